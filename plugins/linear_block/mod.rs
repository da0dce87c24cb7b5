//! Linear layers over blocks of integers that share a scale: `ai.accordion::LinearBlock8` and `LinearBlock4` on the CPU.
//! See `contract.md`.

mod kernels;
mod operator;
#[cfg(test)]
mod tests;
mod vectors;

pub use operator::{LinearBlock4, LinearBlock8};

use self::kernels::{Dots, Kernels, Sums};
use crate::parallel::{ParallelError, ParallelFor, SharedSlice};
use crate::scratch::Scratch;
use crate::simd::Level;
use std::cell::RefCell;

/// Bits of a number, 8 or 4.
type Bits = u8;

/// Rows of activations that a weight row is expanded for at once.
const ROWS_AT_ONCE: usize = 4;

/// Smallest block.
pub const MIN_BLOCK: usize = 16;

/// Weight rows that are read side by side, so that additions do not wait for each other.
const SIDE_BY_SIDE: usize = 4;

/// Numbers of the weight that are expanded per task.
const TASK: usize = 32 * 1024;

/// Numbers of the weight per task at most, for few rows. With less to do than this, what another thread takes over is
/// done before it has noticed, and in smaller pieces the hardware prefetches worse.
const DOT_TASK: usize = 512 * 1024;

/// Why a call was refused.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LinearBlockError {
    /// A tensor has another size than the others ask for.
    #[error("{what} has {found} {of}, expected {expected}")]
    Length {
        /// Which one.
        what: &'static str,
        /// What is counted: elements or bytes.
        of: &'static str,
        /// How many there are.
        found: usize,
        /// What the dimensions say.
        expected: usize,
    },
    /// A block that vectors cannot be cut into.
    #[error("attribute block_size is {0}, expected a power of two of at least {MIN_BLOCK}")]
    BlockSize(usize),
    /// Rows that blocks do not fill.
    #[error("x has {inner} columns, expected a multiple of block_size, {block}")]
    Inner {
        /// How many.
        inner: usize,
        /// Columns per block.
        block: usize,
    },
    /// No threads.
    #[error(transparent)]
    Parallel(#[from] ParallelError),
}

/// A weight of `BITS` bits, 8 or 4.
#[derive(Debug, Clone, Copy)]
pub struct Weight<'a, const BITS: u8> {
    /// Rows, out.
    pub outer: usize,
    /// Columns, in; a multiple of `block`.
    pub inner: usize,
    /// Columns that share a scale; a power of two of at least [`MIN_BLOCK`].
    pub block: usize,
    /// `[outer, inner]`; two numbers of 4 bits to a byte, the first of them in the lower half.
    pub numbers: &'a [u8],
    /// `[outer, inner / block]`.
    pub scale: &'a [f32],
}

impl<const BITS: u8> Weight<'_, BITS> {
    const IS_8_OR_4: () = assert!(BITS == 8 || BITS == 4);

    fn check(&self) -> Result<(), LinearBlockError> {
        let () = Self::IS_8_OR_4;
        let Self { outer, inner, block, .. } = *self;
        if block < MIN_BLOCK || !block.is_power_of_two() {
            return Err(LinearBlockError::BlockSize(block));
        }
        if !inner.is_multiple_of(block) {
            return Err(LinearBlockError::Inner { inner, block });
        }
        let bytes = outer.saturating_mul(inner / (8 / usize::from(BITS)));
        expect("weight", "bytes", self.numbers.len(), bytes)?;
        expect("scale", "elements", self.scale.len(), outer.saturating_mul(inner / block))
    }

    /// The rows `first..first + count`.
    fn rows(&self, first: usize, count: usize) -> Self {
        let (bytes, blocks) = (self.inner * usize::from(BITS) / 8, self.inner / self.block);
        Self {
            outer: count,
            numbers: &self.numbers[first * bytes..][..count * bytes],
            scale: &self.scale[first * blocks..][..count * blocks],
            ..*self
        }
    }

    /// `output[o, i] = numbers[o, i] * scale[o, i / block]`.
    ///
    /// # Errors
    ///
    /// The lengths do not fit, the block is not allowed, or threads could not be had.
    pub fn dequantize(&self, output: &mut [f32], threads: &dyn ParallelFor) -> Result<(), LinearBlockError> {
        self.dequantize_at(Level::detect(), output, threads)
    }

    fn dequantize_at(
        &self,
        level: Level,
        output: &mut [f32],
        threads: &dyn ParallelFor,
    ) -> Result<(), LinearBlockError> {
        self.check()?;
        let Self { outer, inner, block, .. } = *self;
        expect("output", "elements", output.len(), outer * inner)?;
        if inner == 0 {
            return Ok(());
        }
        let kernels = Kernels::of::<BITS>(level);
        let per_task = (TASK / inner).max(1);
        let output = SharedSlice::new(output);
        threads.run(outer.div_ceil(per_task), &|task| {
            let first = task * per_task;
            let rows = self.rows(first, per_task.min(outer - first));
            // SAFETY: the kernels are of an instruction set of this processor; every task has its own rows.
            unsafe {
                let to = output.piece(first * inner, rows.outer * inner);
                (kernels.dequantize)(rows.numbers, rows.scale, block, to);
            }
        })?;
        Ok(())
    }
}

fn expect(what: &'static str, of: &'static str, found: usize, expected: usize) -> Result<(), LinearBlockError> {
    if found == expected { Ok(()) } else { Err(LinearBlockError::Length { what, of, found, expected }) }
}

thread_local! {
    /// Activations as the kernel wants them, kept from call to call.
    static ARRANGED: RefCell<Scratch> = RefCell::default();
}

/// `output[r, o] = sum_i x[r, i] * numbers[o, i] * scale[o, i / block]`. The weight is read once, and expanded for every
/// `ROWS_AT_ONCE` rows.
///
/// # Errors
///
/// The lengths do not fit, the block is not allowed, or threads could not be had.
pub fn linear_block<const BITS: u8>(
    rows: usize,
    x: &[f32],
    weight: &Weight<'_, BITS>,
    output: &mut [f32],
    threads: &dyn ParallelFor,
) -> Result<(), LinearBlockError> {
    linear_block_at(Level::detect(), rows, x, weight, output, threads)
}

fn linear_block_at<const BITS: u8>(
    level: Level,
    rows: usize,
    x: &[f32],
    weight: &Weight<'_, BITS>,
    output: &mut [f32],
    threads: &dyn ParallelFor,
) -> Result<(), LinearBlockError> {
    let Weight { outer, inner, block, .. } = *weight;
    weight.check()?;
    expect("x", "elements", x.len(), rows.saturating_mul(inner))?;
    expect("output", "elements", output.len(), rows.saturating_mul(outer))?;
    if rows == 0 || inner == 0 || outer == 0 {
        output.fill(0.0);
        return Ok(());
    }
    let kernels = Kernels::of::<BITS>(level);
    // Taken, not borrowed: whatever else this thread may run meanwhile finds memory of its own.
    let mut arranged = ARRANGED.take();
    let x_stride = inner.next_multiple_of(kernels.chunk);
    for (x, to) in x.chunks_exact(inner).zip(arranged.at_least(rows * x_stride).chunks_exact_mut(x_stride)) {
        // SAFETY: the kernels are of an instruction set of this processor.
        unsafe { (kernels.arrange)(x, to) };
    }
    let x = arranged.get();
    let per_task = outer.div_ceil((outer * inner).div_ceil(DOT_TASK)).next_multiple_of(SIDE_BY_SIDE);
    let output = SharedSlice::new(output);
    let result = threads.run(outer.div_ceil(per_task), &|task| {
        let (start, end) = (task * per_task, outer.min((task + 1) * per_task));
        let (numbers, scale) = (weight.numbers.as_ptr(), weight.scale.as_ptr());
        let mut sums = Sums::default();
        for first in (start..end).step_by(SIDE_BY_SIDE) {
            let wide = SIDE_BY_SIDE.min(end - first);
            // The last weight row stands in for those behind the end.
            let places = std::array::from_fn(|i| (first + i).min(outer - 1));
            for row in (0..rows).step_by(ROWS_AT_ONCE) {
                let count = ROWS_AT_ONCE.min(rows - row);
                let x = x[row * x_stride..].as_ptr();
                let dots = Dots { x, x_stride, weight: numbers, scale, inner, block };
                // SAFETY: the kernels are of an instruction set of this processor; every place is a weight row, lengths
                // are checked above, and from `x` on there are `count` arranged rows of whole chunks.
                unsafe { kernels.dots[count - 1](&dots, &places, &mut sums) };
                for (i, sums) in sums.iter().enumerate().take(count) {
                    // SAFETY: every task has weight rows of its own, and so places of its own in every output row.
                    unsafe { output.piece((row + i) * outer + first, wide) }.copy_from_slice(&sums[..wide]);
                }
            }
        }
    });
    ARRANGED.set(arranged);
    Ok(result?)
}
