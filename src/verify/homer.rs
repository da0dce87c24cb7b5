//! A HOMER bundle on either side, node by node: every layer of each, what it keeps and leaves; then the context state, the
//! logits of its last row and those of tokens behind it, as `teacher.`.

use super::error::VerifyError;
use super::judge::{Detail, Findings};
use super::lockstep::against_reference;
use super::order::scope;
use super::parts::{Parts, RESULT, Shared};
use crate::pipeline::decode::{Continuation, Sequence};
use crate::pipeline::homer::compress;
use crate::pipeline::{self, Engines};
use crate::reference;
use crate::reference::decode::ContinuationOffset;
use crate::reference::homer::Compression;
use crate::reference::llama::Llama;
use crate::taps::{NoTaps, TapSink};
use crate::tensor::Tensor;
use accordion_graphs::plan::homer::{HomerNode, HomerPlan};
use accordion_graphs::precision::KvCache;
use ndarray::{Axis, Slice};
use std::cell::RefCell;
use std::collections::{BTreeMap, HashSet};

/// What both sides are given.
#[derive(Debug, Clone, Copy)]
pub struct HomerInput<'a> {
    /// Lengths, layers and nodes.
    pub plan: &'a HomerPlan,
    /// Token ids before the context \[P\].
    pub prefix: &'a [u32],
    /// Token ids of the context \[C\].
    pub context: &'a [u32],
    /// Token ids after the context \[S\].
    pub suffix: &'a [u32],
    /// Token ids fed to both sides after the compressed context, whatever they would have generated themselves.
    pub teacher: &'a [u32],
    /// The significance table, one row per layer.
    pub bias: &'a [&'a [f32]],
    /// Leaves that the engine may build in one batch. Their taps wait in memory for the reference, which runs one node
    /// at a time.
    pub width: usize,
}

/// The side of `engines`. `on_progress` hears how many nodes have run.
///
/// # Errors
///
/// A graph cannot be run, or `parts` stops it.
pub fn engine_parts(
    engines: &mut Engines<'_>,
    input: &HomerInput<'_>,
    parts: &mut dyn Parts,
    on_progress: &mut dyn FnMut(usize),
) -> Result<(), VerifyError> {
    let &HomerInput { plan, prefix, context, suffix, teacher, bias, width } = input;
    let shared = Shared::new(parts);
    let keeps_all = plan.nodes.iter().filter(|n| n.removed() == 0).map(HomerNode::tap_scope).collect();
    let waiting = Waiting::default();
    let state = {
        let mut done = 0;
        let mut on_node = |node: &HomerNode| {
            let scope = node.tap_scope();
            let taps = waiting.borrow_mut().remove(&scope).unwrap_or_default();
            for (name, value) in taps {
                shared.record(&name, value);
            }
            shared.end_part(&scope);
            done += 1;
            on_progress(done);
        };
        let prompt = pipeline::homer::Prompt { prefix, context, suffix };
        let mut taps = EngineTaps { shared: &shared, keeps_all, waiting: &waiting };
        compress(engines, plan, prompt, bias, width, &mut taps, &mut on_node)?
    };
    let parts = shared.finish()?;
    parts.record("prefix.logits", Tensor::from_f32([1, state.logits.len()], state.logits.clone())?);
    parts.end_part(RESULT)?;
    if teacher.is_empty() {
        return Ok(());
    }
    let mut sequence = Sequence::continue_from(engines, &state, teacher.len(), Continuation::Next)?;
    parts.record("teacher.logits", sequence.forward(engines, teacher, teacher.len())?);
    parts.end_part("teacher")
}

/// Taps of nodes that ran in one call, until their node is told of: by node, the names and values.
type Waiting = RefCell<BTreeMap<String, Vec<(String, Tensor)>>>;

/// The engine's taps, but for those of nobody's interest.
struct EngineTaps<'s, 'p> {
    shared: &'s Shared<'p>,
    /// Scopes of the nodes that drop nothing: the graphs score their tokens all the same.
    keeps_all: HashSet<String>,
    waiting: &'s Waiting,
}

impl TapSink for EngineTaps<'_, '_> {
    fn wants(&self, name: &str) -> bool {
        let scored_for_nothing = || name.contains(".prune.") && self.keeps_all.contains(scope(name));
        // The engine gives the last row's logits in any case; all of them may be gigabytes.
        name != "prefix.logits" && self.shared.wants(name) && !scored_for_nothing()
    }

    fn record(&mut self, name: &str, value: Tensor) {
        let node = scope(name);
        if node.starts_with("node.") {
            self.waiting.borrow_mut().entry(node.to_owned()).or_default().push((name.to_owned(), value));
        } else {
            self.shared.record(name, value);
        }
    }
}

/// The side of `reference`, in the order of the plan; its cache holds what `kv_cache` says behind the prompt.
///
/// # Errors
///
/// The reference cannot be run, or `parts` stops it.
pub fn reference_parts(
    reference: &Llama,
    input: &HomerInput<'_>,
    kv_cache: KvCache,
    parts: &mut dyn Parts,
) -> Result<(), VerifyError> {
    let &HomerInput { plan, prefix, context, suffix, teacher, bias, .. } = input;
    let significance = |layer: usize| bias.get(layer).copied().unwrap_or_default();
    let prompt = reference::homer::Prompt { prefix, context, suffix };
    let mut compression = Compression::new(reference, plan, prompt, &significance)?;
    while let Some(node) = compression.step(&mut *parts)? {
        parts.end_part(&node.tap_scope())?;
    }
    let context = compression.finish(&mut *parts)?;
    let last = context.last_hidden.slice_axis(Axis(0), Slice::from(-1..)).to_owned();
    parts.record("prefix.logits", reference::to_tensor(&reference.logits(&last))?);
    parts.end_part(RESULT)?;
    if teacher.is_empty() {
        return Ok(());
    }
    let mut continuation = reference::decode::Continuation::new(&context, ContinuationOffset::AfterLast);
    if kv_cache == KvCache::Int8 {
        continuation = continuation.rounded();
    }
    let logits = continuation.feed(reference, teacher, &mut NoTaps)?;
    parts.record("teacher.logits", reference::to_tensor(&logits)?);
    parts.end_part("teacher")
}

/// Compares `engines` with `reference` on `input`. `on_progress` hears how many nodes have run.
///
/// A node that keeps other tokens than the reference is told once; what follows from its choice, up to the root and the
/// result, is counted as not comparable.
///
/// # Errors
///
/// A side cannot be run.
pub fn compare_homer(
    engines: &mut Engines<'_>,
    reference: &Llama,
    input: &HomerInput<'_>,
    detail: Detail,
    on_progress: &mut dyn FnMut(usize),
) -> Result<Findings, VerifyError> {
    let kv_cache = engines.bundle().manifest().kv_cache;
    let expected = Box::new(move |parts: &mut dyn Parts| reference_parts(reference, input, kv_cache, parts));
    against_reference(engines, detail, expected, |engines, parts| engine_parts(engines, input, parts, on_progress))
}
