//! RCC over engines: segment batch by segment batch through the encoder and the decoder's layers over slots, then the
//! prompt through the decoder.
//!
//! Slots never attend to the prompt, so the cache over them is the document's, whatever is asked about it. What the
//! encoder gives of a batch is dropped when its slots are in the cache: of a long document only the cache exists at once.

use super::cache::Cache;
use super::decode::{Sequence, token_tensor};
use super::prompt::PromptIds;
use super::{ContextState, Engines, PipelineError};
use crate::bundle::Bundle;
use crate::taps::{NoTaps, TapSink};
use crate::tensor::Tensor;
use accordion_graphs::architecture::Compressor;
use accordion_graphs::onnx::ValueInfo;
use accordion_graphs::plan::PromptLengths;
use accordion_graphs::plan::rcc::{RccPlan, RccSettings};

/// Name of the graph that turns segments into what is added to the decoder's layers.
pub const ENCODER: &str = "encoder";
/// Name of the graph of the decoder's layers over slots.
pub const SLOTS: &str = "slots";

/// RCC for one run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rcc {
    /// The settings that the bundle was exported with.
    pub settings: RccSettings,
    /// Segments that may be encoded in one batch. Decides memory and time, not the result.
    pub width: usize,
}

impl Rcc {
    /// The plan for a prompt of `lengths`; without a suffix it is that of the document alone.
    ///
    /// # Errors
    ///
    /// There is none, or the bundle does not fit it.
    pub fn plan(&self, bundle: &Bundle, lengths: PromptLengths) -> Result<RccPlan, PipelineError> {
        let plan = RccPlan::new(lengths, self.settings)?;
        let length = plan.slots + lengths.suffix;
        match bundle.architecture().sliding_window() {
            Some(window) if length > window => Err(PipelineError::SlidingWindow { length, window }),
            _ => Ok(plan),
        }
    }

    /// The state of prefix and context alone, behind which any number of prompts can be read. It has no logits.
    /// `on_progress` hears how many of how many segments are done.
    ///
    /// # Errors
    ///
    /// There is no plan, or a graph fails.
    pub fn document(
        &self,
        engines: &mut Engines<'_>,
        prompt: &PromptIds,
        on_progress: &mut dyn FnMut(usize, usize),
    ) -> Result<ContextState, PipelineError> {
        let lengths = PromptLengths { suffix: 0, ..prompt.lengths() };
        let plan = self.plan(engines.bundle(), lengths)?;
        let mut on_batch = |done| on_progress(done, plan.segments);
        read_slots(engines, &plan, &prompt.text(), self.width, &mut NoTaps, &mut on_batch)?.into_state(Vec::new())
    }

    pub(super) fn compress(
        &self,
        engines: &mut Engines<'_>,
        prompt: &PromptIds,
        on_progress: &mut dyn FnMut(usize, usize),
    ) -> Result<ContextState, PipelineError> {
        if prompt.suffix.is_empty() {
            return Err(PipelineError::EmptyPrompt);
        }
        let plan = self.plan(engines.bundle(), prompt.lengths())?;
        let steps = plan.segments + 1;
        let mut on_batch = |done| on_progress(done, steps);
        let mut sequence = read_slots(engines, &plan, &prompt.text(), self.width, &mut NoTaps, &mut on_batch)?;
        let logits = sequence.read(engines, &prompt.suffix, |_| {})?;
        on_progress(steps, steps);
        sequence.into_state(logits)
    }
}

/// The slots of `text`, which is prefix and context as `plan` has them, with room for the plan's suffix behind them.
/// `width` is the number of segments in a batch; `on_batch` hears how many are done.
///
/// Taps of the batch that begins with segment `s` are called `segments.<s>.` and their name in the graph, and carry the
/// rows of all its segments; `segments.<s>.maps` is what the encoder gives.
///
/// # Errors
///
/// The text is not the one planned for, an id is outside the vocabulary, the bundle lacks a graph, or a graph fails.
pub fn read_slots(
    engines: &mut Engines<'_>,
    plan: &RccPlan,
    text: &[u32],
    width: usize,
    taps: &mut dyn TapSink,
    on_batch: &mut dyn FnMut(usize),
) -> Result<Sequence, PipelineError> {
    let width = width.clamp(1, plan.segments.max(1));
    let mut cache = Cache::new(engines.bundle(), plan.slots + plan.lengths.suffix)?;
    for first in (0..plan.segments).step_by(width) {
        let segments = width.min(plan.segments - first);
        let scope = format!("segments.{first}.");
        let ids: Vec<u32> = (first..first + segments).flat_map(|s| plan.segment(text, s)).collect();
        let ids = token_tensor(&ids, encoder_vocab_size(engines.bundle()))?;
        let maps = encode(engines, &ids.reshaped([segments, plan.settings.window])?, &scope, taps)?;
        append(engines, &mut cache, maps, &scope, taps)?;
        on_batch(first + segments);
    }
    Ok(Sequence::over(cache))
}

/// Segments `[segments, W]` to maps `[L, segments * n, H]`.
fn encode(
    engines: &mut Engines<'_>,
    segments: &Tensor,
    scope: &str,
    taps: &mut dyn TapSink,
) -> Result<Tensor, PipelineError> {
    let wanted = Wanted::new(engines, ENCODER, scope, taps)?;
    let outputs = [&["maps"], &wanted.values[..]].concat();
    let engine = engines.get(ENCODER, &wanted.declared)?;
    let mut results = engine.run(&[("input_ids", segments)], &mut [], &outputs)?;
    wanted.record(results.split_off(1), taps)?;
    let maps = results.swap_remove(0);
    let name = format!("{scope}maps");
    if taps.wants(&name) {
        taps.record(&name, maps.clone());
    }
    Ok(maps)
}

/// Appends the slots of `maps [L, slots, H]` to the cache.
fn append(
    engines: &mut Engines<'_>,
    cache: &mut Cache,
    maps: Tensor,
    scope: &str,
    taps: &mut dyn TapSink,
) -> Result<(), PipelineError> {
    let shape = [&[1], maps.shape()].concat();
    let slots = shape.get(2).copied().unwrap_or_default();
    let maps = maps.reshaped(shape)?;
    let positions = (cache.len() as i64..).take(slots).collect();
    let positions = Tensor::from_i64([1, slots], positions)?;
    let wanted = Wanted::new(engines, SLOTS, scope, taps)?;
    let engine = engines.get(SLOTS, &wanted.declared)?;
    let inputs = [("maps", &maps), ("position_ids", &positions)];
    let tapped = cache.run(engine, slots, &inputs, &wanted.values, &[["last.key", "last.value"]])?;
    wanted.record(tapped, taps)
}

/// The context is what the encoder reads; its vocabulary need not be the decoder's.
fn encoder_vocab_size(bundle: &Bundle) -> usize {
    match &bundle.manifest().compressor {
        Some(Compressor::Rcc(model)) => model.encoder.vocab_size(),
        _ => bundle.architecture().vocab_size(),
    }
}

/// The taps of one graph that somebody wants.
struct Wanted<'b> {
    taps: Vec<(String, &'b ValueInfo)>,
    /// Their values in the graph.
    values: Vec<&'b str>,
    /// Those of the values that are no outputs of the graph as it is.
    declared: Vec<&'b str>,
}

impl<'b> Wanted<'b> {
    fn new(engines: &Engines<'b>, graph: &str, scope: &str, sink: &dyn TapSink) -> Result<Self, PipelineError> {
        let signature = engines.signature(graph)?;
        let named = signature.taps.iter().map(|(tap, value)| (format!("{scope}{tap}"), value));
        let taps: Vec<(String, &ValueInfo)> = named.filter(|(name, _)| sink.wants(name)).collect();
        let values: Vec<&str> = taps.iter().map(|(_, value)| value.name.as_str()).collect();
        let is_output = |name: &&str| signature.outputs.iter().any(|output| output.name == *name);
        let declared = values.iter().copied().filter(|name| !is_output(name)).collect();
        Ok(Self { taps, values, declared })
    }

    /// Hands `values` to the sink, without the batch axis where they have one.
    fn record(self, values: Vec<Tensor>, sink: &mut dyn TapSink) -> Result<(), PipelineError> {
        for ((name, info), value) in self.taps.into_iter().zip(values) {
            let batched = info.shape.first().is_some_and(|dim| dim == "batch");
            let value = if batched { value.reshaped(&value.shape()[1..])? } else { value };
            sink.record(&name, value);
        }
        Ok(())
    }
}
