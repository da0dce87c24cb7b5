//! A Llama-family model: weights by name, and a decoder layer in the two halves that HOMER prunes between.

use super::array::Scope;
use super::attention::causal_attention;
use super::cache::{Cache, KeyValue};
use super::rope::Rotary;
use super::{ReferenceError, Result};
use crate::tensor::Tensor;
use accordion_graphs::architecture;
use ndarray::{Array, Array1, Array2, Array3, Axis, Dimension, IntoDimension};

/// The model, all weights in `f32`.
pub struct Llama {
    architecture: architecture::Llama,
    embed_tokens: Array2<f32>,
    layers: Vec<Layer>,
    norm: Array1<f32>,
    /// `None` where the embedding is used in its place.
    lm_head: Option<Array2<f32>>,
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

/// `x W^T + b`, `W [out, in]`.
pub(super) struct Linear {
    weight: Array2<f32>,
    bias: Option<Array1<f32>>,
}

impl Linear {
    pub(super) fn apply(&self, x: &Array2<f32>) -> Array2<f32> {
        let y = x.dot(&self.weight.t());
        match &self.bias {
            Some(bias) => y + bias,
            None => y,
        }
    }
}

/// Weights by name, checked against the shapes that the architecture gives them.
pub(super) struct Weights<F> {
    pub(super) source: F,
}

impl<F, E> Weights<F>
where
    F: Fn(&str) -> std::result::Result<Tensor, E>,
    E: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    pub(super) fn array<D: IntoDimension>(&self, name: &str, shape: D) -> Result<Array<f32, D::Dim>> {
        let shape = shape.into_dimension();
        let tensor =
            (self.source)(name).map_err(|e| ReferenceError::Weight { name: name.to_owned(), source: e.into() })?;
        let mismatch = ReferenceError::WeightShape {
            name: name.to_owned(),
            found: tensor.shape().to_vec(),
            expected: shape.slice().to_vec(),
        };
        if tensor.shape() != shape.slice() {
            return Err(mismatch);
        }
        Array::from_shape_vec(shape, tensor.to_f32()).map_err(|_| mismatch)
    }

    pub(super) fn linear(&self, name: &str, rows: usize, columns: usize, bias: bool) -> Result<Linear> {
        Ok(Linear {
            weight: self.array(&format!("{name}.weight"), [rows, columns])?,
            bias: if bias { Some(self.array(&format!("{name}.bias"), [rows])?) } else { None },
        })
    }
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
    /// Loads the weights of `architecture` by their Hugging Face names from `source`, which may hold any float type.
    ///
    /// # Errors
    ///
    /// A weight cannot be read or has another shape than the architecture gives it, or the architecture's head counts
    /// contradict each other.
    pub fn load<E>(
        architecture: &architecture::Llama,
        source: impl Fn(&str) -> std::result::Result<Tensor, E>,
    ) -> Result<Self>
    where
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

        let weights = Weights { source };
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
            embed_tokens: weights.array("model.embed_tokens.weight", [a.vocab_size, hidden])?,
            layers: (0..a.num_layers).map(layer).collect::<Result<_>>()?,
            norm: weights.array("model.norm.weight", [hidden])?,
            lm_head: if a.tie_word_embeddings {
                None
            } else {
                Some(weights.array("lm_head.weight", [a.vocab_size, hidden])?)
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
        let none = Array3::zeros((self.architecture.num_kv_heads, 0, self.architecture.head_dim));
        Cache { layers: vec![KeyValue { k: none.clone(), v: none }; self.layers.len()] }
    }

    /// The embeddings of `ids`, `[L, D]`.
    ///
    /// # Errors
    ///
    /// An id is outside the vocabulary.
    pub fn embed(&self, ids: &[u32]) -> Result<Array2<f32>> {
        let vocab_size = self.embed_tokens.nrows();
        if let Some(&id) = ids.iter().find(|&&id| id as usize >= vocab_size) {
            return Err(ReferenceError::TokenId { id, vocab_size });
        }
        let rows: Vec<usize> = ids.iter().map(|&id| id as usize).collect();
        Ok(self.embed_tokens.select(Axis(0), &rows))
    }

    /// Logits `[L, vocab]` of the hidden rows that leave the last layer, `[L, D]`: final norm and output projection.
    pub fn logits(&self, hidden: &Array2<f32>) -> Array2<f32> {
        self.final_norm(hidden).dot(&self.lm_head.as_ref().unwrap_or(&self.embed_tokens).t())
    }

    /// The final norm of the hidden rows that leave the last layer, `[L, D]`.
    pub(super) fn final_norm(&self, hidden: &Array2<f32>) -> Array2<f32> {
        self.rms_norm(hidden, &self.norm)
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
        let (q, mut kv) = self.project(layer, x, rotary, taps)?;
        if let Some(past) = past {
            let new = std::mem::replace(&mut kv, past.clone());
            kv.append(&new);
        }
        let attended = causal_attention(&q, &kv.k, &kv.v);
        let residual = self.add_attended(layer, x, &attended, taps)?;
        Ok(Attended { residual, q, kv })
    }

    /// Rotated queries `[H, L, d]`, rotated keys and values of `x [L, D]`.
    pub(super) fn project(
        &self,
        layer: usize,
        x: &Array2<f32>,
        rotary: &Rotary,
        taps: &mut Scope<'_>,
    ) -> Result<(Array3<f32>, KeyValue)> {
        let weights = &self.layers[layer];
        let normed = self.rms_norm(x, &weights.input_layernorm);
        let heads = |projection: &Linear| split_heads(&projection.apply(&normed), self.architecture.head_dim);
        let q = rotary.apply(&heads(&weights.q_proj));
        let kv = KeyValue { k: rotary.apply(&heads(&weights.k_proj)), v: heads(&weights.v_proj) };
        taps.tap_rows("attn.q", &q)?;
        taps.tap_rows("attn.k", &kv.k)?;
        taps.tap_rows("attn.v", &kv.v)?;
        Ok((q, kv))
    }

    /// `x [L, D]` with what its rows found, `attended [L, H * d]`, added to it.
    pub(super) fn add_attended(
        &self,
        layer: usize,
        x: &Array2<f32>,
        attended: &Array2<f32>,
        taps: &mut Scope<'_>,
    ) -> Result<Array2<f32>> {
        taps.tap("attn.out", attended)?;
        let residual = x + &self.layers[layer].o_proj.apply(attended);
        taps.tap("attn_residual", &residual)?;
        Ok(residual)
    }

    /// The MLP half of a layer: what `x [L, D]` becomes after the gated MLP has been added to it.
    pub(super) fn mlp_half(&self, layer: usize, x: &Array2<f32>, taps: &mut Scope<'_>) -> Result<Array2<f32>> {
        let weights = &self.layers[layer];
        let normed = self.rms_norm(x, &weights.post_attention_layernorm);
        let gate = weights.gate_proj.apply(&normed).mapv_into(|g| g / (1.0 + (-g).exp()));
        let mlp = weights.down_proj.apply(&(gate * weights.up_proj.apply(&normed)));
        taps.tap("mlp.out", &mlp)?;
        let out = x + &mlp;
        taps.tap("out", &out)?;
        Ok(out)
    }

    /// `x / sqrt(mean(x^2) + eps) * weight`, row by row.
    pub(super) fn rms_norm(&self, x: &Array2<f32>, weight: &Array1<f32>) -> Array2<f32> {
        let eps = self.architecture.rms_norm_eps as f32;
        let mut normed = x.clone();
        for mut row in normed.rows_mut() {
            let mean_square = row.dot(&row) / row.len() as f32;
            row /= (mean_square + eps).sqrt();
        }
        normed * weight
    }
}

/// `[L, heads * d]` as `[heads, L, d]`.
pub(super) fn split_heads(x: &Array2<f32>, head_dim: usize) -> Array3<f32> {
    let (rows, width) = x.dim();
    Array3::from_shape_fn((width / head_dim, rows, head_dim), |(head, row, i)| x[[row, head * head_dim + i]])
}
