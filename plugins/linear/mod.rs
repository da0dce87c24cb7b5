//! `x * weight^T (+ bias)` for few rows: `ai.accordion::Linear` and `LinearBias` on the CPU. See `contract.md`.

// Forced inlining is what `simd` demands of every kernel.
#![allow(clippy::inline_always)]

mod operator;

pub use operator::{Linear, LinearBias};

use crate::parallel::{ParallelError, ParallelFor, SharedSlice};
#[cfg(target_arch = "x86_64")]
use crate::simd::{Avx2, Avx512};
use crate::simd::{Level, Portable, Simd, total};

/// Rows up to which reading the weights is what takes the time.
pub const MAX_ROWS: usize = 4;

/// Weight elements per task: long enough runs for the hardware to prefetch, short enough to share among threads.
const TASK: usize = 128 * 1024;

/// Weight rows that are read side by side, so that additions do not wait for each other.
const SIDE_BY_SIDE: usize = 4;

/// Why a call was refused.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LinearError {
    /// A tensor has another size than the others ask for.
    #[error("{what} has {found} elements, expected {expected}")]
    Length {
        /// Which one.
        what: &'static str,
        /// Its elements.
        found: usize,
        /// What the dimensions say.
        expected: usize,
    },
    /// More rows than the kernel is made for.
    #[error("x has {rows} rows, expected 1 to {MAX_ROWS}")]
    Rows {
        /// How many.
        rows: usize,
    },
    /// No threads.
    #[error(transparent)]
    Parallel(#[from] ParallelError),
}

/// The sizes of a call.
#[derive(Debug, Clone, Copy)]
pub struct Sizes {
    /// Rows of `x`, 1 to [`MAX_ROWS`].
    pub rows: usize,
    /// Columns of `x` and of the weight.
    pub inner: usize,
    /// Rows of the weight.
    pub outer: usize,
}

/// `output[r, o] = sum_i x[r, i] * weight[o, i] (+ bias[o])`.
///
/// # Errors
///
/// The lengths do not fit, there are no or too many rows, or threads could not be had.
pub fn linear(
    sizes: Sizes,
    x: &[f32],
    weight: &[f32],
    bias: Option<&[f32]>,
    output: &mut [f32],
    threads: &dyn ParallelFor,
) -> Result<(), LinearError> {
    linear_at(Level::detect(), sizes, x, weight, bias, output, threads)
}

fn linear_at(
    level: Level,
    sizes: Sizes,
    x: &[f32],
    weight: &[f32],
    bias: Option<&[f32]>,
    output: &mut [f32],
    threads: &dyn ParallelFor,
) -> Result<(), LinearError> {
    let Sizes { rows, inner, outer } = sizes;
    if rows == 0 || rows > MAX_ROWS {
        return Err(LinearError::Rows { rows });
    }
    let lengths = [
        ("x", x.len(), rows.saturating_mul(inner)),
        ("weight", weight.len(), outer.saturating_mul(inner)),
        ("bias", bias.map_or(outer, <[f32]>::len), outer),
        ("output", output.len(), rows.saturating_mul(outer)),
    ];
    if let Some(&(what, found, expected)) = lengths.iter().find(|(_, found, expected)| found != expected) {
        return Err(LinearError::Length { what, found, expected });
    }
    if outer == 0 {
        return Ok(());
    }
    let kernel = kernel(level, rows);
    let per_task = (TASK / inner.max(1)).next_multiple_of(SIDE_BY_SIDE).max(SIDE_BY_SIDE);
    let output = SharedSlice::new(output);
    threads.run(outer.div_ceil(per_task), &|task| {
        let start = task * per_task;
        let count = per_task.min(outer - start);
        let mut sums = [[0.0f32; SIDE_BY_SIDE]; MAX_ROWS];
        for first in (start..start + count).step_by(SIDE_BY_SIDE) {
            let wide = SIDE_BY_SIDE.min(start + count - first);
            // The last weight row stands in for those behind the end.
            let places: [usize; SIDE_BY_SIDE] = std::array::from_fn(|i| (first + i).min(outer - 1) * inner);
            // SAFETY: the kernel chose an instruction set of this processor; every place is the start of a weight row,
            // and `x` has `rows` rows, all of `inner` elements as checked above.
            unsafe { kernel(x.as_ptr(), weight.as_ptr(), &places, inner, &mut sums) };
            for (row, sums) in sums.iter().enumerate().take(rows) {
                // SAFETY: every task has weight rows of its own, and so places of its own in every output row.
                let out = unsafe { output.piece(row * outer + first, wide) };
                for (i, (out, sum)) in out.iter_mut().zip(sums).enumerate() {
                    *out = sum + bias.map_or(0.0, |bias| bias[first + i]);
                }
            }
        }
    })?;
    Ok(())
}

type Kernel = unsafe fn(*const f32, *const f32, &[usize; SIDE_BY_SIDE], usize, &mut [[f32; SIDE_BY_SIDE]; MAX_ROWS]);

/// The kernel for `rows` rows at `level`, or at the widest narrower one that this processor has.
fn kernel(level: Level, rows: usize) -> Kernel {
    macro_rules! instance {
        ($($features:literal)?, $vector:ty) => {{
            $(#[target_feature(enable = $features)])?
            unsafe fn instance<const ROWS: usize>(
                x: *const f32,
                weight: *const f32,
                places: &[usize; SIDE_BY_SIDE],
                inner: usize,
                sums: &mut [[f32; SIDE_BY_SIDE]; MAX_ROWS],
            ) {
                // SAFETY: passed on from the caller.
                unsafe { dot::<$vector, ROWS>(x, weight, places, inner, sums) }
            }
            match rows {
                1 => instance::<1>,
                2 => instance::<2>,
                3 => instance::<3>,
                _ => instance::<4>,
            }
        }};
    }
    match level.min(Level::detect()) {
        #[cfg(target_arch = "x86_64")]
        Level::Avx512 => instance!("avx512f,avx512dq", Avx512),
        #[cfg(target_arch = "x86_64")]
        Level::Avx2 => instance!("avx2,fma", Avx2),
        _ => instance!(, Portable),
    }
}

/// The products of `ROWS` rows of `x` with the weight rows at `places`.
///
/// # Safety
///
/// The instruction set of `V` is there, `x` is good for `ROWS * inner` elements and `weight` for `inner` from every place
/// on.
#[inline(always)]
unsafe fn dot<V: Simd, const ROWS: usize>(
    x: *const f32,
    weight: *const f32,
    places: &[usize; SIDE_BY_SIDE],
    inner: usize,
    sums: &mut [[f32; SIDE_BY_SIDE]; MAX_ROWS],
) {
    let whole = inner / V::LANES * V::LANES;
    // SAFETY: whole vectors below `inner`; the rest one by one.
    unsafe {
        let mut lanes = [[V::splat(0.0); SIDE_BY_SIDE]; ROWS];
        for i in (0..whole).step_by(V::LANES) {
            let weights: [V; SIDE_BY_SIDE] = std::array::from_fn(|w| V::load(weight.add(places[w] + i)));
            for (row, lanes) in lanes.iter_mut().enumerate() {
                let x = V::load(x.add(row * inner + i));
                for w in 0..SIDE_BY_SIDE {
                    lanes[w] = weights[w].mul_add(x, lanes[w]);
                }
            }
        }
        for (row, (lanes, sums)) in lanes.iter().zip(sums).enumerate() {
            for w in 0..SIDE_BY_SIDE {
                let mut sum = total(lanes[w]);
                for i in whole..inner {
                    sum += *weight.add(places[w] + i) * *x.add(row * inner + i);
                }
                sums[w] = sum;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::float_cmp)]

    use super::*;
    use crate::parallel::Threads;
    use proptest::prelude::*;

    fn noise(count: usize, seed: u32) -> Vec<f32> {
        (0..count as u32).map(|i| ((i * 2_654_435_761 + seed) % 2000) as f32 / 1000.0 - 1.0).collect()
    }

    proptest! {
        #[test]
        fn agrees_with_the_definition_at_every_level(
            rows in 1..=MAX_ROWS, inner in 0..200_usize, outer in 0..150_usize, biased: bool
        ) {
            let (x, weight, bias) = (noise(rows * inner, 1), noise(outer * inner, 2), noise(outer, 3));
            for level in Level::available() {
                let mut out = vec![f32::NAN; rows * outer];
                let bias = biased.then_some(&*bias);
                linear_at(level, Sizes { rows, inner, outer }, &x, &weight, bias, &mut out, &Threads(2)).unwrap();
                for row in 0..rows {
                    for o in 0..outer {
                        let products = x[row * inner..].iter().zip(&weight[o * inner..]).take(inner);
                        let exact: f64 = products.map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
                        let exact = exact + bias.map_or(0.0, |bias| f64::from(bias[o]));
                        let found = f64::from(out[row * outer + o]);
                        prop_assert!((found - exact).abs() < 1e-4, "{level:?} [{row}, {o}]: {found}, expected {exact}");
                    }
                }
            }
        }
    }

    #[test]
    fn threads_do_not_change_a_bit() {
        let sizes = Sizes { rows: 1, inner: 576, outer: 1536 };
        let (x, weight) = (noise(576, 4), noise(576 * 1536, 5));
        let run = |threads| {
            let mut out = vec![0.0; 1536];
            linear(sizes, &x, &weight, None, &mut out, &Threads(threads)).unwrap();
            out
        };
        assert_eq!(run(1), run(3));
    }

    #[test]
    fn refuses_what_does_not_fit() {
        let refuse = |rows, x: usize, weight: usize| {
            let sizes = Sizes { rows, inner: 3, outer: 2 };
            let mut out = vec![0.0; 2 * rows];
            linear(sizes, &vec![0.0; x], &vec![0.0; weight], None, &mut out, &Threads(1)).unwrap_err().to_string()
        };
        assert_eq!(refuse(1, 4, 6), "x has 4 elements, expected 3");
        assert_eq!(refuse(1, 3, 7), "weight has 7 elements, expected 6");
        assert_eq!(refuse(5, 15, 6), "x has 5 rows, expected 1 to 4");
        assert_eq!(refuse(0, 0, 6), "x has 0 rows, expected 1 to 4");
    }
}
