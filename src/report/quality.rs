//! What precisions cost and what they bring, bundle by bundle.

use super::format::{bytes, fixed, latency, percent, tokens};
use super::html::Html;
use super::page::pairs;
use super::table::{Cell, Column, Table};
use crate::eval::quality::report::{QualityReport, QualityRow};
use crate::eval::quality::{Against, Pace, Speedup};
use crate::eval::stats::Interval;

pub(super) fn section(html: &mut Html, found: &QualityReport) {
    html.leaf("h3", &[], title(found));
    html.leaf("p", &[("class", &"lead")], note(found));
    table(found).html(html);
    pairs(html, "Machine", &found.environment);
}

pub(super) fn title(found: &QualityReport) -> String {
    let method = found.bundles.first().map_or("", |row| row.method.as_str());
    format!("{method}, {} bundles", tokens(found.bundles.len())).trim_start_matches(", ").to_owned()
}

/// What was asked, and how the numbers are to be read.
pub(super) fn note(found: &QualityReport) -> String {
    format!(
        "{} windows of {} tokens of {}, the last {} of each predicted; seed {}. Every bundle is held against {}: the change of \
         the perplexity with its 95 % interval over windows, the Kullback-Leibler divergence in nats per token, and how many \
         times as fast it is in {} runs in turn, from the slowest to the fastest.",
        found.windows,
        tokens(found.window_len as usize),
        found.text,
        tokens(found.predicted),
        found.seed,
        first(found),
        found.rounds,
    )
}

fn first(found: &QualityReport) -> &str {
    found.bundles.first().map_or("the first", |row| &row.precision)
}

/// A row for each bundle.
pub(super) fn table(found: &QualityReport) -> Table {
    let first = first(found);
    let columns = [
        ("Weights", String::new()),
        ("Resident", "grown by".to_owned()),
        ("Perplexity", String::new()),
        ("Change", format!("from {first}")),
        ("Divergence", "mean · 99th percentile".to_owned()),
        ("Same likeliest", "of all tokens".to_owned()),
        ("Reading", format!("speed of {first} = 1")),
        ("Generating", format!("speed of {first} = 1")),
    ];
    let columns = columns.map(|(name, detail)| Column::number(name, detail));
    Table {
        caption: "Precisions".to_owned(),
        columns: std::iter::once(Column::text("Precision")).chain(columns).collect(),
        rows: found.bundles.iter().map(row).collect(),
        sortable: true,
    }
}

fn row(row: &QualityRow) -> Vec<Cell> {
    let QualityRow { bundle, precision, quality, .. } = row;
    let against = quality.against.as_ref();
    let name = bundle.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    vec![
        Cell { title: bundle.display().to_string(), ..Cell::text(precision).with_detail(name) },
        Cell::number(Some(quality.weight_bytes as f64), bytes),
        Cell::number(quality.resident_bytes.map(|size| size as f64), bytes),
        Cell::number(Some(quality.perplexity), fixed),
        against.map_or_else(none, change),
        against.map_or_else(none, |found| {
            let divergence = Cell::number(Some(found.divergence), decimals);
            divergence.with_detail(decimals(found.divergence_p99))
        }),
        Cell::number(against.map(|found| found.same_best), percent),
        speed(against, |found| found.prefill_speedup, &quality.prefill_seconds, ""),
        speed(against, |found| found.decode_speedup, &quality.decode_seconds, " a token"),
    ]
}

fn none() -> Cell {
    Cell::number(None, percent)
}

/// Five decimals as long as these say something.
fn decimals(nats: f64) -> String {
    if nats.is_infinite() {
        return "∞".to_owned();
    }
    if nats == 0.0 || (1e-4..1e6).contains(&nats) { format!("{nats:.5}") } else { format!("{nats:.1e}") }
}

fn signed(share: f64) -> String {
    let sign = if share < 0.0 { "−" } else { "+" };
    let magnitude = (share * 100.0).abs();
    if magnitude < 1e6 { format!("{sign}{magnitude:.2} %") } else { format!("{sign}{magnitude:.1e} %") }
}

/// By how much the perplexity grew, and whether that is more than chance.
fn change(found: &Against) -> Cell {
    let shown = Cell::number(Some(found.perplexity_increase), signed);
    let Some(Interval { low, high }) = found.loss_increase.and_then(|loss| loss.interval) else { return shown };
    let (class, said) = match (low, high) {
        (low, _) if low > 0.0 => ("worse", "worse"),
        (_, high) if high < 0.0 => ("better", "better"),
        _ => ("unclear", "no difference for certain"),
    };
    let detail = format!("{} to {}, {said}", signed(low.exp_m1()), signed(high.exp_m1()));
    Cell { class, ..shown.with_detail(detail) }
}

/// How many times as fast as the first; the first has its own time.
fn speed(against: Option<&Against>, of: fn(&Against) -> Option<Speedup>, seconds: &[f64], unit: &str) -> Cell {
    let Some(speedup) = against.and_then(of) else {
        let median = median(seconds);
        return Cell { key: against.is_none().then_some(1.0), ..Cell::number(median, |s| latency(s * 1e3) + unit) };
    };
    let (class, said) = match speedup.pace() {
        Pace::Faster => ("better", "faster"),
        Pace::Slower => ("worse", "slower"),
        Pace::Unclear => ("unclear", "no difference for certain"),
    };
    let Speedup { median, low, high } = speedup;
    let detail = format!("{} to {}, {said}", fixed(low), fixed(high));
    Cell { class, ..Cell::number(Some(median), |factor| fixed(factor) + "×").with_detail(detail) }
}

fn median(numbers: &[f64]) -> Option<f64> {
    let mut sorted = numbers.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len() / 2).copied()
}
