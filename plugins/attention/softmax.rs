//! The online softmax: one row of logits against what the row has seen before.

use crate::simd::Simd;

/// What a row has seen so far, in base 2: its largest logit, and per lane the sum of `2^(logit - max)`.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(super) struct RowState {
    pub(super) sum: [f32; MAX_LANES],
    pub(super) max: f32,
}

/// Lanes of the widest level.
pub(super) const MAX_LANES: usize = 16;

impl RowState {
    /// A row that has seen nothing. The maximum is finite, so that a logit of minus infinity gets weight zero instead
    /// of the NaN of infinity minus infinity.
    pub(super) const EMPTY: Self = Self { sum: [0.0; MAX_LANES], max: f32::MIN };

    /// The sum over all lanes.
    pub(super) fn total(&self) -> f32 {
        self.sum.iter().sum()
    }
}

/// Turns `width` logits into weights `2^(logit - max)` with the maximum over everything seen, updates the row's state
/// and returns the factor by which sums made with the former maximum shrink.
///
/// # Safety
///
/// `logits` has `width` elements, a multiple of `LANES` and not zero.
#[inline(always)]
pub(super) unsafe fn absorb<V: Simd>(logits: *mut f32, width: usize, row: &mut RowState) -> f32 {
    // SAFETY: every access is at a multiple of LANES below `width`, or in the row's own lanes.
    unsafe {
        let mut max = [V::splat(row.max); 2];
        let mut i = 0;
        while i + 2 * V::LANES <= width {
            max[0] = max[0].max(V::load(logits.add(i)));
            max[1] = max[1].max(V::load(logits.add(i + V::LANES)));
            i += 2 * V::LANES;
        }
        if i < width {
            max[0] = max[0].max(V::load(logits.add(i)));
        }
        let new_max = max[0].max(max[1]).reduce_max();
        let decay = V::splat(row.max - new_max).exp2();
        row.max = new_max;

        let center = V::splat(new_max);
        let mut sum = V::load(row.sum.as_ptr()).mul(decay);
        let mut i = 0;
        while i < width {
            let weight = V::load(logits.add(i)).sub(center).exp2();
            weight.store(logits.add(i));
            sum = sum.add(weight);
            i += V::LANES;
        }
        sum.store(row.sum.as_mut_ptr());
        let mut factor = [0.0; MAX_LANES];
        decay.store(factor.as_mut_ptr());
        factor[0]
    }
}
