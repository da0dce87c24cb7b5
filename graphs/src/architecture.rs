//! What a checkpoint's `config.json` says, typed and validated by whoever parsed it.

use serde::{Deserialize, Serialize};

/// The architecture of a decoder, or of any other causal transformer of a checkpoint.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "family", rename_all = "snake_case")]
#[non_exhaustive]
pub enum Architecture {
    /// Llama and its relatives: pre-norm blocks, rotary positions, SwiGLU.
    Llama(Llama),
    /// GPT-NeoX and Pythia: layer norms, partly rotary positions, GELU, attention and MLP side by side or in sequence.
    GptNeox(GptNeox),
}

/// What a checkpoint holds besides its decoder, for the methods that were trained.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "method", rename_all = "snake_case")]
#[non_exhaustive]
pub enum Compressor {
    /// RCC's encoder and maps.
    Rcc(RccModel),
    /// SharedLLM's lower model and cross attention.
    #[serde(rename = "sharedllm")]
    SharedLlm(SharedLlmModel),
}

/// RCC's encoder, and where its tensors and the maps lie in the checkpoint.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RccModel {
    /// The encoder.
    pub encoder: Encoder,
    /// Path of the encoder's own model: `gpt_neox.rcc_encoder`; its tensors follow as in a checkpoint of its own
    /// (`gpt_neox.layers.0...`, `model.layers.0...`, `backbone.layers.0...`).
    pub encoder_path: String,
    /// Path of the linear map from the first encoder state to the decoder's embedding:
    /// `gpt_neox.rcc_encoder2gpt_embed`.
    pub embed_map: String,
    /// Path of the linear maps to the decoder's layers, which a number follows: `gpt_neox.rcc_encoder2gpt_A_matrix`.
    pub layer_maps: String,
}

/// What encodes RCC's segments.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
#[non_exhaustive]
pub enum Encoder {
    /// A causal transformer.
    Transformer(Architecture),
    /// A selective state space model.
    Mamba(Mamba),
}

/// SharedLLM's lower model, whose tensors lie at `encoder.`, and the number of upper layers it is injected into.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SharedLlmModel {
    /// The lower model. It may have more layers than are injected; those are not used.
    pub lower: Llama,
    /// Bottom layers of the upper model that attend to the context \[M\]; the lower model runs as many.
    pub injected_layers: usize,
}

/// A GPT-NeoX decoder (Pythia). Every linear layer of a block has a bias unless `attention_bias` says otherwise.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct GptNeox {
    /// Number of decoder layers.
    pub num_layers: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the MLP.
    pub intermediate_size: usize,
    /// Heads; keys and values have as many.
    pub num_heads: usize,
    /// Number of token ids.
    pub vocab_size: usize,
    /// Positions the model was trained for.
    pub max_positions: usize,
    /// Epsilon inside the layer normalisation's square root.
    pub layer_norm_eps: f64,
    /// Rotary position embedding of the first `rotary_dims` dimensions of a head.
    pub rope: Rope,
    /// Dimensions of a head that are rotated; even.
    pub rotary_dims: usize,
    /// Whether attention and MLP both read the block's input (`x + attn(x) + mlp(x)`) instead of following each other.
    pub parallel_residual: bool,
    /// Whether `embed_out` is the token embedding.
    pub tie_word_embeddings: bool,
    /// Whether the two attention projections have biases.
    pub attention_bias: bool,
    /// Ids that end a generation.
    pub eos_token_ids: Vec<u32>,
    /// Id that starts every text, if the model has one.
    pub bos_token_id: Option<u32>,
}

/// A Mamba model: selective state spaces instead of attention.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Mamba {
    /// Number of blocks.
    pub num_layers: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width inside a block (`expand * hidden_size`).
    pub intermediate_size: usize,
    /// State variables per inner channel.
    pub state_size: usize,
    /// Width of the causal depthwise convolution.
    pub conv_kernel: usize,
    /// Rank of the step size's projection.
    pub time_step_rank: usize,
    /// Number of token ids.
    pub vocab_size: usize,
    /// Epsilon inside the RMS normalisation's square root.
    pub rms_norm_eps: f64,
    /// Whether `in_proj` and `out_proj` have biases.
    pub use_bias: bool,
    /// Whether the convolution has a bias.
    pub use_conv_bias: bool,
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

impl Architecture {
    /// Number of decoder layers \[N\].
    pub fn num_layers(&self) -> usize {
        match self {
            Self::Llama(m) => m.num_layers,
            Self::GptNeox(m) => m.num_layers,
        }
    }

    /// Width of the residual stream \[D\].
    pub fn hidden_size(&self) -> usize {
        match self {
            Self::Llama(m) => m.hidden_size,
            Self::GptNeox(m) => m.hidden_size,
        }
    }

    /// Width of the MLP.
    pub fn intermediate_size(&self) -> usize {
        match self {
            Self::Llama(m) => m.intermediate_size,
            Self::GptNeox(m) => m.intermediate_size,
        }
    }

    /// Query heads \[H\].
    pub fn num_heads(&self) -> usize {
        match self {
            Self::Llama(m) => m.num_heads,
            Self::GptNeox(m) => m.num_heads,
        }
    }

    /// Key/value heads \[G\].
    pub fn num_kv_heads(&self) -> usize {
        match self {
            Self::Llama(m) => m.num_kv_heads,
            Self::GptNeox(m) => m.num_heads,
        }
    }

    /// Width of one head \[d\].
    pub fn head_dim(&self) -> usize {
        match self {
            Self::Llama(m) => m.head_dim,
            Self::GptNeox(m) => m.head_dim(),
        }
    }

    /// Number of token ids \[V\].
    pub fn vocab_size(&self) -> usize {
        match self {
            Self::Llama(m) => m.vocab_size,
            Self::GptNeox(m) => m.vocab_size,
        }
    }

    /// Positions the model was trained for.
    pub fn max_positions(&self) -> usize {
        match self {
            Self::Llama(m) => m.max_positions,
            Self::GptNeox(m) => m.max_positions,
        }
    }

    /// The rotary position embedding.
    pub fn rope(&self) -> &Rope {
        match self {
            Self::Llama(m) => &m.rope,
            Self::GptNeox(m) => &m.rope,
        }
    }

    /// Dimensions of a head that are rotated.
    pub fn rotary_dims(&self) -> usize {
        match self {
            Self::Llama(m) => m.head_dim,
            Self::GptNeox(m) => m.rotary_dims,
        }
    }

    /// Attention sees at most this many positions back, if set.
    pub fn sliding_window(&self) -> Option<usize> {
        match self {
            Self::Llama(m) => m.sliding_window,
            Self::GptNeox(_) => None,
        }
    }

    /// Whether the output projection is the token embedding.
    pub fn tie_word_embeddings(&self) -> bool {
        match self {
            Self::Llama(m) => m.tie_word_embeddings,
            Self::GptNeox(m) => m.tie_word_embeddings,
        }
    }

    /// Ids that end a generation.
    pub fn eos_token_ids(&self) -> &[u32] {
        match self {
            Self::Llama(m) => &m.eos_token_ids,
            Self::GptNeox(m) => &m.eos_token_ids,
        }
    }

    /// Parameters of one layer's matrices in attention and in the MLP (biases and norms aside): the multiply-adds of one
    /// token through them.
    pub fn layer_matrix_elements(&self) -> [u64; 2] {
        let [d, q, kv] =
            [self.hidden_size(), self.num_heads() * self.head_dim(), self.num_kv_heads() * self.head_dim()]
                .map(|n| n as u64);
        let mlp = match self {
            Self::Llama(m) => 3 * d * m.intermediate_size as u64,
            Self::GptNeox(m) => 2 * d * m.intermediate_size as u64,
        };
        [2 * d * (q + kv), mlp]
    }

    /// Bytes of one token's keys and values in fp32.
    pub fn kv_bytes_per_token(&self) -> u64 {
        8 * (self.num_layers() * self.num_kv_heads() * self.head_dim()) as u64
    }
}

impl From<Llama> for Architecture {
    fn from(model: Llama) -> Self {
        Self::Llama(model)
    }
}

impl GptNeox {
    /// Width of one head.
    pub fn head_dim(&self) -> usize {
        self.hidden_size / self.num_heads.max(1)
    }
}

impl Encoder {
    /// Number of blocks.
    pub fn num_layers(&self) -> usize {
        match self {
            Self::Transformer(model) => model.num_layers(),
            Self::Mamba(model) => model.num_layers,
        }
    }

    /// Width of the residual stream.
    pub fn hidden_size(&self) -> usize {
        match self {
            Self::Transformer(model) => model.hidden_size(),
            Self::Mamba(model) => model.hidden_size,
        }
    }

    /// Number of token ids.
    pub fn vocab_size(&self) -> usize {
        match self {
            Self::Transformer(model) => model.vocab_size(),
            Self::Mamba(model) => model.vocab_size,
        }
    }
}
