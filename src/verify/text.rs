//! A verify report for a terminal: a line per part of the model, failures in full.

use super::lockstep::Cost;
use super::schema::{Measured, VerifyReport};
use super::verdict::{TapResult, Verdict};
use std::fmt::Write;

/// Failures and near-ties that are spelled out; a fault early in a model fails everything behind it.
const SPELLED_OUT: usize = 20;

/// `report` as text. `paint` puts the label of a verdict into its colour.
pub fn table(report: &VerifyReport, paint: &dyn Fn(&str, Verdict) -> String) -> String {
    let mut text = String::new();
    let scopes: Vec<[String; 5]> = report
        .scopes
        .iter()
        .map(|scope| {
            let passed = scope.taps.iter().filter(|tap| tap.verdict == Verdict::Pass).count();
            let worst = scope.taps.iter().reduce(|worst, tap| if worse(tap, worst) { tap } else { worst });
            let name = worst.map_or("", |tap| tap.name[scope.name.len()..].trim_start_matches('.'));
            let share = worst.and_then(|tap| tap.bound_use).map_or_else(|| "-".to_owned(), percent);
            let ulps = worst.and_then(|tap| tap.difference.values()?.max_ulps).map_or_else(|| "-".to_owned(), count);
            [scope.name.clone(), format!("{passed}/{}", scope.taps.len()), share, ulps, name.to_owned()]
        })
        .collect();
    let header = ["part", "pass", "of bound", "ulps", "worst tap"].map(str::to_owned);
    let widths = [0, 1, 2, 3]
        .map(|column| scopes.iter().chain([&header]).map(|row| row[column].chars().count()).max().unwrap_or_default());
    let mut row = |[part, pass, share, ulps, tap]: &[String; 5], verdict: &str| {
        let [a, b, c, d] = widths;
        // Writing into a string cannot fail.
        let _ = writeln!(text, "{verdict}  {part:<a$}  {pass:>b$}  {share:>c$}  {ulps:>d$}  {tap}");
    };
    row(&header, "         ");
    for (line, scope) in scopes.iter().zip(&report.scopes) {
        let verdict = scope.taps.iter().map(|tap| tap.verdict).max().unwrap_or(Verdict::Pass);
        row(line, &paint(&format!("{verdict:<9}"), verdict));
    }

    let mut heading = "\n";
    for (name, choices) in report.logits().take(SPELLED_OUT) {
        let (rows, top) = (choices.rows, choices.mean_overlap);
        let _ = write!(
            text,
            "{heading}logits     {name}: argmax {}/{rows}, top-{} {top:.3}",
            choices.argmax_matches, choices.k
        );
        if let Some(ranks) = choices.ranks {
            let (overlap, divergence) = (ranks.mean_overlap, ranks.mean_divergence);
            let _ = write!(text, ", rank-biased overlap {overlap:.4}, KL {divergence:.1e} nats");
        }
        text.push('\n');
        heading = "";
    }
    let told: Vec<&TapResult> = report.taps().filter(|tap| tap.verdict != Verdict::Pass).collect();
    for tap in told.iter().take(SPELLED_OUT) {
        let _ = writeln!(text, "{}  {}: {}", paint(&format!("{:<9}", tap.verdict), tap.verdict), tap.name, tap.reason);
    }
    if told.len() > SPELLED_OUT {
        let _ = writeln!(text, "           and {} more", told.len() - SPELLED_OUT);
    }
    if let Some(measured) = &report.cost {
        let _ = writeln!(text, "\n{}", cost(measured));
    }
    let _ = writeln!(text, "\n{}", summary(report, paint));
    text
}

fn cost(measured: &Measured) -> String {
    let Cost { actual_seconds, expected_seconds, compare_seconds } = measured.cost;
    let mut line = format!(
        "actual side {actual_seconds:.1} s, expected side {expected_seconds:.1} s, comparison {compare_seconds:.1} s"
    );
    if let Some(ratio) = measured.total_over_expected {
        let _ = write!(line, " (together {ratio:.1} times the expected side)");
    }
    if let Some(bytes) = measured.peak_resident_bytes {
        let _ = write!(line, ", at most {:.2} GB resident", bytes as f64 / 1e9);
    }
    line
}

fn summary(report: &VerifyReport, paint: &dyn Fn(&str, Verdict) -> String) -> String {
    let counts = report.counts;
    let verdict = paint(&report.verdict.to_string(), report.verdict);
    let mut line = format!(
        "{verdict}: {} ({}), {} against {}: {} of {} taps pass",
        report.subject.model,
        report.subject.method,
        report.subject.actual,
        report.subject.expected,
        counts.pass,
        counts.total()
    );
    if report.samples > 1 {
        let _ = write!(line, " in each of {} samples", report.samples);
    }
    for (count, what) in [
        (counts.ambiguous, "ambiguous"),
        (counts.fail, "failed"),
        (report.not_comparable, "not comparable"),
        (report.one_sided, "only on one side"),
    ] {
        if count > 0 {
            let _ = write!(line, ", {count} {what}");
        }
    }
    if let Some(first) = &report.first_failure {
        let _ = write!(line, "; the first to fail is {first}");
    }
    if let Some(first) = &report.first_non_finite {
        let _ = write!(line, "; the first with a NaN or an infinity is {first}");
    }
    line
}

fn worse(tap: &TapResult, than: &TapResult) -> bool {
    let severity = |tap: &TapResult| (tap.verdict, tap.bound_use.unwrap_or(f64::INFINITY));
    severity(tap) > severity(than)
}

/// A count as the eye takes it in: single units matter, millions do not.
fn count(ulps: u64) -> String {
    if ulps < 10_000 { ulps.to_string() } else { format!("{:.0e}", ulps as f64) }
}

fn percent(share: f64) -> String {
    if share > 10.0 { format!("{share:.0} x") } else { format!("{:.1} %", 100.0 * share) }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::tensor::Tensor;
    use crate::verify::schema::Subject;
    use crate::verify::verdict::{Bounds, TapKind, judge};
    use accordion_graphs::dtype::DType;

    #[test]
    fn parts_are_summed_up_and_failures_spelled_out() {
        let tap = |name: &str, off_by: f32| {
            let tensor = |value| Tensor::from_f32([2], vec![1.0, value]).unwrap();
            judge(name, &tensor(2.0 + off_by), &tensor(2.0), None, &Bounds::new(TapKind::of(name), DType::F32))
        };
        let subject = Subject {
            model: "tiny".into(),
            method: "plain".into(),
            actual: "ort-cpu fp32".into(),
            expected: "reference".into(),
            environment: Vec::new(),
        };
        let failing = (0..30).map(|l| tap(&format!("layers.{l}.out"), 1.0));
        let taps = std::iter::once(tap("layers.0.attn.q", 5e-5)).chain(failing).collect();
        let text = table(&VerifyReport::in_order(subject, taps, 3), &|label, _| label.to_owned());
        assert!(text.contains("FAIL       layers.0    1/2    4472 x   4e6  out\n"), "{text}");
        assert!(text.contains("layers.19.out: max abs 1.0e0 at [1] exceeds 2.0e-3\n"), "{text}");
        assert!(text.contains("and 10 more\n") && !text.contains("layers.20.out:"), "{text}");
        let summary = "FAIL: tiny (plain), ort-cpu fp32 against reference: 1 of 31 taps pass, 30 failed, \
                       3 not comparable; the first to fail is layers.0.out";
        assert_eq!(text.lines().last(), Some(summary));
    }
}
