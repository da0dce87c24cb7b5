//! Causal attention with grouped heads over a cache of 8-bit integers: `ai.accordion::GroupQueryAttentionInt8` on the CPU. See
//! `contract.md`.

mod append;
mod few;
mod kernels;
mod many;
mod operator;
#[cfg(test)]
mod tests;
mod vectors;

pub use operator::GroupQueryAttentionInt8;

use self::append::Part;
use self::few::Few;
use self::kernels::{Kernels, MAX_ROWS};
use crate::attention::{AttentionError, Geometry, check_len};
use crate::parallel::ParallelFor;
use crate::simd::Level;

/// A cache of keys or values.
#[derive(Debug, Clone, Copy)]
pub struct Entries<'a> {
    /// Where the first [`Geometry::past`] positions are: `[B, G, S, d]` and its S, or `None` where they are in the present
    /// cache already.
    pub past: Option<(&'a [i8], usize)>,
    /// What the entries of every channel count in, `[B, G, 1, d]`.
    pub scale: &'a [f32],
    /// What is appended, `[B, T, G d]`.
    pub new: &'a [f32],
}

/// A cache of keys or values behind which the new positions are written.
#[derive(Debug)]
pub struct Present<'a> {
    /// `[B, G, S', d]`.
    pub entries: &'a mut [i8],
    /// `[B, G, 1, d]`.
    pub scale: &'a mut [f32],
}

/// Causal attention: row `t` of each sequence in `query [B, T, H d]` sees the cache and the new rows `0..=t`, whose numbers are
/// rounded to what the present caches hold. Logits are scaled by `1 / sqrt(d)`.
///
/// The result does not depend on how many threads there are.
///
/// # Errors
///
/// The geometry is inconsistent, a tensor does not have the elements it says, or threads could not be had.
pub fn attend(
    geometry: &Geometry,
    query: &[f32],
    past: [Entries<'_>; 2],
    present: [Present<'_>; 2],
    output: &mut [f32],
    threads: &dyn ParallelFor,
) -> Result<(), AttentionError> {
    attend_at(Level::detect(), geometry, query, past, present, output, threads)
}

/// [`attend`] with the kernels of one instruction set, or of the widest narrower one that this processor has.
fn attend_at(
    level: Level,
    geometry: &Geometry,
    query: &[f32],
    past: [Entries<'_>; 2],
    present: [Present<'_>; 2],
    output: &mut [f32],
    threads: &dyn ParallelFor,
) -> Result<(), AttentionError> {
    let Geometry { batch, rows, heads, kv_heads, head_dim, past: past_rows, capacity } = *geometry;
    geometry.check()?;
    check_len("query", query.len(), &[batch, rows, heads, head_dim])?;
    check_len("output", output.len(), &[batch, rows, heads, head_dim])?;
    for (name, Entries { past, scale, new }) in [("key", &past[0]), ("value", &past[1])] {
        check_len(name, new.len(), &[batch, rows, kv_heads, head_dim])?;
        check_len("scale", scale.len(), &[batch, kv_heads, head_dim])?;
        if let Some((entries, capacity)) = *past {
            check_len("past", entries.len(), &[batch, kv_heads, capacity, head_dim])?;
            if capacity < past_rows {
                return Err(AttentionError::Geometry(format!(
                    "past_length is {past_rows}, but the past cache has {capacity} positions"
                )));
            }
        }
    }
    for Present { entries, scale } in &present {
        check_len("present", entries.len(), &[batch, kv_heads, capacity, head_dim])?;
        check_len("present scale", scale.len(), &[batch, kv_heads, head_dim])?;
    }
    if batch == 0 || rows == 0 {
        return Ok(());
    }
    let [key, value] = present;
    append::append(geometry, [Part { past: past[0], present: key }, Part { past: past[1], present: value }], threads)?
        .attend(level, geometry, query, output, threads)
}

/// Complete caches `[B, G, S', d]` with what their entries count in.
struct Caches<'a> {
    key: &'a [i8],
    key_scale: &'a [f32],
    value: &'a [i8],
    value_scale: &'a [f32],
}

impl Caches<'_> {
    fn attend(
        &self,
        level: Level,
        geometry: &Geometry,
        query: &[f32],
        output: &mut [f32],
        threads: &dyn ParallelFor,
    ) -> Result<(), AttentionError> {
        match Kernels::of(level, geometry.head_dim) {
            Some(kernels) if geometry.rows * geometry.group() <= MAX_ROWS => {
                Ok(Few { kernels, geometry, caches: self, query }.attend(output, threads)?)
            }
            _ => many::attend(geometry, self, query, output, threads),
        }
    }
}
