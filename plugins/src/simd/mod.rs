//! One vector type per instruction set, so that every kernel is written once.
//!
//! [`Simd`] is what the kernels need from a vector of `f32`; [`Level`] is the instruction set found at run time.
//! A kernel is a generic `#[inline(always)]` function, and each level instantiates it inside a function that carries
//! the `#[target_feature]` of that level: only there do the intrinsics become single instructions.

// Without forced inlining an intrinsic would be a function call: only the function that carries the target feature may
// contain it.
#![allow(clippy::inline_always)]

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod portable;

#[cfg(target_arch = "x86_64")]
pub(crate) use avx2::Avx2;
#[cfg(target_arch = "x86_64")]
pub(crate) use avx512::Avx512;
pub(crate) use portable::Portable;

use std::sync::OnceLock;

/// An instruction set that the kernels are compiled for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Level {
    /// Whatever the target guarantees.
    Portable,
    /// AVX2 with FMA, 8 lanes.
    Avx2,
    /// AVX-512 F and DQ, 16 lanes.
    Avx512,
}

impl Level {
    /// The widest level this processor has.
    pub(crate) fn detect() -> Self {
        static FOUND: OnceLock<Level> = OnceLock::new();
        *FOUND.get_or_init(|| Self::available().last().copied().unwrap_or(Self::Portable))
    }

    /// Every level this processor has, narrowest first.
    pub(crate) fn available() -> Vec<Self> {
        let mut levels = vec![Self::Portable];
        #[cfg(target_arch = "x86_64")]
        {
            if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
                levels.push(Self::Avx2);
                if is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512dq") {
                    levels.push(Self::Avx512);
                }
            }
        }
        levels
    }
}

/// Coefficients of the polynomial for `2^r` on `[-1/2, 1/2]`, constant term first: the minimax fit of degree 6 in
/// relative error (2e-9), with the constant term exactly one so that `2^0 = 1`.
#[allow(clippy::excessive_precision)]
const EXP2: [f32; 7] = [
    1.0,
    0.693_147_182_464_599_6,
    0.240_226_462_483_406_07,
    0.055_503_286_421_298_98,
    0.009_618_489_071_726_799,
    0.001_339_993_090_368_807_3,
    0.000_153_458_124_259_468_6,
];

/// A vector of `f32`.
///
/// # Safety
///
/// Every method requires the instruction set of the implementing type; `load` and `store` also require `LANES`
/// readable or writable elements at the pointer.
pub(crate) trait Simd: Copy {
    /// Elements per vector.
    const LANES: usize;

    unsafe fn splat(x: f32) -> Self;
    unsafe fn load(from: *const f32) -> Self;
    unsafe fn store(self, to: *mut f32);
    unsafe fn add(self, other: Self) -> Self;
    unsafe fn sub(self, other: Self) -> Self;
    unsafe fn mul(self, other: Self) -> Self;
    unsafe fn div(self, other: Self) -> Self;
    /// `self * factor + addend`.
    unsafe fn mul_add(self, factor: Self, addend: Self) -> Self;
    /// The larger of both; where either is NaN, either may be returned.
    unsafe fn max(self, other: Self) -> Self;
    /// The largest element.
    unsafe fn reduce_max(self) -> f32;
    /// The sums of the elements of four vectors.
    unsafe fn totals(four: [Self; 4]) -> [f32; 4];
    /// `2^self`, relative error about 1e-7; NaN stays NaN, minus infinity becomes zero.
    unsafe fn exp2(self) -> Self;
    /// Transposes the `LANES` x `LANES` block at `from` (row stride `stride` elements) to `to` (row stride
    /// `to_stride`).
    unsafe fn transpose(from: *const f32, stride: usize, to: *mut f32, to_stride: usize);
    /// As `store`, without fetching what is overwritten into a cache, where the processor can. `to` is aligned to the
    /// vector, and other threads may only look after this one has called `fence`.
    unsafe fn stream(self, to: *mut f32);
    /// Everything streamed is written.
    unsafe fn fence();
}

/// How many bytes ahead weights are asked for that are read once: their rows are too short for the processor to notice in
/// time how the reading goes on.
pub(crate) const AHEAD: usize = 8192;

/// Asks for the cache line at `at`, which need not be memory at all.
#[inline(always)]
pub(crate) fn prefetch<T>(at: *const T) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: every x86-64 processor has the instruction, and it does nothing where there is no memory.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(at.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = at;
}

/// The sum of all lanes, by halves.
///
/// # Safety
///
/// The instruction set of `V` is there.
#[inline(always)]
pub(crate) unsafe fn total<V: Simd>(lanes: V) -> f32 {
    let mut values = [0.0f32; 16];
    // SAFETY: no vector has more than 16 lanes.
    unsafe { lanes.store(values.as_mut_ptr()) };
    let mut width = V::LANES;
    while width > 1 {
        width /= 2;
        for i in 0..width {
            values[i] += values[i + width];
        }
    }
    values[0]
}
