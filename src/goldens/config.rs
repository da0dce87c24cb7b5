//! The keys of Hugging Face's `config.json` that the goldens' models vary, as the cases carry them.
//!
//! A case's config has what its model class was given, without the `model_type` and defaults of a checkpoint's.

use super::Result;
use super::files::invalid;
use accordion_graphs::architecture::{GptNeox, Llama, Mamba, Rope, RopeScaling};
use serde::Deserialize;
use std::path::Path;

/// A Llama. Rotary scaling and `rope_theta` are the case's to interpret.
#[derive(Deserialize)]
pub(super) struct LlamaConfig {
    num_hidden_layers: usize,
    hidden_size: usize,
    intermediate_size: usize,
    num_attention_heads: usize,
    num_key_value_heads: usize,
    head_dim: Option<usize>,
    vocab_size: usize,
    pub(super) max_position_embeddings: usize,
    rms_norm_eps: f64,
    pub(super) rope_theta: Option<f64>,
    pub(super) rope_scaling: Option<RopeScalingConfig>,
    #[serde(default)]
    tie_word_embeddings: bool,
    #[serde(default)]
    attention_bias: bool,
    #[serde(default)]
    mlp_bias: bool,
}

#[derive(Deserialize)]
pub(super) struct RopeScalingConfig {
    #[serde(alias = "rope_type")]
    pub(super) r#type: String,
    pub(super) factor: f64,
}

impl LlamaConfig {
    /// The model with the positions `rope`; `path` is the file that errors name.
    pub(super) fn llama(&self, path: &Path, rope: Rope) -> Result<Llama> {
        let heads = self.num_attention_heads;
        let head_dim = match self.head_dim {
            Some(head_dim) => head_dim,
            None => self
                .hidden_size
                .checked_div(heads)
                .ok_or_else(|| invalid(path, "config.num_attention_heads", &0, &"at least 1"))?,
        };
        Ok(Llama {
            num_layers: self.num_hidden_layers,
            hidden_size: self.hidden_size,
            intermediate_size: self.intermediate_size,
            num_heads: heads,
            num_kv_heads: self.num_key_value_heads,
            head_dim,
            vocab_size: self.vocab_size,
            max_positions: self.max_position_embeddings,
            rms_norm_eps: self.rms_norm_eps,
            rope,
            tie_word_embeddings: self.tie_word_embeddings,
            qkv_bias: self.attention_bias,
            o_bias: self.attention_bias,
            mlp_bias: self.mlp_bias,
            sliding_window: None,
            eos_token_ids: Vec::new(),
            bos_token_id: None,
        })
    }
}

/// A GPT-NeoX.
#[derive(Deserialize)]
pub(super) struct GptNeoxConfig {
    num_hidden_layers: usize,
    hidden_size: usize,
    intermediate_size: usize,
    num_attention_heads: usize,
    vocab_size: usize,
    max_position_embeddings: usize,
    layer_norm_eps: f64,
    rotary_pct: f64,
    rotary_emb_base: f64,
    use_parallel_residual: bool,
    tie_word_embeddings: bool,
    bos_token_id: u32,
    eos_token_id: u32,
}

impl GptNeoxConfig {
    /// The model; `path` is the file that errors name.
    pub(super) fn gpt_neox(&self, path: &Path) -> Result<GptNeox> {
        let head_dim = self
            .hidden_size
            .checked_div(self.num_attention_heads)
            .ok_or_else(|| invalid(path, "num_attention_heads", &0, &"at least 1"))?;
        if !(0.0..=1.0).contains(&self.rotary_pct) {
            return Err(invalid(path, "rotary_pct", &self.rotary_pct, &"a share from 0 to 1"));
        }
        Ok(GptNeox {
            num_layers: self.num_hidden_layers,
            hidden_size: self.hidden_size,
            intermediate_size: self.intermediate_size,
            num_heads: self.num_attention_heads,
            vocab_size: self.vocab_size,
            max_positions: self.max_position_embeddings,
            layer_norm_eps: self.layer_norm_eps,
            rope: Rope { theta: self.rotary_emb_base, scaling: RopeScaling::None },
            rotary_dims: (head_dim as f64 * self.rotary_pct) as usize,
            parallel_residual: self.use_parallel_residual,
            tie_word_embeddings: self.tie_word_embeddings,
            attention_bias: true,
            eos_token_ids: vec![self.eos_token_id],
            bos_token_id: Some(self.bos_token_id),
        })
    }
}

/// A Mamba.
#[derive(Deserialize)]
pub(super) struct MambaConfig {
    num_hidden_layers: usize,
    hidden_size: usize,
    expand: usize,
    state_size: usize,
    conv_kernel: usize,
    time_step_rank: usize,
    vocab_size: usize,
    layer_norm_epsilon: f64,
    use_bias: bool,
    use_conv_bias: bool,
}

impl MambaConfig {
    /// The model.
    pub(super) fn mamba(&self) -> Mamba {
        Mamba {
            num_layers: self.num_hidden_layers,
            hidden_size: self.hidden_size,
            intermediate_size: self.expand.saturating_mul(self.hidden_size),
            state_size: self.state_size,
            conv_kernel: self.conv_kernel,
            time_step_rank: self.time_step_rank,
            vocab_size: self.vocab_size,
            rms_norm_eps: self.layer_norm_epsilon,
            use_bias: self.use_bias,
            use_conv_bias: self.use_conv_bias,
        }
    }
}
