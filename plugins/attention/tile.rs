//! The two matrix products of attention, one register tile at a time.

// Indices say which register is meant; forced inlining is what `simd` demands of every kernel.
#![allow(clippy::inline_always, clippy::needless_range_loop)]

#[cfg(target_arch = "x86_64")]
use crate::simd::Avx512;
use crate::simd::Simd;

/// What an element of a vector holds, and how two vectors are multiplied.
pub(super) trait Elements<V: Simd> {
    /// `sums` plus, element by element, the products of what `a` and `b` hold.
    ///
    /// # Safety
    ///
    /// The instruction set of this and of `V` is there.
    unsafe fn add_products(sums: V, a: V, b: V) -> V;
}

/// Elements that are numbers themselves.
pub(super) struct Single;

impl<V: Simd> Elements<V> for Single {
    #[inline(always)]
    unsafe fn add_products(sums: V, a: V, b: V) -> V {
        // SAFETY: passed on from the caller.
        unsafe { a.mul_add(b, sums) }
    }
}

/// Elements that hold two numbers of type bfloat16 each, the first of them in the lower half.
#[cfg(target_arch = "x86_64")]
pub(super) struct Pairs;

#[cfg(target_arch = "x86_64")]
impl Elements<Avx512> for Pairs {
    #[inline(always)]
    unsafe fn add_products(sums: Avx512, a: Avx512, b: Avx512) -> Avx512 {
        use std::arch::x86_64::{__m512, __m512bh, _mm512_dpbf16_ps};
        use std::mem::transmute;
        // SAFETY: the caller guarantees AVX-512 BF16; a vector holds the same bits as either type.
        unsafe {
            let (a, b) = (transmute::<__m512, __m512bh>(a.0), transmute::<__m512, __m512bh>(b.0));
            Avx512(_mm512_dpbf16_ps(sums.0, a, b))
        }
    }
}

/// Logits of `M` query rows against one panel of `N` vectors of keys: `out[m][key] = scale sum_c rows[m][c] panel[c][key]`.
///
/// # Safety
///
/// The instruction set of `V` and `E` is there; `rows` is `M` rows of `depth` elements, `panel` `depth` rows of `N * LANES`, and `out` has `M` writable rows of
/// `N * LANES` elements, `stride` apart.
#[inline(always)]
pub(super) unsafe fn logits<V: Simd, E: Elements<V>, const M: usize, const N: usize>(
    depth: usize,
    scale: f32,
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
                    sums[m][n] = E::add_products(sums[m][n], query, keys[n]);
                }
            }
        }
        let scale = V::splat(scale);
        for m in 0..M {
            for n in 0..N {
                sums[m][n].mul(scale).store(out.add(m * stride + n * V::LANES));
            }
        }
    }
}

/// Where [`weigh`] reads and writes; strides are in elements. Where elements hold two numbers, those of two keys after each
/// other are one, in weights and values alike.
#[derive(Clone, Copy)]
pub(super) struct Weighing {
    /// Elements of a row of weights to sum over: keys or pairs of them.
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
/// The instruction set of `V` and `E` is there; the rows that [`Weighing`] names are readable, those of `out` writable.
#[inline(always)]
pub(super) unsafe fn weigh<V: Simd, E: Elements<V>, const M: usize, const N: usize>(at: &Weighing) {
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
                    sums[m][n] = E::add_products(sums[m][n], weight, value[n]);
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
