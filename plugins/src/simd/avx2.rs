//! AVX2 with FMA: 8 lanes.

#![allow(clippy::wildcard_imports, clippy::needless_range_loop)]

use super::{EXP2, Simd};
use std::arch::x86_64::*;

#[derive(Clone, Copy)]
pub(crate) struct Avx2(pub(crate) __m256);

// SAFETY (every block): the callers guarantee AVX2, FMA and valid pointers, as the trait demands.
#[allow(clippy::undocumented_unsafe_blocks)]
impl Simd for Avx2 {
    const LANES: usize = 8;

    #[inline(always)]
    unsafe fn splat(x: f32) -> Self {
        Self(unsafe { _mm256_set1_ps(x) })
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        Self(unsafe { _mm256_loadu_ps(from) })
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        unsafe { _mm256_storeu_ps(to, self.0) }
    }
    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        Self(unsafe { _mm256_add_ps(self.0, other.0) })
    }
    #[inline(always)]
    unsafe fn sub(self, other: Self) -> Self {
        Self(unsafe { _mm256_sub_ps(self.0, other.0) })
    }
    #[inline(always)]
    unsafe fn mul(self, other: Self) -> Self {
        Self(unsafe { _mm256_mul_ps(self.0, other.0) })
    }
    #[inline(always)]
    unsafe fn div(self, other: Self) -> Self {
        Self(unsafe { _mm256_div_ps(self.0, other.0) })
    }
    #[inline(always)]
    unsafe fn mul_add(self, factor: Self, addend: Self) -> Self {
        Self(unsafe { _mm256_fmadd_ps(self.0, factor.0, addend.0) })
    }
    #[inline(always)]
    unsafe fn max(self, other: Self) -> Self {
        Self(unsafe { _mm256_max_ps(self.0, other.0) })
    }
    #[inline(always)]
    unsafe fn reduce_max(self) -> f32 {
        unsafe {
            let four = _mm_max_ps(_mm256_castps256_ps128(self.0), _mm256_extractf128_ps::<1>(self.0));
            let two = _mm_max_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_max_ss(two, _mm_shuffle_ps::<1>(two, two)))
        }
    }
    #[inline(always)]
    unsafe fn totals(four: [Self; 4]) -> [f32; 4] {
        unsafe {
            let [Self(a), Self(b), Self(c), Self(d)] = four;
            // Neighbours are added, twice: each half holds one sum of each vector.
            let sums = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
            let sums = _mm_add_ps(_mm256_castps256_ps128(sums), _mm256_extractf128_ps::<1>(sums));
            let mut totals = [0.0; 4];
            _mm_storeu_ps(totals.as_mut_ptr(), sums);
            totals
        }
    }
    #[inline(always)]
    unsafe fn exp2(self) -> Self {
        unsafe {
            // Clamped to where the exponent field can hold the result; `max` and `min` return their second operand
            // when the first comparison is unordered, so NaN stays.
            let x = _mm256_min_ps(_mm256_set1_ps(127.4), _mm256_max_ps(_mm256_set1_ps(-126.0), self.0));
            let whole = _mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(x);
            let rest = _mm256_sub_ps(x, whole);
            let mut poly = _mm256_set1_ps(EXP2[6]);
            poly = _mm256_fmadd_ps(poly, rest, _mm256_set1_ps(EXP2[5]));
            poly = _mm256_fmadd_ps(poly, rest, _mm256_set1_ps(EXP2[4]));
            poly = _mm256_fmadd_ps(poly, rest, _mm256_set1_ps(EXP2[3]));
            poly = _mm256_fmadd_ps(poly, rest, _mm256_set1_ps(EXP2[2]));
            poly = _mm256_fmadd_ps(poly, rest, _mm256_set1_ps(EXP2[1]));
            poly = _mm256_fmadd_ps(poly, rest, _mm256_set1_ps(EXP2[0]));
            let biased = _mm256_add_epi32(_mm256_cvtps_epi32(whole), _mm256_set1_epi32(127));
            let scaled = _mm256_mul_ps(poly, _mm256_castsi256_ps(_mm256_slli_epi32::<23>(biased)));
            let in_range = _mm256_cmp_ps::<_CMP_NLT_UQ>(self.0, _mm256_set1_ps(-126.0));
            Self(_mm256_and_ps(scaled, in_range))
        }
    }
    #[inline(always)]
    unsafe fn transpose(from: *const f32, stride: usize, to: *mut f32, to_stride: usize) {
        unsafe {
            let mut row = [_mm256_setzero_ps(); 8];
            for i in 0..8 {
                row[i] = _mm256_loadu_ps(from.add(i * stride));
            }
            // 4 x 4 blocks inside the 128-bit lanes, then the lanes themselves.
            let mut quad = [_mm256_setzero_ps(); 8];
            for i in 0..2 {
                let low01 = _mm256_unpacklo_ps(row[4 * i], row[4 * i + 1]);
                let high01 = _mm256_unpackhi_ps(row[4 * i], row[4 * i + 1]);
                let low23 = _mm256_unpacklo_ps(row[4 * i + 2], row[4 * i + 3]);
                let high23 = _mm256_unpackhi_ps(row[4 * i + 2], row[4 * i + 3]);
                quad[4 * i] = _mm256_shuffle_ps::<0x44>(low01, low23);
                quad[4 * i + 1] = _mm256_shuffle_ps::<0xee>(low01, low23);
                quad[4 * i + 2] = _mm256_shuffle_ps::<0x44>(high01, high23);
                quad[4 * i + 3] = _mm256_shuffle_ps::<0xee>(high01, high23);
            }
            for j in 0..4 {
                let low = _mm256_permute2f128_ps::<0x20>(quad[j], quad[4 + j]);
                let high = _mm256_permute2f128_ps::<0x31>(quad[j], quad[4 + j]);
                _mm256_storeu_ps(to.add(j * to_stride), low);
                _mm256_storeu_ps(to.add((4 + j) * to_stride), high);
            }
        }
    }
    #[inline(always)]
    unsafe fn stream(self, to: *mut f32) {
        unsafe { _mm256_stream_ps(to, self.0) }
    }
    #[inline(always)]
    unsafe fn fence() {
        unsafe { _mm_sfence() };
    }
}
