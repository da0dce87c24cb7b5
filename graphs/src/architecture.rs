//! What a checkpoint's `config.json` says, typed and validated by whoever parsed it.

use serde::{Deserialize, Serialize};

/// The architecture of a checkpoint.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "family", rename_all = "snake_case")]
#[non_exhaustive]
pub enum Architecture {
    /// Llama and its relatives: pre-norm blocks, rotary positions, SwiGLU.
    Llama(Llama),
}

/// A Llama-family decoder (Llama 2/3, Mistral, `SmolLM`, Qwen2). Letters in brackets are the papers' symbols.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Llama {
    /// Number of decoder layers \[N\].
    pub num_layers: usize,
    /// Width of the residual stream \[D\].
    pub hidden_size: usize,
    /// Width of the gated MLP.
    pub intermediate_size: usize,
    /// Query heads \[H\].
    pub num_heads: usize,
    /// Key/value heads \[G\]; divides `num_heads`.
    pub num_kv_heads: usize,
    /// Width of one head \[d\]; even. `num_heads * head_dim` need not equal `hidden_size`.
    pub head_dim: usize,
    /// Number of token ids.
    pub vocab_size: usize,
    /// Positions the model was trained for.
    pub max_positions: usize,
    /// Epsilon inside the RMS normalisation's square root.
    pub rms_norm_eps: f64,
    /// Rotary position embedding.
    pub rope: Rope,
    /// Whether `lm_head` is the token embedding.
    pub tie_word_embeddings: bool,
    /// Whether the q, k and v projections have biases (Qwen2; Llama with `attention_bias`).
    pub qkv_bias: bool,
    /// Whether the attention output projection has a bias.
    pub o_bias: bool,
    /// Whether the three MLP projections have biases.
    pub mlp_bias: bool,
    /// Attention sees at most this many positions back, if set; contexts must not be longer.
    pub sliding_window: Option<usize>,
    /// Ids that end a generation.
    pub eos_token_ids: Vec<u32>,
    /// Id that starts every text, if the model has one.
    pub bos_token_id: Option<u32>,
}

/// Rotary position embedding: rotate-half layout, one frequency per pair of dimensions.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Rope {
    /// Base of the frequencies.
    pub theta: f64,
    /// How positions beyond the trained range are mapped.
    pub scaling: RopeScaling,
}

/// Rotary scaling, with the parameters its formula takes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum RopeScaling {
    /// Unscaled.
    None,
    /// Position interpolation: positions divided by `factor`.
    Linear {
        /// Stretch of the position range.
        factor: f64,
    },
    /// Dynamic NTK: beyond `original_max_positions` the base grows to
    /// `theta * (factor * len / original - (factor - 1)) ^ (d / (d - 2))`, `len` = largest position + 1.
    Dynamic {
        /// Stretch of the position range.
        factor: f64,
        /// Length up to which nothing changes.
        original_max_positions: usize,
    },
    /// `YaRN`: per-frequency blend of interpolation and extrapolation, cos and sin scaled by `attention_factor`.
    Yarn {
        /// Stretch of the position range.
        factor: f64,
        /// Trained length.
        original_max_positions: usize,
        /// Rotations above which a frequency is left alone (32 in the paper).
        beta_fast: f64,
        /// Rotations below which a frequency is interpolated fully (1 in the paper).
        beta_slow: f64,
        /// Multiplies cos and sin; `0.1 ln(factor) + 1` unless the config says otherwise.
        attention_factor: f64,
    },
    /// Llama 3.1: frequencies interpolated by wavelength band.
    Llama3 {
        /// Stretch of the position range.
        factor: f64,
        /// Wavelengths above `original / low_freq_factor` are divided by `factor`.
        low_freq_factor: f64,
        /// Wavelengths below `original / high_freq_factor` stay.
        high_freq_factor: f64,
        /// Trained length.
        original_max_positions: usize,
    },
}

impl Llama {
    /// Parameters of one decoder layer's matrices (biases and norms aside): the multiply-adds of one token through it.
    pub fn layer_matrix_elements(&self) -> u64 {
        let [d, f, q, kv] = [
            self.hidden_size,
            self.intermediate_size,
            self.num_heads * self.head_dim,
            self.num_kv_heads * self.head_dim,
        ]
        .map(|n| n as u64);
        d * q + 2 * d * kv + q * d + 3 * d * f
    }
}
