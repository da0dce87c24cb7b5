//! AVX-512 F and DQ: 16 lanes.

#![allow(clippy::wildcard_imports, clippy::needless_range_loop)]

use super::{Avx2, EXP2, Simd};
use std::arch::x86_64::*;

#[derive(Clone, Copy)]
pub(crate) struct Avx512(pub(crate) __m512);

// SAFETY (every block): the callers guarantee AVX-512 F and DQ and valid pointers, as the trait demands.
#[allow(clippy::undocumented_unsafe_blocks)]
impl Simd for Avx512 {
    const LANES: usize = 16;

    #[inline(always)]
    unsafe fn splat(x: f32) -> Self {
        Self(unsafe { _mm512_set1_ps(x) })
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        Self(unsafe { _mm512_loadu_ps(from) })
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        unsafe { _mm512_storeu_ps(to, self.0) }
    }
    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        Self(unsafe { _mm512_add_ps(self.0, other.0) })
    }
    #[inline(always)]
    unsafe fn sub(self, other: Self) -> Self {
        Self(unsafe { _mm512_sub_ps(self.0, other.0) })
    }
    #[inline(always)]
    unsafe fn mul(self, other: Self) -> Self {
        Self(unsafe { _mm512_mul_ps(self.0, other.0) })
    }
    #[inline(always)]
    unsafe fn div(self, other: Self) -> Self {
        Self(unsafe { _mm512_div_ps(self.0, other.0) })
    }
    #[inline(always)]
    unsafe fn mul_add(self, factor: Self, addend: Self) -> Self {
        Self(unsafe { _mm512_fmadd_ps(self.0, factor.0, addend.0) })
    }
    #[inline(always)]
    unsafe fn max(self, other: Self) -> Self {
        Self(unsafe { _mm512_max_ps(self.0, other.0) })
    }
    #[inline(always)]
    unsafe fn reduce_max(self) -> f32 {
        unsafe { _mm512_reduce_max_ps(self.0) }
    }
    #[inline(always)]
    unsafe fn totals(four: [Self; 4]) -> [f32; 4] {
        unsafe {
            let mut halves = [Avx2(_mm256_setzero_ps()); 4];
            for i in 0..4 {
                let whole = four[i].0;
                halves[i].0 = _mm256_add_ps(_mm512_castps512_ps256(whole), _mm512_extractf32x8_ps::<1>(whole));
            }
            Avx2::totals(halves)
        }
    }
    #[inline(always)]
    unsafe fn exp2(self) -> Self {
        unsafe {
            // The remainder of an infinity is zero, and `scalef` saturates by itself: no range needs care.
            let rest = _mm512_reduce_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(self.0);
            let whole = _mm512_sub_ps(self.0, rest);
            let mut poly = _mm512_set1_ps(EXP2[6]);
            poly = _mm512_fmadd_ps(poly, rest, _mm512_set1_ps(EXP2[5]));
            poly = _mm512_fmadd_ps(poly, rest, _mm512_set1_ps(EXP2[4]));
            poly = _mm512_fmadd_ps(poly, rest, _mm512_set1_ps(EXP2[3]));
            poly = _mm512_fmadd_ps(poly, rest, _mm512_set1_ps(EXP2[2]));
            poly = _mm512_fmadd_ps(poly, rest, _mm512_set1_ps(EXP2[1]));
            poly = _mm512_fmadd_ps(poly, rest, _mm512_set1_ps(EXP2[0]));
            Self(_mm512_scalef_ps(poly, whole))
        }
    }
    #[inline(always)]
    unsafe fn transpose(from: *const f32, stride: usize, to: *mut f32, to_stride: usize) {
        unsafe {
            let mut row = [_mm512_setzero_ps(); 16];
            for i in 0..16 {
                row[i] = _mm512_loadu_ps(from.add(i * stride));
            }
            // 4 x 4 blocks inside the 128-bit lanes: pairs of rows, then pairs of pairs.
            let mut quad = [_mm512_setzero_ps(); 16];
            for i in 0..4 {
                let low01 = _mm512_castps_pd(_mm512_unpacklo_ps(row[4 * i], row[4 * i + 1]));
                let high01 = _mm512_castps_pd(_mm512_unpackhi_ps(row[4 * i], row[4 * i + 1]));
                let low23 = _mm512_castps_pd(_mm512_unpacklo_ps(row[4 * i + 2], row[4 * i + 3]));
                let high23 = _mm512_castps_pd(_mm512_unpackhi_ps(row[4 * i + 2], row[4 * i + 3]));
                quad[4 * i] = _mm512_castpd_ps(_mm512_unpacklo_pd(low01, low23));
                quad[4 * i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low01, low23));
                quad[4 * i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(high01, high23));
                quad[4 * i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(high01, high23));
            }
            // The 128-bit lanes themselves: quad[4 i + j] holds column 4 l + j of rows 4 i .. 4 i + 4 in lane l.
            for j in 0..4 {
                let a = _mm512_shuffle_f32x4::<0x88>(quad[j], quad[4 + j]);
                let b = _mm512_shuffle_f32x4::<0xdd>(quad[j], quad[4 + j]);
                let c = _mm512_shuffle_f32x4::<0x88>(quad[8 + j], quad[12 + j]);
                let d = _mm512_shuffle_f32x4::<0xdd>(quad[8 + j], quad[12 + j]);
                _mm512_storeu_ps(to.add(j * to_stride), _mm512_shuffle_f32x4::<0x88>(a, c));
                _mm512_storeu_ps(to.add((4 + j) * to_stride), _mm512_shuffle_f32x4::<0x88>(b, d));
                _mm512_storeu_ps(to.add((8 + j) * to_stride), _mm512_shuffle_f32x4::<0xdd>(a, c));
                _mm512_storeu_ps(to.add((12 + j) * to_stride), _mm512_shuffle_f32x4::<0xdd>(b, d));
            }
        }
    }
    #[inline(always)]
    unsafe fn stream(self, to: *mut f32) {
        unsafe { _mm512_stream_ps(to, self.0) }
    }
    #[inline(always)]
    unsafe fn fence() {
        unsafe { _mm_sfence() };
    }
}
