//! SharedLLM over engines: the lower model over the context tree, then the upper model over the running text.
//!
//! Where the released code stops with an error although what it computes is defined, this goes on: a running text of 2 to
//! `n + 1` tokens (rotation tables that were too short), padding, batches, a query of any row, and texts that are longer
//! than the trained positions, whose tables the released code makes of integers and which are right here. Refused by name
//! are a chunk length that cannot be halved, more tokens to keep than a node has, a prompt without a running text (all at
//! planning), nodes longer than the lower model's sliding window, and, as released, so many chunks that a single token's
//! rotation is not defined: `n + 1` has to be less than the width of a head.

use super::decode::{Sequence, token_tensor};
use super::prompt::PromptIds;
use super::{ContextState, Engines, Injected, InjectedLayer, PipelineError};
use crate::bundle::{Bundle, Method};
use crate::taps::{NoTaps, TapSink};
use crate::tensor::Tensor;
use accordion_graphs::architecture::Compressor;
use accordion_graphs::onnx::ValueInfo;
use accordion_graphs::plan::PromptLengths;
use accordion_graphs::plan::sharedllm::{ChunkPolicy, Quirks, SharedLlmPlan, SharedLlmSettings};
use std::ops::Range;

/// SharedLLM for one run.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SharedLlm {
    /// The settings that the bundle was exported with.
    pub settings: SharedLlmSettings,
    /// How much of the prompt the lower model reads.
    pub policy: ChunkPolicy,
    /// Chunks that may be compressed in one call, where they do not depend on each other. Decides memory and time, not
    /// the result.
    pub width: usize,
}

/// What the lower model reads.
#[derive(Debug, Clone, Copy)]
pub struct Context<'a> {
    /// Token ids of all chunks, `[n * L]`.
    pub ids: &'a [u32],
    /// Which of them are tokens and not padding, if some are not.
    pub mask: Option<&'a [bool]>,
    /// The running text, which decides what is kept in detail where the settings say so.
    pub running: &'a [u32],
    /// The row of the running text that decides; the last one, usually.
    pub query_index: usize,
}

impl SharedLlm {
    /// The plan for a prompt of `lengths`.
    ///
    /// # Errors
    ///
    /// There is none, or the bundle does not fit it.
    pub fn plan(&self, bundle: &Bundle, lengths: PromptLengths) -> Result<SharedLlmPlan, PipelineError> {
        let plan = SharedLlmPlan::new(lengths, self.settings, self.policy)?;
        check(&plan, bundle)?;
        Ok(plan)
    }

    pub(super) fn compress(
        &self,
        engines: &mut Engines<'_>,
        prompt: &PromptIds,
        on_progress: &mut dyn FnMut(usize, usize),
    ) -> Result<ContextState, PipelineError> {
        let plan = self.plan(engines.bundle(), prompt.lengths())?;
        let ids = prompt.concatenated();
        let (context, running) = ids.split_at(plan.compressed().end);
        let context = Context { ids: context, mask: None, running, query_index: running.len() - 1 };
        let injected =
            inject(engines, &plan, context, self.width, &mut NoTaps, &mut |done| on_progress(done, ids.len()))?;
        read(engines, injected, running, |done| on_progress(plan.compressed().end + done, ids.len()))
    }
}

/// Checks that the graphs of `bundle` can do what `plan` says.
fn check(plan: &SharedLlmPlan, bundle: &Bundle) -> Result<(), PipelineError> {
    match &bundle.manifest().method {
        Method::SharedLlm { settings } if *settings == plan.settings => {}
        other => {
            let found = serde_json::to_string(other).unwrap_or_default();
            let expected = serde_json::to_string(&Method::SharedLlm { settings: plan.settings }).unwrap_or_default();
            return Err(PipelineError::Settings { found, expected });
        }
    }
    let head_dim = bundle.architecture().head_dim();
    let chunks = plan.chunks * plan.settings.entries_per_chunk();
    if plan.settings.quirks == Quirks::Faithful && chunks + 1 >= head_dim {
        return Err(PipelineError::ManyChunks { chunks, head_dim });
    }
    if let Some(Compressor::SharedLlm(model)) = &bundle.manifest().compressor
        && let (Some(window), Some(length)) =
            (model.lower.sliding_window, plan.levels.iter().map(|level| level.node_len).max())
        && length > window
    {
        return Err(PipelineError::SlidingWindow { length, window });
    }
    Ok(())
}

/// The keys and values of `context` that the bottom layers attend to. `width` is the number of chunks that may go through
/// one call; they all do where they depend on each other or `taps` wants something. `on_progress` is told the tokens done.
///
/// # Errors
///
/// The context is not the one planned for, the bundle does not fit the plan, or a graph fails.
pub fn inject(
    engines: &mut Engines<'_>,
    plan: &SharedLlmPlan,
    context: Context<'_>,
    width: usize,
    taps: &mut dyn TapSink,
    on_progress: &mut dyn FnMut(usize),
) -> Result<Injected, PipelineError> {
    check(plan, engines.bundle())?;
    let graph = if context.mask.is_some() { "compress_masked" } else { "compress" };
    let signature = engines.signature(graph)?;
    let wanted: Vec<(&str, &ValueInfo)> =
        signature.taps.iter().filter(|(tap, _)| taps.wants(tap)).map(|(tap, value)| (tap.as_str(), value)).collect();
    // As released, chunks choose and join halves of each other, unless the tree is only its leaves.
    let coupled = plan.settings.quirks == Quirks::Faithful && plan.settings.tree_depth > 1;
    let width = if coupled || !wanted.is_empty() { plan.chunks } else { width.clamp(1, plan.chunks) };

    let outputs: Vec<&str> = signature.outputs.iter().map(|output| output.name.as_str()).collect();
    let mut calls = Vec::with_capacity(plan.chunks.div_ceil(width));
    for first in (0..plan.chunks).step_by(width) {
        let chunks = first..(first + width).min(plan.chunks);
        let inputs = inputs(engines, plan, &context, chunks.clone())?;
        let inputs: Vec<(&str, &Tensor)> = inputs.iter().map(|(name, tensor)| (*name, tensor)).collect();
        let results = run_tapped(engines, graph, &inputs, &outputs, &wanted, taps)?;
        calls.push(outputs.iter().copied().zip(results).collect::<Vec<_>>());
        on_progress(chunks.end * plan.settings.chunk_len);
    }
    let joined = |name: &str| {
        let parts = calls.iter().flatten().filter(|(output, _)| *output == name).map(|(_, part)| part);
        let parts: Vec<&Tensor> = parts.collect();
        // `[1, G, rows, d]`
        if parts.is_empty() { Ok(None) } else { Tensor::concat(&parts, 2).map(Some) }
    };
    let mut layers = Vec::new();
    while let Some(key) = joined(&format!("injected.{}.key", layers.len()))? {
        let layer = layers.len();
        let value = joined(&format!("injected.{layer}.value"))?;
        let single_key = joined(&format!("injected.{layer}.single_key"))?;
        layers.extend(value.map(|value| InjectedLayer { key, single_key, value }));
    }
    Ok(Injected { layers })
}

/// Feeds the running text to the decoder, whose bottom layers attend to `injected`. `on_progress` is told the tokens done.
///
/// # Errors
///
/// An id is outside the vocabulary, or the decoder fails.
pub fn read(
    engines: &mut Engines<'_>,
    injected: Injected,
    running: &[u32],
    on_progress: impl FnMut(usize),
) -> Result<ContextState, PipelineError> {
    let mut sequence = Sequence::attending_to(engines, injected, running.len())?;
    let logits = sequence.read(engines, running, on_progress)?;
    sequence.into_state(logits)
}

/// The inputs of one call over `chunks`.
fn inputs(
    engines: &Engines<'_>,
    plan: &SharedLlmPlan,
    context: &Context<'_>,
    chunks: Range<usize>,
) -> Result<Vec<(&'static str, Tensor)>, PipelineError> {
    let bundle = engines.bundle();
    let length = plan.settings.chunk_len;
    let (tokens, shape) = (chunks.start * length..chunks.end * length, [1, chunks.len(), length]);
    let ids = context.ids.get(tokens.clone()).unwrap_or_default();
    let scalar = |n: usize| Tensor::from_i64([1], vec![n as i64]);
    let vocab_size = match &bundle.manifest().compressor {
        Some(Compressor::SharedLlm(model)) => model.lower.vocab_size,
        _ => bundle.architecture().vocab_size(),
    };
    let mut inputs = vec![
        ("context_ids", token_tensor(ids, vocab_size)?.reshaped(shape)?),
        ("first_chunk", scalar(chunks.start)?),
        ("num_chunks", scalar(plan.chunks)?),
    ];
    if let Some(mask) = context.mask {
        let mask = mask.get(tokens).unwrap_or_default().iter().map(|&token| f32::from(u8::from(token)));
        inputs.push(("context_mask", Tensor::from_f32(shape, mask.collect())?));
    }
    if plan.settings.retrieval {
        inputs.push(("running_ids", token_tensor(context.running, bundle.architecture().vocab_size())?));
        inputs.push(("query_index", scalar(context.query_index)?));
    }
    Ok(inputs)
}

/// Runs `graph` and hands the taps `wanted` to their sink, without the batch axis.
fn run_tapped(
    engines: &mut Engines<'_>,
    graph: &str,
    inputs: &[(&str, &Tensor)],
    outputs: &[&str],
    wanted: &[(&str, &ValueInfo)],
    taps: &mut dyn TapSink,
) -> Result<Vec<Tensor>, PipelineError> {
    let values: Vec<&str> = wanted.iter().map(|(_, value)| value.name.as_str()).collect();
    // Taps that are outputs already need not be declared again.
    let declared: Vec<&str> = values.iter().copied().filter(|name| !outputs.contains(name)).collect();
    let mut results = engines.get(graph, &declared)?.run(inputs, &mut [], &[outputs, &values].concat())?;
    for ((tap, info), value) in wanted.iter().zip(results.split_off(outputs.len())) {
        let batched = info.shape.first().is_some_and(|dim| dim == "batch");
        taps.record(tap, if batched { value.reshaped(&value.shape()[1..])? } else { value });
    }
    Ok(results)
}
