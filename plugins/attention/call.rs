//! Cuts one call into tasks that cost about the same and do not depend on the number of threads.

use std::cell::RefCell;
use std::f32::consts::LOG2_E;
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::Geometry;
use super::block::{Block, BlockMemory, KEY_BLOCK};
use super::kernels::Kernels;
use crate::parallel::{ParallelError, ParallelFor, SharedSlice};

/// Rows of queries (positions times heads of a group) that one task takes.
const BLOCK_ROWS: usize = 192;
/// Tasks to aim at where keys are split: enough for many threads, few enough that the parts stay small. Not the number of
/// threads, so that the order of additions does not depend on it.
const SPLIT_TASKS: usize = 64;
/// Fewest keys per task where keys are split.
const SPLIT_KEYS: usize = 2 * KEY_BLOCK;

thread_local! {
    static MEMORY: RefCell<BlockMemory> = RefCell::default();
}

/// A checked call whose new keys and values are in the cache.
pub(super) struct Call<'a> {
    pub(super) kernels: &'static Kernels,
    pub(super) geometry: &'a Geometry,
    /// `[B, T, H d]`.
    pub(super) query: &'a [f32],
    /// `[B, G, S', d]`.
    pub(super) key: &'a [f32],
    /// `[B, G, S', d]`.
    pub(super) value: &'a [f32],
    pub(super) scale: f32,
}

impl Call<'_> {
    /// Keys that the last row sees.
    fn total(&self) -> usize {
        self.geometry.past + self.geometry.rows
    }

    /// The block of group `head` (batch and key head) whose rows start at position `first`.
    fn block(&self, head: usize, first: usize) -> Block<'_> {
        let Geometry { head_dim, past, capacity, .. } = *self.geometry;
        let cache = head * capacity * head_dim..(head * capacity + self.total()) * head_dim;
        Block {
            kernels: self.kernels,
            dim: head_dim,
            group: self.geometry.group(),
            visible: past + first + 1,
            keys: &self.key[cache.clone()],
            values: &self.value[cache],
            // Logits in base 2, so that the softmax needs no multiplication of its own.
            scale: self.scale * LOG2_E,
        }
    }

    /// Where the heads of group `head` at position `t` lie in the query and in the output.
    fn row(&self, head: usize, t: usize) -> Range<usize> {
        let Geometry { rows, heads, kv_heads, head_dim, .. } = *self.geometry;
        let (b, g) = (head / kv_heads, head % kv_heads);
        let start = ((b * rows + t) * heads + g * self.geometry.group()) * head_dim;
        start..start + self.geometry.group() * head_dim
    }

    /// Attends positions `range` of group `head` to keys `keys`, and leaves the sums in the thread's memory.
    fn attend<R>(
        &self,
        head: usize,
        range: Range<usize>,
        keys: Range<usize>,
        finish: impl FnOnce(&BlockMemory) -> R,
    ) -> R {
        MEMORY.with_borrow_mut(|memory| {
            let block = self.block(head, range.start);
            let rows = range.len() * block.group;
            let width = block.group * block.dim;
            let queries = memory.queries.at_least(rows * block.dim);
            for (t, to) in range.zip(queries.chunks_exact_mut(width)) {
                to.copy_from_slice(&self.query[self.row(head, t)]);
            }
            block.attend(rows, keys, memory);
            finish(memory)
        })
    }

    /// Divides the sums of positions `range` by the sums of their weights.
    fn write(&self, head: usize, range: Range<usize>, memory: &BlockMemory, output: &SharedSlice<'_, f32>) {
        let dim = self.geometry.head_dim;
        let width = self.block(head, range.start).width();
        let mut rows = memory.sums.get().chunks_exact(width).zip(memory.totals.get().chunks_exact(self.kernels.lanes));
        for t in range {
            let at = self.row(head, t);
            // SAFETY: every group and position is written by one task alone.
            let out = unsafe { output.piece(at.start, at.len()) };
            for (out, (sums, total)) in out.chunks_exact_mut(dim).zip(&mut rows) {
                let factor = 1.0 / total.iter().sum::<f32>();
                for (out, sum) in out.iter_mut().zip(sums) {
                    *out = sum * factor;
                }
            }
        }
    }

    /// Attends all query positions to all keys that they see.
    ///
    /// # Errors
    ///
    /// Threads could not be had.
    pub(super) fn run(&self, output: &mut [f32], threads: &dyn ParallelFor) -> Result<(), ParallelError> {
        let output = SharedSlice::new(output);
        let heads = self.geometry.batch * self.geometry.kv_heads;
        let single_block = self.geometry.rows * self.geometry.group() <= BLOCK_ROWS;
        let parts = SPLIT_TASKS.div_ceil(heads).min(self.total() / SPLIT_KEYS);
        if single_block && parts > 1 {
            self.split_keys(heads, parts, &output, threads)
        } else {
            self.split_rows(heads, &output, threads)
        }
    }

    /// Many query positions: each task takes some of them and all the keys they see.
    fn split_rows(
        &self,
        heads: usize,
        output: &SharedSlice<'_, f32>,
        threads: &dyn ParallelFor,
    ) -> Result<(), ParallelError> {
        let rows = self.geometry.rows;
        let step = (BLOCK_ROWS / self.geometry.group()).max(1);
        let steps = rows.div_ceil(step);
        // The last positions see the most keys and come first, so that the cheapest tasks even out the end.
        threads.run(steps * heads, &|task| {
            let (head, first) = (task % heads, (steps - 1 - task / heads) * step);
            let range = first..rows.min(first + step);
            self.attend(head, range.clone(), 0..self.total(), |memory| self.write(head, range, memory, output));
        })
    }

    /// Few query positions and many keys: each task takes all positions and about one of `parts` parts of the keys. The
    /// last task of a head combines its parts.
    fn split_keys(
        &self,
        heads: usize,
        parts: usize,
        output: &SharedSlice<'_, f32>,
        threads: &dyn ParallelFor,
    ) -> Result<(), ParallelError> {
        let rows = self.geometry.rows;
        let group = self.geometry.group();
        let keys = self.total().div_ceil(parts).next_multiple_of(KEY_BLOCK);
        let parts = self.total().div_ceil(keys);
        let part = Partial { dim: self.geometry.head_dim, rows: rows * group };
        let mut partials = vec![0.0; heads * parts * part.len()];
        let partials = SharedSlice::new(&mut partials);
        let finished: Vec<AtomicUsize> = (0..heads).map(|_| AtomicUsize::new(0)).collect();
        threads.run(heads * parts, &|task| {
            let (head, start) = (task / parts, task % parts * keys);
            // SAFETY: each task has its own part, and gives it up before it counts itself as finished.
            let own = unsafe { partials.piece(task * part.len(), part.len()) };
            let keys = start..self.total().min(start + keys);
            self.attend(head, 0..rows, keys, |memory| part.save(memory, self.kernels.lanes, own));
            if finished[head].fetch_add(1, Ordering::AcqRel) + 1 < parts {
                return;
            }
            // SAFETY: all tasks of this head have finished, and only the last one of them gets here.
            let all = unsafe { partials.piece(head * parts * part.len(), parts * part.len()) };
            for row in 0..part.rows {
                let at = self.row(head, row / group);
                // SAFETY: each row belongs to one head.
                let out = unsafe { output.piece(at.start + row % group * part.dim, part.dim) };
                part.combine(all, row, out);
            }
        })
    }
}

/// The layout of what a task over some of the keys leaves behind: per row the maximum, the sum of weights, and the
/// sums of weighted values.
#[derive(Clone, Copy)]
struct Partial {
    dim: usize,
    rows: usize,
}

impl Partial {
    fn len(self) -> usize {
        self.rows * (self.dim + 2)
    }

    fn save(self, memory: &BlockMemory, lanes: usize, out: &mut [f32]) {
        let sums = memory.sums.get().chunks_exact(self.dim.next_multiple_of(lanes));
        let totals = memory.totals.get().chunks_exact(lanes);
        let rows = sums.zip(totals).zip(memory.maxima.get());
        for (out, ((sums, total), &max)) in out.chunks_exact_mut(self.dim + 2).zip(rows) {
            out[0] = max;
            out[1] = total.iter().sum();
            out[2..].copy_from_slice(&sums[..self.dim]);
        }
    }

    /// One row out of all parts of its head.
    fn combine(self, partials: &[f32], row: usize, out: &mut [f32]) {
        let parts = partials.chunks_exact(self.len()).map(|part| &part[row * (self.dim + 2)..][..self.dim + 2]);
        let max = parts.clone().fold(f32::MIN, |max, part| max.max(part[0]));
        let mut total = 0.0;
        out.fill(0.0);
        for part in parts {
            let weight = (part[0] - max).exp2();
            total += weight * part[1];
            for (out, sum) in out.iter_mut().zip(&part[2..]) {
                *out += weight * sum;
            }
        }
        for out in out {
            *out /= total;
        }
    }
}
