//! Few rows of queries, as in decoding: every task reads a stretch of the cache of one head, as it lies.

use std::f32::consts::LOG2_E;

use super::Caches;
use super::kernels::{Kernels, Stretch};
use crate::attention::Geometry;
use crate::parallel::{ParallelError, ParallelFor, SharedSlice};

/// Keys that one task reads. Not by the number of threads, so that the order of additions does not depend on it.
const KEYS: usize = 512;

/// A checked call whose new keys and values are in the caches.
pub(super) struct Few<'a> {
    pub(super) kernels: &'static Kernels,
    pub(super) geometry: &'a Geometry,
    pub(super) caches: &'a Caches<'a>,
    /// `[B, T, H d]`.
    pub(super) query: &'a [f32],
}

impl Few<'_> {
    /// # Errors
    ///
    /// Threads could not be had.
    pub(super) fn attend(&self, output: &mut [f32], threads: &dyn ParallelFor) -> Result<(), ParallelError> {
        let Geometry { batch, rows, kv_heads, head_dim: dim, past, .. } = *self.geometry;
        let (heads, total) = (batch * kv_heads, past + rows);
        let (rows, parts) = (rows * self.geometry.group(), total.div_ceil(KEYS));
        // Per part: the largest logits, the sums of weights, the sums of weighted values.
        let len = rows * (dim + 2);
        let mut partials = vec![0.0; heads * parts * len];
        let shared = SharedSlice::new(&mut partials);
        threads.run(heads * parts, &|task| {
            // SAFETY: each task has a part of its own.
            let own = unsafe { shared.piece(task * len, len) };
            self.attend_part(task / parts, task % parts * KEYS, own);
        })?;
        for (head, partials) in partials.chunks_exact(parts * len).enumerate() {
            let scale = &self.caches.value_scale[head * dim..][..dim];
            for row in 0..rows {
                self.combine(partials, rows, row, scale, &mut output[self.place(head, row)..][..dim]);
            }
        }
        Ok(())
    }

    /// Where row `row` (position and head of the group) of key head `head` begins in query and output.
    fn place(&self, head: usize, row: usize) -> usize {
        let Geometry { rows, heads, kv_heads, head_dim, .. } = *self.geometry;
        let group = self.geometry.group();
        let (b, g) = (head / kv_heads, head % kv_heads);
        ((b * rows + row / group) * heads + g * group + row % group) * head_dim
    }

    /// All rows of `head` against the keys from `first` on.
    fn attend_part(&self, head: usize, first: usize, partial: &mut [f32]) {
        let Geometry { rows, head_dim: dim, past, capacity, .. } = *self.geometry;
        let group = self.geometry.group();
        let key_scale = &self.caches.key_scale[head * dim..][..dim];
        // Logits in base 2, so that the softmax needs no multiplication of its own.
        let factor = LOG2_E / (dim as f32).sqrt();
        let mut queries = vec![0.0; rows * group * dim];
        for (row, to) in queries.chunks_exact_mut(dim).enumerate() {
            for ((to, from), scale) in to.iter_mut().zip(&self.query[self.place(head, row)..]).zip(key_scale) {
                *to = from * scale * factor;
            }
        }
        let keys = KEYS.min(past + rows - first);
        let stretch = (head * capacity + first) * dim..(head * capacity + first + keys) * dim;
        let (key, value) = (&self.caches.key[stretch.clone()], &self.caches.value[stretch]);
        let (maxima, rest) = partial.split_at_mut(rows * group);
        let (totals, sums) = rest.split_at_mut(rows * group);
        // SAFETY: `rows` rows of queries and sums, `keys` rows of keys and values, as the slices say; the kernels were chosen
        // for this processor and width, and the caller checked that the rows are few enough.
        unsafe {
            (self.kernels.attend)(&Stretch {
                rows: rows * group,
                dim,
                group,
                visible: (past + 1) as isize - first as isize,
                queries: queries.as_ptr(),
                keys,
                key: key.as_ptr(),
                value: value.as_ptr(),
                maxima: maxima.as_mut_ptr(),
                totals: totals.as_mut_ptr(),
                sums: sums.as_mut_ptr(),
            });
        }
    }

    /// Row `row` of `rows` out of all parts of its head; `scale` is what its values count in.
    fn combine(&self, partials: &[f32], rows: usize, row: usize, scale: &[f32], out: &mut [f32]) {
        let dim = self.geometry.head_dim;
        let parts = || partials.chunks_exact(rows * (dim + 2));
        let max = parts().fold(f32::MIN, |max, part| max.max(part[row]));
        let mut total = 0.0;
        out.fill(0.0);
        for part in parts() {
            let weight = (part[row] - max).exp2();
            total += weight * part[rows + row];
            for (out, sum) in out.iter_mut().zip(&part[2 * rows + row * dim..]) {
                *out += weight * sum;
            }
        }
        for (out, scale) in out.iter_mut().zip(scale) {
            *out = *out / total * scale;
        }
    }
}
