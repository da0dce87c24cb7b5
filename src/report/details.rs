//! What stands behind a profile's medians: what bounds them, where their time went, and which of two is faster.

use super::format::{bytes, latency, percent, percent_of, significant, tokens};
use super::table::{Cell, Column, Table};
use crate::profile::decoding::GraphComparison;
use crate::profile::details::{DecodedSpan, DeviceShare, StageTime};
use crate::profile::paired::{CONFIDENCE, Comparison, Difference, Verdict};
use crate::profile::roofline::{Demand, Roofline};
use crate::profile::schema::{Measurement, ProfileReport};
use crate::profile::stats::LatencyStats;

/// Rows of a folded table; a report from a file could have any number.
const LISTED: usize = 200;

/// Tables that are short enough to stand unfolded: those that have rows.
pub(super) fn open(profile: &ProfileReport) -> Vec<Table> {
    [comparisons(profile), limits(profile), device(profile), around(profile)].into_iter().flatten().collect()
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

/// Two things that were measured in turns.
struct Pair<'p> {
    names: [String; 2],
    context: usize,
    pairs: usize,
    differences: &'p [Difference],
}

impl<'p> Pair<'p> {
    /// Two configurations, and decoding without CUDA graphs and with them.
    fn all(profile: &'p ProfileReport) -> Vec<Self> {
        let configurations = profile.comparisons.iter().map(|Comparison { a, b, prompt, pairs, differences }| Self {
            names: [a.clone(), b.clone()],
            context: prompt.context,
            pairs: *pairs,
            differences,
        });
        let graphs = profile.rows.iter().filter_map(|row| {
            let GraphComparison { pairs, differences } = row.measured.details.cuda_graph.as_ref()?;
            let name = |which| format!("{}, CUDA graph {which}", row.measured.configuration.method);
            let names = ["off", "on"].map(name);
            Some(Self { names, context: row.measured.prompt.context, pairs: *pairs, differences })
        });
        configurations.chain(graphs).collect()
    }
}

fn comparisons(profile: &ProfileReport) -> Option<Table> {
    let row = |pair: &Pair<'_>, found: &Difference| {
        let class = match found.verdict {
            Verdict::Faster => "better",
            Verdict::Slower => "worse",
            Verdict::NoDifference => "unclear",
        };
        let interval = format!("{:.3} to {:.3}", found.low, found.high);
        vec![
            Cell {
                class: "pair",
                ..Cell::text(format!("A: {}", pair.names[0])).with_detail(format!("B: {}", pair.names[1]))
            },
            Cell::number(Some(pair.context as f64), |_| tokens(pair.context)),
            Cell::text(&found.quantity),
            Cell::number(Some(found.a_ms), latency),
            Cell::number(Some(found.b_ms), latency),
            Cell::number(Some(found.ratio), |ratio| format!("{ratio:.3}")).with_detail(interval),
            Cell { class, ..Cell::text(format!("B: {}", found.verdict.words())) },
            Cell::number(Some(pair.pairs as f64), |_| tokens(pair.pairs)),
        ]
    };
    let rows: Vec<Vec<Cell>> = Pair::all(profile)
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

fn device(profile: &ProfileReport) -> Option<Table> {
    let columns = vec![
        Column::text("Time"),
        Column::number("Takes", ""),
        Column::number("Enqueue", "of the host"),
        Column::number("Waiting", "of the host"),
        Column::number("Between graphs", "of the host"),
        Column::number("Compute", "of the device"),
        Column::number("Device busy", "compute / takes"),
    ];
    listed("Host and device", columns, profile, |measured| {
        let details = &measured.details;
        let parts = [
            ("context state, median run", details.prefix_on_device()),
            ("each token, mean", details.token_on_device()),
        ];
        let row = |(what, share): (&str, Option<DeviceShare>)| {
            let share = share?;
            let DeviceShare { enqueue_ms, wait_ms, host_ms, compute_ms } = share;
            let times = [share.total_ms(), enqueue_ms, wait_ms, host_ms, compute_ms];
            let times = times.map(|time| Cell::number(Some(time), latency));
            let busy = Cell { bar: Some(share.busy()), ..Cell::number(Some(share.busy()), percent) };
            Some(std::iter::once(Cell::text(what)).chain(times).chain([busy]).collect())
        };
        parts.into_iter().filter_map(row).collect()
    })
}

fn around(profile: &ProfileReport) -> Option<Table> {
    // Of engines that have a device; a column that nobody fills is left out.
    let has_device = profile.rows.iter().any(|row| row.measured.details.peak_device_bytes.is_some());
    let mut columns = vec![
        Column::number("Loading", "all graphs"),
        Column::number("First run", "of the process"),
        Column::number("Warm run", "median"),
        Column::number("Between graphs", "context state"),
        Column::number("Between graphs", "each token"),
        Column::number("Other programs", "of the processors"),
    ];
    columns.extend(has_device.then(|| Column::number("Device memory", "in use at the end")));
    listed("Before, between and beside the graphs", columns, profile, |measured| {
        let details = &measured.details;
        let times = [details.load_ms, details.first_run_ms, details.host_ms, details.token_host_ms];
        if times.iter().all(Option::is_none) && details.others_busy.is_none() {
            return Vec::new();
        }
        let [load, first, host, token] = times.map(|time| Cell::number(time, latency));
        let warm = Cell::number(Some(measured.prefix.median_ms), latency);
        let mut cells = vec![load, first, warm, host, token, Cell::number(details.others_busy, percent)];
        cells.extend(has_device.then(|| Cell::number(details.peak_device_bytes.map(|size| size as f64), bytes)));
        vec![cells]
    })
}

fn stages(profile: &ProfileReport) -> Option<Table> {
    let all = profile.rows.iter().flat_map(|row| &row.measured.details.stages);
    // Engines have a device or not; a column that nobody fills is left out.
    let has_device = all.clone().any(|stage| stage.compute_ms.is_some());
    let mut columns = vec![
        Column::text("Graph"),
        Column::number("Runs", ""),
        Column::number("Time", if has_device { "of the host" } else { "" }),
        Column::number("Share", "of the run"),
    ];
    if has_device {
        columns.push(Column::number("Compute", "of the device"));
    }
    listed("Where the time of a context state goes, by graph", columns, profile, |measured| {
        let details = &measured.details;
        if details.stages.is_empty() {
            return Vec::new();
        }
        let rest = |name: &str, time: Option<f64>| {
            let rest = StageTime { graph: name.to_owned(), calls: 0, total_ms: time?, compute_ms: None };
            Some((rest, None))
        };
        let graphs = details.stages.iter().map(|stage| (stage.clone(), Some(stage.calls)));
        let parts: Vec<_> = graphs
            .chain(rest("(waiting for the device)", details.wait_ms))
            .chain(rest("(between the graphs)", details.host_ms))
            .collect();
        let total: f64 = parts.iter().map(|(part, _)| part.total_ms).sum();
        let row = |(part, calls): (StageTime, Option<usize>)| {
            let share = if total > 0.0 { part.total_ms / total } else { 0.0 };
            let mut cells = vec![
                Cell::text(part.graph),
                Cell::number(calls.map(|calls| calls as f64), |_| tokens(calls.unwrap_or_default())),
                Cell::number(Some(part.total_ms), latency),
                Cell { bar: Some(share), ..Cell::number(Some(share), percent) },
            ];
            cells.extend(has_device.then(|| Cell::number(part.compute_ms, latency)));
            cells
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
