//! Linear layers of signed bytes: `ai.accordion::LinearInt8` and `LinearInt8PerToken` on the CPU. See `contract.md`.

mod kernels;
mod operator;
mod quantize;
#[cfg(test)]
mod tests;
mod vectors;

pub use operator::{LinearInt8, LinearInt8PerToken};

use self::kernels::{Kernels, MAX_TILE, Tile};
use self::quantize::Rows;
use self::vectors::Level;
use crate::parallel::{ParallelError, ParallelFor, SharedSlice};
use crate::scratch::Scratch;
use std::cell::RefCell;

/// Largest number of columns for which no sum of products leaves 32 bits.
pub const MAX_INNER: usize = (1 << 17) - 1;

/// Rows up to which the weight is read as it is stored; for more it is worth packing.
const MAX_DOT_ROWS: usize = 4;

/// Weight rows that are read side by side, so that additions do not wait for each other.
const SIDE_BY_SIDE: usize = 4;

/// Bytes of the weight per task at most, for few rows: as in `linear_block`.
const DOT_TASK: usize = 512 * 1024;

/// Rows of activations per task for many.
const TASK_ROWS: usize = 96;

/// Bytes of packed weight at a time: they stay in a second-level cache.
const SLAB: usize = 512 * 1024;

/// Why a call was refused.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LinearInt8Error {
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
    /// More columns than sums have room for.
    #[error("x has {inner} columns, expected at most {MAX_INNER}")]
    Inner {
        /// How many.
        inner: usize,
    },
    /// A static scale that nothing can be divided by.
    #[error("input_scale is {0}, expected a positive number")]
    InputScale(f32),
    /// No threads.
    #[error(transparent)]
    Parallel(#[from] ParallelError),
}

/// The sizes of a call.
#[derive(Debug, Clone, Copy)]
pub struct Sizes {
    /// Rows of `x`.
    pub rows: usize,
    /// Columns of `x` and of the weight, at most [`MAX_INNER`].
    pub inner: usize,
    /// Rows of the weight.
    pub outer: usize,
}

/// What one step of the activations' numbers stands for.
#[derive(Debug, Clone, Copy)]
pub enum InputScale {
    /// The same for all.
    Static(f32),
    /// Row by row the largest magnitude over 127.
    PerRow,
}

/// What a call reads.
#[derive(Debug, Clone, Copy)]
pub struct Inputs<'a> {
    /// `[rows, inner]`.
    pub x: &'a [f32],
    /// `[outer, inner]`.
    pub weight: &'a [i8],
    /// `[outer]`.
    pub weight_scale: &'a [f32],
    /// Of `x` after smoothing.
    pub input_scale: InputScale,
    /// Factors of the columns of `x`, `[inner]`.
    pub smoothing: &'a [f32],
}

/// Memory that is kept from call to call of a thread.
#[derive(Default)]
struct Memory {
    rows: Rows,
    slab: Scratch<i8>,
    /// Scales of the slab's columns.
    scales: Scratch,
}

thread_local! {
    static MEMORY: RefCell<Memory> = RefCell::default();
}

/// `output[r, o] = s[r] * weight_scale[o] * sum_i q[r, i] * weight[o, i]`, where `q[r, i]` is the whole number from -128 to
/// 127 that is nearest to `x[r, i] * smoothing[i] / s[r]`, ties to even. The sum is exact.
///
/// # Errors
///
/// The lengths do not fit, the scale is not positive, there are too many columns, or threads could not be had.
pub fn linear_int8(
    sizes: Sizes,
    inputs: &Inputs<'_>,
    output: &mut [f32],
    threads: &dyn ParallelFor,
) -> Result<(), LinearInt8Error> {
    linear_int8_at(Level::detect(), sizes, inputs, output, threads)
}

fn linear_int8_at(
    level: Level,
    sizes: Sizes,
    inputs: &Inputs<'_>,
    output: &mut [f32],
    threads: &dyn ParallelFor,
) -> Result<(), LinearInt8Error> {
    check(sizes, inputs, output)?;
    let Sizes { rows, inner, outer } = sizes;
    if inner == 0 || rows == 0 || outer == 0 {
        output.fill(0.0);
        return Ok(());
    }
    let kernels = Kernels::of(level);
    // Taken, not borrowed: whatever else this thread may run meanwhile finds memory of its own.
    let mut memory = MEMORY.take();
    let result = quantize_rows(kernels, sizes, inputs, &mut memory.rows, threads).and_then(|()| {
        if rows <= MAX_DOT_ROWS {
            few(kernels, sizes, inputs, &memory.rows, output, threads)
        } else {
            many(kernels, sizes, inputs, &mut memory, output, threads)
        }
    });
    MEMORY.set(memory);
    Ok(result?)
}

fn check(sizes: Sizes, inputs: &Inputs<'_>, output: &[f32]) -> Result<(), LinearInt8Error> {
    let Sizes { rows, inner, outer } = sizes;
    if inner > MAX_INNER {
        return Err(LinearInt8Error::Inner { inner });
    }
    if let InputScale::Static(scale) = inputs.input_scale
        && !(scale > 0.0 && scale < f32::INFINITY)
    {
        return Err(LinearInt8Error::InputScale(scale));
    }
    let lengths = [
        ("x", inputs.x.len(), rows.saturating_mul(inner)),
        ("weight", inputs.weight.len(), outer.saturating_mul(inner)),
        ("weight_scale", inputs.weight_scale.len(), outer),
        ("smoothing", inputs.smoothing.len(), inner),
        ("output", output.len(), rows.saturating_mul(outer)),
    ];
    match lengths.iter().find(|(_, found, expected)| found != expected) {
        Some(&(what, found, expected)) => Err(LinearInt8Error::Length { what, found, expected }),
        None => Ok(()),
    }
}

fn quantize_rows(
    kernels: &Kernels,
    Sizes { rows, inner, .. }: Sizes,
    inputs: &Inputs<'_>,
    quantized: &mut Rows,
    threads: &dyn ParallelFor,
) -> Result<(), ParallelError> {
    const TASK: usize = 16;
    quantized.resize(rows, inner);
    let stride = quantized.stride;
    let numbers = SharedSlice::new(quantized.numbers.get_mut());
    let starts = SharedSlice::new(quantized.starts.get_mut());
    let scales = SharedSlice::new(quantized.scales.get_mut());
    threads.run(rows.div_ceil(TASK), &|task| {
        for row in task * TASK..rows.min((task + 1) * TASK) {
            let x = &inputs.x[row * inner..][..inner];
            // SAFETY: the kernels are of an instruction set of this processor; every row has places of its own.
            unsafe {
                let to = numbers.piece(row * stride, stride);
                let (start, scale) = (kernels.quantize)(x, inputs.smoothing, inputs.input_scale, to);
                starts.piece(row, 1)[0] = start;
                scales.piece(row, 1)[0] = scale;
            }
        }
    })
}

/// Reads the weight once, in the order it is stored.
fn few(
    kernels: &Kernels,
    Sizes { rows, inner, outer }: Sizes,
    inputs: &Inputs<'_>,
    quantized: &Rows,
    output: &mut [f32],
    threads: &dyn ParallelFor,
) -> Result<(), ParallelError> {
    let per_task = outer.div_ceil((outer * inner).div_ceil(DOT_TASK)).next_multiple_of(SIDE_BY_SIDE);
    let (numbers, starts, scales) = (quantized.numbers.get(), quantized.starts.get(), quantized.scales.get());
    let output = SharedSlice::new(output);
    threads.run(outer.div_ceil(per_task), &|task| {
        let (start, end) = (task * per_task, outer.min((task + 1) * per_task));
        let mut sums = kernels::Sums::default();
        for first in (start..end).step_by(SIDE_BY_SIDE) {
            let wide = SIDE_BY_SIDE.min(end - first);
            // The last weight row stands in for those behind the end.
            let places = std::array::from_fn(|i| (first + i).min(outer - 1) * inner);
            // SAFETY: the kernels are of an instruction set of this processor; every place is the start of a weight row,
            // and there are `rows` quantized rows of whole vectors.
            unsafe {
                let (numbers, starts) = (numbers.as_ptr(), starts.as_ptr());
                let weight = inputs.weight.as_ptr();
                kernels.dots[rows - 1](numbers, quantized.stride, starts, weight, &places, inner, &mut sums);
            }
            for (row, sums) in sums.iter().enumerate().take(rows) {
                // SAFETY: every task has weight rows of its own, and so places of its own in every output row.
                let out = unsafe { output.piece(row * outer + first, wide) };
                for ((out, &sum), scale) in out.iter_mut().zip(sums).zip(&inputs.weight_scale[first..]) {
                    *out = sum as f32 * (scale * scales[row]);
                }
            }
        }
    })
}

/// Packs the weight slab by slab, and multiplies tile by tile.
fn many(
    kernels: &Kernels,
    Sizes { rows, inner, outer }: Sizes,
    inputs: &Inputs<'_>,
    memory: &mut Memory,
    output: &mut [f32],
    threads: &dyn ParallelFor,
) -> Result<(), ParallelError> {
    let columns = kernels.columns;
    let quads = inner.div_ceil(4);
    let panel = quads * 4 * columns;
    let panels_at_once = (SLAB / panel).clamp(1, outer.div_ceil(columns));
    memory.slab.at_least(panels_at_once * panel);
    memory.scales.at_least(panels_at_once * columns);
    let output = SharedSlice::new(output);
    for first in (0..outer).step_by(panels_at_once * columns) {
        let wide = (panels_at_once * columns).min(outer - first);
        let panels = wide.div_ceil(columns);
        memory.scales.get_mut()[..wide].copy_from_slice(&inputs.weight_scale[first..][..wide]);
        let slab = SharedSlice::new(memory.slab.get_mut());
        threads.run(panels, &|i| {
            let (start, end) = (first + i * columns, (first + wide).min(first + (i + 1) * columns));
            // SAFETY: the kernels are of an instruction set of this processor; every task has its own panel.
            unsafe { (kernels.pack)(&inputs.weight[start * inner..end * inner], inner, slab.piece(i * panel, panel)) };
        })?;
        let (slab, scales, quantized) = (memory.slab.get(), memory.scales.get(), &memory.rows);
        let chunks = rows.div_ceil(TASK_ROWS);
        threads.run(chunks * panels, &|task| {
            let (chunk, i) = (task / panels, task % panels);
            let at = Product {
                kernels,
                quads,
                quantized,
                panel: &slab[i * panel..(i + 1) * panel],
                scales: &scales[i * columns..(i + 1) * columns],
                output: &output,
                out_stride: outer,
                first_column: first + i * columns,
                columns: columns.min(wide - i * columns),
            };
            at.rows(chunk * TASK_ROWS, rows.min((chunk + 1) * TASK_ROWS));
        })?;
    }
    Ok(())
}

/// Rows of activations times one panel of the weight.
struct Product<'a> {
    kernels: &'a Kernels,
    quads: usize,
    quantized: &'a Rows,
    panel: &'a [i8],
    scales: &'a [f32],
    output: &'a SharedSlice<'a, f32>,
    out_stride: usize,
    first_column: usize,
    /// Those of the panel that there are.
    columns: usize,
}

impl Product<'_> {
    /// Writes the results of rows `start..end`. No other call may have the same rows and the same panel.
    fn rows(&self, start: usize, end: usize) {
        let most = self.kernels.tile.len();
        let mut edge = [0.0_f32; MAX_TILE];
        for row in (start..end).step_by(most) {
            let count = most.min(end - row);
            let whole = self.columns == self.kernels.columns;
            let place = self.output.pointer(row * self.out_stride + self.first_column);
            let (out, out_stride) =
                if whole { (place, self.out_stride) } else { (edge.as_mut_ptr(), self.kernels.columns) };
            let tile = Tile {
                quads: self.quads,
                rows: self.quantized.numbers.get()[row * self.quantized.stride..].as_ptr(),
                stride: self.quantized.stride,
                starts: self.quantized.starts.get()[row..].as_ptr(),
                row_scales: self.quantized.scales.get()[row..].as_ptr(),
                panel: self.panel.as_ptr(),
                scales: self.scales.as_ptr(),
                out,
                out_stride,
            };
            // SAFETY: the kernels are of an instruction set of this processor; `count` rows are quantized, the panel is
            // whole, and results go to the output's rows, of which this task has these columns alone, or to `edge`.
            unsafe { self.kernels.tile[count - 1](&tile) };
            if !whole {
                for (i, from) in edge.chunks(self.kernels.columns).take(count).enumerate() {
                    let place = (row + i) * self.out_stride + self.first_column;
                    // SAFETY: no other task has these columns of this row.
                    unsafe { self.output.piece(place, self.columns) }.copy_from_slice(&from[..self.columns]);
                }
            }
        }
    }
}
