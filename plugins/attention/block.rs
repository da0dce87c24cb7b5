//! One task: the query rows of one group of heads against a range of keys, flash-attention style.
//!
//! Row `r` of a block is query row `first + r / group` of head `r % group`, so that all heads of the group share the
//! packed keys, rows are sorted by how far they see, and the queries of one position are contiguous in memory.

use std::ops::Range;

use super::kernels::Kernels;
use super::softmax::{NOTHING_SEEN, PADDED_STRIP, STRIP, Strip};
use super::tile::Weighing;
use crate::scratch::Scratch;

/// Keys that are packed and used at once.
pub(super) const KEY_BLOCK: usize = 192;

/// One group of heads over one stretch of query rows.
pub(super) struct Block<'a> {
    pub(super) kernels: &'static Kernels,
    /// Elements per head.
    pub(super) dim: usize,
    /// Query heads that share the keys.
    pub(super) group: usize,
    /// Keys that the block's first query row sees, itself included; each further row sees one more.
    pub(super) visible: usize,
    /// Keys of the group, `[keys, dim]`.
    pub(super) keys: &'a [f32],
    /// Values of the group, `[keys, dim]`.
    pub(super) values: &'a [f32],
    /// Factor of the logits, which are in base 2.
    pub(super) scale: f32,
}

/// The scratch memory of a block.
#[derive(Default)]
pub(super) struct BlockMemory {
    /// `[rows, dim]`.
    pub(super) queries: Scratch,
    /// `[rows, dim rounded up]`: sums of weighted values, not yet divided by the sums of weights.
    pub(super) sums: Scratch,
    /// `[rows]`: the largest logit in base 2.
    pub(super) maxima: Scratch,
    /// `[rows, lanes]`: sums of weights.
    pub(super) totals: Scratch,
    /// Where elements hold two numbers, `[rows, dim / 2]`.
    paired_queries: Scratch,
    /// The same of a block of keys.
    paired_keys: Scratch,
    panels: Scratch,
    /// Values of a block of keys as the kernel reads them, where it cannot read them as they are.
    packed_values: Scratch,
    logits: Scratch,
}

impl Block<'_> {
    /// Elements per row of [`BlockMemory::sums`].
    pub(super) fn width(&self) -> usize {
        self.dim.next_multiple_of(self.kernels.lanes)
    }

    /// Elements per head as kernels multiply them.
    fn depth(&self) -> usize {
        self.dim / self.numbers()
    }

    /// Numbers per element as kernels multiply them.
    fn numbers(&self) -> usize {
        if self.kernels.halves.is_some() { 2 } else { 1 }
    }

    /// Keys visible to row `row`.
    fn limit(&self, row: usize) -> usize {
        self.visible + row / self.group
    }

    /// Attends `rows` rows, whose queries are in `memory`, to those keys of `range` that they may see.
    pub(super) fn attend(&self, rows: usize, range: Range<usize>, memory: &mut BlockMemory) {
        memory.sums.zeroed(rows * self.width());
        memory.totals.zeroed(rows * self.kernels.lanes);
        memory.maxima.at_least(rows)[..rows].fill(NOTHING_SEEN);
        if let Some(halves) = self.kernels.halves {
            let paired = &mut memory.paired_queries.at_least(rows * self.depth())[..rows * self.depth()];
            // SAFETY: the kernels are of an instruction set of this processor.
            unsafe { (halves.neighbours)(&memory.queries.get()[..rows * self.dim], paired) };
        }
        let end = range.end.min(self.limit(rows - 1));
        let mut start = range.start;
        while start < end {
            let count = KEY_BLOCK.min(end - start);
            self.pack_keys(start, count, memory);
            self.pack_values(start, count, memory);
            for first in (0..rows).step_by(STRIP) {
                let strip = first..rows.min(first + STRIP);
                if let Some(seen) = self.limit(strip.end - 1).checked_sub(start)
                    && seen > 0
                {
                    self.attend_strip(strip, start, seen.min(count), memory);
                }
            }
            start += count;
        }
    }

    /// The strip's rows against `count` keys from `start` on, which are packed.
    fn attend_strip(&self, strip: Range<usize>, start: usize, count: usize, memory: &mut BlockMemory) {
        let Kernels { lanes, panel, .. } = *self.kernels;
        let (depth, numbers) = (self.depth(), self.numbers());
        let stride = count.next_multiple_of(panel);
        let logits = memory.logits.at_least(STRIP * stride);
        let queries = if numbers == 1 { &memory.queries } else { &memory.paired_queries };
        for (p, packed) in memory.panels.get().chunks_exact(panel * depth).take(stride / panel).enumerate() {
            for (first, tile) in tiles(strip.clone(), self.kernels.logits.len()) {
                let out = &mut logits[(first - strip.start) * stride + p * panel..];
                let rows = &queries.get()[first * depth..(first + tile) * depth];
                assert!(out.len() >= (tile - 1) * stride + panel);
                // SAFETY: `tile` rows of `depth` queries, `depth` rows of `panel` keys, and room for the tile's logits.
                unsafe {
                    let (rows, packed, out) = (rows.as_ptr(), packed.as_ptr(), out.as_mut_ptr());
                    self.kernels.logits[tile - 1](depth, self.scale, rows, packed, out, stride);
                }
            }
        }

        let width = count.next_multiple_of(lanes);
        for (row, logits) in strip.clone().zip(logits.chunks_exact_mut(stride)) {
            let seen = self.limit(row).saturating_sub(start).min(width);
            logits[seen..width].fill(f32::NEG_INFINITY);
        }
        let mut decay = [0.0; PADDED_STRIP];
        let totals = &mut memory.totals.get_mut()[strip.start * lanes..strip.end * lanes];
        let maxima = &mut memory.maxima.get_mut()[strip.clone()];
        assert!(logits.len() >= strip.len() * stride && strip.len() <= STRIP);
        // SAFETY: `strip.len()` rows of everything, checked here and above; `width` is a multiple of the lanes, at most
        // `stride`, and not zero because `count` is not.
        unsafe {
            (self.kernels.absorb)(&Strip {
                rows: strip.len(),
                logits: logits.as_mut_ptr(),
                stride,
                width,
                maxima: maxima.as_mut_ptr(),
                totals: totals.as_mut_ptr(),
                decay: decay.as_mut_ptr(),
            });
        }

        if let Some(halves) = self.kernels.halves {
            for row in logits.chunks_exact_mut(stride).take(strip.len()) {
                // SAFETY: the kernels are of an instruction set of this processor; `width` is a multiple of the lanes.
                unsafe { (halves.in_place)(&mut row[..width]) };
            }
        }
        let (values, values_stride) = if self.reads_values_as_they_are() {
            (&self.values[start * self.dim..(start + count) * self.dim], self.dim)
        } else {
            (&memory.packed_values.get()[..count.div_ceil(numbers) * self.width()], self.width())
        };
        let vectors = self.width() / lanes;
        let mut column = 0;
        while column < vectors {
            let n = (vectors - column).min(self.kernels.weigh.len());
            let kernels = self.kernels.weigh[n - 1];
            for (first, tile) in tiles(strip.clone(), kernels.len()) {
                let local = first - strip.start;
                let keys = self.limit(first + tile - 1).saturating_sub(start).min(count).div_ceil(numbers);
                let out = &mut memory.sums.get_mut()[first * self.width()..(first + tile) * self.width()];
                assert!(logits.len() >= (local + tile - 1) * stride + keys && decay.len() >= local + tile);
                assert!(column + n <= vectors && keys * values_stride <= values.len());
                // SAFETY: `tile` rows of weights and decays, `keys` rows of values, `tile` rows of sums, all checked
                // above; `n` vectors from `column` on lie inside a row.
                unsafe {
                    kernels[tile - 1](&Weighing {
                        keys,
                        weights: logits.as_ptr().add(local * stride),
                        weights_stride: stride,
                        values: values.as_ptr().add(column * lanes),
                        values_stride,
                        decay: decay.as_ptr().add(local),
                        out: out.as_mut_ptr().add(column * lanes),
                        out_stride: self.width(),
                    });
                }
            }
            column += n;
        }
    }

    /// Packs keys `start..start + count` into panels `[depth, panel]`. What lies behind the last key in its panel is
    /// whatever it was: logits of keys that no row sees are never read.
    fn pack_keys(&self, start: usize, count: usize, memory: &mut BlockMemory) {
        let Kernels { lanes, panel, .. } = *self.kernels;
        let depth = self.depth();
        let mut keys = &self.keys[start * self.dim..(start + count) * self.dim];
        if let Some(halves) = self.kernels.halves {
            let paired = &mut memory.paired_keys.at_least(count * depth)[..count * depth];
            // SAFETY: the kernels are of an instruction set of this processor.
            unsafe { (halves.neighbours)(keys, paired) };
            keys = paired;
        }
        let panels = memory.panels.at_least(count.next_multiple_of(panel) * depth);
        for first in (0..count).step_by(lanes) {
            let packed = &mut panels[first / panel * panel * depth + first % panel..];
            let full = if first + lanes <= count { depth / lanes * lanes } else { 0 };
            for c in (0..full).step_by(lanes) {
                let block = &keys[first * depth + c..];
                let to = &mut packed[c * panel..];
                assert!(block.len() >= (lanes - 1) * depth + lanes && to.len() >= (lanes - 1) * panel + lanes);
                // SAFETY: both blocks were checked to lie inside their slices.
                unsafe { (self.kernels.transpose)(block.as_ptr(), depth, to.as_mut_ptr(), panel) };
            }
            for (lane, key) in keys[first * depth..].chunks_exact(depth).take(lanes).enumerate() {
                for c in full..depth {
                    packed[c * panel + lane] = key[c];
                }
            }
        }
    }

    /// Whether the rows of values are rows of whole vectors, of one number per element.
    fn reads_values_as_they_are(&self) -> bool {
        self.width() == self.dim && self.numbers() == 1
    }

    /// Copies the values of a block of keys to rows of whole vectors, of two keys each where elements hold two numbers.
    fn pack_values(&self, start: usize, count: usize, memory: &mut BlockMemory) {
        if self.reads_values_as_they_are() {
            return;
        }
        let width = self.width();
        let packed = memory.packed_values.at_least(count.div_ceil(self.numbers()) * width);
        let values = &self.values[start * self.dim..(start + count) * self.dim];
        if let Some(halves) = self.kernels.halves {
            let nothing = vec![0.0; self.dim];
            for (to, from) in packed.chunks_exact_mut(width).zip(values.chunks(2 * self.dim)) {
                let (first, second) = from.split_at(self.dim);
                let second = if second.is_empty() { &nothing } else { second };
                // SAFETY: the kernels are of an instruction set of this processor.
                unsafe { (halves.rows)(first, second, to) };
            }
            return;
        }
        for (to, from) in packed.chunks_exact_mut(width).zip(values.chunks_exact(self.dim)) {
            to[..self.dim].copy_from_slice(from);
            to[self.dim..].fill(0.0);
        }
    }
}

/// Cuts `rows` into tiles of at most `height` rows: the first row and the number of rows of each.
fn tiles(rows: Range<usize>, height: usize) -> impl Iterator<Item = (usize, usize)> {
    let end = rows.end;
    rows.step_by(height).map(move |first| (first, height.min(end - first)))
}
