//! Where taps of two sides meet. Actual values wait by name; expected values arrive in the order of the computation, are
//! judged and dropped, so that a comparison of any size needs the memory of one node or one chunk.

use super::verdict::{Bounds, TapKind, TapResult, Verdict, judge};
use crate::taps::TapSink;
use crate::tensor::Tensor;
use std::collections::BTreeMap;

/// Taps that graphs do not have: they mark affixes by their number, gather what is kept, and rotate the keys of cross
/// attention only, before the decoder.
const NOT_IN_GRAPHS: [&str; 5] = [".in_reduction_mask", ".prune.remove_idx", ".cross.q", ".cross.k", ".cross.v"];

/// How taps of tree nodes and segments, which lead to the result, begin.
const PARTS: [&str; 6] = ["node.", "query.", "tree.", "encoder.", "maps", "embed"];

/// Whether the tap called `name` is what the next selection or choice is made by.
pub(super) fn is_score(name: &str) -> bool {
    [".prune.scores", ".similarity", ".sim"].iter().any(|part| name.ends_with(part))
}

/// How much is compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Detail {
    /// Every tap.
    #[default]
    All,
    /// What enters, is scored and leaves every tree node or segment, and the result.
    Nodes,
    /// Which tokens every tree node keeps or which half is split further, and the result.
    Result,
}

impl Detail {
    /// Whether the tap called `name` is compared.
    pub fn includes(self, name: &str) -> bool {
        if NOT_IN_GRAPHS.iter().any(|part| name.ends_with(part)) {
            return false;
        }
        let in_layer = name.starts_with("layers.") || name.contains(".layers.");
        let selects = || is_score(name) || matches!(TapKind::of(name), TapKind::Selection | TapKind::Choice);
        let inside = || PARTS.iter().any(|part| name.starts_with(part));
        match self {
            Self::All => true,
            Self::Nodes => !in_layer,
            Self::Result => !in_layer && (!inside() || selects()),
        }
    }
}

/// What a comparison found.
#[derive(Debug, Clone, Default)]
pub struct Findings {
    /// Every tap that was judged, in the order of the computation.
    pub taps: Vec<TapResult>,
    /// Taps left out, because another choice among near-equals (or a wrong one) came before them.
    pub not_comparable: usize,
}

/// Judges expected taps, as a sink that they are recorded into, against actual ones.
pub(super) struct Judge {
    detail: Detail,
    bounds: Box<dyn Fn(TapKind) -> Bounds>,
    /// What results are called besides the names of their taps.
    pub(super) prefix: String,
    actual: BTreeMap<String, Tensor>,
    /// The expected scores of the node that is being judged, and how far the actual ones are off, within their bounds.
    scores: Option<(Tensor, f64)>,
    diverged: bool,
    findings: Findings,
}

impl Judge {
    pub(super) fn new(detail: Detail, bounds: impl Fn(TapKind) -> Bounds + 'static) -> Self {
        Self {
            detail,
            bounds: Box::new(bounds),
            prefix: String::new(),
            actual: BTreeMap::new(),
            scores: None,
            diverged: false,
            findings: Findings::default(),
        }
    }

    /// Whether [`Judge::offer`] should be given the actual tap `name`.
    pub(super) fn expects(&self, name: &str) -> bool {
        self.detail.includes(name)
    }

    /// Takes an actual tap, to wait for the expected one.
    pub(super) fn offer(&mut self, name: &str, value: Tensor) {
        self.actual.insert(name.to_owned(), value);
    }

    /// A sink for the expected side that takes no other taps than those that wait for it.
    pub(super) fn offered(&mut self) -> Offered<'_> {
        Offered(self)
    }

    /// Begins a part of the computation; `diverged` says that it follows from another choice than the expected one.
    pub(super) fn begin(&mut self, diverged: bool) {
        self.diverged = diverged;
        self.scores = None;
    }

    /// Ends the part whose taps begin with `scope`: what is still waiting there has no counterpart. Returns whether the
    /// sides diverged before its end.
    pub(super) fn end(&mut self, scope: &str) -> bool {
        let unmatched: Vec<String> = self
            .actual
            .range(scope.to_owned()..)
            .map(|(name, _)| name)
            .take_while(|n| n.starts_with(scope))
            .cloned()
            .collect();
        for name in unmatched {
            let Some(actual) = self.actual.remove(&name) else { continue };
            if self.diverged {
                self.findings.not_comparable += 1;
            } else {
                let name = format!("{}{name}", self.prefix);
                self.findings.taps.push(TapResult::missing(&name, actual.shape(), "the expected side"));
            }
        }
        self.diverged
    }

    /// Judges one tap; `actual` need not have waited.
    pub(super) fn compare(&mut self, name: &str, actual: &Tensor, expected: &Tensor) {
        let kind = TapKind::of(name);
        let mut bounds = (self.bounds)(kind);
        let decides = matches!(kind, TapKind::Selection | TapKind::Choice);
        let mut scores = None;
        if let (true, Some((expected, off_by))) = (decides, &self.scores) {
            // Scores that agree only so far leave ties that far apart open.
            bounds.abs = bounds.abs.max(*off_by);
            scores = Some(expected);
        }
        let result = judge(&format!("{}{name}", self.prefix), actual, expected, scores, &bounds);
        // A wrong decision is told once, not again by every tensor that follows from it.
        self.diverged |= decides && result.verdict != Verdict::Pass;
        if is_score(name) {
            let within = result.difference.values().filter(|_| result.verdict == Verdict::Pass);
            self.scores = Some((expected.clone(), within.map_or(0.0, |values| values.max_abs)));
        }
        self.findings.taps.push(result);
    }

    /// Takes a result that was judged elsewhere.
    pub(super) fn tell(&mut self, result: TapResult) {
        self.findings.taps.push(result);
    }

    /// Whether the sides have diverged since [`Judge::begin`].
    pub(super) fn diverged(&self) -> bool {
        self.diverged
    }

    /// Adds `count` taps that could not be compared.
    pub(super) fn leave_out(&mut self, count: usize) {
        self.findings.not_comparable += count;
    }

    pub(super) fn into_findings(self) -> Findings {
        self.findings
    }
}

impl TapSink for Judge {
    fn wants(&self, name: &str) -> bool {
        !self.diverged && self.detail.includes(name)
    }

    fn record(&mut self, name: &str, expected: Tensor) {
        if self.diverged {
            return;
        }
        if let Some(actual) = self.actual.remove(name) {
            self.compare(name, &actual, &expected);
        } else {
            let full = format!("{}{name}", self.prefix);
            self.findings.taps.push(TapResult::missing(&full, expected.shape(), "the actual side"));
        }
    }
}

/// See [`Judge::offered`].
pub(super) struct Offered<'a>(&'a mut Judge);

impl TapSink for Offered<'_> {
    fn wants(&self, name: &str) -> bool {
        self.0.actual.contains_key(name) && self.0.wants(name)
    }

    fn record(&mut self, name: &str, value: Tensor) {
        self.0.record(name, value);
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use accordion_graphs::dtype::DType;

    fn judge_all() -> Judge {
        Judge::new(Detail::All, |kind| Bounds::new(kind, DType::F32))
    }

    fn floats(values: &[f32]) -> Tensor {
        Tensor::from_f32([values.len()], values.to_vec()).unwrap()
    }

    fn ids(values: &[i64]) -> Tensor {
        Tensor::from_i64([values.len()], values.to_vec()).unwrap()
    }

    fn verdicts(findings: &Findings) -> Vec<(&str, Verdict)> {
        findings.taps.iter().map(|tap| (tap.name.as_str(), tap.verdict)).collect()
    }

    #[test]
    fn what_only_one_side_has_is_a_failure() {
        let mut judge = judge_all();
        judge.offer("node.h0.i1.a", floats(&[1.0]));
        judge.offer("node.h0.i1.b", floats(&[1.0]));
        judge.offer("node.h0.i10.b", floats(&[1.0]));
        judge.begin(false);
        judge.record("node.h0.i1.a", floats(&[1.0]));
        judge.record("node.h0.i1.c", floats(&[1.0]));
        assert!(!judge.end("node.h0.i1."));
        let findings = judge.into_findings();
        let expected =
            [("node.h0.i1.a", Verdict::Pass), ("node.h0.i1.c", Verdict::Fail), ("node.h0.i1.b", Verdict::Fail)];
        assert_eq!(verdicts(&findings), expected);
    }

    #[test]
    fn behind_another_selection_nothing_is_compared() {
        for (exchanged, verdict) in [(1.000_01, Verdict::Ambiguous), (0.5, Verdict::Fail)] {
            let mut judge = judge_all();
            for name in ["n.prune.scores", "n.out_hidden"] {
                judge.offer(name, floats(&[2.0, 1.0, exchanged]));
            }
            judge.offer("n.prune.keep_idx", ids(&[0, 2]));
            judge.begin(false);
            judge.record("n.prune.scores", floats(&[2.0, 1.0, exchanged]));
            judge.record("n.prune.keep_idx", ids(&[0, 1]));
            assert!(!judge.wants("n.out_hidden"));
            judge.record("n.out_hidden", floats(&[0.0, 0.0, 0.0]));
            assert!(judge.end("n."));
            let findings = judge.into_findings();
            assert_eq!(verdicts(&findings), [("n.prune.scores", Verdict::Pass), ("n.prune.keep_idx", verdict)]);
            assert_eq!(findings.not_comparable, 1);
        }
    }

    #[test]
    fn scores_that_agree_only_so_far_leave_ties_that_far_apart_open() {
        for (second, verdict) in [(1.005, Verdict::Ambiguous), (1.01, Verdict::Fail)] {
            let mut judge = judge_all();
            // The third scores are 3e-3 apart, within the bounds of the tensor.
            judge.offer("n.prune.scores", floats(&[100.0, second, 1.004]));
            judge.offer("n.prune.keep_idx", ids(&[0, 2]));
            judge.record("n.prune.scores", floats(&[100.0, second, 1.001]));
            judge.record("n.prune.keep_idx", ids(&[0, 1]));
            assert_eq!(judge.into_findings().taps[1].verdict, verdict);
        }
    }

    #[test]
    fn less_detail_never_hides_a_selection() {
        let names = ["node.h0.i0.layers.3.out", "node.h0.i0.in_hidden", "node.h0.i0.prune.keep_idx", "cache.k.0"];
        let included = |detail: Detail| names.map(|name| detail.includes(name));
        assert_eq!(included(Detail::All), [true; 4]);
        assert_eq!(included(Detail::Nodes), [false, true, true, true]);
        assert_eq!(included(Detail::Result), [false, false, true, true]);
        assert!(!Detail::All.includes("node.h0.i0.in_reduction_mask"));
    }
}
