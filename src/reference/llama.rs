//! A Llama-family model: weights by name, and a decoder layer in the two halves that HOMER prunes between.

use super::array::{Scope, split_heads};
use super::attention::attend;
use super::cache::{Cache, KeyValue};
use super::quantize::Weight;
use super::rope::Rotary;
use super::transformer::Transformer;
use super::weights::{Linear, Weights, rms_norm, silu};
use super::{ReferenceError, Result};
use accordion_graphs::architecture;
use ndarray::{Array1, Array2, Array3};

/// The model, all weights in `f32`.
pub struct Llama {
    architecture: architecture::Llama,
    embed_tokens: Linear,
    layers: Vec<Layer>,
    norm: Array1<f32>,
    /// `None` where the embedding is used in its place.
    lm_head: Option<Linear>,
}

struct Layer {
    input_layernorm: Array1<f32>,
    q_proj: Linear,
    k_proj: Linear,
    v_proj: Linear,
    o_proj: Linear,
    post_attention_layernorm: Array1<f32>,
    gate_proj: Linear,
    up_proj: Linear,
    down_proj: Linear,
}

/// What the attention half of a layer yields.
pub(super) struct Attended {
    /// The residual stream after attention, `[L, D]`.
    pub(super) residual: Array2<f32>,
    /// Rotated queries, `[H, L, d]`.
    pub(super) q: Array3<f32>,
    /// Keys and values of past and new rows.
    pub(super) kv: KeyValue,
}

impl Llama {
    /// Loads the weights of `architecture` by their Hugging Face names from `source`, which may hold any float type,
    /// and of quantized matrices also says what rows are rounded to.
    ///
    /// # Errors
    ///
    /// A weight cannot be read or has another shape than the architecture gives it, or the architecture's head counts
    /// contradict each other.
    pub fn load<W, E>(
        architecture: &architecture::Llama,
        source: impl Fn(&str) -> std::result::Result<W, E>,
    ) -> Result<Self>
    where
        W: Into<Weight>,
        E: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        let a = architecture;
        let contradiction = |what, found, expected: String| Err(ReferenceError::Architecture { what, found, expected });
        if a.num_kv_heads == 0 || !a.num_heads.is_multiple_of(a.num_kv_heads) {
            return contradiction("num_kv_heads", a.num_kv_heads, format!("a divisor of num_heads = {}", a.num_heads));
        }
        if a.num_heads == 0 {
            return contradiction("num_heads", 0, "at least 1".to_owned());
        }
        if a.head_dim == 0 || !a.head_dim.is_multiple_of(2) {
            return contradiction("head_dim", a.head_dim, "a positive even number".to_owned());
        }

        let weights = Weights::new(source);
        let (hidden, inner) = (a.hidden_size, a.intermediate_size);
        let (queries, keys) = (a.num_heads.saturating_mul(a.head_dim), a.num_kv_heads.saturating_mul(a.head_dim));
        let layer = |index: usize| -> Result<Layer> {
            let at = |name: &str| format!("model.layers.{index}.{name}");
            Ok(Layer {
                input_layernorm: weights.array(&at("input_layernorm.weight"), [hidden])?,
                q_proj: weights.linear(&at("self_attn.q_proj"), queries, hidden, a.qkv_bias)?,
                k_proj: weights.linear(&at("self_attn.k_proj"), keys, hidden, a.qkv_bias)?,
                v_proj: weights.linear(&at("self_attn.v_proj"), keys, hidden, a.qkv_bias)?,
                o_proj: weights.linear(&at("self_attn.o_proj"), hidden, queries, a.o_bias)?,
                post_attention_layernorm: weights.array(&at("post_attention_layernorm.weight"), [hidden])?,
                gate_proj: weights.linear(&at("mlp.gate_proj"), inner, hidden, a.mlp_bias)?,
                up_proj: weights.linear(&at("mlp.up_proj"), inner, hidden, a.mlp_bias)?,
                down_proj: weights.linear(&at("mlp.down_proj"), hidden, inner, a.mlp_bias)?,
            })
        };
        Ok(Self {
            embed_tokens: weights.matrix("model.embed_tokens.weight", [a.vocab_size, hidden])?,
            layers: (0..a.num_layers).map(layer).collect::<Result<_>>()?,
            norm: weights.array("model.norm.weight", [hidden])?,
            lm_head: if a.tie_word_embeddings {
                None
            } else {
                Some(weights.matrix("lm_head.weight", [a.vocab_size, hidden])?)
            },
            architecture: a.clone(),
        })
    }

    /// The architecture whose weights these are.
    pub fn architecture(&self) -> &architecture::Llama {
        &self.architecture
    }

    /// A cache of all layers without any row.
    pub fn empty_cache(&self) -> Cache {
        Cache::empty(self.layers.len(), self.architecture.num_kv_heads, self.architecture.head_dim)
    }

    /// The embeddings of `ids`, `[L, D]`.
    ///
    /// # Errors
    ///
    /// An id is outside the vocabulary.
    pub fn embed(&self, ids: &[u32]) -> Result<Array2<f32>> {
        self.embed_tokens.rows(ids)
    }

    /// The final norm of the rows that leave the last layer, `[L, D]`.
    pub fn final_norm(&self, hidden: &Array2<f32>) -> Array2<f32> {
        self.rms_norm(hidden, &self.norm)
    }

    /// Logits `[L, vocab]` of the hidden rows that leave the last layer, `[L, D]`: final norm and output projection.
    pub fn logits(&self, hidden: &Array2<f32>) -> Array2<f32> {
        self.lm_head.as_ref().unwrap_or(&self.embed_tokens).apply(&self.final_norm(hidden))
    }

    /// The rotation of rows at `positions`.
    pub(super) fn rotary(&self, positions: &[i64]) -> Rotary {
        Rotary::new(&self.architecture.rope, self.architecture.head_dim, positions)
    }

    /// The attention half of a layer: `x [L, D]` attends to itself and to `past`, and is added to.
    pub(super) fn attention_half(
        &self,
        layer: usize,
        x: &Array2<f32>,
        rotary: &Rotary,
        past: Option<&KeyValue>,
        taps: &mut Scope<'_>,
    ) -> Result<Attended> {
        let rows = past.map_or(0, KeyValue::rows) + x.nrows();
        if let Some(window) = self.architecture.sliding_window.filter(|&window| rows > window) {
            return Err(ReferenceError::SlidingWindow { rows, window });
        }
        let [q, k, v] = self.project(layer, x);
        let (attended, q, kv) = attend(&q, &k, v, rotary, past, taps)?;
        Ok(Attended { residual: self.add_attended(layer, x, &attended, taps)?, q, kv })
    }

    /// Queries `[H, L, d]`, keys and values `[G, L, d]` of `x [L, D]`, not rotated.
    pub(super) fn project(&self, layer: usize, x: &Array2<f32>) -> [Array3<f32>; 3] {
        let weights = &self.layers[layer];
        let normed = self.rms_norm(x, &weights.input_layernorm);
        let heads = |projection: &Linear| split_heads(&projection.apply(&normed), self.architecture.head_dim);
        [&weights.q_proj, &weights.k_proj, &weights.v_proj].map(heads)
    }

    /// `x [L, D]` with what its rows attended to, `[L, H * d]`, added to it.
    pub(super) fn add_attended(
        &self,
        layer: usize,
        x: &Array2<f32>,
        attended: &Array2<f32>,
        taps: &mut Scope<'_>,
    ) -> Result<Array2<f32>> {
        let residual = x + &self.layers[layer].o_proj.apply(attended);
        taps.tap("attn_residual", &residual)?;
        Ok(residual)
    }

    /// The MLP half of a layer: what `x [L, D]` becomes after the gated MLP has been added to it.
    pub(super) fn mlp_half(&self, layer: usize, x: &Array2<f32>, taps: &mut Scope<'_>) -> Result<Array2<f32>> {
        let weights = &self.layers[layer];
        let normed = self.rms_norm(x, &weights.post_attention_layernorm);
        let gate = weights.gate_proj.apply(&normed).mapv_into(silu);
        let mlp = weights.down_proj.apply(&(gate * weights.up_proj.apply(&normed)));
        taps.tap("mlp.out", &mlp)?;
        let out = x + &mlp;
        taps.tap("out", &out)?;
        Ok(out)
    }

    /// `x / sqrt(mean(x^2) + eps) * weight`, row by row.
    fn rms_norm(&self, x: &Array2<f32>, weight: &Array1<f32>) -> Array2<f32> {
        rms_norm(x, weight, self.architecture.rms_norm_eps as f32)
    }
}

impl Transformer for Llama {
    fn num_layers(&self) -> usize {
        self.layers.len()
    }

    fn empty_cache(&self) -> Cache {
        self.empty_cache()
    }

    fn embed(&self, ids: &[u32]) -> Result<Array2<f32>> {
        self.embed(ids)
    }

    fn rotary(&self, positions: &[i64]) -> Rotary {
        self.rotary(positions)
    }

    fn layer(
        &self,
        layer: usize,
        x: &Array2<f32>,
        rotary: &Rotary,
        past: Option<&KeyValue>,
        taps: &mut Scope<'_>,
    ) -> Result<(Array2<f32>, KeyValue)> {
        let Attended { residual, kv, .. } = self.attention_half(layer, x, rotary, past, taps)?;
        Ok((self.mlp_half(layer, &residual, taps)?, kv))
    }

    fn final_norm(&self, hidden: &Array2<f32>) -> Array2<f32> {
        self.final_norm(hidden)
    }

    fn logits(&self, hidden: &Array2<f32>) -> Array2<f32> {
        self.logits(hidden)
    }
}
