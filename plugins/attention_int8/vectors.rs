//! Vectors of `f32` out of signed bytes.

// Forced inlining is what `simd` demands of every kernel.
#![allow(clippy::inline_always)]

#[cfg(target_arch = "x86_64")]
use crate::simd::{Avx2, Avx512};
use crate::simd::{Portable, Simd};
#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::{
    _mm_loadl_epi64, _mm_loadu_si128, _mm256_cvtepi8_epi32, _mm256_cvtepi32_ps, _mm512_cvtepi8_epi32,
    _mm512_cvtepi32_ps,
};

/// A vector that is made of bytes.
///
/// # Safety
///
/// As [`Simd`].
pub(super) trait Expand: Simd {
    /// `LANES` signed bytes.
    unsafe fn expand(from: *const i8) -> Self;
}

#[cfg(target_arch = "x86_64")]
impl Expand for Avx512 {
    #[inline(always)]
    unsafe fn expand(from: *const i8) -> Self {
        // SAFETY: the caller guarantees the instruction set and sixteen bytes.
        Self(unsafe { _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(from.cast()))) })
    }
}

#[cfg(target_arch = "x86_64")]
impl Expand for Avx2 {
    #[inline(always)]
    unsafe fn expand(from: *const i8) -> Self {
        // SAFETY: the caller guarantees the instruction set and eight bytes.
        Self(unsafe { _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(from.cast()))) })
    }
}

impl Expand for Portable {
    #[inline(always)]
    unsafe fn expand(from: *const i8) -> Self {
        // SAFETY: the caller guarantees four bytes.
        Self(unsafe { from.cast::<[i8; 4]>().read() }.map(f32::from))
    }
}
