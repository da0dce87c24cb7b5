//! A HOMER bundle against the reference, node by node: as soon as the engine has run a node, the reference runs the same
//! one and every tap is judged and dropped. At width 1 the taps of one node are in memory at a time.

use super::error::VerifyError;
use super::judge::{Detail, Findings, Judge};
use super::order::scope;
use super::quantized::bounds_of;
use crate::pipeline::decode::{Continuation, Sequence};
use crate::pipeline::{self, ContextState, Engines};
use crate::reference;
use crate::reference::decode::ContinuationOffset;
use crate::reference::homer::Compression;
use crate::reference::llama::Llama;
use crate::taps::{NoTaps, TapSink};
use crate::tensor::Tensor;
use accordion_graphs::plan::homer::{HomerNode, HomerPlan};
use ndarray::{Axis, Slice};
use std::cell::RefCell;
use std::collections::HashSet;

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

/// Compares `engines` with `reference` on `input`. `on_progress` hears how many nodes have been compared.
///
/// A node that keeps other tokens than the reference is told once; what follows from its choice, up to the root and the
/// result, is counted as not comparable. Logits are those of the last row, and `teacher.logits`.
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
    let HomerInput { plan, prefix, context, suffix, bias, .. } = *input;
    let significance = |layer: usize| bias.get(layer).copied().unwrap_or_default();
    let prompt = reference::homer::Prompt { prefix, context, suffix };
    let lockstep = RefCell::new(Lockstep {
        plan,
        compression: Compression::new(reference, plan, prompt, &significance)?,
        judge: Judge::new(detail, bounds_of(engines.bundle())),
        keeps_all: plan.nodes.iter().filter(|n| n.removed() == 0).map(HomerNode::tap_scope).collect(),
        ahead: HashSet::new(),
        diverged: Vec::with_capacity(plan.nodes.len()),
        error: None,
    });
    let state = {
        let prompt = pipeline::homer::Prompt { prefix, context, suffix };
        let mut on_node = |node: &HomerNode| on_progress(lockstep.borrow_mut().finished(node));
        pipeline::homer::compress(engines, plan, prompt, bias, input.width, &mut EngineTaps(&lockstep), &mut on_node)?
    };
    lockstep.into_inner().result(engines, reference, &state, input.teacher)
}

/// The engine's taps, on their way to the judge.
struct EngineTaps<'c, 'a>(&'c RefCell<Lockstep<'a>>);

impl TapSink for EngineTaps<'_, '_> {
    fn wants(&self, name: &str) -> bool {
        self.0.borrow().wants(name)
    }

    fn record(&mut self, name: &str, value: Tensor) {
        self.0.borrow_mut().judge.offer(name, value);
    }
}

/// The reference, one step behind the engine.
struct Lockstep<'a> {
    plan: &'a HomerPlan,
    compression: Compression<'a>,
    judge: Judge,
    /// Scopes of the nodes that drop nothing: the graphs score their tokens all the same.
    keeps_all: HashSet<String>,
    /// Nodes that the engine has run and the reference has not.
    ahead: HashSet<(usize, usize)>,
    /// For every node that both have run, in the plan's order, whether they kept different tokens in it or below it.
    diverged: Vec<bool>,
    /// The engine cannot be stopped from inside: what went wrong waits here.
    error: Option<VerifyError>,
}

impl Lockstep<'_> {
    fn wants(&self, name: &str) -> bool {
        let scored_for_nothing = || name.contains(".prune.") && self.keeps_all.contains(scope(name));
        // The engine gives the last row's logits in any case; all of them may be gigabytes.
        name != "prefix.logits" && self.error.is_none() && self.judge.expects(name) && !scored_for_nothing()
    }

    /// The engine has run `node`: the reference follows as far as it can. Returns how many nodes it has run.
    fn finished(&mut self, node: &HomerNode) -> usize {
        self.ahead.insert((node.height, node.index));
        while self.error.is_none() {
            match self.plan.nodes.get(self.diverged.len()) {
                Some(next) if self.ahead.remove(&(next.height, next.index)) => self.step(next),
                _ => break,
            }
        }
        self.diverged.len()
    }

    fn step(&mut self, node: &HomerNode) {
        self.judge.begin(node.children.is_some_and(|children| children.iter().any(|&child| self.diverged[child])));
        if let Err(error) = self.compression.step(&mut self.judge) {
            self.error = Some(error.into());
        }
        self.diverged.push(self.judge.end(&format!("{}.", node.tap_scope())));
    }

    /// Compares the context state and what is decoded from it.
    fn result(
        mut self,
        engines: &mut Engines<'_>,
        reference: &Llama,
        state: &ContextState,
        teacher: &[u32],
    ) -> Result<Findings, VerifyError> {
        if let Some(error) = self.error {
            return Err(error);
        }
        let diverged = self.diverged.last().copied().unwrap_or(false);
        self.judge.begin(diverged);
        let context = self.compression.finish(&mut self.judge)?;
        self.judge.end("prefix.");
        self.judge.end("cache.");
        if diverged {
            self.judge.leave_out(1 + usize::from(!teacher.is_empty()));
            return Ok(self.judge.into_findings());
        }

        let last = context.last_hidden.slice_axis(Axis(0), Slice::from(-1..)).to_owned();
        let found = Tensor::from_f32([1, state.logits.len()], state.logits.clone())?;
        self.judge.compare("prefix.logits", &found, &reference::to_tensor(&reference.logits(&last))?);
        if !teacher.is_empty() {
            let mut sequence = Sequence::continue_from(engines, state, teacher.len(), Continuation::Next)?;
            let found = sequence.forward(engines, teacher, teacher.len())?;
            let mut continuation = reference::decode::Continuation::new(&context, ContinuationOffset::AfterLast);
            let expected = continuation.feed(reference, teacher, &mut NoTaps)?;
            self.judge.compare("teacher.logits", &found, &reference::to_tensor(&expected)?);
        }
        Ok(self.judge.into_findings())
    }
}
