//! Keys and values of one sequence, in the form that the graphs of a target append to.

use super::PipelineError;
use crate::bundle::Bundle;
use crate::runtime::{Engine, InPlace};
use crate::tensor::Tensor;
use accordion_graphs::blocks::Target;
use std::collections::VecDeque;

/// The cache of all layers.
pub(super) struct Cache {
    groups: usize,
    head_dim: usize,
    sliding_window: Option<usize>,
    rows: Rows,
    length: usize,
    /// Names of the layers' inputs and outputs, made once.
    past: Vec<[String; 2]>,
    present: Vec<[String; 2]>,
}

enum Rows {
    /// With room behind the `length` valid rows: `[1, G, capacity, d]` per layer, appended to in place.
    Reserved { capacity: usize, buffers: Vec<[Vec<f32>; 2]> },
    /// Exactly the rows so far, `[1, G, length, d]` per layer, replaced by longer ones at every step.
    Growing(Vec<[Tensor; 2]>),
}

impl Cache {
    /// No rows yet, with room for `capacity` where room can be reserved.
    pub(super) fn new(bundle: &Bundle, capacity: usize) -> Result<Self, PipelineError> {
        let arch = bundle.architecture();
        let (layers, groups, head_dim) = (arch.num_layers(), arch.num_kv_heads(), arch.head_dim());
        let rows = match bundle.manifest().target {
            Target::OrtCpu => {
                let elements = groups * capacity * head_dim;
                let buffers = (0..layers).map(|_| [vec![0.0; elements], vec![0.0; elements]]).collect();
                Rows::Reserved { capacity, buffers }
            }
            Target::Portable => {
                let empty = || Tensor::from_f32([1, groups, 0, head_dim], Vec::new());
                Rows::Growing((0..layers).map(|_| Ok([empty()?, empty()?])).collect::<Result<_, PipelineError>>()?)
            }
        };
        let names = |what: &str| -> Vec<[String; 2]> {
            (0..layers).map(|l| ["key", "value"].map(|part| format!("{what}.{l}.{part}"))).collect()
        };
        let sliding_window = arch.sliding_window();
        let (past, present) = (names("past_key_values"), names("present"));
        Ok(Self { groups, head_dim, sliding_window, rows, length: 0, past, present })
    }

    /// The `length` rows of `tensors`, `[1, G, length, d]` per layer, and room for `extra` more.
    pub(super) fn copy_of(
        bundle: &Bundle,
        tensors: &[[Tensor; 2]],
        length: usize,
        extra: usize,
    ) -> Result<Self, PipelineError> {
        let mut cache = Self::new(bundle, length + extra)?;
        match &mut cache.rows {
            Rows::Growing(rows) => *rows = tensors.to_vec(),
            Rows::Reserved { capacity, buffers } => {
                for (buffer, tensor) in buffers.iter_mut().flatten().zip(tensors.iter().flatten()) {
                    put(buffer, *capacity * cache.head_dim, 0, tensor.as_f32()?, length * cache.head_dim);
                }
            }
        }
        cache.length = length;
        Ok(cache)
    }

    /// Rows so far.
    pub(super) fn len(&self) -> usize {
        self.length
    }

    /// Runs `engine`, whose graph appends `new` rows to the bottom layers and hands out those of the others, as outputs
    /// `[1, G, new, d]` called `handed_out`. Returns `outputs`. The cache is as it was if the engine fails.
    pub(super) fn run<'a>(
        &'a mut self,
        engine: &mut dyn Engine,
        new: usize,
        inputs: &[(&'a str, &'a Tensor)],
        outputs: &[&'a str],
        handed_out: &[[&'a str; 2]],
    ) -> Result<Vec<Tensor>, PipelineError> {
        let length = self.length + new;
        if let Some(window) = self.sliding_window.filter(|&window| length > window) {
            return Err(PipelineError::SlidingWindow { length, window });
        }
        self.make_room(new);
        let appended = self.past.len() - handed_out.len();
        let (past, present) = (&self.past[..appended], &self.present[..appended]);
        let past_length = Tensor::from_i64([1], vec![self.length as i64])?;
        let mut inputs = inputs.to_vec();
        let mut outputs = [outputs, handed_out.as_flattened()].concat();
        let asked = outputs.len();
        let results = match &mut self.rows {
            Rows::Reserved { capacity, buffers } => {
                inputs.push(("past_length", &past_length));
                let shape = [1, self.groups, *capacity, self.head_dim];
                let names = past.iter().flatten().zip(present.iter().flatten());
                let mut in_place: Vec<InPlace<'_>> = names
                    .zip(buffers.iter_mut().flatten())
                    .map(|((input, output), data)| InPlace { input, output, shape: &shape, data })
                    .collect();
                engine.run(&inputs, &mut in_place, &outputs)?
            }
            Rows::Growing(rows) => {
                inputs.extend(past.iter().flatten().map(String::as_str).zip(rows.iter().flatten()));
                outputs.extend(present.iter().flatten().map(String::as_str));
                engine.run(&inputs, &mut [], &outputs)?
            }
        };
        let mut results = VecDeque::from(results);
        let grown: Vec<Tensor> = results.drain(asked..).collect();
        let handed: Vec<Tensor> = results.drain(asked - 2 * handed_out.len()..).collect();
        if let Rows::Growing(rows) = &mut self.rows {
            for (old, new) in rows.iter_mut().flatten().zip(grown) {
                *old = new;
            }
        }
        self.append(appended, &handed, new)?;
        self.length = length;
        Ok(results.into())
    }

    /// Appends the `new` rows `handed`, keys and values in turn, to the layers from `first` on.
    fn append(&mut self, first: usize, handed: &[Tensor], new: usize) -> Result<(), PipelineError> {
        let (length, head_dim) = (self.length, self.head_dim);
        match &mut self.rows {
            Rows::Reserved { capacity, buffers } => {
                for (buffer, tensor) in buffers[first..].iter_mut().flatten().zip(handed) {
                    put(buffer, *capacity * head_dim, length * head_dim, tensor.as_f32()?, new * head_dim);
                }
            }
            Rows::Growing(rows) => {
                let shape = [1, self.groups, length + new, head_dim];
                let stride = (length + new) * head_dim;
                for (old, tensor) in rows[first..].iter_mut().flatten().zip(handed) {
                    let mut grown = vec![0.0; self.groups * stride];
                    put(&mut grown, stride, 0, old.as_f32()?, length * head_dim);
                    put(&mut grown, stride, length * head_dim, tensor.as_f32()?, new * head_dim);
                    *old = Tensor::from_f32(shape, grown)?;
                }
            }
        }
        Ok(())
    }

    /// Grows the reserved room, at least by half, when `new` rows do not fit.
    fn make_room(&mut self, new: usize) {
        let Rows::Reserved { capacity, buffers } = &mut self.rows else { return };
        let needed = self.length + new;
        if needed <= *capacity {
            return;
        }
        let larger = needed.max(*capacity + *capacity / 2);
        let (valid, old, stride) = (self.length * self.head_dim, *capacity * self.head_dim, larger * self.head_dim);
        for buffer in buffers.iter_mut().flatten() {
            let mut grown = vec![0.0; self.groups * stride];
            for (to, from) in grown.chunks_exact_mut(stride).zip(buffer.chunks_exact(old.max(1))) {
                to[..valid].copy_from_slice(&from[..valid]);
            }
            *buffer = grown;
        }
        *capacity = larger;
    }

    /// The rows so far, `[1, G, length, d]` per layer.
    pub(super) fn tensors(&self) -> Result<Vec<[Tensor; 2]>, PipelineError> {
        match &self.rows {
            Rows::Growing(rows) => Ok(rows.clone()),
            Rows::Reserved { capacity, buffers } => {
                let (valid, stride) = (self.length * self.head_dim, *capacity * self.head_dim);
                let exact = |buffer: &Vec<f32>| {
                    let rows = buffer.chunks_exact(stride.max(1)).flat_map(|head| &head[..valid]).copied().collect();
                    Tensor::from_f32([1, self.groups, self.length, self.head_dim], rows)
                };
                buffers.iter().map(|[k, v]| Ok([exact(k)?, exact(v)?])).collect()
            }
        }
    }

    /// As [`Self::tensors`], in the memory of the cache itself.
    pub(super) fn into_tensors(self) -> Result<Vec<[Tensor; 2]>, PipelineError> {
        let shape = [1, self.groups, self.length, self.head_dim];
        match self.rows {
            Rows::Growing(rows) => Ok(rows),
            Rows::Reserved { capacity, buffers } => {
                let (valid, stride) = (self.length * self.head_dim, capacity * self.head_dim);
                let exact = |mut buffer: Vec<f32>| {
                    // Rows of a head move down to where the head before them ends.
                    for head in 1..self.groups {
                        buffer.copy_within(head * stride..head * stride + valid, head * valid);
                    }
                    buffer.truncate(self.groups * valid);
                    Tensor::from_f32(shape, buffer)
                };
                buffers.into_iter().map(|[k, v]| Ok([exact(k)?, exact(v)?])).collect()
            }
        }
    }
}

/// Copies every head of `from`, `count` elements each, to the place `offset` in the head of `to` that has the same number;
/// heads of `to` are `stride` elements apart.
fn put(to: &mut [f32], stride: usize, offset: usize, from: &[f32], count: usize) {
    for (to, from) in to.chunks_exact_mut(stride.max(1)).zip(from.chunks_exact(count.max(1))) {
        to[offset..offset + count].copy_from_slice(&from[..count]);
    }
}
