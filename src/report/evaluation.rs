//! What a method still finds, predicts and reproduces: heat maps by length and depth, perplexity against length, tables.

use super::chart::{Chart, Point, Series, draw};
use super::format::{fixed, percent_of, tokens};
use super::html::Html;
use super::page::pairs;
use super::table::{Cell as TableCell, Column, Table};
use crate::eval::schema::{BucketPerplexity, Cell, CellResult, Comparison, Summary};
use crate::eval::stats::{Interval, Mean};
use std::collections::BTreeSet;

/// What a summary's tables are.
pub(super) struct Tables {
    /// Where there are depths, one by length and depth for each method.
    pub(super) grids: Vec<Table>,
    /// One row for each method and length.
    pub(super) whole: Vec<Table>,
    /// What few readers need.
    pub(super) further: Vec<Table>,
}

pub(super) fn section(html: &mut Html, summary: &Summary) {
    html.leaf("h3", &[], title(summary));
    html.leaf("p", &[("class", &"lead")], note(summary));
    let Tables { grids, whole, further } = tables(summary);
    if !grids.is_empty() {
        html.element("div", &[("class", &"grids")], |html| grids.iter().for_each(|grid| grid.html(html)));
    }
    html.element("div", &[("class", &"charts")], |html| {
        draw(html, perplexity_chart(summary));
        draw(html, running_chart(summary));
    });
    for table in &whole {
        table.html(html);
    }
    for table in &further {
        html.element("details", &[], |html| {
            html.leaf("summary", &[], &table.caption);
            table.html(html);
        });
    }
    let settings: Vec<(String, String)> = summary.settings.clone().into_iter().collect();
    pairs(html, "Settings", &settings);
    for one in &summary.methods {
        pairs(html, &one.method, &one.settings.clone().into_iter().collect::<Vec<_>>());
    }
}

/// The task and the model, whose fingerprint is long.
pub(super) fn title(summary: &Summary) -> String {
    let model: String = summary.model.chars().take(12).collect();
    let mut task = summary.task.chars();
    let task: String = task.next().into_iter().flat_map(char::to_uppercase).chain(task).collect();
    format!("{task}, model {model}")
}

pub(super) fn note(summary: &Summary) -> String {
    format!("Intervals are at 95 %; n is the number of independent samples; seed {}.", summary.seed)
}

/// All tables of a summary.
pub(super) fn tables(summary: &Summary) -> Tables {
    let whole: Vec<&Cell> = summary.cells.iter().filter(|cell| cell.depth.is_none()).collect();
    Tables {
        grids: methods(summary).into_iter().filter_map(|method| grid(summary, method)).collect(),
        whole: [answers(&whole), likelihoods(summary, &whole), continuations(summary, &whole)]
            .into_iter()
            .flatten()
            .collect(),
        further: [by_position(&whole), running(summary), survival(&whole)].into_iter().flatten().collect(),
    }
}

/// The methods in the order of their cells.
fn methods(summary: &Summary) -> Vec<&str> {
    let mut methods: Vec<&str> = Vec::new();
    for cell in &summary.cells {
        if !methods.contains(&cell.method.as_str()) {
            methods.push(&cell.method);
        }
    }
    methods
}

/// How many of the answers of `method` were right, by depth and length.
fn grid(summary: &Summary, method: &str) -> Option<Table> {
    let cells: Vec<&Cell> = summary.cells.iter().filter(|cell| cell.method == method).collect();
    let lengths: BTreeSet<usize> = cells.iter().map(|cell| cell.length).collect();
    let depths: BTreeSet<u8> = cells.iter().filter_map(|cell| cell.depth).collect();
    if depths.is_empty() {
        return None;
    }
    let at = |length: usize, depth: Option<u8>| {
        let here = cells.iter().find(|cell| (cell.length, cell.depth) == (length, depth));
        here.map_or_else(|| TableCell::number(None, fixed), |cell| share(cell))
    };
    let row = |depth: Option<u8>| {
        let name = depth.map_or("all depths".to_owned(), |depth| format!("{depth} %"));
        let name = TableCell { key: Some(depth.map_or(101.0, f64::from)), ..TableCell::text(name) };
        std::iter::once(name).chain(lengths.iter().map(|&length| at(length, depth))).collect()
    };
    let heads = lengths.iter().map(|&length| Column::number(tokens(length), "tokens"));
    Some(Table {
        caption: format!("{method}: right answers by depth and length"),
        columns: std::iter::once(Column::text("Depth")).chain(heads).collect(),
        rows: depths.iter().copied().map(Some).chain([None]).map(row).collect(),
        sortable: false,
    })
}

/// A cell of the heat map: the share, and of how many.
fn share(cell: &Cell) -> TableCell {
    let CellResult::Answer { hits, share, interval, score } = &cell.result else {
        return TableCell::number(None, fixed);
    };
    let class = match share {
        0.0 => "q0",
        ..0.2 => "q1",
        ..0.4 => "q2",
        ..0.6 => "q3",
        ..0.8 => "q4",
        ..1.0 => "q5",
        _ => "q6",
    };
    let title = format!("95 % interval {}; mean score {score:.2}", percent_range(interval));
    let shown = TableCell::number(Some(*share), percent_of).with_detail(format!("{hits} of {}", cell.n));
    TableCell { title, class, ..shown }
}

/// The cells that every table of results begins with.
fn who(cell: &Cell) -> Vec<TableCell> {
    let length = TableCell::number(Some(cell.length as f64), |_| tokens(cell.length));
    vec![TableCell::text(&cell.method), length, TableCell::number(Some(cell.n as f64), |_| tokens(cell.n))]
}

/// A table with a row for each cell that `row` has something to say about, behind method, length and n.
fn listed(
    caption: &str,
    columns: Vec<Column>,
    cells: &[&Cell],
    row: impl Fn(&Cell) -> Option<Vec<TableCell>>,
) -> Option<Table> {
    let rows: Vec<Vec<TableCell>> =
        cells.iter().filter_map(|cell| Some(who(cell).into_iter().chain(row(cell)?).collect())).collect();
    let first = [Column::text("Method"), Column::number("Length", "tokens"), Column::number("n", "samples")];
    let columns = first.into_iter().chain(columns).collect();
    (!rows.is_empty()).then(|| Table { caption: caption.to_owned(), columns, rows, sortable: true })
}

fn answers(cells: &[&Cell]) -> Option<Table> {
    let columns = vec![
        Column::number("Right", "answers"),
        Column::number("Share", "95 % interval"),
        Column::number("Score", "mean"),
    ];
    listed("Answers", columns, cells, |cell| {
        let CellResult::Answer { hits, share, interval, score } = &cell.result else { return None };
        Some(vec![
            TableCell::number(Some(*hits as f64), |_| tokens(*hits)),
            TableCell::number(Some(*share), percent_of).with_detail(percent_range(interval)),
            TableCell::number(Some(*score), fixed),
        ])
    })
}

fn likelihoods(summary: &Summary, cells: &[&Cell]) -> Option<Table> {
    let columns = vec![
        Column::number("Predicted", "tokens"),
        Column::number("Perplexity", "95 % interval"),
        Column::number("Negative log-likelihood", "per token"),
        against(summary),
    ];
    listed("Perplexity", columns, cells, |cell| {
        let CellResult::Likelihood { tokens: predicted, nll, perplexity, .. } = &cell.result else { return None };
        let interval = nll.interval.map(|Interval { low, high }| format!("{:.2} to {:.2}", low.exp(), high.exp()));
        Some(vec![
            TableCell::number(Some(*predicted as f64), |_| tokens(*predicted)),
            TableCell::number(Some(*perplexity), fixed).with_detail(interval.unwrap_or_default()),
            mean(Some(nll)),
            mean(difference(summary, cell)),
        ])
    })
}

fn continuations(summary: &Summary, cells: &[&Cell]) -> Option<Table> {
    let columns = vec![
        Column::number("Exact", "texts"),
        Column::number("Share", "95 % interval"),
        Column::number("BLEU-4", "mean"),
        against(summary),
    ];
    listed("Continued texts", columns, cells, |cell| {
        let CellResult::Continuation { exact, share, interval, bleu } = &cell.result else { return None };
        Some(vec![
            TableCell::number(Some(*exact as f64), |_| tokens(*exact)),
            TableCell::number(Some(*share), percent_of).with_detail(percent_range(interval)),
            mean(Some(bleu)),
            mean(difference(summary, cell)),
        ])
    })
}

fn by_position(cells: &[&Cell]) -> Option<Table> {
    let buckets = |cell: &Cell| match &cell.result {
        CellResult::Likelihood { buckets, .. } => buckets.clone(),
        _ => Vec::new(),
    };
    let starts: BTreeSet<usize> = cells.iter().flat_map(|cell| buckets(cell)).map(|bucket| bucket.start).collect();
    let heads = starts.iter().map(|&start| Column::number(tokens(start), "and on")).collect();
    let at = |found: &[BucketPerplexity], start: usize| {
        let here = found.iter().find(|bucket| bucket.start == start);
        TableCell::number(here.map(|bucket| bucket.perplexity), fixed)
    };
    let table = listed("Perplexity by place among the predicted tokens", heads, cells, |cell| {
        let found = buckets(cell);
        (!found.is_empty()).then(|| starts.iter().map(|&start| at(&found, start)).collect())
    });
    table.filter(|_| starts.len() > 1)
}

fn running(summary: &Summary) -> Option<Table> {
    let row = |point: &crate::eval::schema::Running| {
        vec![
            TableCell::text(&point.method),
            TableCell::number(Some(point.tokens as f64), |_| tokens(point.tokens)),
            TableCell::number(Some(point.n as f64), |_| tokens(point.n)),
            TableCell::number(Some(point.perplexity), fixed),
        ]
    };
    let rows: Vec<_> = summary.running.iter().map(row).collect();
    let columns = vec![
        Column::text("Method"),
        Column::number("Read", "tokens"),
        Column::number("n", "texts"),
        Column::number("Perplexity", "of all so far"),
    ];
    let caption = "Perplexity of the text so far".to_owned();
    (!rows.is_empty()).then_some(Table { caption, columns, rows, sortable: true })
}

fn survival(cells: &[&Cell]) -> Option<Table> {
    let heights: BTreeSet<usize> = cells.iter().flat_map(|cell| &cell.survival).map(|level| level.height).collect();
    let heads = heights.iter().map(|height| Column::number(format!("Height {height}"), "left of entered")).collect();
    let at = |cell: &Cell, height: usize| {
        let here = cell.survival.iter().find(|level| level.height == height);
        let shares = here.map(|level| level.left as f64 / level.entered.max(1) as f64);
        let detail = here.map(|level| format!("{} of {}", tokens(level.left), tokens(level.entered)));
        TableCell::number(shares, percent_of).with_detail(detail.unwrap_or_default())
    };
    listed("Tokens of the answer that each level of the tree kept", heads, cells, |cell| {
        (!cell.survival.is_empty()).then(|| heights.iter().map(|&height| at(cell, height)).collect())
    })
}

/// The column of [`difference`]s.
fn against(summary: &Summary) -> Column {
    let baseline = summary.comparisons.first().map_or("the first", |found| found.baseline.as_str());
    let quantity = summary.comparisons.first().map_or("", |found| found.quantity.as_str());
    Column::number(format!("Against {baseline}"), quantity)
}

/// How `cell` differs from the first method on the same samples.
fn difference<'s>(summary: &'s Summary, cell: &Cell) -> Option<&'s Mean> {
    let same = |other: &&Comparison| other.method == cell.method && other.length == cell.length;
    summary.comparisons.iter().find(same).map(|found| &found.difference)
}

fn mean(mean: Option<&Mean>) -> TableCell {
    let interval = mean.and_then(|mean| mean.interval);
    let signed = |value: f64| format!("{value:.3}").replace('-', "−");
    let detail = interval.map(|Interval { low, high }| format!("{} to {}", signed(low), signed(high)));
    TableCell::number(mean.map(|mean| mean.mean), signed).with_detail(detail.unwrap_or_default())
}

fn percent_range(interval: &Interval) -> String {
    format!("{:.0} to {:.0} %", interval.low * 100.0, interval.high * 100.0)
}

fn perplexity_chart(summary: &Summary) -> Chart<'_> {
    let point = |cell: &Cell| match &cell.result {
        CellResult::Likelihood { nll, perplexity, .. } if cell.depth.is_none() => Some(Point {
            x: cell.length as f64,
            y: *perplexity,
            spread: nll.interval.map(|Interval { low, high }| (low.exp(), high.exp())),
            title: format!("{}, {} tokens: {perplexity:.2}, n = {}", cell.method, tokens(cell.length), cell.n),
        }),
        _ => None,
    };
    let series = methods(summary).into_iter().map(|name| Series {
        name,
        points: summary.cells.iter().filter(|cell| cell.method == name).filter_map(point).collect(),
    });
    Chart {
        title: "Perplexity",
        description: "Lower is better; bars are 95 % intervals.".to_owned(),
        axis: "tokens of the past",
        series: series.collect(),
        format: fixed,
    }
}

fn running_chart(summary: &Summary) -> Chart<'_> {
    let series = methods(summary).into_iter().map(|name| {
        let of_method = summary.running.iter().filter(|point| point.method == name);
        let points = of_method.map(|point| Point {
            x: point.tokens as f64,
            y: point.perplexity,
            spread: None,
            title: format!("{name}, {} tokens: {:.2}, n = {}", tokens(point.tokens), point.perplexity, point.n),
        });
        Series { name, points: points.collect() }
    });
    Chart {
        title: "Perplexity of the text so far",
        description: "Texts are read from their start, segment by segment.".to_owned(),
        axis: "tokens read",
        series: series.collect(),
        format: fixed,
    }
}
