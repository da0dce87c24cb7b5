//! The tensors an architecture needs, under the names Hugging Face gives them.

use super::error::CheckpointError;
use accordion_graphs::architecture::{Architecture, Encoder, GptNeox, Llama, Mamba, RccModel, SharedLlmModel};
use accordion_graphs::dtype::DType;
use accordion_graphs::plan::rcc::RccSettings;
use accordion_graphs::weights::WeightIndex;
use std::path::Path;

/// Name and shape of a tensor.
pub type NamedShape = (String, Vec<usize>);

/// Every tensor that `model` needs, with its shape.
pub fn required_tensors(model: &Llama) -> impl Iterator<Item = NamedShape> + '_ {
    let [d, vocab] = [model.hidden_size, model.vocab_size];
    let head = (!model.tie_word_embeddings).then(|| ("lm_head.weight".to_owned(), vec![vocab, d]));
    llama_body(model, "model".to_owned(), model.num_layers)
        .chain([("model.norm.weight".to_owned(), vec![d])])
        .chain(head)
}

/// Every tensor that a decoder of architecture `model` needs, with its shape.
pub fn decoder_tensors(model: &Architecture) -> Vec<NamedShape> {
    match model {
        Architecture::Llama(model) => required_tensors(model).collect(),
        Architecture::GptNeox(model) => {
            let [d, vocab] = [model.hidden_size, model.vocab_size];
            let norm = ["weight", "bias"].map(|part| (format!("gpt_neox.final_layer_norm.{part}"), vec![d]));
            let head = (!model.tie_word_embeddings).then(|| ("embed_out.weight".to_owned(), vec![vocab, d]));
            neox_body(model, "gpt_neox", model.num_layers).into_iter().chain(norm).chain(head).collect()
        }
        _ => Vec::new(),
    }
}

/// Every tensor that `model` needs in front of a decoder of architecture `decoder`, with its shape. What reaches no token
/// is not needed: the encoder's last block, final norm and head, and the map behind the decoder's last layer.
pub fn rcc_tensors(model: &RccModel, decoder: &Architecture, settings: RccSettings) -> Vec<NamedShape> {
    let (layers, _) = settings.encoder_states(&model.encoder, settings.live_states(decoder.num_layers()));
    let body = encoder_body(model);
    let mut tensors = match &model.encoder {
        Encoder::Transformer(Architecture::Llama(encoder)) => llama_body(encoder, body, layers).collect(),
        Encoder::Transformer(Architecture::GptNeox(encoder)) => neox_body(encoder, &body, layers),
        Encoder::Mamba(encoder) => mamba_body(encoder, &body, layers),
        _ => Vec::new(),
    };
    let map = |path: String| (format!("{path}.weight"), vec![decoder.hidden_size(), model.encoder.hidden_size()]);
    tensors.push(map(model.embed_map.clone()));
    let behind_layers = 0..decoder.num_layers().saturating_sub(1);
    tensors.extend(behind_layers.map(|layer| map(format!("{}.{layer}", model.layer_maps))));
    tensors
}

/// Every tensor of a checkpoint that holds nothing but `encoder`, with its shape.
pub(crate) fn encoder_tensors(encoder: &Encoder) -> Vec<NamedShape> {
    match encoder {
        Encoder::Transformer(model) => decoder_tensors(model),
        Encoder::Mamba(model) => {
            let mut tensors = mamba_body(model, "backbone", model.num_layers);
            tensors.push(("backbone.norm_f.weight".to_owned(), vec![model.hidden_size]));
            tensors.push(("lm_head.weight".to_owned(), vec![model.vocab_size, model.hidden_size]));
            tensors
        }
        _ => Vec::new(),
    }
}

/// Path of the encoder's embedding and blocks.
pub(crate) fn encoder_body(model: &RccModel) -> String {
    let body = match &model.encoder {
        Encoder::Transformer(Architecture::GptNeox(_)) => "gpt_neox",
        Encoder::Mamba(_) => "backbone",
        _ => "model",
    };
    format!("{}.{body}", model.encoder_path)
}

/// Every tensor that `model` needs beside the upper model `upper`, with its shape.
pub fn sharedllm_tensors(model: &SharedLlmModel, upper: &Llama) -> Vec<NamedShape> {
    let (d, q) = (upper.hidden_size, upper.num_heads * upper.head_dim);
    let cross = |layer: usize| {
        [("layernorm", vec![d]), ("q_proj", vec![q, d]), ("o_proj", vec![d, q])]
            .map(|(name, shape)| (format!("model.layers.{layer}.cross_attn.{name}.weight"), shape))
    };
    llama_body(&model.lower, "encoder".to_owned(), model.injected_layers)
        .chain([("encoder.norm.weight".to_owned(), vec![model.lower.hidden_size])])
        .chain((0..model.injected_layers).flat_map(cross))
        .collect()
}

/// Embedding and the first `layers` layers at the path `body`.
fn llama_body(model: &Llama, body: String, layers: usize) -> impl Iterator<Item = NamedShape> + '_ {
    let [d, f] = [model.hidden_size, model.intermediate_size];
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
    let embedding = (format!("{body}.embed_tokens.weight"), vec![model.vocab_size, d]);
    let layer = move |i: usize| {
        let linears = projections.map(|(name, shape, bias)| linear(&format!("{body}.layers.{i}.{name}"), shape, bias));
        let norms = ["input_layernorm", "post_attention_layernorm"]
            .map(|name| (format!("{body}.layers.{i}.{name}.weight"), vec![d]));
        linears.into_iter().flatten().chain(norms)
    };
    std::iter::once(embedding).chain((0..layers).flat_map(layer))
}

/// Embedding and the first `layers` layers at the path `body`.
fn neox_body(model: &GptNeox, body: &str, layers: usize) -> Vec<NamedShape> {
    let [d, f] = [model.hidden_size, model.intermediate_size];
    let projections = [
        ("attention.query_key_value", [3 * d, d], model.attention_bias),
        ("attention.dense", [d, d], model.attention_bias),
        ("mlp.dense_h_to_4h", [f, d], true),
        ("mlp.dense_4h_to_h", [d, f], true),
    ];
    let mut tensors = vec![(format!("{body}.embed_in.weight"), vec![model.vocab_size, d])];
    for i in 0..layers {
        for (name, shape, bias) in projections {
            tensors.extend(linear(&format!("{body}.layers.{i}.{name}"), shape, bias));
        }
        for norm in ["input_layernorm", "post_attention_layernorm"] {
            tensors.extend(["weight", "bias"].map(|part| (format!("{body}.layers.{i}.{norm}.{part}"), vec![d])));
        }
    }
    tensors
}

/// Embedding and the first `layers` blocks at the path `body`.
fn mamba_body(model: &Mamba, body: &str, layers: usize) -> Vec<NamedShape> {
    let Mamba { hidden_size: d, intermediate_size: inner, state_size, time_step_rank: rank, .. } = *model;
    let projections = [
        ("in_proj", [2 * inner, d], model.use_bias),
        ("x_proj", [rank + 2 * state_size, inner], false),
        ("dt_proj", [inner, rank], true),
        ("out_proj", [d, inner], model.use_bias),
    ];
    let mut tensors = vec![(format!("{body}.embeddings.weight"), vec![model.vocab_size, d])];
    for i in 0..layers {
        let block = format!("{body}.layers.{i}");
        tensors.push((format!("{block}.norm.weight"), vec![d]));
        for (name, shape, bias) in projections {
            tensors.extend(linear(&format!("{block}.mixer.{name}"), shape, bias));
        }
        tensors.push((format!("{block}.mixer.conv1d.weight"), vec![inner, 1, model.conv_kernel]));
        tensors.extend(model.use_conv_bias.then(|| (format!("{block}.mixer.conv1d.bias"), vec![inner])));
        tensors.push((format!("{block}.mixer.A_log"), vec![inner, state_size]));
        tensors.push((format!("{block}.mixer.D"), vec![inner]));
    }
    tensors
}

/// The weight of a linear layer, and its bias if it has one.
fn linear(path: &str, shape: [usize; 2], bias: bool) -> impl Iterator<Item = NamedShape> + use<> {
    let bias = bias.then(|| (format!("{path}.bias"), vec![shape[0]]));
    std::iter::once((format!("{path}.weight"), shape.to_vec())).chain(bias)
}

/// Checks that `weights` has every `expected` part of a quantized matrix, in its shape and type.
///
/// # Errors
///
/// As [`check_tensors`].
pub(crate) fn check_parts(
    expected: impl IntoIterator<Item = (NamedShape, DType)>,
    weights: &WeightIndex,
    dir: &Path,
    description: &'static str,
) -> Result<(), CheckpointError> {
    for ((name, expected), dtype) in expected {
        let Some(weight) = weights.get(&name) else {
            return Err(CheckpointError::MissingTensor { path: dir.to_owned(), name });
        };
        let path = weights.file_of(weight).unwrap_or(dir).to_owned();
        if weight.shape != expected {
            return Err(CheckpointError::Shape { path, name, found: weight.shape.clone(), expected, description });
        }
        if weight.dtype != dtype {
            return Err(CheckpointError::WeightType { path, name, found: weight.dtype, expected: dtype.to_string() });
        }
    }
    Ok(())
}

/// Checks that `weights` has every `expected` tensor, in its shape and as floating-point numbers. Tensors beyond those
/// (rotary buffers of old checkpoints) are left alone.
///
/// # Errors
///
/// Names the first tensor that is missing or different; `dir` is the folder and `description` the file in it that
/// messages speak of.
pub fn check_tensors(
    expected: impl IntoIterator<Item = NamedShape>,
    weights: &WeightIndex,
    dir: &Path,
    description: &'static str,
) -> Result<(), CheckpointError> {
    for (name, expected) in expected {
        let Some(weight) = weights.get(&name) else {
            return Err(CheckpointError::MissingTensor { path: dir.to_owned(), name });
        };
        let path = weights.file_of(weight).unwrap_or(dir).to_owned();
        if weight.shape != expected {
            return Err(CheckpointError::Shape { path, name, found: weight.shape.clone(), expected, description });
        }
        if !matches!(weight.dtype, DType::F32 | DType::F16 | DType::Bf16) {
            return Err(CheckpointError::WeightType {
                path,
                name,
                found: weight.dtype,
                expected: "fp32, fp16 or bf16".to_owned(),
            });
        }
    }
    Ok(())
}
