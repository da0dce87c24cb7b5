//! Appending to the cache: new rows are rounded to the units of their channels, which grow where they have to.

use super::{Caches, Entries, Present};
use crate::attention::Geometry;
use crate::parallel::{ParallelError, ParallelFor, SharedSlice};

/// The largest magnitude of an entry.
const LEVELS: f32 = 127.0;
/// As many units as this are rounded to more than [`LEVELS`] of them.
const BEYOND: f32 = 127.5;
/// By how much a unit grows at least.
const GROWTH: f32 = 1.25;

/// Keys or values, before and after.
pub(super) struct Part<'a> {
    pub(super) past: Entries<'a>,
    pub(super) present: Present<'a>,
}

/// Fills the present caches: the valid rows of the past, which are rounded anew in channels whose units grow, then the new
/// rows. What lies behind them is left alone in place and zeroed in a copy.
///
/// # Errors
///
/// Threads could not be had.
pub(super) fn append<'a>(
    geometry: &Geometry,
    parts: [Part<'a>; 2],
    threads: &dyn ParallelFor,
) -> Result<Caches<'a>, ParallelError> {
    let Geometry { batch, kv_heads, head_dim, capacity, .. } = *geometry;
    let (plane, heads) = (capacity * head_dim, batch * kv_heads);
    let [key, value] = parts;
    let (past, present) = ([key.past, value.past], [key.present, value.present]);
    let [Present { entries: key, scale: key_scale }, Present { entries: value, scale: value_scale }] = present;
    {
        let entries = [SharedSlice::new(&mut *key), SharedSlice::new(&mut *value)];
        let scales = [SharedSlice::new(&mut *key_scale), SharedSlice::new(&mut *value_scale)];
        threads.run(2 * heads, &|task| {
            let (part, head) = (task % 2, task / 2);
            // SAFETY: every task is another pair of part and head.
            let (entries, scale) =
                unsafe { (entries[part].piece(head * plane, plane), scales[part].piece(head * head_dim, head_dim)) };
            append_head(geometry, head, &past[part], entries, scale);
        })?;
    }
    Ok(Caches { key, key_scale, value, value_scale })
}

/// One head of one part: `entries [S', d]` and their `scale [d]`.
fn append_head(geometry: &Geometry, head: usize, past: &Entries<'_>, entries: &mut [i8], scale: &mut [f32]) {
    let Geometry { rows, kv_heads, head_dim, past: past_rows, .. } = *geometry;
    let (b, g) = (head / kv_heads, head % kv_heads);
    let new = (0..rows).map(|t| &past.new[((b * rows + t) * kv_heads + g) * head_dim..][..head_dim]);
    let (old, behind) = entries.split_at_mut(past_rows * head_dim);
    let (fresh, room) = behind.split_at_mut(rows * head_dim);
    if let Some((from, capacity)) = past.past {
        old.copy_from_slice(&from[head * capacity * head_dim..][..past_rows * head_dim]);
        room.fill(0);
    }
    let before = &past.scale[head * head_dim..][..head_dim];
    scale.copy_from_slice(before);
    let mut largest = vec![0.0_f32; head_dim];
    for row in new.clone() {
        for (largest, x) in largest.iter_mut().zip(row) {
            // What is not a number stays.
            *largest = if x.abs() > *largest || x.is_nan() { x.abs() } else { *largest };
        }
    }
    for (scale, largest) in scale.iter_mut().zip(&largest) {
        // Not so where either is no number either.
        let fits = largest / *scale < BEYOND;
        if !fits {
            let needed = largest * (1.0 / LEVELS);
            *scale = if needed.is_nan() { needed } else { needed.max(*scale * GROWTH) };
        }
    }
    let ratio: Vec<f32> = before.iter().zip(&*scale).map(|(before, after)| before / after).collect();
    if ratio.iter().any(|ratio| ratio.to_bits() != 1.0_f32.to_bits()) {
        for row in old.chunks_exact_mut(head_dim) {
            for (entry, ratio) in row.iter_mut().zip(&ratio) {
                *entry = nearest(f32::from(*entry) * ratio);
            }
        }
    }
    for (row, fresh) in new.zip(fresh.chunks_exact_mut(head_dim)) {
        for ((x, scale), entry) in row.iter().zip(&*scale).zip(fresh) {
            *entry = nearest(x / scale);
        }
    }
}

/// The nearest integer, ties to even, of a number up to [`BEYOND`]; adding and taking away what has no room for a fraction
/// rounds, and is an instruction on every target.
fn nearest(x: f32) -> i8 {
    const ROUNDS: f32 = 12_582_912.0;
    ((x + ROUNDS) - ROUNDS) as i8
}
