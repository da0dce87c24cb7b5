//! Bounds, and the verdict they give.
//!
//! A difference is judged against the tensor's own scale: activations of a trained model reach thousands in a few
//! channels, and rounding grows with them. Where such a channel is the small difference of large numbers, single elements
//! are far less exact than the tensor as a whole, so that each has its own bound: a wide one for the element, a narrow
//! one for the norm, which a systematic error cannot hide from. (SmolLM2, FP32, graphs and reference: 1.4e-5 and 2e-6 on
//! a novel, 2e-4 and 1.2e-5 on random tokens; there one unit in the last place of the embedding alone moves single rows
//! by 3e-5.) Choices between values (which tokens survive, which token is best) are
//! exact unless the values lie so near to each other that two sides, each within its bounds, may choose differently:
//! such a near-tie is [`Verdict::Ambiguous`].

use super::compare::{Comparison, FloatDifference, IntegerDifference, compare};
use super::logits::{LogitAgreement, compare_logits};
use super::selection::{SelectionDifference, SelectionError, compare_choices, compare_selections};
use crate::tensor::Tensor;
use accordion_graphs::dtype::DType;
use serde::{Deserialize, Serialize};

/// What a comparison says, from good to bad.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum Verdict {
    /// Within the bounds.
    Pass,
    /// A near-tie was decided differently: neither side is wrong, and what follows from it may differ.
    Ambiguous,
    /// Outside the bounds.
    Fail,
}

impl std::fmt::Display for Verdict {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(match self {
            Self::Pass => "PASS",
            Self::Ambiguous => "AMBIGUOUS",
            Self::Fail => "FAIL",
        })
    }
}

/// What kind of tensor a tap carries, by the last words of its name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TapKind {
    /// Indices of surviving tokens: `prune.keep_idx`.
    Selection,
    /// Which of two halves goes on: `chosen`.
    Choice,
    /// Scores over the vocabulary: `logits`.
    Logits,
    /// Rows of a matrix, copied: `embed`, and what enters a leaf of a tree.
    Copy,
    /// Everything else: floats within bounds, integers exactly.
    Value,
}

impl TapKind {
    /// The kind of the tap called `name`.
    pub fn of(name: &str) -> Self {
        match name.rsplit(['.', '/']).next() {
            Some("keep_idx") => Self::Selection,
            Some("chosen") => Self::Choice,
            Some("logits" | "prefill_logits" | "step_logits") => Self::Logits,
            // That of a segment is mapped to the decoder's width.
            Some("embed") if !name.starts_with("segments.") => Self::Copy,
            Some("in_hidden") if name.starts_with("node.h0.") => Self::Copy,
            _ => Self::Value,
        }
    }
}

/// What may differ. An element may be off by `max(abs, rel * scale)`, `scale` being the largest expected magnitude in
/// its tensor.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Bounds {
    /// Permitted absolute difference, whatever the scale.
    pub abs: f64,
    /// Permitted difference relative to the scale.
    pub rel: f64,
    /// Permitted norm of the difference relative to the norm of the tensor; not asked where no element is off by `abs`.
    pub norm_rel: f64,
    /// Least cosine; not asked of a tensor that lies below `abs` as a whole.
    pub min_cosine: f64,
    /// Least mean share of common tokens among the best five; asked of logits only.
    pub min_top_k: f64,
    /// Permitted distance of an element in units in the last place, where that says anything: of copies in fp32.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_ulps: Option<u64>,
}

impl Bounds {
    /// The bounds for a tap of `kind` in a trained model, when the less precise side computes in `dtype`. A selection or choice
    /// is held against its scores as closely as rounding of well-conditioned numbers allows; those of choices are cosines.
    pub fn new(kind: TapKind, dtype: DType) -> Self {
        match dtype {
            DType::F16 => {
                Self { abs: 5e-3, rel: 1e-2, norm_rel: 4e-2, min_cosine: 0.999, min_top_k: 0.6, max_ulps: None }
            }
            DType::Bf16 => {
                Self { abs: 4e-2, rel: 5e-2, norm_rel: 0.12, min_cosine: 0.99, min_top_k: 0.6, max_ulps: None }
            }
            DType::F32 | DType::I64 | DType::I32 | DType::Bool | DType::U8 | DType::I8 | DType::I4 | DType::F8E4m3 => {
                let rel = match kind {
                    TapKind::Value | TapKind::Copy => 1e-3,
                    // They sum over the full hidden width right after a normalisation.
                    TapKind::Logits => 1e-4,
                    TapKind::Selection | TapKind::Choice => 1e-5,
                };
                let abs = if kind == TapKind::Choice { 1e-5 } else { 1e-4 };
                // A copy is the same numbers; those that entries of a quantized row stand for are rounded once.
                let max_ulps = (kind == TapKind::Copy).then_some(1);
                Self { abs, rel, norm_rel: 1e-4, min_cosine: 0.99999, min_top_k: 0.8, max_ulps }
            }
        }
    }

    /// The bounds for a tap of `kind` in a golden case: small models of well-conditioned numbers, on which FP32 agrees to
    /// `abs` whatever the scale.
    pub fn golden(kind: TapKind, dtype: DType) -> Self {
        let bounds = Self::new(kind, dtype);
        if matches!(dtype, DType::F16 | DType::Bf16) { bounds } else { Self { rel: 0.0, ..bounds } }
    }

    /// What either of two bounds permits.
    #[must_use]
    pub fn or(&self, other: &Self) -> Self {
        Self {
            abs: self.abs.max(other.abs),
            rel: self.rel.max(other.rel),
            norm_rel: self.norm_rel.max(other.norm_rel),
            min_cosine: self.min_cosine.min(other.min_cosine),
            min_top_k: self.min_top_k.min(other.min_top_k),
            max_ulps: self.max_ulps.zip(other.max_ulps).map(|(a, b)| a.max(b)),
        }
    }

    /// The permitted difference in a tensor of `scale`.
    pub fn allowed(&self, scale: f64) -> f64 {
        self.abs.max(self.rel * scale)
    }

    /// The distance below which two values of a tensor of `scale` are a near-tie: each may be off by [`Self::allowed`].
    pub fn tie_margin(&self, scale: f64) -> f64 {
        2.0 * self.allowed(scale)
    }
}

/// The bounds for a tap by its name and kind.
pub type BoundsOf = dyn Fn(&str, TapKind) -> Bounds;

/// The numbers behind a verdict.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
#[non_exhaustive]
pub enum Difference {
    /// Two float tensors.
    Float(FloatDifference),
    /// Two logit tensors.
    Logits {
        /// As floats.
        values: FloatDifference,
        /// As choices.
        choices: LogitAgreement,
    },
    /// Two integer tensors.
    Integer(IntegerDifference),
    /// Two sets of surviving tokens.
    Selection(SelectionDifference),
    /// There is nothing to compare: another shape or type, or one side is missing.
    Incomparable,
}

impl Difference {
    /// The float part, if there is one.
    pub fn values(&self) -> Option<&FloatDifference> {
        match self {
            Self::Float(values) | Self::Logits { values, .. } => Some(values),
            Self::Integer(_) | Self::Selection(_) | Self::Incomparable => None,
        }
    }
}

/// One tap, compared and judged.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TapResult {
    /// Its name.
    pub name: String,
    /// Its expected shape; the actual one where nothing was expected.
    pub shape: Vec<usize>,
    /// What came out.
    pub verdict: Verdict,
    /// Why, in one line.
    pub reason: String,
    /// Largest difference as a share of what is permitted: above 1 is a failure. Absent where difference has no size.
    pub bound_use: Option<f64>,
    /// The numbers.
    pub difference: Difference,
}

impl TapResult {
    /// How many numbers of the actual side are NaN or infinite beyond those of the expected one.
    pub fn lost_numbers(&self) -> usize {
        self.difference.values().map_or(0, |values| {
            let [actual, expected] = [values.actual_non_finite, values.expected_non_finite].map(|n| n.nan + n.inf);
            actual.saturating_sub(expected)
        })
    }

    /// A tap that only one side has: a failure, because nothing was proven about it. `absent_from` names the other side.
    pub fn missing(name: &str, shape: &[usize], absent_from: &str) -> Self {
        Self {
            name: name.to_owned(),
            shape: shape.to_vec(),
            verdict: Verdict::Fail,
            reason: format!("missing from {absent_from}"),
            bound_use: None,
            difference: Difference::Incomparable,
        }
    }
}

/// Compares and judges one tap. `scores` are the expected scores `[tokens]` that a selection was cut by, or `[count, 2]` that
/// choices were made between; without them these have to match exactly.
pub fn judge(name: &str, actual: &Tensor, expected: &Tensor, scores: Option<&Tensor>, bounds: &Bounds) -> TapResult {
    judge_as(TapKind::of(name), name, actual, expected, scores, bounds)
}

/// As [`judge`], whatever the name says of the tap's kind.
pub(super) fn judge_as(
    kind: TapKind,
    name: &str,
    actual: &Tensor,
    expected: &Tensor,
    scores: Option<&Tensor>,
    bounds: &Bounds,
) -> TapResult {
    let (verdict, reason, bound_use, difference) = match (kind, scores) {
        (TapKind::Selection, Some(scores)) => {
            judge_selection(compare_selections(actual, expected, scores), "tokens", bounds)
        }
        (TapKind::Choice, Some(scores)) => judge_selection(compare_choices(actual, expected, scores), "halves", bounds),
        _ => match compare(actual, expected) {
            Comparison::Float(values) => {
                let choices = (kind == TapKind::Logits).then(|| compare_logits(actual, expected)).flatten();
                judge_floats(values, choices, bounds)
            }
            Comparison::Integer(found) => judge_integers(found),
            Comparison::Incomparable => {
                let reason = format!("{actual:?} where {expected:?} was expected");
                (Verdict::Fail, reason, None, Difference::Incomparable)
            }
        },
    };
    TapResult { name: name.to_owned(), shape: expected.shape().to_vec(), verdict, reason, bound_use, difference }
}

type Judgement = (Verdict, String, Option<f64>, Difference);

fn judge_selection(found: Result<SelectionDifference, SelectionError>, what: &str, bounds: &Bounds) -> Judgement {
    let found = match found {
        Ok(found) => found,
        Err(error) => return (Verdict::Fail, error.to_string(), None, Difference::Incomparable),
    };
    let margin = bounds.tie_margin(found.score_scale);
    let (verdict, reason) = match found.score_gap {
        None => (Verdict::Pass, format!("the same {} {what} are kept", found.kept)),
        Some(gap) if gap <= margin => (
            Verdict::Ambiguous,
            format!("{} near-ties decided differently: scores {gap:.1e} apart, margin {margin:.1e}", found.exchanged),
        ),
        Some(f64::MAX) => (Verdict::Fail, "a token that is exempt from the cut was exchanged".to_owned()),
        Some(gap) => (
            Verdict::Fail,
            format!("{} {what} exchanged across a score gap of {gap:.1e}, margin {margin:.1e}", found.exchanged),
        ),
    };
    let bound_use = Some(found.score_gap.map_or(0.0, |gap| gap / margin));
    (verdict, reason, bound_use, Difference::Selection(found))
}

fn judge_integers(found: IntegerDifference) -> Judgement {
    let (verdict, reason) = match &found.first {
        None => (Verdict::Pass, format!("all {} integers equal", found.elements)),
        Some(first) => (
            Verdict::Fail,
            format!(
                "{} of {} integers differ, first at {:?}: {}, expected {}",
                found.mismatches, found.elements, first.at, first.actual, first.expected
            ),
        ),
    };
    (verdict, reason, found.first.is_none().then_some(0.0), Difference::Integer(found))
}

fn judge_floats(values: FloatDifference, choices: Option<LogitAgreement>, bounds: &Bounds) -> Judgement {
    let allowed = bounds.allowed(values.scale);
    let comparable = values.actual_non_finite.nan + values.expected_non_finite.nan + values.infinity_mismatches == 0;
    let norm_use = if values.max_abs > bounds.abs { values.norm_rel.unwrap_or(0.0) / bounds.norm_rel } else { 0.0 };
    let bound_use = comparable.then(|| (values.max_abs / allowed).max(norm_use));
    let (verdict, reason) = float_failure(&values, bounds, allowed)
        .map(|reason| (Verdict::Fail, reason))
        .or_else(|| choices.as_ref().and_then(|choices| choice_problem(choices, bounds)))
        .unwrap_or_else(|| (Verdict::Pass, agreement(&values, allowed)));
    let difference = match choices {
        Some(choices) => Difference::Logits { values, choices },
        None => Difference::Float(values),
    };
    (verdict, reason, bound_use, difference)
}

fn agreement(values: &FloatDifference, allowed: f64) -> String {
    match values.max_abs_at {
        Some(_) => {
            let ulps = values.max_ulps.map(|ulps| format!(" ({ulps} ulp)")).unwrap_or_default();
            format!("max abs {:.1e}{ulps}, allowed {allowed:.1e}", values.max_abs)
        }
        None => format!("all {} elements equal", values.elements),
    }
}

fn float_failure(values: &FloatDifference, bounds: &Bounds, allowed: f64) -> Option<String> {
    let (actual, expected) = (values.actual_non_finite, values.expected_non_finite);
    if actual.nan + expected.nan > 0 {
        return Some(format!("NaN in {} elements, {} of the expected ones", actual.nan, expected.nan));
    }
    if values.infinity_mismatches > 0 {
        return Some(format!(
            "infinities differ in {} elements ({} found, {} expected)",
            values.infinity_mismatches, actual.inf, expected.inf
        ));
    }
    if values.max_abs > allowed {
        let at = values.max_abs_at.as_deref().unwrap_or_default();
        return Some(format!("max abs {:.1e} at {at:?} exceeds {allowed:.1e}", values.max_abs));
    }
    if let (Some(allowed), Some(ulps)) = (bounds.max_ulps, values.max_ulps)
        && ulps > allowed
    {
        let at = values.max_abs_at.as_deref().unwrap_or_default();
        return Some(format!(
            "a copy is off by up to {ulps} units in the last place, {:.1e} at {at:?}",
            values.max_abs
        ));
    }
    match (values.cosine, values.norm_rel) {
        (Some(cosine), _) if cosine < bounds.min_cosine && values.scale > bounds.abs => {
            Some(format!("cosine {cosine:.6} is below {}", bounds.min_cosine))
        }
        (_, Some(norm)) if norm > bounds.norm_rel && values.max_abs > bounds.abs => {
            let at = values.max_abs_at.as_deref().unwrap_or_default();
            let (max_abs, allowed) = (values.max_abs, bounds.norm_rel);
            Some(format!("off by {norm:.1e} of its norm, allowed {allowed:.1e}; most, {max_abs:.1e}, at {at:?}"))
        }
        _ => None,
    }
}

/// Different choices between values that are all within their bounds. They can only be near-ties: the lead of one token
/// over another changes by at most twice the permitted difference.
fn choice_problem(choices: &LogitAgreement, bounds: &Bounds) -> Option<(Verdict, String)> {
    if choices.mean_overlap < bounds.min_top_k {
        let reason = format!("top-{} overlap {:.3} is below {}", choices.k, choices.mean_overlap, bounds.min_top_k);
        return Some((Verdict::Fail, reason));
    }
    choices.widest_flip.map(|flip| {
        let flipped = choices.rows - choices.argmax_matches;
        let reason = format!("argmax differs in {flipped} of {} rows, all within {flip:.1e} of a tie", choices.rows);
        (Verdict::Ambiguous, reason)
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    const FP32: Bounds =
        Bounds { abs: 1e-4, rel: 1e-5, norm_rel: 1e-4, min_cosine: 0.99999, min_top_k: 0.8, max_ulps: None };

    fn f32s(data: &[f32]) -> Tensor {
        Tensor::from_f32([data.len()], data.to_vec()).unwrap()
    }

    fn ids(data: &[i64]) -> Tensor {
        Tensor::from_i64([data.len()], data.to_vec()).unwrap()
    }

    fn verdict(name: &str, actual: &Tensor, expected: &Tensor) -> (Verdict, String) {
        let result = judge(name, actual, expected, None, &Bounds::new(TapKind::of(name), expected.dtype()));
        (result.verdict, result.reason)
    }

    #[test]
    fn planted_differences_fail_and_rounding_passes() {
        let expected = f32s(&[1.0, -2.0, 3.0]);
        assert_eq!(verdict("layers.0.out", &f32s(&[1.00005, -2.0, 3.0]), &expected).0, Verdict::Pass);
        let (planted, reason) = verdict("layers.0.out", &f32s(&[1.0, -2.0, 3.001]), &expected);
        assert_eq!(planted, Verdict::Fail);
        assert!(reason.contains("at [2]"), "{reason}");
        assert_eq!(verdict("x", &f32s(&[1.0, -2.0]), &expected).0, Verdict::Fail);
        assert_eq!(verdict("x", &ids(&[1, -2, 3]), &expected).0, Verdict::Fail);
    }

    #[test]
    fn copies_are_exact_whatever_the_scale() {
        let (expected, off) = (f32s(&[100.0, 1.0]), f32s(&[100.0, 1.0 + 3.0 * f32::EPSILON]));
        assert_eq!(verdict("layers.0.out", &off, &expected).0, Verdict::Pass);
        assert_eq!(verdict("node.h1.i0.in_hidden", &off, &expected).0, Verdict::Pass);
        for name in ["embed", "encoder.embed", "node.h0.i3.in_hidden"] {
            assert_eq!(verdict(name, &expected, &expected).0, Verdict::Pass);
            let (planted, reason) = verdict(name, &off, &expected);
            assert_eq!(planted, Verdict::Fail);
            assert!(reason.starts_with("a copy is off by up to 3 units"), "{reason}");
        }
        // In 16 bits the other side may have rounded.
        let half = Bounds::new(TapKind::Copy, DType::F16);
        assert_eq!(judge("embed", &off, &expected, None, &half).verdict, Verdict::Pass);
    }

    #[test]
    fn the_scale_of_the_tensor_widens_the_bound() {
        assert_eq!(verdict("x", &f32s(&[5000.0, 1.01]), &f32s(&[5000.0, 1.0])).0, Verdict::Pass);
        assert_eq!(verdict("x", &f32s(&[50.0, 1.01]), &f32s(&[50.0, 1.0])).0, Verdict::Fail);
    }

    #[test]
    fn one_element_may_be_less_exact_than_the_tensor_as_a_whole() {
        let expected = vec![10.0; 10_000];
        let off_by = |differences: &[f32]| {
            let mut actual = expected.clone();
            actual.iter_mut().zip(differences).for_each(|(value, difference)| *value += difference);
            verdict("x", &f32s(&actual), &f32s(&expected))
        };
        assert_eq!(off_by(&[5e-3]).0, Verdict::Pass);
        assert_eq!(off_by(&[2e-2]).0, Verdict::Fail);
        let (systematic, reason) = off_by(&vec![2e-3; 10_000]);
        assert_eq!(systematic, Verdict::Fail);
        assert!(reason.starts_with("off by 2.0e-4 of its norm, allowed 1.0e-4"), "{reason}");
    }

    #[test]
    fn a_golden_case_is_judged_by_absolute_differences() {
        let large = |value: f32| f32s(&[1000.0, value]);
        let golden = Bounds::golden(TapKind::Value, DType::F32);
        assert_eq!(judge("x", &large(1.0), &large(1.00009), None, &golden).verdict, Verdict::Pass);
        assert_eq!(judge("x", &large(1.0), &large(1.0002), None, &golden).verdict, Verdict::Fail);
    }

    #[test]
    fn a_tensor_that_is_wrong_in_direction_fails_within_the_absolute_bound() {
        let (verdict, reason) = verdict("x", &f32s(&[2e-4; 4]), &f32s(&[2e-4, 2e-4, 2e-4, 1.2e-4]));
        assert_eq!(verdict, Verdict::Fail);
        assert!(reason.starts_with("cosine"), "{reason}");
    }

    #[test]
    fn nan_fails_even_when_both_sides_have_it_and_equal_infinities_pass() {
        let nan = f32s(&[f32::NAN, 1.0]);
        assert_eq!(judge("x", &nan, &nan, None, &FP32).bound_use, None);
        assert_eq!(verdict("x", &nan, &nan).0, Verdict::Fail);
        let inf = f32s(&[f32::INFINITY, 1.0]);
        assert_eq!(verdict("prune.scores", &inf, &inf).0, Verdict::Pass);
        assert_eq!(verdict("prune.scores", &f32s(&[f32::NEG_INFINITY, 1.0]), &inf).0, Verdict::Fail);
    }

    #[test]
    fn integers_have_to_be_equal() {
        assert_eq!(verdict("out_position_ids", &ids(&[1, 2]), &ids(&[1, 2])).0, Verdict::Pass);
        let (planted, reason) = verdict("out_position_ids", &ids(&[1, 3]), &ids(&[1, 2]));
        assert_eq!(planted, Verdict::Fail);
        assert_eq!(reason, "1 of 2 integers differ, first at [1]: 3, expected 2");
    }

    #[test]
    fn selections_are_ambiguous_only_at_near_ties() {
        let judged = |scores: &[f32]| {
            judge("node.h0.i0.prune.keep_idx", &ids(&[0, 2]), &ids(&[0, 1]), Some(&f32s(scores)), &FP32)
        };
        let near = judged(&[9.0, 1.0, 0.9999]);
        assert_eq!(near.verdict, Verdict::Ambiguous);
        assert!(near.reason.contains("margin 2.0e-4"), "{}", near.reason);
        assert!(near.bound_use.unwrap() < 1.0);
        assert_eq!(judged(&[9.0, 1.0, 0.999]).verdict, Verdict::Fail);
        assert_eq!(judged(&[9.0, f32::INFINITY, 0.999]).verdict, Verdict::Fail);
        let exact = judge("a.keep_idx", &ids(&[0, 2]), &ids(&[0, 1]), None, &FP32);
        assert_eq!(exact.verdict, Verdict::Fail);
    }

    #[test]
    fn choices_are_ambiguous_only_at_near_ties() {
        let judged = |right: f32| {
            let scores = Tensor::from_f32([2, 2], vec![0.9, 0.1, 0.5, right]).unwrap();
            let bounds = Bounds::new(TapKind::Choice, DType::F32);
            judge("tree.0.chosen", &ids(&[0, 1]), &ids(&[0, 0]), Some(&scores), &bounds).verdict
        };
        assert_eq!(judged(0.499_99), Verdict::Ambiguous);
        assert_eq!(judged(0.499_9), Verdict::Fail);
    }

    #[test]
    fn logits_are_judged_by_the_tokens_they_pick() {
        let logits = |first: f32, second: f32| f32s(&[first, second, 0.0, -1.0, -2.0, -3.0]);
        let (near, reason) = verdict("prefix.logits", &logits(1.00005, 1.0), &logits(1.0, 1.00005));
        assert_eq!(near, Verdict::Ambiguous, "{reason}");
        assert_eq!(verdict("prefix.logits", &logits(1.0, 0.5), &logits(1.0, 0.5)).0, Verdict::Pass);
        let coarse = Bounds { abs: 1.0, min_cosine: -1.0, ..FP32 };
        let judged = |actual: &[f32], expected: &[f32]| judge("logits", &f32s(actual), &f32s(expected), None, &coarse);
        let unrelated =
            judged(&[1.0, 0.9, 0.8, 0.7, 0.6, 0.1, 0.2, 0.3, 0.4], &[1.0, 0.1, 0.2, 0.3, 0.4, 0.9, 0.8, 0.7, 0.6]);
        assert_eq!(unrelated.verdict, Verdict::Fail, "{}", unrelated.reason);
        assert!(unrelated.reason.starts_with("top-5 overlap"), "{}", unrelated.reason);
    }
}
