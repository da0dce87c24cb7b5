//! `silu(gate) * up` in one pass: `ai.accordion::SwiGlu` on the CPU. See `contract.md`.

// Forced inlining is what `simd` demands of every kernel.
#![allow(clippy::inline_always)]

mod operator;

pub use operator::SwiGlu;

use std::f32::consts::LOG2_E;

use crate::parallel::{ParallelError, ParallelFor, SharedSlice};
#[cfg(target_arch = "x86_64")]
use crate::simd::{Avx2, Avx512};
use crate::simd::{Level, Portable, Simd};

/// Elements per task: the three pieces together stay well inside a second-level cache.
const TASK: usize = 16 * 1024;

/// Why a call was refused.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SwiGluError {
    /// The three tensors have different sizes.
    #[error("gate has {gate} elements, up {up} and the output {output}: expected the same")]
    Length {
        /// Elements of `gate`.
        gate: usize,
        /// Elements of `up`.
        up: usize,
        /// Elements of the output.
        output: usize,
    },
    /// No threads.
    #[error(transparent)]
    Parallel(#[from] ParallelError),
}

/// `output[i] = gate[i] / (1 + exp(-gate[i])) * up[i]`.
///
/// # Errors
///
/// The lengths differ, or threads could not be had.
pub fn swiglu(gate: &[f32], up: &[f32], output: &mut [f32], threads: &dyn ParallelFor) -> Result<(), SwiGluError> {
    swiglu_at(Level::detect(), gate, up, output, threads)
}

fn swiglu_at(
    level: Level,
    gate: &[f32],
    up: &[f32],
    output: &mut [f32],
    threads: &dyn ParallelFor,
) -> Result<(), SwiGluError> {
    let len = gate.len();
    if up.len() != len || output.len() != len {
        return Err(SwiGluError::Length { gate: len, up: up.len(), output: output.len() });
    }
    let kernel = kernel(level);
    let output = SharedSlice::new(output);
    threads.run(len.div_ceil(TASK), &|task| {
        let start = task * TASK;
        let len = TASK.min(len - start);
        // SAFETY: every task has its own piece.
        let out = unsafe { output.piece(start, len) };
        // SAFETY: `kernel` chose an instruction set of this processor, and all three slices have `len` elements.
        unsafe { kernel(gate[start..start + len].as_ptr(), up[start..start + len].as_ptr(), out.as_mut_ptr(), len) };
    })?;
    Ok(())
}

type Kernel = unsafe fn(*const f32, *const f32, *mut f32, usize);

/// The kernel of `level`, or of the widest narrower one that this processor has.
fn kernel(level: Level) -> Kernel {
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx512f,avx512dq")]
    unsafe fn avx512(gate: *const f32, up: *const f32, out: *mut f32, len: usize) {
        // SAFETY: passed on from the caller.
        unsafe { all::<Avx512>(gate, up, out, len) }
    }
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2,fma")]
    unsafe fn avx2(gate: *const f32, up: *const f32, out: *mut f32, len: usize) {
        // SAFETY: passed on from the caller.
        unsafe { all::<Avx2>(gate, up, out, len) }
    }
    match level.min(Level::detect()) {
        #[cfg(target_arch = "x86_64")]
        Level::Avx512 => avx512,
        #[cfg(target_arch = "x86_64")]
        Level::Avx2 => avx2,
        _ => all::<Portable>,
    }
}

/// # Safety
///
/// The instruction set of `V` is there, and all three pointers are good for `len` elements.
#[inline(always)]
unsafe fn all<V: Simd>(gate: *const f32, up: *const f32, out: *mut f32, len: usize) {
    let whole = len / V::LANES * V::LANES;
    // SAFETY: whole vectors below `len`; the rest goes through a vector of its own.
    unsafe {
        for i in (0..whole).step_by(V::LANES) {
            one(V::load(gate.add(i)), V::load(up.add(i))).store(out.add(i));
        }
        let mut rest = [[0.0f32; 16]; 3];
        let count = len - whole;
        std::ptr::copy_nonoverlapping(gate.add(whole), rest[0].as_mut_ptr(), count);
        std::ptr::copy_nonoverlapping(up.add(whole), rest[1].as_mut_ptr(), count);
        one(V::load(rest[0].as_ptr()), V::load(rest[1].as_ptr())).store(rest[2].as_mut_ptr());
        std::ptr::copy_nonoverlapping(rest[2].as_ptr(), out.add(whole), count);
    }
}

/// # Safety
///
/// The instruction set of `V` is there.
#[inline(always)]
unsafe fn one<V: Simd>(gate: V, up: V) -> V {
    // SAFETY: passed on from the caller.
    unsafe {
        let exp = gate.mul(V::splat(-LOG2_E)).exp2();
        gate.mul(up).div(exp.add(V::splat(1.0)))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::float_cmp)]

    use super::*;
    use crate::parallel::Threads;

    #[test]
    fn agrees_with_the_definition_at_every_level() {
        // From where the sigmoid vanishes to where it is one, at a length that leaves a rest in every task.
        let gate: Vec<f32> = (0..40_003).map(|i| (i as f32 - 20_000.0) * 0.005).collect();
        let up: Vec<f32> = (0..40_003).map(|i| (i as f32 * 0.37).sin() * 5.0).collect();
        for level in Level::available() {
            let mut out = vec![f32::NAN; gate.len()];
            swiglu_at(level, &gate, &up, &mut out, &Threads(2)).unwrap();
            for ((&g, &u), &found) in gate.iter().zip(&up).zip(&out) {
                let (g, u) = (f64::from(g), f64::from(u));
                let expected = g / (1.0 + (-g).exp()) * u;
                let bound = 1e-6 * expected.abs() + 1e-36;
                // The exponent of a negative gate carries the rounding of the product with log2(e).
                let bound = bound * (1.0 + g.abs() / 8.0);
                assert!((f64::from(found) - expected).abs() <= bound, "{level:?}: silu({g}) * {u} is {found}");
            }
        }
    }

    #[test]
    fn infinities_and_nan() {
        for level in Level::available() {
            let mut out = [0.0; 3];
            swiglu_at(level, &[f32::INFINITY, f32::NAN, 0.0], &[2.0, 1.0, 7.0], &mut out, &Threads(1)).unwrap();
            assert!(out[0] == f32::INFINITY && out[1].is_nan() && out[2] == 0.0, "{level:?}: {out:?}");
        }
    }

    #[test]
    fn refuses_different_lengths() {
        let error = swiglu(&[0.0; 3], &[0.0; 2], &mut [0.0; 3], &Threads(1)).unwrap_err();
        assert_eq!(error.to_string(), "gate has 3 elements, up 2 and the output 3: expected the same");
    }
}
