//! Where taps of two sides meet: one after the other in the order of the computation, so that a choice knows the scores it
//! was made by, and what follows from another choice is known to.

use super::verdict::{BoundsOf, TapKind, TapResult, Verdict, judge};
use crate::tensor::Tensor;
use std::rc::Rc;

/// Taps that graphs do not have, or not one by one: they mark affixes by their number, gather what is kept, and rotate the keys of cross
/// attention only, before the decoder.
const NOT_IN_GRAPHS: [&str; 5] = [".in_reduction_mask", ".prune.remove_idx", ".cross.q", ".cross.k", ".cross.v"];

/// How taps of tree nodes and segments, which lead to the result, begin.
const PARTS: [&str; 4] = ["node.", "query.", "tree.", "segments."];

/// Whether the tap called `name` is what the next selection or choice is made by.
pub(crate) fn is_score(name: &str) -> bool {
    matches!(name.rsplit('.').next(), Some("similarity" | "sim")) || name.ends_with("prune.scores")
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
        let all_at_once = || name.contains(".nodes.") || name.contains(".halves.") || name.starts_with("query.layers.");
        if NOT_IN_GRAPHS.iter().any(|part| name.ends_with(part)) || all_at_once() {
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
    /// Taps that only one side has, so that nothing is said about them: what the reference computes and no graph needs, or
    /// what one of two graphs has fused away.
    pub one_sided: usize,
}

impl Findings {
    /// Adds what sample number `sample` of the same computation came to: every tap keeps the worst result of all samples.
    pub fn add_sample(&mut self, sample: usize, other: Self) {
        self.not_comparable += other.not_comparable;
        self.one_sided = self.one_sided.max(other.one_sided);
        let severity = |tap: &TapResult| (tap.verdict, tap.bound_use.unwrap_or(f64::INFINITY));
        // The order is the same in all samples, but what was not comparable in one may be in another.
        let mut next = 0;
        for mut tap in other.taps {
            let known = self.taps[next..].iter().position(|known| known.name == tap.name).map(|place| next + place);
            if known.is_none_or(|place| severity(&tap) > severity(&self.taps[place])) {
                tap.reason = format!("sample {sample}: {}", tap.reason);
                match known {
                    Some(place) => self.taps[place] = tap,
                    None => self.taps.insert(next, tap),
                }
            }
            next = known.unwrap_or(next) + 1;
        }
    }
}

/// Judges actual taps against expected ones.
pub(super) struct Judge {
    bounds: Rc<BoundsOf>,
    /// What results are called besides the names of their taps.
    pub(super) prefix: String,
    /// The expected scores of the part that is being judged, and how far the actual ones are off, within their bounds.
    scores: Option<(Tensor, f64)>,
    diverged: bool,
    findings: Findings,
}

impl Judge {
    pub(super) fn new(bounds: Rc<BoundsOf>) -> Self {
        Self { bounds, prefix: String::new(), scores: None, diverged: false, findings: Findings::default() }
    }

    /// Begins a part of the computation; `diverged` says that it follows from another choice than the expected one.
    pub(super) fn begin(&mut self, diverged: bool) {
        self.diverged = diverged;
        self.scores = None;
    }

    /// Judges one tap.
    pub(super) fn compare(&mut self, name: &str, actual: &Tensor, expected: &Tensor) {
        let kind = TapKind::of(name);
        let mut bounds = (self.bounds)(name, kind);
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

    /// Adds a tap that only one side has.
    pub(super) fn note_one_sided(&mut self) {
        self.findings.one_sided += 1;
    }

    pub(super) fn into_findings(self) -> Findings {
        self.findings
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::super::verdict::Bounds;
    use super::*;
    use accordion_graphs::dtype::DType;

    fn judge_all() -> Judge {
        Judge::new(Rc::new(|_, kind| Bounds::new(kind, DType::F32)))
    }

    fn floats(values: &[f32]) -> Tensor {
        Tensor::from_f32([values.len()], values.to_vec()).unwrap()
    }

    fn ids(values: &[i64]) -> Tensor {
        Tensor::from_i64([values.len()], values.to_vec()).unwrap()
    }

    #[test]
    fn another_selection_is_a_divergence_near_or_not() {
        for (exchanged, verdict) in [(1.000_01, Verdict::Ambiguous), (0.5, Verdict::Fail)] {
            let mut judge = judge_all();
            judge.begin(false);
            let scores = floats(&[2.0, 1.0, exchanged]);
            judge.compare("n.prune.scores", &scores, &scores);
            assert!(!judge.diverged());
            judge.compare("n.prune.keep_idx", &ids(&[0, 2]), &ids(&[0, 1]));
            assert!(judge.diverged());
            let taps = judge.into_findings().taps;
            assert_eq!(taps.iter().map(|tap| tap.verdict).collect::<Vec<_>>(), [Verdict::Pass, verdict]);
        }
    }

    #[test]
    fn scores_that_agree_only_so_far_leave_ties_that_far_apart_open() {
        for (second, verdict) in [(1.005, Verdict::Ambiguous), (1.01, Verdict::Fail)] {
            let mut judge = judge_all();
            // The third scores are 3e-3 apart, within the bounds of the tensor.
            judge.compare("n.prune.scores", &floats(&[100.0, second, 1.004]), &floats(&[100.0, second, 1.001]));
            judge.compare("n.prune.keep_idx", &ids(&[0, 2]), &ids(&[0, 1]));
            assert_eq!(judge.into_findings().taps[1].verdict, verdict);
        }
    }

    #[test]
    fn a_tap_has_the_worst_result_of_all_samples() {
        let tap = |name: &str, off_by: f32| {
            judge(name, &floats(&[1.0 + off_by]), &floats(&[1.0]), None, &Bounds::new(TapKind::Value, DType::F32))
        };
        let mut all = Findings { taps: vec![tap("a", 1e-6), tap("c", 1.0)], not_comparable: 1, one_sided: 2 };
        let other = vec![tap("a", 1e-5), tap("b", 1.0), tap("c", 0.5), tap("d", 0.0)];
        all.add_sample(1, Findings { taps: other, not_comparable: 0, one_sided: 2 });
        let found: Vec<(&str, bool)> =
            all.taps.iter().map(|tap| (tap.name.as_str(), tap.reason.starts_with("sample 1: "))).collect();
        assert_eq!(found, [("a", true), ("b", true), ("c", false), ("d", true)]);
        assert_eq!((all.not_comparable, all.one_sided), (1, 2));
    }

    #[test]
    fn less_detail_never_hides_a_selection() {
        let names = [
            "node.h0.i0.layers.3.out",
            "segments.0.encoder.layers.1.out",
            "node.h0.i0.in_hidden",
            "segments.0.maps.1",
            "node.h0.i0.prune.keep_idx",
            "tree.0.chosen",
            "cache.k.0",
        ];
        let included = |detail: Detail| names.map(|name| detail.includes(name));
        assert_eq!(included(Detail::All), [true; 7]);
        assert_eq!(included(Detail::Nodes), [false, false, true, true, true, true, true]);
        assert_eq!(included(Detail::Result), [false, false, false, false, true, true, true]);
        assert!(!Detail::All.includes("node.h0.i0.in_reduction_mask"));
    }
}
