//! Plain arrays of 4 lanes, which compilers turn into whatever the target guarantees.

use super::{EXP2, Simd};

#[derive(Clone, Copy)]
pub(crate) struct Portable(pub(crate) [f32; 4]);

macro_rules! lanewise {
    ($f:expr) => {{
        let f = $f;
        Self([f(0), f(1), f(2), f(3)])
    }};
}

impl Simd for Portable {
    const LANES: usize = 4;

    #[inline(always)]
    unsafe fn splat(x: f32) -> Self {
        Self([x; 4])
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: the caller guarantees four readable elements.
        Self(unsafe { from.cast::<[f32; 4]>().read_unaligned() })
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: the caller guarantees four writable elements.
        unsafe { to.cast::<[f32; 4]>().write_unaligned(self.0) }
    }
    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        lanewise!(|i: usize| self.0[i] + other.0[i])
    }
    #[inline(always)]
    unsafe fn sub(self, other: Self) -> Self {
        lanewise!(|i: usize| self.0[i] - other.0[i])
    }
    #[inline(always)]
    unsafe fn mul(self, other: Self) -> Self {
        lanewise!(|i: usize| self.0[i] * other.0[i])
    }
    #[inline(always)]
    unsafe fn div(self, other: Self) -> Self {
        lanewise!(|i: usize| self.0[i] / other.0[i])
    }
    #[inline(always)]
    unsafe fn mul_add(self, factor: Self, addend: Self) -> Self {
        // Not `f32::mul_add`: without the instruction it is a library call.
        lanewise!(|i: usize| self.0[i] * factor.0[i] + addend.0[i])
    }
    #[inline(always)]
    unsafe fn max(self, other: Self) -> Self {
        lanewise!(|i: usize| if self.0[i] > other.0[i] { self.0[i] } else { other.0[i] })
    }
    #[inline(always)]
    unsafe fn reduce_max(self) -> f32 {
        self.0.iter().copied().fold(f32::NEG_INFINITY, f32::max)
    }
    #[inline(always)]
    unsafe fn totals(four: [Self; 4]) -> [f32; 4] {
        four.map(|Self([a, b, c, d])| (a + b) + (c + d))
    }
    #[inline(always)]
    unsafe fn exp2(self) -> Self {
        lanewise!(|i: usize| exp2(self.0[i]))
    }
    #[inline(always)]
    unsafe fn transpose(from: *const f32, stride: usize, to: *mut f32, to_stride: usize) {
        for i in 0..4 {
            for j in 0..4 {
                // SAFETY: the caller guarantees both blocks.
                unsafe { *to.add(j * to_stride + i) = *from.add(i * stride + j) };
            }
        }
    }
    #[inline(always)]
    unsafe fn stream(self, to: *mut f32) {
        // SAFETY: passed on from the caller.
        unsafe { self.store(to) }
    }
    #[inline(always)]
    unsafe fn fence() {}
}

#[inline(always)]
fn exp2(x: f32) -> f32 {
    /// Adding and subtracting it rounds to the nearest integer.
    const ROUND: f32 = 12_582_912.0;
    if x < -126.0 {
        return 0.0;
    }
    let clamped = if x > 127.4 { 127.4 } else { x };
    let shifted = clamped + ROUND;
    let rest = clamped - (shifted - ROUND);
    let mut poly = EXP2[6];
    for c in EXP2[..6].iter().rev() {
        poly = poly * rest + c;
    }
    // The low bits of `shifted` are the integer; NaN keeps `poly` NaN whatever the factor is.
    poly * f32::from_bits(shifted.to_bits().wrapping_add(127) << 23)
}
