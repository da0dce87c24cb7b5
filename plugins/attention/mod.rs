//! Causal attention with grouped heads: `ai.accordion::GroupQueryAttention` on the CPU. See `contract.md`.

mod block;
mod cache;
mod call;
mod halves;
mod kernels;
mod operator;
mod softmax;
#[cfg(test)]
mod tests;
mod tile;

pub use operator::{GroupQueryAttention, GroupQueryAttentionBf16};

use self::call::Call;
use self::halves::rounded;
use self::kernels::Kernels;
use crate::parallel::{ParallelError, ParallelFor};
use crate::simd::Level;

/// Rows of queries, positions times heads of a group, from which on it is worth making pairs of the keys and values they see.
const WORTH_PAIRING: usize = 16;

/// Largest supported head dimension.
pub const MAX_HEAD_DIM: usize = 256;

/// The lengths of one call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Geometry {
    /// Sequences, B.
    pub batch: usize,
    /// New positions per sequence, T.
    pub rows: usize,
    /// Query heads, H.
    pub heads: usize,
    /// Key and value heads, G; divides H.
    pub kv_heads: usize,
    /// Elements per head, d.
    pub head_dim: usize,
    /// Positions that are already in the cache.
    pub past: usize,
    /// Positions that the present cache has room for, S'; at least `past + rows`.
    pub capacity: usize,
}

/// Where the first [`Geometry::past`] positions of the cache are.
#[derive(Debug, Clone, Copy)]
pub enum Past<'a> {
    /// Already in the present cache.
    InPlace,
    /// In these caches, `[B, G, capacity, d]` each; they are copied to the present cache.
    Copied {
        /// Keys.
        key: &'a [f32],
        /// Values.
        value: &'a [f32],
        /// Positions per cache, S.
        capacity: usize,
    },
}

/// What attention reads.
#[derive(Debug, Clone, Copy)]
pub struct Inputs<'a> {
    /// `[B, T, H d]`.
    pub query: &'a [f32],
    /// `[B, T, G d]`.
    pub key: &'a [f32],
    /// `[B, T, G d]`.
    pub value: &'a [f32],
    /// The cache so far.
    pub past: Past<'a>,
    /// Factor of the logits; usually `1 / sqrt(d)`.
    pub scale: f32,
}

/// What attention writes.
#[derive(Debug)]
pub struct Outputs<'a> {
    /// `[B, T, H d]`.
    pub output: &'a mut [f32],
    /// `[B, G, S', d]`.
    pub present_key: &'a mut [f32],
    /// `[B, G, S', d]`.
    pub present_value: &'a mut [f32],
}

/// What queries, keys and values are multiplied as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Factors {
    /// As they are.
    F32,
    /// Rounded to bfloat16.
    Bf16,
}

/// Why a call was refused.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AttentionError {
    /// Lengths that do not belong together.
    #[error("{0}")]
    Geometry(String),
    /// A tensor has another number of elements than its shape.
    #[error("{tensor} has {found} elements, expected {expected}")]
    Length {
        /// Which one.
        tensor: &'static str,
        /// Its elements.
        found: usize,
        /// What the geometry asks for.
        expected: usize,
    },
    /// No threads.
    #[error(transparent)]
    Parallel(#[from] ParallelError),
}

impl Geometry {
    pub(crate) fn check(&self) -> Result<(), AttentionError> {
        let refuse = |message: String| Err(AttentionError::Geometry(message));
        let Self { rows, heads, kv_heads, head_dim, past, capacity, .. } = *self;
        if kv_heads == 0 || heads == 0 || !heads.is_multiple_of(kv_heads) {
            return refuse(format!(
                "num_heads is {heads} and kv_num_heads is {kv_heads}: expected a positive multiple of kv_num_heads"
            ));
        }
        if head_dim == 0 || head_dim > MAX_HEAD_DIM {
            return refuse(format!("the head dimension is {head_dim}, expected 1 to {MAX_HEAD_DIM}"));
        }
        if past.checked_add(rows).is_none_or(|total| total > capacity) {
            return refuse(format!(
                "the cache has room for {capacity} positions, but past_length {past} and {rows} new rows need more"
            ));
        }
        Ok(())
    }

    /// Query heads per key head.
    pub(crate) fn group(&self) -> usize {
        self.heads / self.kv_heads
    }
}

pub(crate) fn check_len(tensor: &'static str, found: usize, dims: &[usize]) -> Result<(), AttentionError> {
    let expected = dims.iter().try_fold(1usize, |n, &dim| n.checked_mul(dim));
    let expected =
        expected.ok_or_else(|| AttentionError::Geometry(format!("a {tensor} of shape {dims:?} is too large")))?;
    if found == expected { Ok(()) } else { Err(AttentionError::Length { tensor, found, expected }) }
}

/// Causal attention: row `t` of each sequence sees the cache and the new rows `0..=t`. New keys and values are
/// written to the present cache behind the past.
///
/// The result does not depend on how many threads there are.
///
/// # Errors
///
/// The geometry is inconsistent, a tensor does not have the elements it says, or threads could not be had.
pub fn attend(
    geometry: &Geometry,
    inputs: &Inputs<'_>,
    outputs: Outputs<'_>,
    threads: &dyn ParallelFor,
) -> Result<(), AttentionError> {
    attend_at(Level::detect(), Factors::F32, geometry, inputs, outputs, threads)
}

/// [`attend`] with queries, new keys and new values rounded to bfloat16, and stored as that. Weights may be rounded, too,
/// before they meet the values.
///
/// # Errors
///
/// As [`attend`].
pub fn attend_bf16(
    geometry: &Geometry,
    inputs: &Inputs<'_>,
    outputs: Outputs<'_>,
    threads: &dyn ParallelFor,
) -> Result<(), AttentionError> {
    attend_at(Level::detect(), Factors::Bf16, geometry, inputs, outputs, threads)
}

/// [`attend`] or [`attend_bf16`] with the kernels of one instruction set, or of the widest narrower one that this processor has.
fn attend_at(
    level: Level,
    factors: Factors,
    geometry: &Geometry,
    inputs: &Inputs<'_>,
    outputs: Outputs<'_>,
    threads: &dyn ParallelFor,
) -> Result<(), AttentionError> {
    let Geometry { batch, rows, heads, kv_heads, head_dim, past, capacity } = *geometry;
    let Outputs { output, present_key, present_value } = outputs;
    geometry.check()?;
    check_len("query", inputs.query.len(), &[batch, rows, heads, head_dim])?;
    check_len("key", inputs.key.len(), &[batch, rows, kv_heads, head_dim])?;
    check_len("value", inputs.value.len(), &[batch, rows, kv_heads, head_dim])?;
    check_len("output", output.len(), &[batch, rows, heads, head_dim])?;
    check_len("present_key", present_key.len(), &[batch, kv_heads, capacity, head_dim])?;
    check_len("present_value", present_value.len(), &[batch, kv_heads, capacity, head_dim])?;
    if let Past::Copied { key, value, capacity } = inputs.past {
        check_len("past_key", key.len(), &[batch, kv_heads, capacity, head_dim])?;
        check_len("past_value", value.len(), &[batch, kv_heads, capacity, head_dim])?;
        if capacity < past {
            return Err(AttentionError::Geometry(format!(
                "past_length is {past}, but the past cache has {capacity} positions"
            )));
        }
    }
    if batch == 0 || rows == 0 {
        return Ok(());
    }
    let [past_key, past_value] = match inputs.past {
        Past::InPlace => [None, None],
        Past::Copied { key, value, capacity } => [Some((key, capacity)), Some((value, capacity))],
    };
    let [query, key, value] =
        [inputs.query, inputs.key, inputs.value].map(|numbers| rounded(numbers, factors == Factors::Bf16));
    let key = cache::append(geometry, &key, past_key, present_key, threads)?;
    let value = cache::append(geometry, &value, past_value, present_value, threads)?;
    let many = factors == Factors::Bf16 && rows * geometry.group() >= WORTH_PAIRING;
    let kernels = many.then(|| Kernels::of_bf16(level, head_dim)).flatten().unwrap_or_else(|| Kernels::of(level));
    let call = Call { kernels, geometry, query: &query, key, value, scale: inputs.scale };
    Ok(call.run(output, threads)?)
}
