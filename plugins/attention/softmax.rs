//! The online softmax: a strip of rows of logits against what the rows have seen before.

// Forced inlining is what `simd` demands of every kernel.
#![allow(clippy::inline_always)]

use crate::simd::Simd;

/// Lanes of the widest level.
pub(super) const MAX_LANES: usize = 16;
/// Rows whose logits are alive at once: small enough that they stay in the first cache level.
pub(super) const STRIP: usize = 24;
/// [`STRIP`] in whole vectors of every level.
pub(super) const PADDED_STRIP: usize = STRIP.next_multiple_of(MAX_LANES);

/// A strip of logits, and what its rows have seen so far.
#[derive(Clone, Copy)]
pub(super) struct Strip {
    /// Rows, at most [`STRIP`].
    pub(super) rows: usize,
    /// `rows` rows of logits in base 2; they become weights.
    pub(super) logits: *mut f32,
    /// Elements from one row to the next.
    pub(super) stride: usize,
    /// Logits per row, a multiple of the lanes and not zero.
    pub(super) width: usize,
    /// The largest logit of each row.
    pub(super) maxima: *mut f32,
    /// `rows` vectors: per lane the sum of `2^(logit - maximum)`.
    pub(super) totals: *mut f32,
    /// [`PADDED_STRIP`] factors to write: by how much sums made with the former maximum shrink.
    pub(super) decay: *mut f32,
}

/// The maximum of a row that has seen nothing. It is finite, so that a logit of minus infinity gets weight zero instead
/// of the NaN of infinity minus infinity.
pub(super) const NOTHING_SEEN: f32 = f32::MIN;

/// Turns logits into weights `2^(logit - maximum)` with the maximum over everything seen, and updates maxima and totals.
///
/// The rows go through each step together: a single row would wait for its own maximum and decay.
///
/// # Safety
///
/// The pointers of `strip` are good for what it says, for reading and writing.
#[inline(always)]
pub(super) unsafe fn absorb<V: Simd>(strip: &Strip) {
    let Strip { rows, logits, stride, width, maxima, totals, decay } = *strip;
    let (mut before, mut after) = ([0.0; PADDED_STRIP], [0.0; PADDED_STRIP]);
    // SAFETY: rows are below `rows`, columns below `width`, and the local arrays hold a padded strip.
    unsafe {
        for row in 0..rows {
            let logits = logits.add(row * stride);
            let mut max = [V::splat(*maxima.add(row)); 2];
            let mut i = 0;
            while i + 2 * V::LANES <= width {
                max[0] = max[0].max(V::load(logits.add(i)));
                max[1] = max[1].max(V::load(logits.add(i + V::LANES)));
                i += 2 * V::LANES;
            }
            if i < width {
                max[0] = max[0].max(V::load(logits.add(i)));
            }
            before[row] = *maxima.add(row);
            after[row] = max[0].max(max[1]).reduce_max();
            *maxima.add(row) = after[row];
        }
        for row in (0..rows).step_by(V::LANES) {
            let change = V::load(before.as_ptr().add(row)).sub(V::load(after.as_ptr().add(row)));
            change.exp2().store(decay.add(row));
        }
        for (row, &max) in after.iter().enumerate().take(rows) {
            let logits = logits.add(row * stride);
            let max = V::splat(max);
            let total = totals.add(row * V::LANES);
            let mut sum = V::load(total).mul(V::splat(*decay.add(row)));
            for i in (0..width).step_by(V::LANES) {
                let weight = V::load(logits.add(i)).sub(max).exp2();
                weight.store(logits.add(i));
                sum = sum.add(weight);
            }
            sum.store(total);
        }
    }
}
