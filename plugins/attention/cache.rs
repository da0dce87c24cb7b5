//! The key-value cache: behind the past, one row per new position.

use super::Geometry;
use crate::parallel::{ParallelError, ParallelFor, SharedSlice, Threads};

/// Positions that one task copies.
const COPY_ROWS: usize = 512;

/// Fills `present` `[B, G, S', d]`: the valid rows of `past` (`[B, G, S, d]` and its S; `None` where they are in
/// place already), then `new` `[B, T, G d]`. What lies behind them is left alone in place and zeroed in a copy.
///
/// # Errors
///
/// Threads could not be had.
pub(super) fn append<'a>(
    geometry: &Geometry,
    new: &[f32],
    past: Option<(&[f32], usize)>,
    present: &'a mut [f32],
    threads: &dyn ParallelFor,
) -> Result<&'a [f32], ParallelError> {
    let Geometry { batch, rows, kv_heads, head_dim, capacity, past: past_rows, .. } = *geometry;
    let first = if past.is_some() { 0 } else { past_rows };
    let last = if past.is_some() { capacity } else { past_rows + rows };
    let chunks = (last - first).div_ceil(COPY_ROWS);
    // A step appends a row per head: done before another thread has noticed.
    let here = batch * kv_heads * (last - first) <= COPY_ROWS;
    let threads = if here { &Threads(1) } else { threads };
    let shared = SharedSlice::new(&mut *present);
    threads.run(batch * kv_heads * chunks, &|task| {
        let (head, chunk) = (task / chunks, task % chunks);
        let start = first + chunk * COPY_ROWS;
        let end = last.min(start + COPY_ROWS);
        // SAFETY: every pair of head and chunk is another range of rows.
        let to = unsafe { shared.piece((head * capacity + start) * head_dim, (end - start) * head_dim) };
        let (b, g) = (head / kv_heads, head % kv_heads);
        for (row, to) in (start..end).zip(to.chunks_exact_mut(head_dim)) {
            if let Some(t) = row.checked_sub(past_rows) {
                if t < rows {
                    to.copy_from_slice(&new[((b * rows + t) * kv_heads + g) * head_dim..][..head_dim]);
                } else {
                    to.fill(0.0);
                }
            } else if let Some((past, past_capacity)) = past {
                to.copy_from_slice(&past[(head * past_capacity + row) * head_dim..][..head_dim]);
            }
        }
    })?;
    Ok(present)
}
