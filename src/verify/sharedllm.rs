//! A SharedLLM bundle on either side: the tree of every chunk and what is kept of it, as `query.`, `tree.<w>.` and `kv.<l>.`;
//! the running text that attends to that, as `running.`; tokens behind it, at once as `teacher.` and one by one as `steps.<i>.`,
//! which the released code computes differently; and the cache.

use super::bundle::sharedllm_model;
use super::error::VerifyError;
use super::judge::{Detail, Findings, is_score};
use super::lockstep::against_reference;
use super::parts::Parts;
use super::sides::{EngineRows, ReferenceRows, Running};
use crate::pipeline::Engines;
use crate::pipeline::decode::{Continuation, Sequence};
use crate::pipeline::sharedllm::{Context, inject};
use crate::reference::sharedllm::{Prompt, RunningText, SharedLlm, compress};
use crate::taps::{NoTaps, TapSink};
use crate::tensor::{Tensor, TensorError};
use accordion_graphs::plan::sharedllm::{Quirks, SharedLlmPlan};
use accordion_graphs::precision::KvCache;
use std::collections::BTreeMap;

/// The part of everything before the running text.
const TREE: &str = "tree";

/// What both sides are given.
#[derive(Debug, Clone, Copy)]
pub struct SharedLlmInput<'a> {
    /// Chunks and levels.
    pub plan: &'a SharedLlmPlan,
    /// Token ids of all chunks \[n * L\].
    pub context: &'a [u32],
    /// Token ids that the upper model reads \[T\]; the last one decides what is kept in detail.
    pub running: &'a [u32],
    /// Token ids fed to both sides behind the running text, whatever they would have generated themselves.
    pub teacher: &'a [u32],
    /// Chunks that the engine may compress in one call for what the running text attends to.
    pub width: usize,
}

/// The side of `engines`. `on_progress` hears how many tokens have been read.
///
/// # Errors
///
/// A graph cannot be run, or `parts` stops it.
pub fn engine_parts(
    engines: &mut Engines<'_>,
    input: &SharedLlmInput<'_>,
    parts: &mut dyn Parts,
    on_progress: &mut dyn FnMut(usize),
) -> Result<(), VerifyError> {
    let &SharedLlmInput { plan, context, running, teacher, width } = input;
    let compressed = Context { ids: context, mask: None, running, query_index: running.len().saturating_sub(1) };
    for (tap, value) in tree_taps(engines, plan, compressed, &|tap| parts.wants(tap))? {
        let value = decided_between(plan, &tap, value)?;
        parts.record(&tap, value);
    }
    parts.end_part(TREE)?;

    // Without taps chunks go through in calls of the width that was asked for.
    let injected = inject(engines, plan, compressed, width, &mut NoTaps, &mut *on_progress)?;
    let mut sequence = Sequence::attending_to(engines, injected, running.len())?;
    let mut rows = EngineRows { engines, sequence: &mut sequence };
    rows.read(running, "running.", parts, &mut |done| on_progress(context.len() + done))?;
    let state = sequence.into_state(Vec::new())?;

    let continued = |engines: &Engines<'_>| Sequence::continue_from(engines, &state, teacher.len(), Continuation::Next);
    let mut sequence = continued(engines)?;
    EngineRows { engines, sequence: &mut sequence }.read(teacher, "teacher.", parts, &mut |_| {})?;
    let mut sequence = continued(engines)?;
    let mut rows = EngineRows { engines, sequence: &mut sequence };
    for (step, id) in teacher.iter().enumerate() {
        rows.read(std::slice::from_ref(id), &format!("steps.{step}."), parts, &mut |_| {})?;
    }
    rows.end(parts)
}

/// The side of `reference`, whose keys and values are kept as `kv_cache` says behind the running text.
///
/// # Errors
///
/// The reference cannot be run, or `parts` stops it.
pub fn reference_parts(
    reference: &SharedLlm,
    input: &SharedLlmInput<'_>,
    kv_cache: KvCache,
    parts: &mut dyn Parts,
) -> Result<(), VerifyError> {
    let &SharedLlmInput { plan, context, running, teacher, .. } = input;
    let mask = vec![true; context.len()];
    let prompt = Prompt { context, mask: &mask, running, query_index: running.len().saturating_sub(1) };
    let injected = compress(reference, plan, prompt, &mut Paired { sink: parts, plan })?;
    parts.end_part(TREE)?;
    let mut rows = Running { model: reference, text: RunningText::new(reference, &injected) };
    rows.read(running, "running.", parts)?;
    if kv_cache == KvCache::Int8 {
        rows.text = rows.text.rounded();
    }
    rows.clone().read(teacher, "teacher.", parts)?;
    for (step, id) in teacher.iter().enumerate() {
        rows.read(std::slice::from_ref(id), &format!("steps.{step}."), parts)?;
    }
    rows.end(parts)
}

/// Compares `engines` with `reference` on `input`. A half that is chosen otherwise is told once; what follows from it is counted
/// as not comparable.
///
/// # Errors
///
/// A side cannot be run.
pub fn compare_sharedllm(
    engines: &mut Engines<'_>,
    reference: &SharedLlm,
    input: &SharedLlmInput<'_>,
    detail: Detail,
    on_progress: &mut dyn FnMut(usize),
) -> Result<Findings, VerifyError> {
    let kv_cache = engines.bundle().manifest().kv_cache;
    let expected = Box::new(move |parts: &mut dyn Parts| reference_parts(reference, input, kv_cache, parts));
    against_reference(engines, detail, expected, |engines, parts| engine_parts(engines, input, parts, on_progress))
}

/// The taps of `context`'s tree under the reference's names and in its shapes, as far as they are wanted.
pub(super) fn tree_taps(
    engines: &mut Engines<'_>,
    plan: &SharedLlmPlan,
    context: Context<'_>,
    wants: &dyn Fn(&str) -> bool,
) -> Result<BTreeMap<String, Tensor>, VerifyError> {
    let lower = &sharedllm_model(engines.bundle())?.lower;
    let heads = [lower.num_kv_heads, lower.head_dim];
    let mut taps = EngineTaps { plan, heads, wants, found: BTreeMap::new(), error: None };
    inject(engines, plan, context, plan.chunks, &mut taps, &mut |_| {})?;
    match taps.error {
        None => Ok(taps.found),
        Some(error) => Err(error.into()),
    }
}

/// The engine's taps of the tree, as they are recorded.
struct EngineTaps<'a> {
    plan: &'a SharedLlmPlan,
    /// Key heads of the lower model, and their width.
    heads: [usize; 2],
    wants: &'a dyn Fn(&str) -> bool,
    found: BTreeMap<String, Tensor>,
    error: Option<TensorError>,
}

/// Keys or values of all tree nodes in one layer: `lower.layers.<l>.attn.k` is `<l>` and `key`.
fn of_nodes(name: &str) -> Option<(&str, &'static str)> {
    let (layer, part) = name.strip_prefix("lower.layers.")?.split_once('.')?;
    Some((layer, if part == "attn.k" { "key" } else { (part == "attn.v").then_some("value")? }))
}

impl TapSink for EngineTaps<'_> {
    fn wants(&self, name: &str) -> bool {
        let in_tree = || {
            let part = name.strip_prefix("tree.").and_then(|rest| Some(rest.split_once('.')?.1));
            part.is_some_and(|part| !part.contains('.'))
        };
        // A tree of one level compares no halves.
        let query = name == "query.vector" && self.plan.levels.len() > 1;
        let same = query || name.starts_with("kv.") || in_tree();
        self.error.is_none() && (self.wants)(name) && (same || of_nodes(name).is_some())
    }

    fn record(&mut self, name: &str, value: Tensor) {
        let recorded = self.translated(name, &value);
        self.error = self.error.take().or(recorded.err());
    }
}

impl EngineTaps<'_> {
    fn translated(&mut self, name: &str, value: &Tensor) -> Result<(), TensorError> {
        if let Some((layer, part)) = of_nodes(name) {
            for (w, nodes) in self.by_level(value)?.into_iter().enumerate() {
                self.found.insert(format!("tree.{w}.layers.{layer}.{part}"), nodes);
            }
            return Ok(());
        }
        let value = match name.rsplit('.').next() {
            Some("encoded_ids") => {
                let len = value.shape().last().copied().unwrap_or(1).max(1);
                value.reshaped([value.len() / len, len])?
            }
            // As released, the leaves of a tree of one level are chunks of their own.
            Some("key" | "value") if self.plan.settings.entries_per_chunk() == 2 => self.leaves_apart(value)?,
            _ => value.clone(),
        };
        self.found.insert(name.to_owned(), value);
        Ok(())
    }

    /// Rows of all nodes of all chunks, `[n * rows, G * d]`, as those of each level, `[nodes, G, length, d]`.
    fn by_level(&self, value: &Tensor) -> Result<Vec<Tensor>, TensorError> {
        let SharedLlmPlan { chunks, ref levels, settings, .. } = *self.plan;
        let ([groups, width], rows) = (self.heads, value.to_f32());
        let per_chunk: usize = levels.iter().map(|level| level.nodes * level.node_len).sum();
        let mut start = 0;
        let mut result = Vec::with_capacity(levels.len());
        for (w, level) in levels.iter().enumerate() {
            let count = chunks * level.nodes;
            let mut values = Vec::with_capacity(count * level.node_len * groups * width);
            for node in 0..count {
                // As released, the second leaf of chunk `r` is leaf `n + r` of all.
                let joined = settings.quirks == Quirks::Faithful && level.nodes == 2 && w > 0;
                let (chunk, side) =
                    if joined { (node % chunks, node / chunks) } else { (node / level.nodes, node % level.nodes) };
                let first = chunk * per_chunk + start + side * level.node_len;
                for group in 0..groups {
                    for row in first..first + level.node_len {
                        values.extend(rows.iter().skip((row * groups + group) * width).take(width));
                    }
                }
            }
            result.push(Tensor::from_f32([count, groups, level.node_len, width], values)?);
            start += level.nodes * level.node_len;
        }
        Ok(result)
    }

    /// `[n, G, 2 * C, d]` as `[2 * n, G, C, d]`.
    fn leaves_apart(&self, value: &Tensor) -> Result<Tensor, TensorError> {
        let [groups, width] = self.heads;
        let kept = self.plan.kept_per_chunk / 2;
        let values = value.to_f32();
        let leaf = |at: usize, group: usize| {
            let first = ((at / 2 * groups + group) * 2 + at % 2) * kept * width;
            values.iter().skip(first).take(kept * width)
        };
        let leaves = 2 * self.plan.chunks;
        let apart = (0..leaves).flat_map(|at| (0..groups).flat_map(move |group| leaf(at, group)));
        Tensor::from_f32([leaves, groups, kept, width], apart.copied().collect())
    }
}

/// The tap `name`; similarities of all left and then all right halves, `[2 * n]`, as the pairs that are decided between,
/// `[n, 2]`.
pub(crate) fn decided_between(plan: &SharedLlmPlan, name: &str, value: Tensor) -> Result<Tensor, TensorError> {
    if !is_score(name) {
        return Ok(value);
    }
    let count = value.len() / 2;
    match plan.settings.quirks {
        // As released, neighbours in the list.
        Quirks::Faithful => value.reshaped([count, 2]),
        Quirks::Fixed => {
            let values = value.to_f32();
            let (left, right) = values.split_at(count);
            let pairs = left.iter().zip(right).flat_map(|(&left, &right)| [left, right]);
            Tensor::from_f32([count, 2], pairs.collect())
        }
    }
}

/// The reference's taps, with similarities by the pairs that are decided between.
struct Paired<'a> {
    sink: &'a mut dyn Parts,
    plan: &'a SharedLlmPlan,
}

impl TapSink for Paired<'_> {
    fn wants(&self, name: &str) -> bool {
        self.sink.wants(name)
    }

    fn record(&mut self, name: &str, value: Tensor) {
        // A tensor that cannot be paired fails by its shape.
        let value = decided_between(self.plan, name, value.clone()).unwrap_or(value);
        self.sink.record(name, value);
    }
}
