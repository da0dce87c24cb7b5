//! tokenizer.json built from a bare vocabulary: byte-level BPE with its merges, or `SentencePiece` BPE with scores.

use serde_json::{Map, Value, json};
use std::collections::HashMap;

/// One entry of a vocabulary; its place is its id.
pub(crate) struct Piece {
    pub(crate) text: String,
    /// Higher merges first (`SentencePiece` only).
    pub(crate) score: f64,
    pub(crate) kind: PieceKind,
}

/// What a piece stands for.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum PieceKind {
    /// Text.
    Normal,
    /// Never produced by text of a user; not shown.
    Control,
    /// Matched as a whole before anything else.
    UserDefined,
}

/// The contents of tokenizer.json and `tokenizer_config.json`.
pub(crate) struct TokenizerFiles {
    pub(crate) tokenizer: Value,
    pub(crate) config: Value,
}

/// No honest piece is longer; finding the merges of one takes time quadratic in its length.
const LONGEST_PIECE: usize = 1024;

/// Byte-level BPE. `splitting` has the fields `pre_tokenizer` and, where the model needs them, `normalizer` and
/// `ignore_merges`. `bos` precedes every text. An error says what the pieces should have been.
pub(crate) fn byte_level_bpe(
    pieces: &[Piece],
    merges: &[(&str, &str)],
    splitting: &Value,
    bos: Option<&str>,
) -> Result<Value, String> {
    let vocab = vocab(pieces)?;
    if let Some((left, right)) =
        merges.iter().find(|(l, r)| ![*l, *r, &format!("{l}{r}")].iter().all(|text| vocab.contains_key(*text)))
    {
        return Err(format!("to contain '{left}', '{right}' and their merge"));
    }
    let byte_level = json!({ "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true });
    Ok(json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": added_tokens(pieces),
        "normalizer": splitting["normalizer"],
        "pre_tokenizer": splitting["pre_tokenizer"],
        "post_processor": bos.and_then(|bos| begins_with(bos, pieces)),
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": null,
            "unk_token": null,
            "continuing_subword_prefix": null,
            "end_of_word_suffix": null,
            "fuse_unk": false,
            "byte_fallback": false,
            "ignore_merges": splitting["ignore_merges"].as_bool().unwrap_or(false),
            "vocab": vocab,
            "merges": merges,
        },
    }))
}

/// `SentencePiece` BPE: spaces are `▁`, unknown characters fall back to byte pieces, and the merges are all ways to cut
/// a piece into two pieces, best score first. `add_space_prefix` puts a space before every text.
pub(crate) fn sentencepiece_bpe(
    pieces: &[Piece],
    unknown: Option<&str>,
    bos: Option<&str>,
    add_space_prefix: bool,
) -> Result<Value, String> {
    let vocab = vocab(pieces)?;
    if let Some(long) = pieces.iter().position(|piece| piece.text.len() > LONGEST_PIECE) {
        return Err(format!("no piece of more than {LONGEST_PIECE} bytes (id {long} is longer)"));
    }
    let space = json!({ "type": "Replace", "pattern": { "String": " " }, "content": "\u{2581}" });
    let prefix = json!({ "type": "Prepend", "prepend": "\u{2581}" });
    let normalizers = if add_space_prefix { vec![prefix, space] } else { vec![space] };
    let mut decoders = vec![
        json!({ "type": "Replace", "pattern": { "String": "\u{2581}" }, "content": " " }),
        json!({ "type": "ByteFallback" }),
        json!({ "type": "Fuse" }),
    ];
    if add_space_prefix {
        decoders.push(json!({ "type": "Strip", "content": " ", "start": 1, "stop": 0 }));
    }
    Ok(json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": added_tokens(pieces),
        "normalizer": { "type": "Sequence", "normalizers": normalizers },
        "pre_tokenizer": null,
        "post_processor": bos.and_then(|bos| begins_with(bos, pieces)),
        "decoder": { "type": "Sequence", "decoders": decoders },
        "model": {
            "type": "BPE",
            "dropout": null,
            "unk_token": unknown,
            "continuing_subword_prefix": null,
            "end_of_word_suffix": null,
            "fuse_unk": true,
            "byte_fallback": true,
            "ignore_merges": false,
            "vocab": vocab,
            "merges": merges_by_score(pieces),
        },
    }))
}

fn vocab(pieces: &[Piece]) -> Result<Map<String, Value>, String> {
    let mut vocab = Map::with_capacity(pieces.len());
    for (id, piece) in pieces.iter().enumerate() {
        if let Some(first) = vocab.insert(piece.text.clone(), json!(id)) {
            return Err(format!("different texts for all ids, but {first} and {id} are both '{}'", piece.text));
        }
    }
    Ok(vocab)
}

fn merges_by_score(pieces: &[Piece]) -> Vec<(&str, &str)> {
    let normal = || pieces.iter().enumerate().filter(|(_, piece)| piece.kind == PieceKind::Normal);
    let ids: HashMap<&str, usize> = normal().map(|(id, piece)| (piece.text.as_str(), id)).collect();
    let mut merged: Vec<&Piece> = normal().map(|(_, piece)| piece).collect();
    merged.sort_by(|a, b| b.score.total_cmp(&a.score));
    let mut merges = Vec::new();
    for piece in merged {
        let cuts = piece.text.char_indices().skip(1).map(|(at, _)| piece.text.split_at(at));
        let mut found: Vec<_> =
            cuts.filter_map(|(left, right)| Some((*ids.get(left)?, *ids.get(right)?, left, right))).collect();
        found.sort_unstable();
        merges.extend(found.into_iter().map(|(_, _, left, right)| (left, right)));
    }
    merges
}

fn added_tokens(pieces: &[Piece]) -> Vec<Value> {
    let added = pieces.iter().enumerate().filter(|(_, piece)| piece.kind != PieceKind::Normal);
    added
        .map(|(id, piece)| {
            json!({
                "id": id,
                "content": piece.text,
                "single_word": false,
                "lstrip": false,
                "rstrip": false,
                "normalized": false,
                "special": piece.kind == PieceKind::Control,
            })
        })
        .collect()
}

/// The post-processor that puts `bos` before every text.
fn begins_with(bos: &str, pieces: &[Piece]) -> Option<Value> {
    let id = pieces.iter().position(|piece| piece.text == bos)?;
    let token = json!({ "SpecialToken": { "id": bos, "type_id": 0 } });
    let sequence = |id: &str, type_id: u32| json!({ "Sequence": { "id": id, "type_id": type_id } });
    Some(json!({
        "type": "TemplateProcessing",
        "single": [token, sequence("A", 0)],
        "pair": [token, sequence("A", 0), sequence("B", 1)],
        "special_tokens": { bos: { "id": bos, "ids": [id], "tokens": [bos] } },
    }))
}
