//! A few rows of queries against a stretch of keys, and the kernels of each instruction set behind one table.
//!
//! Keys and values are read once, as they lie, and made floats in registers; what their entries count in is in the queries and
//! in what becomes of the sums.

// Indices say which register is meant; forced inlining is what `simd` demands of every kernel.
#![allow(clippy::inline_always, clippy::needless_range_loop)]

use super::vectors::Expand;
#[cfg(target_arch = "x86_64")]
use crate::simd::{Avx2, Avx512};
use crate::simd::{Level, Portable, total};

/// Most rows of a call.
pub(super) const MAX_ROWS: usize = 16;
/// Keys whose logits are alive at once: so few that they stay in the first cache level.
const BLOCK: usize = 64;
/// Lanes of the widest level.
const MAX_LANES: usize = 16;
/// Rows that share the registers.
const TILE: usize = 4;

/// The maximum of a row that has seen nothing. It is finite, so that a logit of minus infinity gets weight zero.
pub(super) const NOTHING_SEEN: f32 = f32::MIN;

/// Rows of queries, and the keys and values they see.
#[derive(Clone, Copy)]
pub(super) struct Stretch {
    /// At most [`MAX_ROWS`].
    pub(super) rows: usize,
    /// Elements per row, a multiple of the lanes.
    pub(super) dim: usize,
    /// Rows per position: each further position sees one key more.
    pub(super) group: usize,
    /// Keys of the stretch that the first position sees: none if negative.
    pub(super) visible: isize,
    /// `rows` rows, times what the keys count in; logits are in base 2.
    pub(super) queries: *const f32,
    /// Keys there are.
    pub(super) keys: usize,
    /// `keys` rows.
    pub(super) key: *const i8,
    /// `keys` rows.
    pub(super) value: *const i8,
    /// Per row the largest logit, to write.
    pub(super) maxima: *mut f32,
    /// Per row the sum of weights, to write.
    pub(super) totals: *mut f32,
    /// `rows` rows of zeros: sums of weighted values.
    pub(super) sums: *mut f32,
}

/// Attends the rows to the stretch, flash-attention style: block by block, against the largest logit so far.
///
/// # Safety
///
/// The pointers of `at` are good for what it says, and the instruction set of `V` is there.
#[inline(always)]
unsafe fn attend<V: Expand>(at: &Stretch) {
    let Stretch { rows, dim, group, visible, keys, maxima, totals, .. } = *at;
    let mut logits = [[0.0_f32; BLOCK]; MAX_ROWS];
    let mut decay = [0.0_f32; MAX_ROWS];
    let mut seen_totals = [0.0_f32; MAX_ROWS];
    let mut seen_maxima = [NOTHING_SEEN; MAX_ROWS];
    // SAFETY: rows are below `rows`, keys below `keys`; the local arrays hold a block of both.
    unsafe {
        for start in (0..keys).step_by(BLOCK) {
            let count = BLOCK.min(keys - start);
            for first in (0..rows).step_by(TILE) {
                let (q, k, out) = (at.queries.add(first * dim), at.key.add(start * dim), &mut logits[first..]);
                match rows - first {
                    1 => products::<V, 1>(dim, q, k, count, out),
                    2 => products::<V, 2>(dim, q, k, count, out),
                    3 => products::<V, 3>(dim, q, k, count, out),
                    _ => products::<V, TILE>(dim, q, k, count, out),
                }
            }
            for row in 0..rows {
                let limit = (visible + (row / group) as isize - start as isize).clamp(0, count as isize) as usize;
                logits[row][limit..].fill(f32::NEG_INFINITY);
                let row_logits = logits[row].as_mut_ptr();
                let mut max = V::splat(seen_maxima[row]);
                for i in (0..BLOCK).step_by(V::LANES) {
                    max = max.max(V::load(row_logits.add(i)));
                }
                let max = max.reduce_max();
                decay[row] = (seen_maxima[row] - max).exp2();
                seen_maxima[row] = max;
                let mut sum = V::splat(0.0);
                for i in (0..BLOCK).step_by(V::LANES) {
                    let weight = V::load(row_logits.add(i)).sub(V::splat(max)).exp2();
                    weight.store(row_logits.add(i));
                    sum = sum.add(weight);
                }
                seen_totals[row] = seen_totals[row] * decay[row] + total(sum);
            }
            for first in (0..rows).step_by(TILE) {
                let (weights, decay) = (&logits[first..], &decay[first..]);
                let (v, out) = (at.value.add(start * dim), at.sums.add(first * dim));
                match rows - first {
                    1 => weigh::<V, 1>(dim, weights, decay, v, count, out),
                    2 => weigh::<V, 2>(dim, weights, decay, v, count, out),
                    3 => weigh::<V, 3>(dim, weights, decay, v, count, out),
                    _ => weigh::<V, TILE>(dim, weights, decay, v, count, out),
                }
            }
        }
        for row in 0..rows {
            *maxima.add(row) = seen_maxima[row];
            *totals.add(row) = seen_totals[row];
        }
    }
}

/// Products of `M` rows of queries with `count` keys, at most [`BLOCK`].
#[inline(always)]
unsafe fn products<V: Expand, const M: usize>(
    dim: usize,
    queries: *const f32,
    keys: *const i8,
    count: usize,
    out: &mut [[f32; BLOCK]],
) {
    let mut lanes = [[0.0_f32; MAX_LANES * MAX_LANES]; M];
    let mut across = [0.0_f32; MAX_LANES * MAX_LANES];
    // SAFETY: keys are below `count`, columns below `dim`; the local arrays hold a vector per lane.
    unsafe {
        for first in (0..count).step_by(V::LANES) {
            for lane in 0..V::LANES.min(count - first) {
                let key = keys.add((first + lane) * dim);
                let mut sums = [V::splat(0.0); M];
                for c in (0..dim).step_by(V::LANES) {
                    let part = V::expand(key.add(c));
                    for m in 0..M {
                        sums[m] = V::load(queries.add(m * dim + c)).mul_add(part, sums[m]);
                    }
                }
                for m in 0..M {
                    sums[m].store(lanes[m].as_mut_ptr().add(lane * V::LANES));
                }
            }
            for m in 0..M {
                V::transpose(lanes[m].as_ptr(), V::LANES, across.as_mut_ptr(), V::LANES);
                let mut sum = V::load(across.as_ptr());
                for i in 1..V::LANES {
                    sum = sum.add(V::load(across.as_ptr().add(i * V::LANES)));
                }
                sum.store(out[m].as_mut_ptr().add(first));
            }
        }
    }
}

/// `out[m] = decay[m] out[m] + sum_key weights[m][key] values[key]` of `M` rows and `count` keys.
#[inline(always)]
unsafe fn weigh<V: Expand, const M: usize>(
    dim: usize,
    weights: &[[f32; BLOCK]],
    decay: &[f32],
    values: *const i8,
    count: usize,
    out: *mut f32,
) {
    let step = 2 * V::LANES;
    let whole = dim / step * step;
    // SAFETY: passed on; columns are below `dim`.
    unsafe {
        for c in (0..whole).step_by(step) {
            weigh_columns::<V, M, 2>(dim, weights, decay, values.add(c), count, out.add(c));
        }
        if whole < dim {
            weigh_columns::<V, M, 1>(dim, weights, decay, values.add(whole), count, out.add(whole));
        }
    }
}

/// [`weigh`] of `N` vectors of columns.
#[inline(always)]
unsafe fn weigh_columns<V: Expand, const M: usize, const N: usize>(
    dim: usize,
    weights: &[[f32; BLOCK]],
    decay: &[f32],
    values: *const i8,
    count: usize,
    out: *mut f32,
) {
    // SAFETY: rows are below `M`, keys below `count`.
    unsafe {
        let mut sums = [[V::splat(0.0); N]; M];
        for m in 0..M {
            for n in 0..N {
                sums[m][n] = V::load(out.add(m * dim + n * V::LANES)).mul(V::splat(decay[m]));
            }
        }
        for key in 0..count {
            let mut value = [V::splat(0.0); N];
            for n in 0..N {
                value[n] = V::expand(values.add(key * dim + n * V::LANES));
            }
            for m in 0..M {
                let weight = V::splat(weights[m][key]);
                for n in 0..N {
                    sums[m][n] = weight.mul_add(value[n], sums[m][n]);
                }
            }
        }
        for m in 0..M {
            for n in 0..N {
                sums[m][n].store(out.add(m * dim + n * V::LANES));
            }
        }
    }
}

/// The kernel of one level.
pub(super) struct Kernels {
    /// [`attend`].
    pub(super) attend: unsafe fn(&Stretch),
}

/// Instantiates the table of one level.
macro_rules! table {
    ($name:ident, $vector:ty, $($feature:literal)?) => {
        static $name: Kernels = {
            $(#[target_feature(enable = $feature)])?
            unsafe fn attend_of(at: &Stretch) {
                // SAFETY: passed on from the caller.
                unsafe { attend::<$vector>(at) }
            }
            Kernels { attend: attend_of }
        };
    };
}

#[cfg(target_arch = "x86_64")]
table!(AVX512, Avx512, "avx512f,avx512dq");
#[cfg(target_arch = "x86_64")]
table!(AVX2, Avx2, "avx2,fma");
table!(PORTABLE, Portable,);

impl Kernels {
    /// The kernels of `level`, or of the widest narrower one that this processor has and whose vectors divide `dim`; `None` if
    /// there are none.
    pub(super) fn of(level: Level, dim: usize) -> Option<&'static Self> {
        let level = level.min(Level::detect());
        #[cfg(target_arch = "x86_64")]
        {
            if level >= Level::Avx512 && dim.is_multiple_of(16) {
                return Some(&AVX512);
            }
            if level >= Level::Avx2 && dim.is_multiple_of(8) {
                return Some(&AVX2);
            }
        }
        let _ = level;
        dim.is_multiple_of(4).then_some(&PORTABLE)
    }
}
