//! The tensors an architecture needs, under the names Hugging Face gives them.

use super::error::CheckpointError;
use accordion_graphs::architecture::Llama;
use accordion_graphs::dtype::DType;
use accordion_graphs::weights::WeightIndex;
use std::path::Path;

/// Every tensor that `model` needs, with its shape.
pub fn required_tensors(model: &Llama) -> impl Iterator<Item = (String, Vec<usize>)> + '_ {
    let [d, f, vocab] = [model.hidden_size, model.intermediate_size, model.vocab_size];
    let [q, kv] = [model.num_heads, model.num_kv_heads].map(|heads| heads * model.head_dim);
    let projections = [
        ("self_attn.q_proj", [q, d], model.qkv_bias),
        ("self_attn.k_proj", [kv, d], model.qkv_bias),
        ("self_attn.v_proj", [kv, d], model.qkv_bias),
        ("self_attn.o_proj", [d, q], model.o_bias),
        ("mlp.gate_proj", [f, d], model.mlp_bias),
        ("mlp.up_proj", [f, d], model.mlp_bias),
        ("mlp.down_proj", [d, f], model.mlp_bias),
    ];
    let layer = move |i: usize| {
        let linears = projections.into_iter().flat_map(move |(name, shape, bias)| {
            let weight = (format!("model.layers.{i}.{name}.weight"), shape.to_vec());
            let bias = bias.then(|| (format!("model.layers.{i}.{name}.bias"), vec![shape[0]]));
            std::iter::once(weight).chain(bias)
        });
        let norms = ["input_layernorm", "post_attention_layernorm"]
            .map(|name| (format!("model.layers.{i}.{name}.weight"), vec![d]));
        linears.chain(norms)
    };
    let head = (!model.tie_word_embeddings).then(|| ("lm_head.weight".to_owned(), vec![vocab, d]));
    std::iter::once(("model.embed_tokens.weight".to_owned(), vec![vocab, d]))
        .chain((0..model.num_layers).flat_map(layer))
        .chain([("model.norm.weight".to_owned(), vec![d])])
        .chain(head)
}

/// Checks that `weights` has every tensor that `model` needs, in its shape and as floating-point numbers. Tensors beyond
/// those (rotary buffers of old checkpoints) are left alone.
///
/// # Errors
///
/// Names the first tensor that is missing or different; `dir` is the folder messages speak of.
pub fn check_tensors(model: &Llama, weights: &WeightIndex, dir: &Path) -> Result<(), CheckpointError> {
    for (name, expected) in required_tensors(model) {
        let Some(weight) = weights.get(&name) else {
            return Err(CheckpointError::MissingTensor { path: dir.to_owned(), name });
        };
        let path = weights.file_of(weight).unwrap_or(dir).to_owned();
        if weight.shape != expected {
            return Err(CheckpointError::Shape { path, name, found: weight.shape.clone(), expected });
        }
        if !matches!(weight.dtype, DType::F32 | DType::F16 | DType::Bf16) {
            return Err(CheckpointError::WeightType { path, name, found: weight.dtype });
        }
    }
    Ok(())
}
