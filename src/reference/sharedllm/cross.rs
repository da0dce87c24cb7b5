//! Attention of the running text to the context, between a layer's attention and its MLP.

use super::super::array::{Scope, split_heads};
use super::super::attention::full_attention;
use super::super::cache::KeyValue;
use super::super::llama::Llama;
use super::super::rope::{Frequencies, Rotary};
use super::super::weights::{Linear, Weights, rms_norm};
use super::super::{ReferenceError, Result};
use super::Injected;
use accordion_graphs::architecture;
use accordion_graphs::plan::sharedllm::Quirks;
use ndarray::{Array1, Array2};

/// The weights of one layer. Keys and values have none: they are used as the lower model made them.
pub(super) struct CrossAttention {
    layernorm: Array1<f32>,
    q_proj: Linear,
    o_proj: Linear,
}

impl CrossAttention {
    pub(super) fn load(upper: &architecture::Llama, layer: usize, weights: &Weights<'_>) -> Result<Self> {
        let at = |name: &str| format!("model.layers.{layer}.cross_attn.{name}");
        let (hidden, queries) = (upper.hidden_size, upper.num_heads * upper.head_dim);
        Ok(Self {
            layernorm: weights.array(&at("layernorm.weight"), [hidden])?,
            q_proj: weights.linear(&at("q_proj"), queries, hidden, false)?,
            o_proj: weights.linear(&at("o_proj"), hidden, queries, false)?,
        })
    }

    /// `x [L, D]` with what its rows find in all of the context added to it. Where the context is `rounded`, so are keys that
    /// are rotated back by the rotation of the queries, which then need none.
    pub(super) fn attend(
        &self,
        upper: &Llama,
        x: &Array2<f32>,
        (injected, rounded): (&Injected, bool),
        layer: usize,
        taps: &mut Scope<'_>,
    ) -> Result<Array2<f32>> {
        let &architecture::Llama { head_dim, rms_norm_eps, .. } = upper.architecture();
        let rows = injected.rows(layer);
        let rotation = |rows, backwards| {
            query_rotation(upper, injected.chunks(), (rows, x.nrows() == 1), injected.quirks, backwards)
        };
        // On top of the rotation inside the node that the keys have already.
        let keys = upper.rotary(&injected.key_positions());
        let q = self.q_proj.apply(&rms_norm(x, &self.layernorm, rms_norm_eps as f32));
        let (q, k) = (split_heads(&q, head_dim), keys.apply(&rows.k));
        let (q, KeyValue { k, v, .. }) = if rounded {
            let k = rotation(rows.rows(), true)?.apply(&k);
            (q, KeyValue::new(k, rows.v).rounded())
        } else {
            (rotation(x.nrows(), false)?.apply(&q), KeyValue::new(k, rows.v))
        };
        let out = full_attention(&q, &k, &v);
        taps.tap_rows("cross.q", &q)?;
        taps.tap_rows("cross.k", &k)?;
        taps.tap_rows("cross.v", &v)?;
        taps.tap("cross.out", &out)?;
        let residual = x + &self.o_proj.apply(&out);
        taps.tap("cross_residual", &residual)?;
        Ok(residual)
    }
}

/// Where the query of every token is, seen from the context: behind all chunks.
pub(super) fn query_position(chunks: usize) -> i64 {
    chunks as i64 + 1
}

/// Where the keys are, chunk after chunk: at the number of their chunk. As released that number is looked up once more, as
/// if it were a row (Q4).
pub(super) fn key_positions(chunks: usize, kept_per_chunk: usize, quirks: Quirks) -> Vec<i64> {
    let chunk = |row: usize| row / kept_per_chunk;
    let position = |row| match quirks {
        Quirks::Faithful => chunk(chunk(row)),
        Quirks::Fixed => chunk(row),
    };
    (0..chunks * kept_per_chunk).map(|row| position(row) as i64).collect()
}

/// The rotation of queries for `rows` rows, or the one back. As released, a `single` query is rotated by one angle in all pairs
/// of dimensions (Q5): its position is looked up in the angles of that position.
fn query_rotation(
    upper: &Llama,
    chunks: usize,
    (rows, single): (usize, bool),
    quirks: Quirks,
    backwards: bool,
) -> Result<Rotary> {
    let sign = if backwards { -1 } else { 1 };
    let architecture::Llama { head_dim, ref rope, .. } = *upper.architecture();
    let position = query_position(chunks);
    if !single || quirks == Quirks::Fixed {
        return Ok(upper.rotary(&vec![sign * position; rows]));
    }
    if chunks + 1 >= head_dim {
        return Err(ReferenceError::SingleTokenRotation { chunks, most: head_dim.saturating_sub(2) });
    }
    let Frequencies { inv_freq, .. } = Frequencies::new(rope, head_dim, position);
    let angle = (sign * position) as f32 * inv_freq[(chunks + 1) % inv_freq.len()];
    Ok(Rotary::of_angle(angle, rows, inv_freq.len()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_at_their_chunk_or_where_the_second_lookup_puts_them() {
        assert_eq!(key_positions(3, 2, Quirks::Fixed), [0, 0, 1, 1, 2, 2]);
        assert_eq!(key_positions(3, 2, Quirks::Faithful), [0, 0, 0, 0, 1, 1]);
        assert_eq!(key_positions(2, 2, Quirks::Faithful), [0; 4]);
    }
}
