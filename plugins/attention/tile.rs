//! The two matrix products of attention, one register tile at a time.

// Indices say which register is meant; forced inlining is what `simd` demands of every kernel.
#![allow(clippy::inline_always, clippy::needless_range_loop)]

use crate::simd::Simd;

/// Logits of `M` query rows against one panel of `N` vectors of keys: `out[m][key] = sum_c rows[m][c] panel[c][key]`.
///
/// # Safety
///
/// `rows` is `M` rows of `depth` elements, `panel` `depth` rows of `N * LANES`, and `out` has `M` writable rows of
/// `N * LANES` elements, `stride` apart.
#[inline(always)]
pub(super) unsafe fn logits<V: Simd, const M: usize, const N: usize>(
    depth: usize,
    rows: *const f32,
    panel: *const f32,
    out: *mut f32,
    stride: usize,
) {
    // SAFETY: all indices stay inside what the caller describes.
    unsafe {
        let mut sums = [[V::splat(0.0); N]; M];
        for c in 0..depth {
            let mut keys = [V::splat(0.0); N];
            for n in 0..N {
                keys[n] = V::load(panel.add(c * N * V::LANES + n * V::LANES));
            }
            for m in 0..M {
                let query = V::splat(*rows.add(m * depth + c));
                for n in 0..N {
                    sums[m][n] = query.mul_add(keys[n], sums[m][n]);
                }
            }
        }
        for m in 0..M {
            for n in 0..N {
                sums[m][n].store(out.add(m * stride + n * V::LANES));
            }
        }
    }
}

/// Where [`weigh`] reads and writes; strides are in elements.
#[derive(Clone, Copy)]
pub(super) struct Weighing {
    /// Keys to sum over.
    pub(super) keys: usize,
    /// `M` rows of weights.
    pub(super) weights: *const f32,
    pub(super) weights_stride: usize,
    /// `keys` rows of values.
    pub(super) values: *const f32,
    pub(super) values_stride: usize,
    /// `M` factors for what is already in `out`.
    pub(super) decay: *const f32,
    /// `M` rows of sums.
    pub(super) out: *mut f32,
    pub(super) out_stride: usize,
}

/// Adds weighted values to `M` rows of `N` vectors: `out[m] = decay[m] out[m] + sum_key weights[m][key] values[key]`.
///
/// # Safety
///
/// The rows that [`Weighing`] names are readable, those of `out` writable.
#[inline(always)]
pub(super) unsafe fn weigh<V: Simd, const M: usize, const N: usize>(at: &Weighing) {
    let Weighing { keys, weights, weights_stride, values, values_stride, decay, out, out_stride } = *at;
    // SAFETY: all indices stay inside what the caller describes.
    unsafe {
        let mut sums = [[V::splat(0.0); N]; M];
        for m in 0..M {
            let factor = V::splat(*decay.add(m));
            for n in 0..N {
                sums[m][n] = V::load(out.add(m * out_stride + n * V::LANES)).mul(factor);
            }
        }
        for key in 0..keys {
            let mut value = [V::splat(0.0); N];
            for n in 0..N {
                value[n] = V::load(values.add(key * values_stride + n * V::LANES));
            }
            for m in 0..M {
                let weight = V::splat(*weights.add(m * weights_stride + key));
                for n in 0..N {
                    sums[m][n] = weight.mul_add(value[n], sums[m][n]);
                }
            }
        }
        for m in 0..M {
            for n in 0..N {
                sums[m][n].store(out.add(m * out_stride + n * V::LANES));
            }
        }
    }
}
