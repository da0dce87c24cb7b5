//! What stored integers need from a vector type beyond [`Simd`].

// Without forced inlining an intrinsic would be a function call: only the function that carries the target feature may
// contain it. Stars import the instruction sets.
#![allow(clippy::inline_always, clippy::wildcard_imports)]

use super::Bits;
#[cfg(target_arch = "x86_64")]
use crate::simd::{Avx2, Avx512};
use crate::simd::{Portable, Simd};
#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;

/// A vector of `f32` that stored integers become. They come in chunks of four vectors: number `4 i + j` of a chunk is lane
/// `i` of vector `j`, because that is how lanes of 32 or 16 bits hold them.
///
/// # Safety
///
/// Every method requires the instruction set of the implementing type and, behind the pointer, what it says.
pub(super) trait Expand: Simd {
    /// A chunk of signed bytes.
    unsafe fn expand_8(from: *const u8) -> [Self; 4];
    /// A chunk of signed 4-bit numbers, two to a byte, the first of them in the lower half.
    unsafe fn expand_4(from: *const u8) -> [Self; 4];
    /// Lane `i` becomes `from[i >> shift]`.
    unsafe fn spread(from: *const f32, shift: u32) -> Self;

    #[inline(always)]
    unsafe fn expand<const BITS: Bits>(from: *const u8) -> [Self; 4] {
        // SAFETY: passed on from the caller.
        unsafe { if BITS == 8 { Self::expand_8(from) } else { Self::expand_4(from) } }
    }
}

// SAFETY (every block): the callers guarantee AVX-512 F and DQ and valid pointers, as the trait demands.
#[allow(clippy::undocumented_unsafe_blocks)]
#[cfg(target_arch = "x86_64")]
impl Expand for Avx512 {
    #[inline(always)]
    unsafe fn expand_8(from: *const u8) -> [Self; 4] {
        unsafe {
            let bytes = _mm512_loadu_si512(from.cast());
            [_mm512_slli_epi32::<24>(bytes), _mm512_slli_epi32::<16>(bytes), _mm512_slli_epi32::<8>(bytes), bytes]
                .map(|high| Self(_mm512_cvtepi32_ps(_mm512_srai_epi32::<24>(high))))
        }
    }
    #[inline(always)]
    unsafe fn expand_4(from: *const u8) -> [Self; 4] {
        unsafe {
            let numbers = _mm512_cvtepu16_epi32(_mm256_loadu_si256(from.cast()));
            // A permutation reads the lowest four bits of each index.
            let values =
                _mm512_setr_ps(0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, -8.0, -7.0, -6.0, -5.0, -4.0, -3.0, -2.0, -1.0);
            [
                Self(_mm512_permutexvar_ps(numbers, values)),
                Self(_mm512_permutexvar_ps(_mm512_srli_epi32::<4>(numbers), values)),
                Self(_mm512_permutexvar_ps(_mm512_srli_epi32::<8>(numbers), values)),
                Self(_mm512_permutexvar_ps(_mm512_srli_epi32::<12>(numbers), values)),
            ]
        }
    }
    #[inline(always)]
    unsafe fn spread(from: *const f32, shift: u32) -> Self {
        unsafe {
            if shift >= 4 {
                return Self::splat(*from);
            }
            let lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
            let index = _mm512_srl_epi32(lanes, _mm_cvtsi32_si128(shift as i32));
            let some = _mm512_maskz_loadu_ps(0xffff >> (16 - (16 >> shift)), from);
            Self(_mm512_permutexvar_ps(index, some))
        }
    }
}

// SAFETY (every block): the callers guarantee AVX2 and valid pointers, as the trait demands.
#[allow(clippy::undocumented_unsafe_blocks)]
#[cfg(target_arch = "x86_64")]
impl Expand for Avx2 {
    #[inline(always)]
    unsafe fn expand_8(from: *const u8) -> [Self; 4] {
        unsafe {
            let bytes = _mm256_loadu_si256(from.cast());
            [_mm256_slli_epi32::<24>(bytes), _mm256_slli_epi32::<16>(bytes), _mm256_slli_epi32::<8>(bytes), bytes]
                .map(|high| Self(_mm256_cvtepi32_ps(_mm256_srai_epi32::<24>(high))))
        }
    }
    #[inline(always)]
    unsafe fn expand_4(from: *const u8) -> [Self; 4] {
        unsafe {
            let numbers = _mm256_cvtepu16_epi32(_mm_loadu_si128(from.cast()));
            [
                Self(_mm256_cvtepi32_ps(_mm256_srai_epi32::<28>(_mm256_slli_epi32::<28>(numbers)))),
                Self(_mm256_cvtepi32_ps(_mm256_srai_epi32::<28>(_mm256_slli_epi32::<24>(numbers)))),
                Self(_mm256_cvtepi32_ps(_mm256_srai_epi32::<28>(_mm256_slli_epi32::<20>(numbers)))),
                Self(_mm256_cvtepi32_ps(_mm256_srai_epi32::<28>(_mm256_slli_epi32::<16>(numbers)))),
            ]
        }
    }
    #[inline(always)]
    unsafe fn spread(from: *const f32, shift: u32) -> Self {
        unsafe {
            match shift {
                2 => Self(_mm256_set_m128(_mm_set1_ps(*from.add(1)), _mm_set1_ps(*from))),
                _ => Self::splat(*from),
            }
        }
    }
}

impl Expand for Portable {
    #[inline(always)]
    unsafe fn expand_8(from: *const u8) -> [Self; 4] {
        // SAFETY: the caller guarantees sixteen bytes.
        let bytes = unsafe { from.cast::<[i8; 16]>().read() };
        std::array::from_fn(|j| Self(std::array::from_fn(|i| f32::from(bytes[4 * i + j]))))
    }
    #[inline(always)]
    unsafe fn expand_4(from: *const u8) -> [Self; 4] {
        // SAFETY: the caller guarantees eight bytes.
        let bytes = unsafe { from.cast::<[u8; 8]>().read() };
        let number = |at: usize| (bytes[at / 2] << (4 - at % 2 * 4)) as i8 >> 4;
        std::array::from_fn(|j| Self(std::array::from_fn(|i| f32::from(number(4 * i + j)))))
    }
    #[inline(always)]
    unsafe fn spread(from: *const f32, _: u32) -> Self {
        // SAFETY: the caller guarantees one number; no block is smaller than a chunk of these vectors.
        unsafe { Self::splat(*from) }
    }
}
