//! config.json to an [`Architecture`], and back.
//!
//! What is absent takes the value that Hugging Face's model class gives it where that is a fact about the family
//! (`rope_theta`, biases, tying); everything else must be there. Unknown values are refused by name.

mod gpt_neox;
mod llama;
mod mamba;

pub use llama::config_json;
pub(crate) use llama::read as llama;

use super::error::CheckpointError;
use super::fields::Fields;
use accordion_graphs::architecture::{Architecture, Encoder};
use serde_json::{Value, json};
use std::path::Path;

// Bounds far above any real model, so that products of sizes cannot overflow and a lying file cannot ask for work.
pub(crate) const MAX_LAYERS: usize = 1 << 10;
const MAX_WIDTH: usize = 1 << 20;
const MAX_HEADS: usize = 1 << 14;
const MAX_HEAD_DIM: usize = 1 << 12;
const MAX_VOCAB: usize = 1 << 24;
pub(crate) const MAX_POSITIONS: usize = 1 << 30;
const MAX_EOS: usize = 1 << 10;

const DECODERS: &str = "llama, mistral, qwen2, gpt_neox; mamba only as the encoder in rcc.json";

/// The architecture that `config`, the content of the file `origin`, describes.
///
/// # Errors
///
/// A field is missing, has a value that cannot be meant, or asks for something that is not supported.
pub fn from_config_json(config: &Value, origin: &Path) -> Result<Architecture, CheckpointError> {
    architecture(Fields::of(config, "", origin)?)
}

/// The config.json of `model`. Where [`from_config_json`] can produce `model`, it reads this back to an equal value.
pub fn architecture_json(model: &Architecture) -> Value {
    match model {
        Architecture::Llama(model) => llama::config_json(model),
        Architecture::GptNeox(model) => gpt_neox::config_json(model),
        // Families are added to the enum and here together.
        _ => Value::Null,
    }
}

/// The configuration of an encoder, as rcc.json has it at `encoder`.
pub fn encoder_json(encoder: &Encoder) -> Value {
    match encoder {
        Encoder::Transformer(model) => architecture_json(model),
        Encoder::Mamba(model) => mamba::config_json(model),
        _ => Value::Null,
    }
}

/// The encoder that `config`, from the file `origin`, describes.
pub(crate) fn encoder_from_json(config: &Value, origin: &Path) -> Result<Encoder, CheckpointError> {
    encoder(Fields::of(config, "encoder.", origin)?)
}

/// The causal transformer that `fields` describe.
pub(crate) fn architecture(fields: Fields<'_>) -> Result<Architecture, CheckpointError> {
    match fields.required("model_type", Fields::text)? {
        "gpt_neox" => gpt_neox::read(fields).map(Architecture::GptNeox),
        "mamba" => Err(fields.unsupported("model_type", "mamba", DECODERS)),
        _ => llama::read(fields).map(Architecture::Llama),
    }
}

/// The encoder that `fields` describe.
pub(crate) fn encoder(fields: Fields<'_>) -> Result<Encoder, CheckpointError> {
    match fields.required("model_type", Fields::text)? {
        "mamba" => mamba::read(fields).map(Encoder::Mamba),
        _ => architecture(fields).map(Encoder::Transformer),
    }
}

/// Refuses quantised weights, and another activation function than the family's.
fn check_common(fields: Fields<'_>, activation: &str) -> Result<(), CheckpointError> {
    if let Some(other) = fields.text("hidden_act")?.filter(|&found| found != activation) {
        return Err(fields.unsupported("hidden_act", other, activation));
    }
    if let Some(quantization) = fields.get("quantization_config") {
        let method = quantization.get("quant_method").and_then(Value::as_str).unwrap_or("unknown");
        let supported = "none: weights must be fp32, fp16 or bf16";
        return Err(fields.unsupported("quantization_config of method", method, supported));
    }
    Ok(())
}

/// The epsilon of a normalisation.
fn epsilon(fields: Fields<'_>, name: &str) -> Result<f64, CheckpointError> {
    fields.required(name, |f, n| f.number(n, "above 0, below 1", |x| x > 0.0 && x < 1.0))
}

fn token_id(fields: Fields<'_>, name: &str, vocab_size: usize) -> Result<Option<u32>, CheckpointError> {
    let read = |value: &Value| {
        valid_token_id(value, vocab_size).ok_or_else(|| fields.wrong(name, format!("a token id below {vocab_size}")))
    };
    fields.get(name).map(read).transpose()
}

/// The ids that end a generation, given as one number or as a list; `None` when the file does not say.
pub(crate) fn eos_token_ids(fields: Fields<'_>, vocab_size: usize) -> Result<Option<Vec<u32>>, CheckpointError> {
    const NAME: &str = "eos_token_id";
    let Some(list) = fields.get(NAME).and_then(Value::as_array) else {
        return Ok(token_id(fields, NAME, vocab_size)?.map(|id| vec![id]));
    };
    let ids: Option<Vec<u32>> = list.iter().take(MAX_EOS + 1).map(|value| valid_token_id(value, vocab_size)).collect();
    match ids {
        Some(ids) if ids.len() <= MAX_EOS => Ok(Some(ids)),
        _ => Err(fields.wrong(NAME, format!("at most {MAX_EOS} token ids below {vocab_size}"))),
    }
}

fn valid_token_id(value: &Value, vocab_size: usize) -> Option<u32> {
    value.as_u64().filter(|&id| id < vocab_size as u64).map(|id| id as u32)
}

/// The ids as [`eos_token_ids`] reads them.
fn eos_json(ids: &[u32]) -> Value {
    match ids {
        [] => Value::Null,
        [only] => json!(only),
        several => json!(several),
    }
}
