//! Checkpoints of any size that take no disk: honest headers, and files of zeros that the file system does not store.

#![allow(clippy::unwrap_used, clippy::panic)]

use accordion::checkpoint::{NamedShape, config_json, from_config_json, required_tensors};
use accordion_graphs::architecture::{Architecture, Llama};
use serde_json::{Map, Value, json};
use std::fs::{self, File};
use std::io::Write;
use std::path::Path;

/// A model of six layers that no one would run.
pub(crate) fn tiny_model() -> Llama {
    model(&json!({
        "model_type": "llama", "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 6,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 50, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 64, "tie_word_embeddings": true,
    }))
}

/// A model of seven billion parameters.
pub(crate) fn large_model() -> Llama {
    model(&json!({
        "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
        "num_attention_heads": 32, "vocab_size": 32000, "rms_norm_eps": 1e-5, "max_position_embeddings": 4096,
        "tie_word_embeddings": false,
    }))
}

/// The model that a config.json describes.
pub(crate) fn model(config: &Value) -> Llama {
    match from_config_json(config, Path::new("config.json")) {
        Ok(Architecture::Llama(model)) => model,
        other => panic!("{other:?}"),
    }
}

/// Writes a checkpoint of `model` into the existing folder `dir`: one file, or `shards` of them with an index.
pub(crate) fn write(dir: &Path, model: &Llama, dtype: &str, shards: usize) {
    fs::write(dir.join("config.json"), config_json(model).to_string()).unwrap();
    write_tensors(dir, &required_tensors(model).collect::<Vec<_>>(), dtype, shards);
}

/// Writes the weight files of a checkpoint into the existing folder `dir`: one, or `shards` of them with an index.
pub(crate) fn write_tensors(dir: &Path, tensors: &[NamedShape], dtype: &str, shards: usize) {
    let size = if dtype == "F32" { 4 } else { 2 };
    let mut weight_map = Map::new();
    for (number, part) in tensors.chunks(tensors.len().div_ceil(shards)).enumerate() {
        let file = match shards {
            1 => "model.safetensors".to_owned(),
            _ => format!("model-{:05}-of-{shards:05}.safetensors", number + 1),
        };
        let mut header = Map::new();
        let mut end = 0;
        for (name, shape) in part {
            let begin = end;
            end += shape.iter().product::<usize>() as u64 * size;
            header.insert(name.clone(), json!({"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}));
            weight_map.insert(name.clone(), json!(file));
        }
        write_file(&dir.join(&file), &Value::from(header).to_string(), end);
    }
    if shards > 1 {
        let index = json!({"metadata": {}, "weight_map": weight_map});
        fs::write(dir.join("model.safetensors.index.json"), index.to_string()).unwrap();
    }
}

fn write_file(path: &Path, header: &str, data: u64) {
    let mut file = File::create(path).unwrap();
    file.write_all(&(header.len() as u64).to_le_bytes()).unwrap();
    file.write_all(header.as_bytes()).unwrap();
    file.set_len(8 + header.len() as u64 + data).unwrap();
}
