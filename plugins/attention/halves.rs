//! Numbers of type bfloat16: rounding to them, and two of them in one element.

// Forced inlining is what `simd` demands of every kernel.
#![allow(clippy::inline_always)]

use std::borrow::Cow;

/// The kernels that put two numbers into one element, the first of them in the lower half.
pub(super) struct Halves {
    /// Neighbours: the second argument's elements hold the numbers of the first, twice as many.
    pub(super) neighbours: unsafe fn(&[f32], &mut [f32]),
    /// The same in place: a row's first half holds all of its numbers.
    pub(super) in_place: unsafe fn(&mut [f32]),
    /// Rows: each element of the third argument holds those of the first two, which lie in the same place.
    pub(super) rows: unsafe fn(&[f32], &[f32], &mut [f32]),
}

impl Halves {
    /// With AVX-512 BF16. All lengths are multiples of 16.
    #[cfg(target_arch = "x86_64")]
    pub(super) const AVX512: Self = Self { neighbours, in_place, rows };
}

/// The nearest number of type bfloat16, ties to even; NaN stays NaN.
pub(super) fn nearest(x: f32) -> f32 {
    if x.is_nan() {
        return x;
    }
    let bits = x.to_bits();
    // What is cut off rounds up where it is more than a half, or a half and the rest odd.
    f32::from_bits(bits.wrapping_add(0x7fff + (bits >> 16 & 1)) & 0xffff_0000)
}

/// All of `numbers` rounded, where they have to be.
pub(super) fn rounded(numbers: &[f32], wanted: bool) -> Cow<'_, [f32]> {
    if wanted { Cow::Owned(numbers.iter().map(|&x| nearest(x)).collect()) } else { Cow::Borrowed(numbers) }
}

#[cfg(target_arch = "x86_64")]
use x86::{in_place, neighbours, rows};

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::{
        __m256bh, __m256i, __m512i, _mm256_storeu_si256, _mm512_cvtepu16_epi32, _mm512_cvtneps_pbh, _mm512_loadu_ps,
        _mm512_or_si512, _mm512_slli_epi32, _mm512_storeu_si512,
    };
    use std::mem::transmute;

    const LANES: usize = 16;

    /// A vector's numbers, 16 bits each.
    ///
    /// # Safety
    ///
    /// AVX-512 BF16 is there, and `from` is good for a vector.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bf16")]
    unsafe fn halves(from: *const f32) -> __m256i {
        // SAFETY: by the caller's promise; either type is 256 bits.
        unsafe { transmute::<__m256bh, __m256i>(_mm512_cvtneps_pbh(_mm512_loadu_ps(from))) }
    }

    /// The same, with zeros behind each.
    ///
    /// # Safety
    ///
    /// As [`halves`].
    #[inline]
    #[target_feature(enable = "avx512f,avx512bf16")]
    unsafe fn spread(from: *const f32) -> __m512i {
        // SAFETY: passed on from the caller.
        unsafe { _mm512_cvtepu16_epi32(halves(from)) }
    }

    #[target_feature(enable = "avx512f,avx512bf16")]
    pub(super) unsafe fn neighbours(from: &[f32], to: &mut [f32]) {
        for (from, to) in from.chunks_exact(LANES).zip(to.chunks_exact_mut(LANES / 2)) {
            // SAFETY: the chunks are that long.
            unsafe { _mm256_storeu_si256(to.as_mut_ptr().cast(), halves(from.as_ptr())) };
        }
    }

    #[target_feature(enable = "avx512f,avx512bf16")]
    pub(super) unsafe fn in_place(row: &mut [f32]) {
        for i in (0..row.len() / LANES * LANES).step_by(LANES) {
            let start = row.as_mut_ptr();
            // SAFETY: inside the row; what is written lies at or before what was read.
            unsafe { _mm256_storeu_si256(start.add(i / 2).cast(), halves(start.add(i))) };
        }
    }

    #[target_feature(enable = "avx512f,avx512bf16")]
    pub(super) unsafe fn rows(first: &[f32], second: &[f32], to: &mut [f32]) {
        let pairs = first.chunks_exact(LANES).zip(second.chunks_exact(LANES));
        for ((first, second), to) in pairs.zip(to.chunks_exact_mut(LANES)) {
            // SAFETY: the chunks are that long.
            unsafe {
                let (low, high) = (spread(first.as_ptr()), spread(second.as_ptr()));
                let pairs = _mm512_or_si512(low, _mm512_slli_epi32::<16>(high));
                _mm512_storeu_si512(to.as_mut_ptr().cast(), pairs);
            }
        }
    }
}
