//! What stands behind a profile's medians: what bounds them, where their time went, and which of two is faster.

use super::format::{bytes, latency, percent, percent_of, significant, tokens};
use super::table::{Cell, Column, Table};
use crate::profile::details::DecodedSpan;
use crate::profile::paired::{CONFIDENCE, Comparison, Difference, Verdict};
use crate::profile::roofline::{Demand, Roofline};
use crate::profile::schema::{Measurement, ProfileReport};
use crate::profile::stats::LatencyStats;

/// Rows of a folded table; a report from a file could have any number.
const LISTED: usize = 200;

/// Tables that are short enough to stand unfolded: those that have rows.
pub(super) fn open(profile: &ProfileReport) -> Vec<Table> {
    [comparisons(profile), limits(profile), around(profile)].into_iter().flatten().collect()
}

/// Tables with many rows for each measurement: those that have any.
pub(super) fn folded(profile: &ProfileReport) -> Vec<Table> {
    [stages(profile), decoded(profile)].into_iter().flatten().collect()
}

/// A table whose rows begin with method and context, one list of rows for each measurement; `None` without a row.
fn listed(
    caption: &str,
    columns: Vec<Column>,
    profile: &ProfileReport,
    rows: impl Fn(&Measurement) -> Vec<Vec<Cell>>,
) -> Option<Table> {
    let of_measurement = |measured: &Measurement| {
        let context = measured.prompt.context;
        let who = move |method: &str| [Cell::text(method), Cell::number(Some(context as f64), |_| tokens(context))];
        let method = measured.configuration.method.clone();
        rows(measured).into_iter().map(move |row| who(&method).into_iter().chain(row).collect::<Vec<_>>())
    };
    let mut rows: Vec<Vec<Cell>> = profile.rows.iter().flat_map(|row| of_measurement(&row.measured)).collect();
    let mut caption = caption.to_owned();
    if rows.len() > LISTED {
        caption = format!("{caption} (the first {LISTED} of {} rows)", tokens(rows.len()));
        rows.truncate(LISTED);
    }
    let first = [Column::text("Method"), Column::number("Context", "tokens")];
    (!rows.is_empty()).then(|| Table {
        caption,
        columns: first.into_iter().chain(columns).collect(),
        rows,
        sortable: true,
    })
}

fn comparisons(profile: &ProfileReport) -> Option<Table> {
    let row = |pair: &Comparison, found: &Difference| {
        let class = match found.verdict {
            Verdict::Faster => "better",
            Verdict::Slower => "worse",
            Verdict::NoDifference => "unclear",
        };
        let interval = format!("{:.3} to {:.3}", found.low, found.high);
        vec![
            Cell { class: "pair", ..Cell::text(format!("A: {}", pair.a)).with_detail(format!("B: {}", pair.b)) },
            Cell::number(Some(pair.prompt.context as f64), |_| tokens(pair.prompt.context)),
            Cell::text(&found.quantity),
            Cell::number(Some(found.a_ms), latency),
            Cell::number(Some(found.b_ms), latency),
            Cell::number(Some(found.ratio), |ratio| format!("{ratio:.3}")).with_detail(interval),
            Cell { class, ..Cell::text(format!("B: {}", found.verdict.words())) },
            Cell::number(Some(pair.pairs as f64), |_| tokens(pair.pairs)),
        ]
    };
    let rows: Vec<Vec<Cell>> = profile
        .comparisons
        .iter()
        .flat_map(|pair| pair.differences.iter().map(move |found| row(pair, found)))
        .take(LISTED)
        .collect();
    let interval = format!("{} interval", percent_of(CONFIDENCE));
    let columns = vec![
        Column::text("A and B"),
        Column::number("Context", "tokens"),
        Column::text("Time"),
        Column::number("A", "median"),
        Column::number("B", "median"),
        Column::number("B / A", interval),
        Column::text("Verdict"),
        Column::number("n", "pairs"),
    ];
    let caption = "Which of two is faster, measured in turns".to_owned();
    (!rows.is_empty()).then_some(Table { caption, columns, rows, sortable: true })
}

fn limits(profile: &ProfileReport) -> Option<Table> {
    let columns = vec![
        Column::text("Time"),
        Column::text("Bound by"),
        Column::number("Work", "operations"),
        Column::number("Read", "at least"),
        Column::number("Floor", "at the machine's rates"),
        Column::number("Measured", "median"),
        Column::number("Of the limit", "floor / median"),
    ];
    listed("How far from the limits of the machine", columns, profile, |measured| {
        let details = &measured.details;
        let parts = [
            ("context state", details.prefix_limit, details.prefix_demand, &measured.prefix),
            ("each token", details.token_limit, details.token_demand, &measured.per_token),
        ];
        let row = |(what, limit, demand, stats): (&str, Option<Roofline>, Option<Demand>, &LatencyStats)| {
            let Roofline { bound, floor_ms, fraction } = limit?;
            let work = demand.map(|d| d.linear_operations as f64 + d.attention_operations as f64);
            Some(vec![
                Cell::text(what),
                Cell::text(bound.name()),
                Cell::number(work, operations),
                Cell::number(demand.map(|d| d.read_bytes as f64), bytes),
                Cell::number(Some(floor_ms), latency),
                Cell::number(Some(stats.median_ms), latency),
                Cell { bar: Some(fraction), ..Cell::number(Some(fraction), percent) },
            ])
        };
        parts.into_iter().filter_map(row).collect()
    })
}

/// A number of operations with the prefix that suits it.
fn operations(count: f64) -> String {
    let (size, unit) = if count >= 1e12 { (1e12, "T") } else { (1e9, "G") };
    format!("{} {unit}", significant(count / size))
}

fn around(profile: &ProfileReport) -> Option<Table> {
    let columns = vec![
        Column::number("Loading", "all graphs"),
        Column::number("First run", "of the process"),
        Column::number("Warm run", "median"),
        Column::number("Between graphs", "context state"),
        Column::number("Between graphs", "each token"),
        Column::number("Other programs", "of the processors"),
    ];
    listed("Before, between and beside the graphs", columns, profile, |measured| {
        let details = &measured.details;
        let times = [details.load_ms, details.first_run_ms, details.host_ms, details.token_host_ms];
        if times.iter().all(Option::is_none) && details.others_busy.is_none() {
            return Vec::new();
        }
        let [load, first, host, token] = times.map(|time| Cell::number(time, latency));
        let warm = Cell::number(Some(measured.prefix.median_ms), latency);
        vec![vec![load, first, warm, host, token, Cell::number(details.others_busy, percent)]]
    })
}

fn stages(profile: &ProfileReport) -> Option<Table> {
    let columns = vec![
        Column::text("Graph"),
        Column::number("Runs", ""),
        Column::number("Time", ""),
        Column::number("Share", "of the run"),
    ];
    listed("Where the time of a context state goes, by graph", columns, profile, |measured| {
        let details = &measured.details;
        if details.stages.is_empty() {
            return Vec::new();
        }
        let graphs = details.stages.iter().map(|stage| (stage.graph.as_str(), Some(stage.calls), stage.total_ms));
        let parts: Vec<_> = graphs.chain(details.host_ms.map(|host| ("(between the graphs)", None, host))).collect();
        let total: f64 = parts.iter().map(|(_, _, time)| time).sum();
        let row = |(graph, calls, time): (&str, Option<usize>, f64)| {
            let share = if total > 0.0 { time / total } else { 0.0 };
            vec![
                Cell::text(graph),
                Cell::number(calls.map(|calls| calls as f64), |_| tokens(calls.unwrap_or_default())),
                Cell::number(Some(time), latency),
                Cell { bar: Some(share), ..Cell::number(Some(share), percent) },
            ]
        };
        parts.into_iter().map(row).collect()
    })
}

fn decoded(profile: &ProfileReport) -> Option<Table> {
    let columns = vec![
        Column::number("New tokens", "from · to"),
        Column::number("Cache", "rows at the end"),
        Column::number("Each token", "median · p95"),
    ];
    listed("Each token, as the cache grows", columns, profile, |measured| {
        let spans = measured.details.decoded.iter();
        let row = |span: &DecodedSpan| {
            vec![
                Cell::number(Some(span.from as f64), |_| tokens(span.from.saturating_add(1)))
                    .with_detail(tokens(span.to)),
                Cell::number(Some(span.cache_rows as f64), |_| tokens(span.cache_rows)),
                Cell::number(Some(span.per_token.median_ms), latency).with_detail(latency(span.per_token.p95_ms)),
            ]
        };
        spans.map(row).collect()
    })
}
