//! The tokenizer of a GGUF file, rebuilt from its metadata as the tokenizer.json it was converted from.

use super::reader::Gguf;
use crate::checkpoint::error::CheckpointError;
use crate::checkpoint::fields::Fields;
use crate::checkpoint::vocabulary::{Piece, PieceKind, TokenizerFiles, byte_level_bpe, sentencepiece_bpe};
use accordion_graphs::architecture::Llama;
use serde_json::{Value, json};

const TOKENS: &str = "tokenizer.ggml.tokens";
const MERGES: &str = "tokenizer.ggml.merges";
const SCORES: &str = "tokenizer.ggml.scores";
const KINDS: &str = "tokenizer.ggml.token_type";

/// The tokenizer files for `model`.
pub(super) fn read(gguf: &Gguf, model: &Llama) -> Result<TokenizerFiles, CheckpointError> {
    let fields = gguf.fields()?;
    let kind = fields.required("tokenizer.ggml.model", Fields::text)?;
    let pieces = pieces(gguf, fields, model.vocab_size)?;
    let text_of = |key: &str| {
        let id = fields.index(key, pieces.len())?;
        Ok::<_, CheckpointError>(id.map(|id| pieces[id].text.clone()))
    };
    let add_bos = fields.flag("tokenizer.ggml.add_bos_token")?;
    if fields.flag("tokenizer.ggml.add_eos_token")? == Some(true) {
        return Err(fields.wrong("tokenizer.ggml.add_eos_token", "false"));
    }
    let bos = text_of("tokenizer.ggml.bos_token_id")?;
    let unknown = text_of("tokenizer.ggml.unknown_token_id")?;
    let config = json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": model.max_positions,
        "clean_up_tokenization_spaces": false,
        "bos_token": bos,
        "eos_token": text_of("tokenizer.ggml.eos_token_id")?,
        "unk_token": unknown,
        "pad_token": text_of("tokenizer.ggml.padding_token_id")?,
        "chat_template": fields.text("tokenizer.chat_template")?,
    });
    let unsupported = |what: &str, found: &str, supported: &str| CheckpointError::Unsupported {
        what: what.to_owned(),
        found: found.to_owned(),
        path: gguf.path().to_owned(),
        supported: supported.to_owned(),
    };
    let tokenizer = match kind {
        "gpt2" => {
            let name = fields.text("tokenizer.ggml.pre")?.unwrap_or("default");
            let splitting = Splitting::named(name)
                .ok_or_else(|| unsupported("tokenizer.ggml.pre", name, "default, gpt-2, smollm, llama-bpe, qwen2"))?;
            let merges = gguf.texts(MERGES).ok_or_else(|| fields.missing(MERGES))?;
            let merges = merges.iter().map(|merge| merge.split_once(' ')).collect::<Option<Vec<_>>>();
            let merges = merges.ok_or_else(|| fields.wrong(MERGES, "two tokens with a space between them, each"))?;
            let bos = bos.filter(|_| add_bos.unwrap_or(name == "llama-bpe"));
            byte_level_bpe(&pieces, &merges, &splitting.json(), bos.as_deref())
        }
        "llama" => {
            let bos = bos.filter(|_| add_bos.unwrap_or(true));
            let prefix = fields.flag("tokenizer.ggml.add_space_prefix")?.unwrap_or(true);
            sentencepiece_bpe(&pieces, unknown.as_deref(), bos.as_deref(), prefix)
        }
        other => return Err(unsupported("tokenizer.ggml.model", other, "gpt2, llama")),
    };
    let tokenizer = tokenizer.map_err(|expected| fields.wrong(TOKENS, expected))?;
    Ok(TokenizerFiles { tokenizer, config })
}

fn pieces(gguf: &Gguf, fields: Fields<'_>, vocab_size: usize) -> Result<Vec<Piece>, CheckpointError> {
    let tokens = gguf.texts(TOKENS).ok_or_else(|| fields.missing(TOKENS))?;
    let wrong_count = |name: &str, found: usize, expected: String| CheckpointError::Field {
        path: gguf.path().to_owned(),
        field: name.to_owned(),
        found: format!("an array of {found}"),
        expected,
    };
    if tokens.len() > vocab_size {
        return Err(wrong_count(TOKENS, tokens.len(), format!("at most {vocab_size}, the rows of token_embd.weight")));
    }
    let numbers = |name| match gguf.numbers(name) {
        Some(found) if found.len() != tokens.len() => {
            Err(wrong_count(name, found.len(), format!("{}, one for each token", tokens.len())))
        }
        found => Ok(found),
    };
    let (kinds, scores) = (numbers(KINDS)?, numbers(SCORES)?);
    // The numbers of llama.cpp's token types; unused tokens and bytes are ordinary entries of the vocabulary.
    let kind = |id: usize| match kinds.map_or(1, |kinds| kinds[id] as i64) {
        3 => PieceKind::Control,
        4 => PieceKind::UserDefined,
        _ => PieceKind::Normal,
    };
    let piece = |(id, text): (usize, &String)| Piece {
        text: text.clone(),
        score: scores.map_or(0.0, |scores| scores[id]),
        kind: kind(id),
    };
    Ok(tokens.iter().enumerate().map(piece).collect())
}

/// How text is cut before merging.
enum Splitting {
    Gpt2,
    SmolLm,
    Llama3,
    Qwen2,
}

impl Splitting {
    fn named(name: &str) -> Option<Self> {
        Some(match name {
            "default" | "gpt-2" => Self::Gpt2,
            "smollm" => Self::SmolLm,
            "llama-bpe" => Self::Llama3,
            "qwen2" => Self::Qwen2,
            _ => return None,
        })
    }

    /// The changes to a byte-level tokenizer.json.
    fn json(&self) -> Value {
        /// The expression of both models; they differ in how many digits stay together.
        fn words(digits: &str) -> Value {
            let regex = format!(
                "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{{L}}\\p{{N}}]?\\p{{L}}+|{digits}| ?[^\\s\\p{{L}}\\p{{N}}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
            );
            json!({ "type": "Split", "pattern": { "Regex": regex }, "behavior": "Isolated", "invert": false })
        }
        let byte_level = |use_regex: bool| json!({ "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": use_regex });
        let sequence = |first: Value, second: Value| json!({ "type": "Sequence", "pretokenizers": [first, second] });
        match self {
            Self::Gpt2 => json!({ "pre_tokenizer": byte_level(true) }),
            Self::SmolLm => {
                let digits = json!({ "type": "Digits", "individual_digits": true });
                json!({ "pre_tokenizer": sequence(digits, byte_level(true)) })
            }
            Self::Llama3 => json!({
                "pre_tokenizer": sequence(words("\\p{N}{1,3}"), byte_level(false)),
                "ignore_merges": true,
            }),
            Self::Qwen2 => json!({
                "pre_tokenizer": sequence(words("\\p{N}"), byte_level(false)),
                "normalizer": { "type": "NFC" },
            }),
        }
    }
}
