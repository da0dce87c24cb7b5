//! One vector type per instruction set that multiplies bytes, so that every kernel is written once.

// Without forced inlining an intrinsic would be a function call: only the function that carries the target feature may
// contain it. Stars import the instruction sets.
#![allow(clippy::inline_always, clippy::wildcard_imports)]

#[cfg(target_arch = "x86_64")]
use crate::simd::{Avx2, Avx512, Simd};
#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;
use std::sync::OnceLock;

/// An instruction set that the kernels are compiled for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Level {
    /// Whatever the target guarantees.
    Portable,
    /// AVX2 with FMA.
    Avx2,
    /// AVX2 with products of bytes.
    AvxVnni,
    /// AVX-512 with products of bytes.
    Avx512Vnni,
}

impl Level {
    /// The fastest level this processor has.
    pub(super) fn detect() -> Self {
        static FOUND: OnceLock<Level> = OnceLock::new();
        *FOUND.get_or_init(|| Self::available().last().copied().unwrap_or(Self::Portable))
    }

    /// Every level this processor has, slowest first.
    pub(super) fn available() -> Vec<Self> {
        let mut levels = vec![Self::Portable];
        #[cfg(target_arch = "x86_64")]
        {
            if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
                levels.push(Self::Avx2);
                if is_x86_feature_detected!("avxvnni") {
                    levels.push(Self::AvxVnni);
                }
                if is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512vnni")
                {
                    levels.push(Self::Avx512Vnni);
                }
            }
        }
        levels
    }
}

/// A vector of 32-bit sums or of four times as many bytes.
///
/// # Safety
///
/// Every method requires the instruction set of the implementing type and, behind pointers, as many elements as it says.
pub(super) trait Bytes: Copy {
    /// 32-bit numbers per vector.
    const LANES: usize;

    unsafe fn splat(number: i32) -> Self;
    /// `4 * LANES` bytes.
    unsafe fn load(from: *const i8) -> Self;
    /// Every byte, as a signed number, plus 128: as an unsigned number.
    unsafe fn plus_128(self) -> Self;
    /// To each sum, modulo 2^32, the products of its four bytes of `unsigned` and `signed`.
    unsafe fn add_products(self, unsigned: Self, signed: Self) -> Self;
    /// `to[i] = self[i] * (by[i] * factor)` for `LANES` elements.
    unsafe fn store_scaled(self, by: *const f32, factor: f32, to: *mut f32);
    /// The sum of the sums.
    unsafe fn total(self) -> i32;
    /// Four bytes each from `LANES` places to the right of `LANES` rows, `stride` bytes apart: place by place, those of all
    /// rows to `to`, `to_stride` bytes apart. `stride` and `to_stride` are multiples of 4.
    unsafe fn transpose(from: *const i8, stride: usize, to: *mut i8, to_stride: usize);
}

#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy)]
pub(super) struct Avx512Vnni(__m512i);

// SAFETY (every block): the callers guarantee AVX-512 F, DQ, BW and VNNI and valid pointers, as the trait demands.
#[allow(clippy::undocumented_unsafe_blocks)]
#[cfg(target_arch = "x86_64")]
impl Bytes for Avx512Vnni {
    const LANES: usize = 16;

    #[inline(always)]
    unsafe fn splat(number: i32) -> Self {
        Self(unsafe { _mm512_set1_epi32(number) })
    }
    #[inline(always)]
    unsafe fn load(from: *const i8) -> Self {
        Self(unsafe { _mm512_loadu_si512(from.cast()) })
    }
    #[inline(always)]
    unsafe fn plus_128(self) -> Self {
        Self(unsafe { _mm512_xor_si512(self.0, _mm512_set1_epi8(-128)) })
    }
    #[inline(always)]
    unsafe fn add_products(self, unsigned: Self, signed: Self) -> Self {
        Self(unsafe { _mm512_dpbusd_epi32(self.0, unsigned.0, signed.0) })
    }
    #[inline(always)]
    unsafe fn store_scaled(self, by: *const f32, factor: f32, to: *mut f32) {
        unsafe {
            let by = _mm512_mul_ps(_mm512_loadu_ps(by), _mm512_set1_ps(factor));
            _mm512_storeu_ps(to, _mm512_mul_ps(_mm512_cvtepi32_ps(self.0), by));
        }
    }
    #[inline(always)]
    unsafe fn total(self) -> i32 {
        unsafe { _mm512_reduce_add_epi32(self.0) }
    }
    #[inline(always)]
    unsafe fn transpose(from: *const i8, stride: usize, to: *mut i8, to_stride: usize) {
        unsafe { Avx512::transpose(from.cast(), stride / 4, to.cast(), to_stride / 4) }
    }
}

/// What both 256-bit levels share; `$add_products` is where they differ.
#[cfg(target_arch = "x86_64")]
macro_rules! bytes_256 {
    ($name:ident, $add_products:expr) => {
        #[derive(Clone, Copy)]
        pub(super) struct $name(__m256i);

        // SAFETY (every block): the callers guarantee the instruction set and valid pointers, as the trait demands.
        #[allow(clippy::undocumented_unsafe_blocks)]
        impl Bytes for $name {
            const LANES: usize = 8;

            #[inline(always)]
            unsafe fn splat(number: i32) -> Self {
                Self(unsafe { _mm256_set1_epi32(number) })
            }
            #[inline(always)]
            unsafe fn load(from: *const i8) -> Self {
                Self(unsafe { _mm256_loadu_si256(from.cast()) })
            }
            #[inline(always)]
            unsafe fn plus_128(self) -> Self {
                Self(unsafe { _mm256_xor_si256(self.0, _mm256_set1_epi8(-128)) })
            }
            #[inline(always)]
            unsafe fn add_products(self, unsigned: Self, signed: Self) -> Self {
                Self(unsafe { $add_products(self.0, unsigned.0, signed.0) })
            }
            #[inline(always)]
            unsafe fn store_scaled(self, by: *const f32, factor: f32, to: *mut f32) {
                unsafe {
                    let by = _mm256_mul_ps(_mm256_loadu_ps(by), _mm256_set1_ps(factor));
                    _mm256_storeu_ps(to, _mm256_mul_ps(_mm256_cvtepi32_ps(self.0), by));
                }
            }
            #[inline(always)]
            unsafe fn total(self) -> i32 {
                unsafe {
                    let four = _mm_add_epi32(_mm256_castsi256_si128(self.0), _mm256_extracti128_si256::<1>(self.0));
                    let two = _mm_add_epi32(four, _mm_shuffle_epi32::<0b1110>(four));
                    _mm_cvtsi128_si32(_mm_add_epi32(two, _mm_shuffle_epi32::<1>(two)))
                }
            }
            #[inline(always)]
            unsafe fn transpose(from: *const i8, stride: usize, to: *mut i8, to_stride: usize) {
                unsafe { Avx2::transpose(from.cast(), stride / 4, to.cast(), to_stride / 4) }
            }
        }
    };
}

#[cfg(target_arch = "x86_64")]
bytes_256!(AvxVnni, _mm256_dpbusd_avx_epi32);
#[cfg(target_arch = "x86_64")]
bytes_256!(Avx2Bytes, add_products_avx2);

/// By 16-bit halves: the instruction that multiplies bytes without VNNI cuts sums off at 16 bits.
///
/// # Safety
///
/// AVX2 is there.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
unsafe fn add_products_avx2(sums: __m256i, unsigned: __m256i, signed: __m256i) -> __m256i {
    // SAFETY: passed on from the caller.
    unsafe {
        let even = _mm256_madd_epi16(
            _mm256_and_si256(unsigned, _mm256_set1_epi16(0xff)),
            _mm256_srai_epi16::<8>(_mm256_slli_epi16::<8>(signed)),
        );
        let odd = _mm256_madd_epi16(_mm256_srli_epi16::<8>(unsigned), _mm256_srai_epi16::<8>(signed));
        _mm256_add_epi32(sums, _mm256_add_epi32(even, odd))
    }
}

/// Plain arrays, which compilers turn into whatever the target guarantees.
#[derive(Clone, Copy)]
pub(super) struct Portable([i32; 4]);

impl Bytes for Portable {
    const LANES: usize = 4;

    #[inline(always)]
    unsafe fn splat(number: i32) -> Self {
        Self([number; 4])
    }
    #[inline(always)]
    unsafe fn load(from: *const i8) -> Self {
        // SAFETY: the caller guarantees sixteen readable bytes.
        Self(unsafe { from.cast::<[i32; 4]>().read_unaligned() })
    }
    #[inline(always)]
    unsafe fn plus_128(self) -> Self {
        Self(self.0.map(|bytes| bytes ^ i32::from_ne_bytes([0x80; 4])))
    }
    #[inline(always)]
    unsafe fn add_products(self, unsigned: Self, signed: Self) -> Self {
        let mut sums = self.0;
        for (lane, sum) in sums.iter_mut().enumerate() {
            let pairs = unsigned.0[lane].to_ne_bytes().into_iter().zip(signed.0[lane].to_ne_bytes());
            *sum = pairs.fold(*sum, |sum, (u, s)| sum.wrapping_add(i32::from(u) * i32::from(s as i8)));
        }
        Self(sums)
    }
    #[inline(always)]
    unsafe fn store_scaled(self, by: *const f32, factor: f32, to: *mut f32) {
        for (i, sum) in self.0.into_iter().enumerate() {
            // SAFETY: the caller guarantees four elements.
            unsafe { *to.add(i) = sum as f32 * (*by.add(i) * factor) };
        }
    }
    #[inline(always)]
    unsafe fn total(self) -> i32 {
        self.0.into_iter().fold(0, i32::wrapping_add)
    }
    #[inline(always)]
    unsafe fn transpose(from: *const i8, stride: usize, to: *mut i8, to_stride: usize) {
        for row in 0..4 {
            for place in 0..4 {
                // SAFETY: the caller guarantees both blocks.
                unsafe {
                    let four = from.add(row * stride + 4 * place).cast::<[i8; 4]>().read();
                    to.add(place * to_stride + 4 * row).cast::<[i8; 4]>().write(four);
                }
            }
        }
    }
}
