//! Keys and values of one sequence, in the form that the graphs of a target append to.

use super::reserved::{Reserved, put};
use super::stepwise::{EXPECTED_ROWS, Names, Stepwise, room_for};
use super::{ContextState, PipelineError};
use crate::bundle::Bundle;
use crate::runtime::{Engine, InPlace};
use crate::tensor::{Tensor, TensorError};
use accordion_graphs::blocks::Target;
use std::collections::VecDeque;

/// The cache of all layers.
pub(super) struct Cache {
    groups: usize,
    head_dim: usize,
    sliding_window: Option<usize>,
    rows: Rows,
    /// The rows in the keeping of the engine that single tokens are fed to: then there are none here.
    stepwise: Option<Stepwise>,
    /// What entries of keys and values count in, `[1, G, 1, d]` per layer, where they are 8-bit integers.
    scales: Option<Vec<[Tensor; 2]>>,
    length: usize,
    /// Rows that are expected, of which some may have come.
    expected: usize,
    /// Whether an engine may take the rows into its keeping: none has refused.
    may_step: bool,
    /// Names of the layers' inputs and outputs, made once.
    past: Vec<[String; 2]>,
    present: Vec<[String; 2]>,
    new: Vec<[String; 2]>,
    past_scales: Vec<[String; 2]>,
    present_scales: Vec<[String; 2]>,
}

enum Rows {
    /// With room behind the valid rows, appended to in place.
    Reserved(Reserved<f32>),
    /// As above.
    ReservedInt8(Reserved<i8>),
    /// Exactly the rows so far, `[1, G, length, d]` per layer, replaced by longer ones at every step.
    Growing(Vec<[Tensor; 2]>),
}

impl Cache {
    /// No rows yet, with room for `capacity` where room can be reserved.
    pub(super) fn new(bundle: &Bundle, capacity: usize) -> Result<Self, PipelineError> {
        let arch = bundle.architecture();
        let (layers, groups, head_dim) = (arch.num_layers(), arch.num_kv_heads(), arch.head_dim());
        let rows = match bundle.manifest().target {
            Target::OrtCpu => Rows::Reserved(Reserved::new(layers, [groups, capacity, head_dim])),
            Target::Portable => {
                let empty = || Tensor::from_f32([1, groups, 0, head_dim], Vec::new());
                Rows::Growing((0..layers).map(|_| Ok([empty()?, empty()?])).collect::<Result<_, PipelineError>>()?)
            }
        };
        Ok(Self::of_rows(bundle, rows, None, [0, capacity]))
    }

    fn of_rows(bundle: &Bundle, rows: Rows, scales: Option<Vec<[Tensor; 2]>>, [length, expected]: [usize; 2]) -> Self {
        let arch = bundle.architecture();
        let names = |what: &str, suffix: &str| -> Vec<[String; 2]> {
            (0..arch.num_layers()).map(|l| ["key", "value"].map(|part| format!("{what}.{l}.{part}{suffix}"))).collect()
        };
        Self {
            groups: arch.num_kv_heads(),
            head_dim: arch.head_dim(),
            sliding_window: arch.sliding_window(),
            rows,
            stepwise: None,
            scales,
            length,
            expected,
            may_step: true,
            past: names("past_key_values", ""),
            present: names("present", ""),
            new: names("new", ""),
            past_scales: names("past_key_values", "_scale"),
            present_scales: names("present", "_scale"),
        }
    }

    /// The rows of `state`, in the numbers that they are in, and room for `extra` more.
    pub(super) fn copy_of(bundle: &Bundle, state: &ContextState, extra: usize) -> Result<Self, PipelineError> {
        let arch = bundle.architecture();
        let (layers, length) = (arch.num_layers(), state.len());
        let room = [arch.num_kv_heads(), length + extra, arch.head_dim()];
        let scales = state.scales.as_ref().map(|scales| scales.cache.clone());
        let tensors = state.cache.iter().flatten();
        let rows = match (bundle.manifest().target, &scales) {
            (Target::Portable, _) => Rows::Growing(state.cache.clone()),
            (Target::OrtCpu, None) => {
                let mut reserved = Reserved::new(layers, room);
                reserved.put(0, tensors, 0, length)?;
                Rows::Reserved(reserved)
            }
            (Target::OrtCpu, Some(_)) => {
                let mut reserved = Reserved::new(layers, room);
                reserved.put(0, tensors, 0, length)?;
                Rows::ReservedInt8(reserved)
            }
        };
        Ok(Self::of_rows(bundle, rows, scales, [length, length.saturating_add(extra)]))
    }

    /// Rows so far.
    pub(super) fn len(&self) -> usize {
        self.length
    }

    /// Whether it holds 8-bit integers.
    pub(super) fn is_int8(&self) -> bool {
        self.scales.is_some()
    }

    /// Runs `engine`, whose graph appends `new` rows to the bottom layers and hands out those of the others, as outputs
    /// `[1, G, new, d]` called `handed_out`. Returns `outputs`. The cache is as it was if the engine fails, but for 8-bit
    /// integers that were appended to in place: their units may have grown meanwhile, so that nothing can be fed behind them.
    pub(super) fn run<'a>(
        &'a mut self,
        engine: &mut dyn Engine,
        new: usize,
        inputs: &[(&'a str, &'a Tensor)],
        outputs: &[&'a str],
        handed_out: &[[&'a str; 2]],
    ) -> Result<Vec<Tensor>, PipelineError> {
        let length = self.longer(new)?;
        if let Some(stepwise) = &self.stepwise {
            self.rows = Rows::Growing(stepwise.rows(self.length)?);
            self.stepwise = None;
        }
        match &mut self.rows {
            Rows::Reserved(reserved) => reserved.make_room(self.length, new),
            Rows::ReservedInt8(reserved) => reserved.make_room(self.length, new),
            Rows::Growing(_) => {}
        }
        let appended = self.past.len() - handed_out.len();
        let (past, present) = (&self.past[..appended], &self.present[..appended]);
        let names = || past.iter().flatten().zip(present.iter().flatten());
        let past_length = Tensor::from_i64([1], vec![self.length as i64])?;
        let mut inputs = inputs.to_vec();
        let mut outputs = [outputs, handed_out.as_flattened()].concat();
        let asked = outputs.len();
        if let Some(scales) = &self.scales {
            inputs.extend(self.past_scales.iter().flatten().map(String::as_str).zip(scales.iter().flatten()));
            outputs.extend(self.present_scales.iter().flatten().map(String::as_str));
        }
        let scaled = outputs.len();
        let results = match &mut self.rows {
            Rows::Growing(rows) => {
                inputs.extend(past.iter().flatten().map(String::as_str).zip(rows.iter().flatten()));
                outputs.extend(present.iter().flatten().map(String::as_str));
                engine.run(&inputs, &mut [], &outputs)?
            }
            Rows::Reserved(reserved) => {
                inputs.push(("past_length", &past_length));
                let shape = reserved.shape();
                let mut in_place = bound(names(), &shape, reserved.memory());
                engine.run(&inputs, &mut in_place, &outputs)?
            }
            Rows::ReservedInt8(reserved) => {
                inputs.push(("past_length", &past_length));
                let shape = reserved.shape();
                let mut in_place = bound(names(), &shape, reserved.memory());
                engine.run(&inputs, &mut in_place, &outputs)?
            }
        };
        let mut results = VecDeque::from(results);
        let grown: Vec<Tensor> = results.drain(scaled..).collect();
        let scales: Vec<Tensor> = results.drain(asked..).collect();
        let handed: Vec<Tensor> = results.drain(asked - 2 * handed_out.len()..).collect();
        if let Rows::Growing(rows) = &mut self.rows {
            replace(rows, grown);
        }
        if let Some(old) = &mut self.scales {
            replace(old, scales);
        }
        self.append(appended, &handed, new)?;
        self.length = length;
        Ok(results.into())
    }

    /// Appends the `new` rows `handed`, keys and values in turn, to the layers from `first` on.
    fn append(&mut self, first: usize, handed: &[Tensor], new: usize) -> Result<(), TensorError> {
        let (length, head_dim) = (self.length, self.head_dim);
        match &mut self.rows {
            Rows::Reserved(reserved) => reserved.put(first, handed, length, new),
            Rows::ReservedInt8(reserved) => reserved.put(first, handed, length, new),
            Rows::Growing(rows) => {
                let shape = [1, self.groups, length + new, head_dim];
                let stride = (length + new) * head_dim;
                for (old, tensor) in rows[first..].iter_mut().flatten().zip(handed) {
                    let mut grown = vec![0.0; self.groups * stride];
                    put(&mut grown, stride, 0, old.as_f32()?, length * head_dim);
                    put(&mut grown, stride, length * head_dim, tensor.as_f32()?, new * head_dim);
                    *old = Tensor::from_f32(shape, grown)?;
                }
                Ok(())
            }
        }
    }

    /// Whether tokens may be fed with [`Self::step`]: until an engine says no.
    pub(super) fn may_step(&self) -> bool {
        self.may_step
    }

    /// Feeds the token `id` at `position` to `engine`, whose graph only reads the rows so far, and which keeps them then.
    /// `fixed` are further inputs of the graph, the same for all tokens. Returns the logits `[1, 1, V]`; none, and nothing is
    /// fed, if the engine has no use for keeping them. If it fails the rows may be lost.
    pub(super) fn step(
        &mut self,
        engine: &mut dyn Engine,
        [id, position]: [i64; 2],
        fixed: &[(&str, &Tensor)],
    ) -> Result<Option<Vec<Tensor>>, PipelineError> {
        let (length, longer) = (self.length, self.longer(1)?);
        let full = self.stepwise.as_ref().filter(|stepwise| stepwise.capacity() < longer);
        let mut expected = self.expected.clamp(longer, length.saturating_add(EXPECTED_ROWS));
        if let Some(full) = full {
            expected = longer.max(length + length / 2);
            self.rows = Rows::Growing(full.rows(length)?);
            self.stepwise = None;
        }
        if self.stepwise.is_none()
            && let Rows::Growing(rows) = &mut self.rows
        {
            let names = Names { past: &self.past, new: &self.new };
            self.stepwise = Stepwise::new(engine, &names, rows, fixed, room_for(expected))?;
            self.may_step = self.stepwise.is_some();
            if self.may_step {
                rows.clear();
            }
        }
        let Some(stepwise) = &mut self.stepwise else { return Ok(None) };
        let results = stepwise.step([id, position], length)?;
        self.length = longer;
        Ok(Some(results))
    }

    /// How many rows there are with `new` more.
    fn longer(&self, new: usize) -> Result<usize, PipelineError> {
        let length = self.length + new;
        match self.sliding_window.filter(|&window| length > window) {
            Some(window) => Err(PipelineError::SlidingWindow { length, window }),
            None => Ok(length),
        }
    }

    /// The rows so far, `[1, G, length, d]` per layer, and what they count in where they are 8-bit integers.
    pub(super) fn tensors(&self) -> Result<Parts, PipelineError> {
        if let Some(stepwise) = &self.stepwise {
            return Ok((stepwise.rows(self.length)?, None));
        }
        let rows = match &self.rows {
            Rows::Growing(rows) => rows.clone(),
            Rows::Reserved(reserved) => reserved.tensors(self.length)?,
            Rows::ReservedInt8(reserved) => reserved.tensors(self.length)?,
        };
        Ok((rows, self.scales.clone()))
    }

    /// As [`Self::tensors`], in the memory of the cache itself.
    pub(super) fn into_tensors(self) -> Result<Parts, PipelineError> {
        if self.stepwise.is_some() {
            return self.tensors();
        }
        let rows = match self.rows {
            Rows::Growing(rows) => rows,
            Rows::Reserved(reserved) => reserved.into_tensors(self.length)?,
            Rows::ReservedInt8(reserved) => reserved.into_tensors(self.length)?,
        };
        Ok((rows, self.scales))
    }
}

/// Keys and values of every layer, and what they count in.
type Parts = (Vec<[Tensor; 2]>, Option<Vec<[Tensor; 2]>>);

/// The memory of every tensor of the cache under its names as input and output.
fn bound<'a>(
    names: impl Iterator<Item = (&'a String, &'a String)>,
    shape: &'a [usize],
    memory: impl Iterator<Item = crate::runtime::Memory<'a>>,
) -> Vec<InPlace<'a>> {
    names.zip(memory).map(|((input, output), data)| InPlace { input, output, shape, data }).collect()
}

/// Puts `new`, keys and values in turn, into the place of `old`.
fn replace(old: &mut [[Tensor; 2]], new: Vec<Tensor>) {
    for (old, new) in old.iter_mut().flatten().zip(new) {
        *old = new;
    }
}
