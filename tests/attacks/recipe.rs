//! Little checkpoints of every form with a compressor, written as the authors' code names their tensors.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use crate::checkpoint::{safetensors, safetensors_header};
use accordion::checkpoint::Checkpoint;
use serde_json::{Value, json};
use std::fs;
use tempfile::TempDir;

pub(crate) type Tensors = Vec<(String, Vec<usize>)>;

/// What goes into a checkpoint's folder.
#[derive(Clone)]
pub(crate) struct Recipe {
    pub(crate) config: Value,
    pub(crate) rcc: Option<Value>,
    pub(crate) tensors: Tensors,
}

impl Recipe {
    pub(crate) fn write(&self) -> TempDir {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("config.json"), self.config.to_string()).unwrap();
        if let Some(rcc) = &self.rcc {
            fs::write(dir.path().join("rcc.json"), rcc.to_string()).unwrap();
        }
        let (header, len) = safetensors_header(&self.tensors);
        fs::write(dir.path().join("model.safetensors"), safetensors(&Value::from(header).to_string(), len)).unwrap();
        dir
    }

    pub(crate) fn open(&self) -> Checkpoint {
        Checkpoint::open(self.write().path()).unwrap()
    }

    /// Opening must fail with a one-line message that contains all of `parts`.
    pub(crate) fn refused(&self, parts: &[&str]) {
        let message = Checkpoint::open(self.write().path()).expect_err("must be refused").to_string();
        for part in parts {
            assert!(message.contains(part), "'{message}' does not say '{part}'");
        }
        assert!(!message.contains('\n'), "{message}");
    }

    pub(crate) fn rcc(mut self, rcc: Value) -> Self {
        self.rcc = Some(rcc);
        self
    }

    pub(crate) fn without(mut self, dropped: impl Fn(&str) -> bool) -> Self {
        self.tensors.retain(|(name, _)| !dropped(name));
        self
    }

    pub(crate) fn renamed(mut self, from: &str, to: &str) -> Self {
        for (name, _) in &mut self.tensors {
            *name = name.replace(from, to);
        }
        self
    }

    pub(crate) fn shaped(mut self, tensor: &str, shape: &[usize]) -> Self {
        let found = self.tensors.iter_mut().find(|(name, _)| name == tensor);
        found.expect("the tensor is there").1 = shape.to_vec();
        self
    }
}

pub(crate) const V: usize = 24;
pub(crate) const H: usize = 16;
const F: usize = 20;

pub(crate) fn neox_config(layers: usize) -> Value {
    json!({
        "model_type": "gpt_neox", "vocab_size": V, "hidden_size": H, "num_hidden_layers": layers,
        "num_attention_heads": 2, "intermediate_size": F, "hidden_act": "gelu", "rotary_pct": 0.25,
        "rotary_emb_base": 10000, "max_position_embeddings": 64, "layer_norm_eps": 1e-5,
        "use_parallel_residual": true, "tie_word_embeddings": false, "bos_token_id": 0, "eos_token_id": 0,
    })
}

fn llama_config(layers: usize, family: &str) -> Value {
    json!({
        "model_type": family, "vocab_size": V, "hidden_size": H, "num_hidden_layers": layers,
        "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": F, "hidden_act": "silu",
        "rope_theta": 1e6, "max_position_embeddings": 64, "rms_norm_eps": 1e-6, "tie_word_embeddings": false,
        "use_sliding_window": false, "sliding_window": 4096, "max_window_layers": 4,
    })
}

pub(crate) fn mamba_config(layers: usize) -> Value {
    json!({
        "model_type": "mamba", "vocab_size": V, "hidden_size": H, "state_size": 8, "num_hidden_layers": layers,
        "expand": 2, "conv_kernel": 4, "time_step_rank": 4, "use_bias": false, "use_conv_bias": true,
        "hidden_act": "silu", "residual_in_fp32": true, "layer_norm_epsilon": 1e-5,
    })
}

/// The tensors of a model of its own at `path`, which ends in a dot or is empty.
fn model(path: &str, parts: &[(&str, &[usize])], layers: usize, layer: &[(&str, &[usize])]) -> Tensors {
    let mut tensors: Tensors = parts.iter().map(|(name, shape)| (format!("{path}{name}"), shape.to_vec())).collect();
    let body = parts[0].0.split('.').next().unwrap();
    for i in 0..layers {
        tensors.extend(layer.iter().map(|(name, shape)| (format!("{path}{body}.layers.{i}.{name}"), shape.to_vec())));
    }
    tensors
}

pub(crate) fn neox_tensors(path: &str, layers: usize) -> Tensors {
    let parts: [(&str, &[usize]); 4] = [
        ("gpt_neox.embed_in.weight", &[V, H]),
        ("gpt_neox.final_layer_norm.weight", &[H]),
        ("gpt_neox.final_layer_norm.bias", &[H]),
        ("embed_out.weight", &[V, H]),
    ];
    model(
        path,
        &parts,
        layers,
        &[
            ("input_layernorm.weight", &[H]),
            ("input_layernorm.bias", &[H]),
            ("post_attention_layernorm.weight", &[H]),
            ("post_attention_layernorm.bias", &[H]),
            ("attention.query_key_value.weight", &[3 * H, H]),
            ("attention.query_key_value.bias", &[3 * H]),
            ("attention.dense.weight", &[H, H]),
            ("attention.dense.bias", &[H]),
            ("mlp.dense_h_to_4h.weight", &[F, H]),
            ("mlp.dense_h_to_4h.bias", &[F]),
            ("mlp.dense_4h_to_h.weight", &[H, F]),
            ("mlp.dense_4h_to_h.bias", &[H]),
        ],
    )
}

const LLAMA_LAYER: [(&str, &[usize]); 9] = [
    ("input_layernorm.weight", &[H]),
    ("post_attention_layernorm.weight", &[H]),
    ("self_attn.q_proj.weight", &[H, H]),
    ("self_attn.k_proj.weight", &[H / 2, H]),
    ("self_attn.v_proj.weight", &[H / 2, H]),
    ("self_attn.o_proj.weight", &[H, H]),
    ("mlp.gate_proj.weight", &[F, H]),
    ("mlp.up_proj.weight", &[F, H]),
    ("mlp.down_proj.weight", &[H, F]),
];

fn llama_tensors(path: &str, layers: usize, biased: bool) -> Tensors {
    let parts: [(&str, &[usize]); 3] =
        [("model.embed_tokens.weight", &[V, H]), ("model.norm.weight", &[H]), ("lm_head.weight", &[V, H])];
    let biases: [(&str, &[usize]); 3] =
        [("self_attn.q_proj.bias", &[H]), ("self_attn.k_proj.bias", &[H / 2]), ("self_attn.v_proj.bias", &[H / 2])];
    let layer = if biased { [&LLAMA_LAYER[..], &biases].concat() } else { LLAMA_LAYER.to_vec() };
    model(path, &parts, layers, &layer)
}

pub(crate) fn mamba_tensors(path: &str, layers: usize) -> Tensors {
    let parts: [(&str, &[usize]); 3] =
        [("backbone.embeddings.weight", &[V, H]), ("backbone.norm_f.weight", &[H]), ("lm_head.weight", &[V, H])];
    model(
        path,
        &parts,
        layers,
        &[
            ("norm.weight", &[H]),
            ("mixer.in_proj.weight", &[4 * H, H]),
            ("mixer.x_proj.weight", &[20, 2 * H]),
            ("mixer.dt_proj.weight", &[2 * H, 4]),
            ("mixer.dt_proj.bias", &[2 * H]),
            ("mixer.out_proj.weight", &[H, 2 * H]),
            ("mixer.conv1d.weight", &[2 * H, 1, 4]),
            ("mixer.conv1d.bias", &[2 * H]),
            ("mixer.A_log", &[2 * H, 8]),
            ("mixer.D", &[2 * H]),
        ],
    )
}

pub(crate) fn maps(stem: &str, layers: usize) -> Tensors {
    let mut maps = vec![(format!("{stem}2gpt_embed.weight"), vec![H, H])];
    maps.extend((0..layers).map(|i| (format!("{stem}2gpt_A_matrix.{i}.weight"), vec![H, H])));
    maps
}

/// As the released checkpoint: a decoder and an encoder of 3 layers.
pub(crate) fn neox() -> Recipe {
    let mut tensors = neox_tensors("", 3);
    tensors.push(("gpt_neox.embed_out.weight".to_owned(), vec![V, H]));
    tensors.extend(neox_tensors("gpt_neox.rcc_encoder.", 3));
    tensors.extend(maps("gpt_neox.rcc_encoder", 3));
    Recipe { config: neox_config(3), rcc: None, tensors }
}

/// Two encoder blocks for each of 3 decoder layers.
fn pairs(encoder: &Value, encoder_tensors: Tensors) -> Recipe {
    let mut tensors = neox_tensors("", 3);
    tensors.extend(encoder_tensors);
    tensors.extend(maps("gpt_neox.rcc_encoder", 3));
    let rcc = json!({"schema": "accordion.rcc/1", "window": 64, "ratio": 8, "pairs": true, "encoder": encoder});
    Recipe { config: neox_config(3), rcc: Some(rcc), tensors }
}

pub(crate) fn neox_pairs() -> Recipe {
    pairs(&neox_config(6), neox_tensors("gpt_neox.rcc_encoder.", 6))
}

pub(crate) fn mamba_pairs() -> Recipe {
    pairs(&mamba_config(6), mamba_tensors("gpt_neox.rcc_encoder.", 6))
}

pub(crate) fn qwen2() -> Recipe {
    let mut tensors = llama_tensors("", 3, true);
    tensors.extend(llama_tensors("model.rcc_decoder.", 3, true));
    tensors.extend(maps("model.rcc_decoder", 3));
    Recipe { config: llama_config(3, "qwen2"), rcc: None, tensors }
}

pub(crate) fn llama() -> Recipe {
    let mut tensors = llama_tensors("", 3, false);
    tensors.extend(llama_tensors("model.rcc_encoder.", 3, false));
    tensors.extend(maps("model.rcc_encoder", 3));
    Recipe { config: llama_config(3, "llama"), rcc: Some(json!({"window": 64, "ratio": 8})), tensors }
}

/// 4 upper layers of which 2 are injected into by a lower model of 3.
pub(crate) fn sharedllm() -> Recipe {
    let mut config = llama_config(4, "llama");
    config["num_cross_attn_layers"] = json!(-2);
    config["encoder_config"] = llama_config(3, "llama");
    config["last_p"] = json!("\"4,4\"");
    let mut tensors = llama_tensors("", 4, false);
    let lower = llama_tensors("", 3, false);
    tensors.extend(lower.into_iter().filter_map(|(name, shape)| {
        Some((name.replacen("model.", "encoder.", 1), shape)).filter(|(name, _)| name != "lm_head.weight")
    }));
    for layer in 0..2 {
        for (name, shape) in [("layernorm", vec![H]), ("q_proj", vec![H, H]), ("o_proj", vec![H, H])] {
            tensors.push((format!("model.layers.{layer}.cross_attn.{name}.weight"), shape));
        }
    }
    Recipe { config, rcc: None, tensors }
}
