//! What the methods cost: charts against context length, and the table they are drawn from.

use super::chart::{Chart, Point, Series, draw};
use super::format::{bytes, grouped, latency, percent, significant, tokens};
use super::html::Html;
use super::page::pairs;
use super::table::{Cell, Column, Table};
use super::{details, operators};
use crate::profile::schema::{ProfileReport, ProfileRow};
use crate::profile::stats::LatencyStats;

const AXIS: &str = "context tokens";

/// Warnings that stand unfolded above the charts.
const WARNINGS_SHOWN: usize = 4;

pub(super) fn section(html: &mut Html, profile: &ProfileReport) {
    html.leaf("h3", &[], &profile.model);
    if let Some(trust) = &profile.trust {
        html.leaf("p", &[("class", &"lead")], &trust.sentence);
    }
    if !profile.warnings.is_empty() {
        html.element("div", &[("class", &"note warn"), ("role", &"note")], |html| {
            html.leaf("strong", &[], "Read with care");
            let (shown, folded) = profile.warnings.split_at(profile.warnings.len().min(WARNINGS_SHOWN));
            let list = |html: &mut Html, warnings: &[String]| {
                html.element("ul", &[], |html| warnings.iter().for_each(|warning| html.leaf("li", &[], warning)));
            };
            list(html, shown);
            if !folded.is_empty() {
                html.element("details", &[], |html| {
                    html.leaf("summary", &[], format_args!("{} more", folded.len()));
                    list(html, folded);
                });
            }
        });
    }
    let mut decoders: Vec<&str> = Vec::new();
    for row in &profile.rows {
        let decoder = row.measured.configuration.decoder.as_str();
        if !decoders.contains(&decoder) {
            decoders.push(decoder);
        }
    }
    // Methods of different decoders are not compared: each decoder has its own charts.
    for decoder in &decoders {
        if decoders.len() > 1 {
            html.leaf("h4", &[], decoder);
        }
        let same = |row: &&ProfileRow| row.measured.configuration.decoder == *decoder;
        charts(html, &profile.rows.iter().filter(same).collect::<Vec<_>>());
    }
    measurements(profile).html(html);
    for table in details::open(profile) {
        table.html(html);
    }
    for table in details::folded(profile) {
        html.element("details", &[("class", &"breakdown")], |html| {
            html.leaf("summary", &[], &table.caption);
            table.html(html);
        });
    }
    profile.rows.iter().for_each(|row| operators::section(html, row));
    html.leaf("h3", &[], "How it was measured");
    let mut described: Vec<(&str, &str)> = Vec::new();
    for row in &profile.rows {
        let how = &row.measured.configuration;
        let key = (how.method.as_str(), how.decoder.as_str());
        if described.contains(&key) {
            continue;
        }
        described.push(key);
        let mut values = vec![
            ("decoder".to_owned(), how.decoder.clone()),
            ("engine".to_owned(), how.engine.clone()),
            ("threads".to_owned(), how.threads.to_string()),
        ];
        values.extend(how.settings.iter().cloned());
        pairs(html, &how.method, &values);
    }
    if !profile.environment.is_empty() {
        pairs(html, "Machine", &profile.environment);
    }
}

fn charts(html: &mut Html, rows: &[&ProfileRow]) {
    html.element("div", &[("class", &"charts")], |html| {
        let spread = "Median; bars from fastest to 95th percentile.";
        draw(html, latency_chart(rows, "Time to context state", spread, |row| &row.measured.prefix));
        draw(html, memory_chart(rows));
        draw(html, state_chart(rows));
        draw(html, latency_chart(rows, "First token", spread, |row| &row.measured.first_token));
        draw(html, latency_chart(rows, "Each further token", spread, |row| &row.measured.per_token));
    });
}

/// The rows of each method, in the order of the report.
fn by_method<'a>(rows: &[&'a ProfileRow], point: impl Fn(&'a ProfileRow) -> Point) -> Vec<Series<'a>> {
    let mut all: Vec<Series<'a>> = Vec::new();
    for row in rows {
        let name = row.measured.configuration.method.as_str();
        match all.iter_mut().find(|series| series.name == name) {
            Some(series) => series.points.push(point(row)),
            None => all.push(Series { name, points: vec![point(row)] }),
        }
    }
    all
}

fn latency_chart<'a>(
    rows: &[&'a ProfileRow],
    title: &'a str,
    description: &str,
    stats: fn(&ProfileRow) -> &LatencyStats,
) -> Chart<'a> {
    let series = by_method(rows, |row| {
        let found = stats(row);
        Point {
            x: row.measured.prompt.context as f64,
            y: found.median_ms,
            spread: Some((found.min_ms, found.p95_ms)),
            title: format!("{}: {} median", point_name(row), latency(found.median_ms)),
        }
    });
    Chart { title, description: description.to_owned(), axis: AXIS, series, format: latency }
}

fn memory_chart<'a>(rows: &[&'a ProfileRow]) -> Chart<'a> {
    let series = by_method(rows, |row| {
        let peak = row.measured.peak_resident_bytes as f64;
        let title = format!("{}: {} peak", point_name(row), bytes(peak));
        Point { x: row.measured.prompt.context as f64, y: peak, spread: None, title }
    });
    let description = "Peak resident memory of the process, weights included.".to_owned();
    Chart { title: "Memory", description, axis: AXIS, series, format: bytes }
}

fn state_chart<'a>(rows: &[&'a ProfileRow]) -> Chart<'a> {
    let series = by_method(rows, |row| {
        let size = row.measured.state_bytes as f64;
        let title = format!("{}: {} kept", point_name(row), bytes(size));
        Point { x: row.measured.prompt.context as f64, y: size, spread: None, title }
    });
    let description = "Keys and values that are kept of the prompt.".to_owned();
    Chart { title: "Context state", description, axis: AXIS, series, format: bytes }
}

fn point_name(row: &ProfileRow) -> String {
    format!("{}, {} context tokens", row.measured.configuration.method, tokens(row.measured.prompt.context))
}

/// All rows.
pub(super) fn measurements(profile: &ProfileReport) -> Table {
    let columns = [
        ("Context", "tokens"),
        ("Kept", "tokens"),
        ("Context state", "median · p95"),
        ("Against plain", "median"),
        ("First token", "median · p95"),
        ("Each token", "median · p95"),
        ("Against plain", "each token"),
        ("Peak memory", "resident"),
        ("State", "per context token"),
        ("Smaller", "than plain's cache"),
        ("Operations", "of the prefix"),
        ("Of the limit", "floor / median"),
    ];
    let columns = columns.map(|(name, detail)| Column::number(name, detail));
    Table {
        caption: "Measurements".to_owned(),
        columns: std::iter::once(Column::text("Method")).chain(columns).collect(),
        rows: profile.rows.iter().map(measurement).collect(),
        sortable: true,
    }
}

fn measurement(row: &ProfileRow) -> Vec<Cell> {
    let measured = &row.measured;
    let count = |n: usize| Cell::number(Some(n as f64), |_| tokens(n));
    let times = |factor: f64| format!("{}×", significant(factor));
    vec![
        Cell::text(&measured.configuration.method),
        count(measured.prompt.context),
        count(measured.tokens_kept),
        latency_cell(&measured.prefix),
        Cell::number(row.prefix_speedup, times),
        latency_cell(&measured.first_token),
        latency_cell(&measured.per_token),
        Cell::number(row.per_token_speedup, times),
        Cell::number(Some(measured.peak_resident_bytes as f64), bytes),
        Cell::number(row.state_bytes_per_context_token, bytes),
        Cell::number(row.state_reduction, times),
        Cell::number(measured.operations.map(|n| n as f64), operations),
        Cell::number(measured.floor_fraction, percent),
    ]
}

fn operations(count: f64) -> String {
    if count >= 1e12 {
        format!("{} T", significant(count / 1e12))
    } else {
        format!("{} G", grouped((count / 1e9) as u128))
    }
}

fn latency_cell(stats: &LatencyStats) -> Cell {
    let title = format!(
        "{} runs, min {}, mean {}, p90 {}, p99 {}, variation {}",
        stats.runs,
        latency(stats.min_ms),
        latency(stats.mean_ms),
        latency(stats.p90_ms),
        latency(stats.p99_ms),
        percent(stats.cv)
    );
    let class = if stats.is_unstable() { "unstable" } else { "" };
    let shown = Cell::number(Some(stats.median_ms), latency).with_detail(latency(stats.p95_ms));
    Cell { title, class, ..shown }
}
