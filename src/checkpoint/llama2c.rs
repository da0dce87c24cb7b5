//! Models of the llama2.c project (fp32 weights in its first format, followed by its tokenizer), imported into ordinary
//! Hugging Face folders.
//!
//! Seven 32-bit integers (widths, counts, and a vocabulary size that is negative when `lm_head` has weights of its own),
//! then the tensors of all layers stacked by kind, the rotary tables, `lm_head`; then for the tokenizer the longest
//! piece's length and, for each piece, its score, length and bytes.

use super::config::{self, config_json};
use super::error::{CheckpointError, io_error};
use super::fields::Fields;
use super::files;
use super::import::{Folder, RowOrder};
use super::required::required_tensors;
use super::vocabulary::{Piece, PieceKind, sentencepiece_bpe};
use accordion_graphs::architecture::Llama;
use memmap2::Mmap;
use serde_json::json;
use std::collections::BTreeMap;
use std::path::Path;

const HEADER: usize = 7 * size_of::<i32>();
// The first ids of the Llama-2 vocabulary: unknown, begin and end of a text, then the 256 bytes.
const UNKNOWN: usize = 0;
const BOS: usize = 1;
const EOS: usize = 2;
const FIRST_BYTE: usize = 3;

/// Imports the llama2.c model `source`, which its tokenizer follows in the same file, as a new checkpoint folder `out`.
/// `progress` hears how many of how many elements have been written. The file must not be truncated meanwhile.
///
/// # Errors
///
/// The file is malformed or too short, `out` exists, or writing fails. Nothing is left behind then.
pub fn import_llama2c(source: &Path, out: &Path, progress: impl FnMut(u64, u64)) -> Result<(), CheckpointError> {
    let (file, size) = files::open(source)?;
    if size < HEADER as u64 {
        return Err(too_short(source, "the header", HEADER as u64, size));
    }
    // SAFETY: the mapping is private and read-only and lives only as long as the import, which asks its caller not to
    // truncate the file meanwhile.
    let map = unsafe { Mmap::map(&file) }.map_err(io_error(source))?;
    let model = architecture(&map, source)?;
    let (offsets, end) = layout(&model);
    if end > size {
        return Err(too_short(source, "the model", end, size));
    }
    let pieces = pieces(&map[end as usize..], model.vocab_size)
        .ok_or_else(|| too_short(source, "the tokenizer after the model", size + 1, size))?;
    let text = |id: usize| pieces.get(id).map(|piece| piece.text.as_str());
    let tokenizer =
        sentencepiece_bpe(&pieces, text(UNKNOWN), text(BOS), true).map_err(|expected| CheckpointError::Field {
            path: source.to_owned(),
            field: "the vocabulary".to_owned(),
            found: "another".to_owned(),
            expected,
        })?;

    let folder = Folder::create(out)?;
    folder.write_json(super::CONFIG, &config_json(&model))?;
    folder.write_json(super::tokenizer::TOKENIZER, &tokenizer)?;
    folder.write_json(
        super::tokenizer::TOKENIZER_CONFIG,
        &json!({
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": model.max_positions,
            "clean_up_tokenization_spaces": false,
            "unk_token": text(UNKNOWN),
            "bos_token": text(BOS),
            "eos_token": text(EOS),
        }),
    )?;
    folder.write_weights(&model, RowOrder::Pairs, progress, |name| {
        let missing = || CheckpointError::MissingTensor { path: source.to_owned(), name: name.to_owned() };
        let tensor = &map[*offsets.get(name).ok_or_else(missing)? as usize..];
        Ok(Box::new(move |row, values| {
            let bytes = &tensor[row * size_of_val(values)..];
            for (value, bytes) in values.iter_mut().zip(bytes.as_chunks().0) {
                *value = f32::from_le_bytes(*bytes);
            }
        }))
    })?;
    folder.publish()
}

fn too_short(path: &Path, what: &'static str, needed: u64, found: u64) -> CheckpointError {
    CheckpointError::TooShort { path: path.to_owned(), what, needed, found }
}

fn architecture(header: &[u8], path: &Path) -> Result<Llama, CheckpointError> {
    let numbers: Vec<i32> = header[..HEADER].as_chunks().0.iter().map(|&b| i32::from_le_bytes(b)).collect();
    let &[dim, hidden_dim, n_layers, n_heads, n_kv_heads, vocab_size, seq_len] = numbers.as_slice() else {
        return Err(too_short(path, "the header", HEADER as u64, header.len() as u64));
    };
    let config = json!({
        "model_type": "llama",
        "hidden_size": dim,
        "intermediate_size": hidden_dim,
        "num_hidden_layers": n_layers,
        "num_attention_heads": n_heads,
        "num_key_value_heads": n_kv_heads,
        "vocab_size": vocab_size.unsigned_abs(),
        "max_position_embeddings": seq_len,
        "tie_word_embeddings": vocab_size > 0,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        // Constants of its code.
        "rms_norm_eps": 1e-5,
        "rope_theta": 10_000.0,
    });
    config::llama(Fields::of(&config, "", path)?)
}

/// Where each tensor begins, and where the model ends. Sizes are bounded by the checks on the configuration, so that
/// none of this can overflow.
fn layout(model: &Llama) -> (BTreeMap<String, u64>, u64) {
    const STACKED: [&str; 9] = [
        "input_layernorm",
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.o_proj",
        "post_attention_layernorm",
        "mlp.gate_proj",
        "mlp.down_proj",
        "mlp.up_proj",
    ];
    let stacked = STACKED
        .into_iter()
        .flat_map(|module| (0..model.num_layers).map(move |layer| format!("model.layers.{layer}.{module}.weight")));
    let sizes: BTreeMap<String, u64> = required_tensors(model)
        .map(|(name, shape)| (name, shape.iter().product::<usize>() as u64 * size_of::<f32>() as u64))
        .collect();
    let mut end = HEADER as u64;
    let mut offsets = BTreeMap::new();
    let mut place = |name: String| {
        let size = sizes.get(&name).copied().unwrap_or(0);
        offsets.insert(name, end);
        end += size;
    };
    place("model.embed_tokens.weight".to_owned());
    stacked.for_each(&mut place);
    place("model.norm.weight".to_owned());
    // Two tables of a cosine or sine for each position and pair.
    end += (model.max_positions * model.head_dim) as u64 * size_of::<f32>() as u64;
    if let Some(head) = sizes.get("lm_head.weight") {
        offsets.insert("lm_head.weight".to_owned(), end);
        end += head;
    }
    (offsets, end)
}

/// The vocabulary, in the spelling of `SentencePiece`; `None` when the bytes end too early or are not UTF-8.
fn pieces(bytes: &[u8], count: usize) -> Option<Vec<Piece>> {
    let mut rest = bytes.get(size_of::<i32>()..)?;
    let mut pieces = Vec::new();
    for id in 0..count {
        let (score, after) = rest.split_first_chunk()?;
        let (len, after) = after.split_first_chunk()?;
        let (raw, after) = after.split_at_checked(usize::try_from(i32::from_le_bytes(*len)).ok()?)?;
        rest = after;
        let (text, kind) = match id {
            UNKNOWN => ("<unk>".to_owned(), PieceKind::Control),
            BOS => ("<s>".to_owned(), PieceKind::Control),
            EOS => ("</s>".to_owned(), PieceKind::Control),
            // Written as the byte itself or by its name, depending on the exporter's age.
            id if id < FIRST_BYTE + 256 => (format!("<0x{:02X}>", id - FIRST_BYTE), PieceKind::Normal),
            _ => (std::str::from_utf8(raw).ok()?.replace(' ', "\u{2581}"), PieceKind::Normal),
        };
        pieces.push(Piece { text, score: f32::from_le_bytes(*score).into(), kind });
    }
    Some(pieces)
}
