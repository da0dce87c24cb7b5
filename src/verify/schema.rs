//! What `accordion verify` reports: every tap in the order of the computation, grouped by the part of the model it
//! belongs to.

use super::judge::Findings;
use super::lockstep::Cost;
use super::logits::LogitAgreement;
use super::order::{model_order, scope};
use super::verdict::{Difference, TapResult, Verdict};
use crate::environment::peak_resident_bytes;
use serde::{Deserialize, Serialize};

/// The value of [`VerifyReport::schema`].
pub const SCHEMA: &str = "accordion.verify/1";

/// What was compared, and where.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Subject {
    /// The checkpoint, by name.
    pub model: String,
    /// The method whose graphs ran.
    pub method: String,
    /// What was tested: `ort-cpu fp32`.
    pub actual: String,
    /// What it was held against: `reference`, or a golden file.
    pub expected: String,
    /// Where it ran: names and values.
    pub environment: Vec<(String, String)>,
}

/// Taps by verdict.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counts {
    /// Within the bounds.
    pub pass: usize,
    /// Near-ties decided differently.
    pub ambiguous: usize,
    /// Outside the bounds.
    pub fail: usize,
}

impl Counts {
    /// All taps.
    pub fn total(self) -> usize {
        self.pass + self.ambiguous + self.fail
    }
}

/// The taps of one part of the model.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Scope {
    /// Its name: `layers.7`, `node.h1.i0`, `cache`.
    pub name: String,
    /// Its taps in the order of the computation.
    pub taps: Vec<TapResult>,
}

/// All taps of one comparison.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct VerifyReport {
    /// [`SCHEMA`].
    pub schema: String,
    /// What was compared.
    pub subject: Subject,
    /// The worst verdict of all taps; a failure when there is no tap, because nothing was proven.
    pub verdict: Verdict,
    /// Taps by verdict.
    pub counts: Counts,
    /// Taps that both sides have but that follow from a choice which fell differently, so that they say nothing.
    #[serde(default)]
    pub not_comparable: usize,
    /// Taps that only one side has, so that nothing is said about them.
    #[serde(default)]
    pub one_sided: usize,
    /// Inputs that were compared; every tap has its worst result over all of them.
    #[serde(default = "one")]
    pub samples: usize,
    /// What it took.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cost: Option<Measured>,
    /// The first tap in the order of the computation that failed: where to look.
    pub first_failure: Option<String>,
    /// The first tap in the order of the computation where the tested side has a NaN or an infinity that the other does not:
    /// where numbers ran out of their format.
    #[serde(default)]
    pub first_non_finite: Option<String>,
    /// The tap with the worst verdict and, among those, the largest share of its bound.
    pub worst: Option<String>,
    /// The taps.
    pub scopes: Vec<Scope>,
}

/// What a comparison took, on the machine that the report names.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Measured {
    /// Time by side.
    #[serde(flatten)]
    pub cost: Cost,
    /// All of it as a multiple of what the expected side alone took; absent where that took no time.
    pub total_over_expected: Option<f64>,
    /// The most memory that the process had resident; absent where the system does not say.
    pub peak_resident_bytes: Option<u64>,
}

impl Measured {
    /// What `cost` is together, and what this process needed for it.
    pub fn new(cost: Cost) -> Self {
        let total = cost.actual_seconds + cost.expected_seconds + cost.compare_seconds;
        Self {
            cost,
            total_over_expected: (cost.expected_seconds > 0.0).then(|| total / cost.expected_seconds),
            peak_resident_bytes: peak_resident_bytes(),
        }
    }
}

fn one() -> usize {
    1
}

impl VerifyReport {
    /// The report of `findings`, to which the comparison of `samples` inputs has come.
    pub fn of_samples(subject: Subject, findings: Findings, samples: usize, cost: Option<Cost>) -> Self {
        let Findings { taps, not_comparable, one_sided } = findings;
        let cost = cost.map(Measured::new);
        Self { one_sided, samples, cost, ..Self::in_order(subject, taps, not_comparable) }
    }

    /// Groups and counts `taps` that come in no particular order: they are put into model order.
    pub fn new(subject: Subject, mut taps: Vec<TapResult>) -> Self {
        taps.sort_by(|a, b| model_order(&a.name, &b.name));
        Self::in_order(subject, taps, 0)
    }

    /// Groups and counts `taps` that come in the order of their computation, besides which `not_comparable` others were
    /// left out.
    pub fn in_order(subject: Subject, taps: Vec<TapResult>, not_comparable: usize) -> Self {
        let mut counts = Counts::default();
        for tap in &taps {
            match tap.verdict {
                Verdict::Pass => counts.pass += 1,
                Verdict::Ambiguous => counts.ambiguous += 1,
                Verdict::Fail => counts.fail += 1,
            }
        }
        let severity = |tap: &&TapResult| (tap.verdict, tap.bound_use.unwrap_or(f64::INFINITY));
        // The first of equals is kept: later ones usually follow from it.
        let worst = taps.iter().reduce(|worst, tap| if severity(&tap) > severity(&worst) { tap } else { worst });
        let mut report = Self {
            schema: SCHEMA.to_owned(),
            subject,
            verdict: taps.iter().map(|tap| tap.verdict).max().unwrap_or(Verdict::Fail),
            counts,
            not_comparable,
            one_sided: 0,
            samples: 1,
            cost: None,
            first_failure: taps.iter().find(|tap| tap.verdict == Verdict::Fail).map(|tap| tap.name.clone()),
            first_non_finite: taps.iter().find(|tap| tap.lost_numbers() > 0).map(|tap| tap.name.clone()),
            worst: worst.map(|tap| tap.name.clone()),
            scopes: Vec::new(),
        };
        for tap in taps {
            let name = scope(&tap.name);
            match report.scopes.last_mut() {
                Some(last) if last.name == name => last.taps.push(tap),
                _ => report.scopes.push(Scope { name: name.to_owned(), taps: vec![tap] }),
            }
        }
        report
    }

    /// The taps that are logits, with what they would choose.
    pub fn logits(&self) -> impl Iterator<Item = (&str, &LogitAgreement)> {
        self.taps().filter_map(|tap| match &tap.difference {
            Difference::Logits { choices, .. } => Some((tap.name.as_str(), choices)),
            _ => None,
        })
    }

    /// All taps in the order of the computation.
    pub fn taps(&self) -> impl Iterator<Item = &TapResult> {
        self.scopes.iter().flat_map(|scope| &scope.taps)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use crate::tensor::Tensor;
    use crate::verify::verdict::{Bounds, TapKind, judge};
    use accordion_graphs::dtype::DType;

    fn subject() -> Subject {
        Subject {
            model: "tiny".into(),
            method: "homer".into(),
            actual: "ort-cpu fp32".into(),
            expected: "reference".into(),
            environment: vec![("cpu".into(), "two cores".into())],
        }
    }

    fn tap(name: &str, off_by: f32) -> TapResult {
        let tensor = |value| Tensor::from_f32([2], vec![1.0, value]).unwrap();
        judge(name, &tensor(2.0 + off_by), &tensor(2.0), None, &Bounds::new(TapKind::of(name), DType::F32))
    }

    #[test]
    fn taps_are_ordered_grouped_and_counted() {
        let taps = vec![
            tap("layers.10.out", 0.0),
            tap("layers.2.out", 1.0),
            tap("cache.k.0", 5e-5),
            tap("layers.2.attn.out", 0.5),
            TapResult::missing("cache.v.0", &[2], "ort-cpu fp32"),
        ];
        let report = VerifyReport::new(subject(), taps);
        let scopes: Vec<_> = report.scopes.iter().map(|scope| (scope.name.as_str(), scope.taps.len())).collect();
        assert_eq!(scopes, [("layers.2", 2), ("layers.10", 1), ("cache", 2)]);
        assert_eq!(report.counts, Counts { pass: 2, ambiguous: 0, fail: 3 });
        assert_eq!(report.verdict, Verdict::Fail);
        assert_eq!(report.first_failure.as_deref(), Some("layers.2.attn.out"));
        assert_eq!(report.worst.as_deref(), Some("cache.v.0"));
    }

    #[test]
    fn nothing_compared_is_nothing_proven() {
        assert_eq!(VerifyReport::new(subject(), Vec::new()).verdict, Verdict::Fail);
    }

    #[test]
    fn json_says_the_schema_and_comes_back() {
        let nan = Tensor::from_f32([2], vec![f32::NAN, f32::INFINITY]).unwrap();
        let one = |value| Tensor::from_f32([1], vec![value]).unwrap();
        // Numbers that decimal notation holds exactly, so that equality is fair.
        let bounds = Bounds { abs: 0.5, ..Bounds::new(TapKind::Value, DType::F32) };
        let mut taps = vec![judge("layers.0.out", &one(2.25), &one(2.0), None, &bounds)];
        taps.push(TapResult::missing("z", &[], "golden"));
        taps.push(judge("y", &nan, &nan, None, &Bounds::new(TapKind::Value, DType::F32)));
        let report = VerifyReport::new(subject(), taps);
        let json = serde_json::to_string(&report).unwrap();
        assert!(json.starts_with(r#"{"schema":"accordion.verify/1""#), "{json}");
        assert!(json.contains(r#""verdict":"FAIL""#), "{json}");
        assert_eq!(serde_json::from_str::<VerifyReport>(&json).unwrap(), report);
    }
}
