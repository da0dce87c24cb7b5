//! GGUF files, imported into ordinary Hugging Face folders.

mod architecture;
mod dequantize;
mod reader;
mod vocabulary;

use super::config::config_json;
use super::error::CheckpointError;
use super::import::{Folder, RowOrder};
use super::required::required_tensors;
use accordion_graphs::architecture::Llama;
use reader::{Gguf, StoredTensor};
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

/// Imports the GGUF file `source` as a new checkpoint folder `out`: weights as fp32, one tensor in memory at a time.
/// `progress` hears how many of how many elements have been written. The file must not be truncated meanwhile.
///
/// # Errors
///
/// The file is malformed, its architecture, a tensor or its tokenizer is not supported, `out` exists, or writing
/// fails. Nothing is left behind then.
pub fn import_gguf(source: &Path, out: &Path, progress: impl FnMut(u64, u64)) -> Result<(), CheckpointError> {
    let gguf = Gguf::open(source)?;
    let imported = architecture::read(&gguf)?;
    let model = &imported.model;
    let tokenizer = vocabulary::read(&gguf, model)?;
    check_tensors(&gguf, model)?;

    let folder = Folder::create(out)?;
    folder.write_json(super::CONFIG, &config_json(model))?;
    folder.write_json(super::tokenizer::TOKENIZER, &tokenizer.tokenizer)?;
    folder.write_json(super::tokenizer::TOKENIZER_CONFIG, &tokenizer.config)?;
    folder.write_weights(model, imported.row_order, progress, |name| {
        let tensor = stored_tensor(&gguf, name)?;
        let (block, block_bytes) = tensor.encoding.block();
        let bytes = gguf.bytes(tensor);
        Ok(Box::new(move |row, values| {
            let row_bytes = values.len() / block * block_bytes;
            tensor.encoding.decode(&bytes[row * row_bytes..][..row_bytes], values);
        }))
    })?;
    folder.publish()
}

/// What a GGUF file holds, from its header alone.
#[derive(Debug, Clone, PartialEq)]
pub struct GgufFacts {
    /// The model.
    pub model: Llama,
    /// Number of elements over all tensors.
    pub parameters: u64,
    /// Number of tensors by the encoding of their elements.
    pub encodings: BTreeMap<String, usize>,
}

/// Reads the header of the GGUF file `source`.
///
/// # Errors
///
/// The file is malformed, or its architecture is not supported.
pub fn gguf_facts(source: &Path) -> Result<GgufFacts, CheckpointError> {
    let gguf = Gguf::open(source)?;
    let mut encodings = BTreeMap::new();
    let mut parameters = 0_u64;
    for tensor in gguf.tensors().values() {
        *encodings.entry(format!("{:?}", tensor.encoding)).or_default() += 1;
        let elements = tensor.shape.iter().fold(1_u64, |n, &dim| n.saturating_mul(dim));
        parameters = parameters.saturating_add(elements);
    }
    Ok(GgufFacts { model: architecture::read(&gguf)?.model, parameters, encodings })
}

/// What the metadata say about the model.
struct Imported {
    model: Llama,
    row_order: RowOrder,
}

/// Every tensor the model needs is there in its shape, and there is none that would have to be ignored.
fn check_tensors(gguf: &Gguf, model: &Llama) -> Result<(), CheckpointError> {
    let mut needed = BTreeSet::new();
    for (name, expected) in required_tensors(model) {
        let found: Vec<usize> = stored_tensor(gguf, &name)?.shape.iter().rev().map(|&dim| dim as usize).collect();
        let stored = stored_name(&name);
        if found != expected {
            let (path, description) = (gguf.path().to_owned(), super::CONFIG);
            return Err(CheckpointError::Shape { path, name: stored, found, expected, description });
        }
        needed.insert(stored);
    }
    match gguf.tensors().keys().find(|name| !needed.contains(*name)) {
        None => Ok(()),
        Some(unknown) => Err(CheckpointError::Unsupported {
            what: "tensor".to_owned(),
            found: unknown.clone(),
            path: gguf.path().to_owned(),
            supported: "those of a Llama or Qwen2 decoder".to_owned(),
        }),
    }
}

/// The tensor that Hugging Face calls `name`.
fn stored_tensor<'a>(gguf: &'a Gguf, name: &str) -> Result<&'a StoredTensor, CheckpointError> {
    let stored = stored_name(name);
    gguf.tensors()
        .get(&stored)
        .ok_or_else(|| CheckpointError::MissingTensor { path: gguf.path().to_owned(), name: stored })
}

/// The name a GGUF file gives the tensor that Hugging Face calls `name`.
fn stored_name(name: &str) -> String {
    const MODULES: [(&str, &str); 12] = [
        ("model.embed_tokens", "token_embd"),
        ("model.norm", "output_norm"),
        ("lm_head", "output"),
        ("self_attn.q_proj", "attn_q"),
        ("self_attn.k_proj", "attn_k"),
        ("self_attn.v_proj", "attn_v"),
        ("self_attn.o_proj", "attn_output"),
        ("mlp.gate_proj", "ffn_gate"),
        ("mlp.up_proj", "ffn_up"),
        ("mlp.down_proj", "ffn_down"),
        ("input_layernorm", "attn_norm"),
        ("post_attention_layernorm", "ffn_norm"),
    ];
    let (module, parameter) = name.rsplit_once('.').unwrap_or((name, ""));
    let (prefix, module) = match module.strip_prefix("model.layers.").and_then(|rest| rest.split_once('.')) {
        Some((layer, module)) => (format!("blk.{layer}."), module),
        None => (String::new(), module),
    };
    let stored = MODULES.iter().find(|(ours, _)| *ours == module).map_or(module, |(_, stored)| stored);
    format!("{prefix}{stored}.{parameter}")
}
