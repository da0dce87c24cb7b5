//! GPT-NeoX (Black et al. 2022): layer norms, partly rotary positions, GELU, and attention and MLP side by side or one after
//! the other.

use super::array::{Scope, split_heads};
use super::attention::attend;
use super::cache::{Cache, KeyValue};
use super::quantize::Weight;
use super::rope::Rotary;
use super::transformer::Transformer;
use super::weights::{LayerNorm, Linear, Weights};
use super::{ReferenceError, Result};
use accordion_graphs::architecture;
use ndarray::{Array2, Axis, concatenate, s};

/// The model, all weights in `f32`.
pub struct GptNeox {
    architecture: architecture::GptNeox,
    embed_in: Linear,
    layers: Vec<Layer>,
    final_layer_norm: LayerNorm,
    /// `None` where the embedding is used in its place.
    embed_out: Option<Linear>,
}

struct Layer {
    input_layernorm: LayerNorm,
    query_key_value: Linear,
    dense: Linear,
    post_attention_layernorm: LayerNorm,
    dense_h_to_4h: Linear,
    dense_4h_to_h: Linear,
}

impl GptNeox {
    /// Loads the weights of `architecture` by their Hugging Face names from `source`, which may hold any float type,
    /// and of quantized matrices also says what rows are rounded to.
    ///
    /// # Errors
    ///
    /// A weight cannot be read or has another shape than the architecture gives it, or the architecture contradicts
    /// itself.
    pub fn load<W, E>(
        architecture: &architecture::GptNeox,
        source: impl Fn(&str) -> std::result::Result<W, E>,
    ) -> Result<Self>
    where
        W: Into<Weight>,
        E: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        let a = architecture;
        let contradiction = |what, found, expected: String| Err(ReferenceError::Architecture { what, found, expected });
        if a.num_heads == 0 || a.hidden_size == 0 || !a.hidden_size.is_multiple_of(a.num_heads) {
            return contradiction("num_heads", a.num_heads, format!("a divisor of hidden_size = {}", a.hidden_size));
        }
        if a.rotary_dims > a.head_dim() || !a.rotary_dims.is_multiple_of(2) {
            return contradiction("rotary_dims", a.rotary_dims, format!("even and at most {}", a.head_dim()));
        }

        let weights = Weights::new(source);
        let (hidden, inner, eps) = (a.hidden_size, a.intermediate_size, a.layer_norm_eps);
        let layer = |index: usize| -> Result<Layer> {
            let at = |name: &str| format!("gpt_neox.layers.{index}.{name}");
            let fused = hidden.saturating_mul(3);
            Ok(Layer {
                input_layernorm: weights.layer_norm(&at("input_layernorm"), hidden, eps)?,
                query_key_value: weights.linear(&at("attention.query_key_value"), fused, hidden, a.attention_bias)?,
                dense: weights.linear(&at("attention.dense"), hidden, hidden, a.attention_bias)?,
                post_attention_layernorm: weights.layer_norm(&at("post_attention_layernorm"), hidden, eps)?,
                dense_h_to_4h: weights.linear(&at("mlp.dense_h_to_4h"), inner, hidden, true)?,
                dense_4h_to_h: weights.linear(&at("mlp.dense_4h_to_h"), hidden, inner, true)?,
            })
        };
        Ok(Self {
            embed_in: weights.matrix("gpt_neox.embed_in.weight", [a.vocab_size, hidden])?,
            layers: (0..a.num_layers).map(layer).collect::<Result<_>>()?,
            final_layer_norm: weights.layer_norm("gpt_neox.final_layer_norm", hidden, eps)?,
            embed_out: if a.tie_word_embeddings {
                None
            } else {
                Some(weights.matrix("embed_out.weight", [a.vocab_size, hidden])?)
            },
            architecture: a.clone(),
        })
    }
}

impl Transformer for GptNeox {
    fn num_layers(&self) -> usize {
        self.layers.len()
    }

    fn empty_cache(&self) -> Cache {
        Cache::empty(self.layers.len(), self.architecture.num_heads, self.architecture.head_dim())
    }

    fn embed(&self, ids: &[u32]) -> Result<Array2<f32>> {
        self.embed_in.rows(ids)
    }

    fn rotary(&self, positions: &[i64]) -> Rotary {
        Rotary::new(&self.architecture.rope, self.architecture.rotary_dims, positions)
    }

    fn layer(
        &self,
        layer: usize,
        x: &Array2<f32>,
        rotary: &Rotary,
        past: Option<&KeyValue>,
        taps: &mut Scope<'_>,
    ) -> Result<(Array2<f32>, KeyValue)> {
        let weights = &self.layers[layer];
        let fused = weights.query_key_value.apply(&weights.input_layernorm.apply(x));
        let head_dim = self.architecture.head_dim();
        let [q, k, v] = [0, 1, 2].map(|part| split_heads(&part_of_heads(&fused, part, head_dim), head_dim));
        let (attended, _, kv) = attend(&q, &k, v, rotary, past, taps)?;
        let residual = x + &weights.dense.apply(&attended);
        taps.tap("attn_residual", &residual)?;

        let mlp_input = if self.architecture.parallel_residual { x } else { &residual };
        let normed = weights.post_attention_layernorm.apply(mlp_input);
        let mlp = weights.dense_4h_to_h.apply(&weights.dense_h_to_4h.apply(&normed).mapv_into(gelu));
        taps.tap("mlp.out", &mlp)?;
        let out = residual + mlp;
        taps.tap("out", &out)?;
        Ok((out, kv))
    }

    fn final_norm(&self, hidden: &Array2<f32>) -> Array2<f32> {
        self.final_layer_norm.apply(hidden)
    }

    fn logits(&self, hidden: &Array2<f32>) -> Array2<f32> {
        self.embed_out.as_ref().unwrap_or(&self.embed_in).apply(&self.final_norm(hidden))
    }
}

/// Queries (0), keys (1) or values (2), `[L, H * d]`, of the fused projection, whose columns go head by head:
/// `[L, H, (q, k, v), d]`.
fn part_of_heads(fused: &Array2<f32>, part: usize, head_dim: usize) -> Array2<f32> {
    let heads = fused.axis_chunks_iter(Axis(1), 3 * head_dim);
    let parts: Vec<_> = heads.map(|head| head.slice_move(s![.., part * head_dim..(part + 1) * head_dim])).collect();
    // All parts have as many rows.
    concatenate(Axis(1), &parts).unwrap_or_default()
}

/// `x * Phi(x)`, exactly rather than by its usual approximation.
fn gelu(x: f32) -> f32 {
    let x = f64::from(x);
    (0.5 * x * (1.0 + erf(x / std::f64::consts::SQRT_2))) as f32
}

/// The error function by the series `2 / sqrt(pi) * exp(-x^2) * sum 2^n x^(2n + 1) / (2n + 1)!!`, whose terms all have the
/// sign of `x` (Abramowitz and Stegun 7.1.6).
fn erf(x: f64) -> f64 {
    // Beyond this the result rounds to one.
    if x.abs() > 6.0 {
        return x.signum();
    }
    let (mut term, mut sum) = (x, x);
    let mut n = 1.0;
    while term.abs() > 1e-17 * sum.abs() {
        term *= 2.0 * x * x / (2.0 * n + 1.0);
        sum += term;
        n += 1.0;
    }
    std::f64::consts::FRAC_2_SQRT_PI * (-x * x).exp() * sum
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_error_function_has_its_tabulated_values() {
        // Abramowitz and Stegun, tables 7.1 and 7.2.
        for (x, expected) in [(0.0, 0.0), (0.5, 0.520_499_877_8), (1.0, 0.842_700_792_9), (2.0, 0.995_322_265_0)] {
            assert!((erf(x) - expected).abs() < 1e-10, "erf({x}) = {}", erf(x));
            assert!((erf(-x) + expected).abs() < 1e-10, "erf(-{x}) = {}", erf(-x));
        }
        assert!((erf(5.99) - 1.0).abs() < 1e-15 && erf(f64::NAN).is_nan());
    }

    #[test]
    fn the_fused_projection_goes_head_by_head() {
        // Two heads of width 1: q0 k0 v0 q1 k1 v1.
        let fused = Array2::from_shape_fn((1, 6), |(_, column)| column as f32);
        for (part, expected) in [[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]].iter().enumerate() {
            assert_eq!(part_of_heads(&fused, part, 1).as_slice(), Some(&expected[..]));
        }
    }
}
