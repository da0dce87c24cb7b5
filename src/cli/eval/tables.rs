//! An evaluation on the terminal.

use super::super::text::{grouped, table};
use accordion::eval::schema::{Cell, CellResult, Comparison, Summary};
use accordion::eval::stats::{Interval, Mean};
use std::collections::BTreeSet;

/// All tables of an evaluation.
pub(super) fn summary(summary: &Summary) -> String {
    let whole: Vec<&Cell> = summary.cells.iter().filter(|cell| cell.depth.is_none()).collect();
    let mut out = match whole.first().map(|cell| &cell.result) {
        Some(CellResult::Answer { .. }) => answers(summary, &whole),
        Some(CellResult::Likelihood { .. }) => likelihoods(summary, &whole),
        Some(CellResult::Continuation { .. }) => continuations(summary, &whole),
        None => return "nothing was evaluated: no one takes part at these lengths\n".to_owned(),
    };
    let traced: Vec<[String; 3]> =
        whole.iter().filter(|cell| !cell.survival.is_empty()).map(|cell| levels(cell)).collect();
    if !traced.is_empty() {
        let header = ["method", ">length", "answer's tokens that entered and left each level, leaves first"];
        out = format!("{out}\n{}", table(header, &traced));
    }
    if !summary.running.is_empty() {
        let rows: Vec<[String; 4]> = summary
            .running
            .iter()
            .map(|point| {
                let perplexity = format!("{:.2}", point.perplexity);
                [point.method.clone(), grouped(point.tokens as u64), point.n.to_string(), perplexity]
            })
            .collect();
        out = format!("{out}\n{}", table(["method", ">tokens read", ">n", ">perplexity so far"], &rows));
    }
    format!("{out}\nIntervals are at 95 %; seed {}, n = independent samples.\n", summary.seed)
}

fn answers(summary: &Summary, cells: &[&Cell]) -> String {
    let depths: BTreeSet<u8> = summary.cells.iter().filter_map(|cell| cell.depth).collect();
    let at = |cell: &Cell, depth| {
        let same =
            |other: &&Cell| (&other.method, other.length, other.depth) == (&cell.method, cell.length, Some(depth));
        match summary.cells.iter().find(same).map(|cell| (&cell.result, cell.n)) {
            Some((CellResult::Answer { hits, .. }, n)) => format!("{hits}/{n}"),
            _ => "-".to_owned(),
        }
    };
    let rows: Vec<[String; 8]> = cells
        .iter()
        .filter_map(|cell| {
            let CellResult::Answer { hits, share, interval, score } = &cell.result else { return None };
            Some([
                cell.method.clone(),
                grouped(cell.length as u64),
                cell.n.to_string(),
                hits.to_string(),
                format!("{:.0} %", share * 100.0),
                format!("{:.0} to {:.0} %", interval.low * 100.0, interval.high * 100.0),
                format!("{score:.2}"),
                depths.iter().map(|&depth| at(cell, depth)).collect::<Vec<_>>().join("  "),
            ])
        })
        .collect();
    let listed: Vec<String> = depths.iter().map(ToString::to_string).collect();
    let by_depth = if listed.is_empty() { String::new() } else { format!("at depth {} %", listed.join(", ")) };
    table(["method", ">length", ">n", ">right", ">share", ">interval", ">score", &by_depth], &rows)
}

fn likelihoods(summary: &Summary, cells: &[&Cell]) -> String {
    let mut starts = Vec::new();
    let rows: Vec<[String; 8]> = cells
        .iter()
        .filter_map(|cell| {
            let CellResult::Likelihood { tokens, nll, perplexity, buckets } = &cell.result else { return None };
            if buckets.len() > starts.len() {
                starts = buckets.iter().map(|bucket| bucket.start.to_string()).collect();
            }
            let by_position: Vec<String> = buckets.iter().map(|bucket| format!("{:.1}", bucket.perplexity)).collect();
            Some([
                cell.method.clone(),
                grouped(cell.length as u64),
                cell.n.to_string(),
                grouped(*tokens as u64),
                with_interval(nll),
                format!("{perplexity:.2}"),
                difference(summary, cell),
                by_position.join("  "),
            ])
        })
        .collect();
    let against = against(summary, "nll");
    let by_position = format!("perplexity from token {}", starts.join(", "));
    table(["method", ">length", ">n", ">tokens", ">nll", ">perplexity", &against, &by_position], &rows)
}

fn continuations(summary: &Summary, cells: &[&Cell]) -> String {
    let rows: Vec<[String; 7]> = cells
        .iter()
        .filter_map(|cell| {
            let CellResult::Continuation { exact, interval, bleu, .. } = &cell.result else { return None };
            Some([
                cell.method.clone(),
                grouped(cell.length as u64),
                cell.n.to_string(),
                exact.to_string(),
                format!("{:.0} to {:.0} %", interval.low * 100.0, interval.high * 100.0),
                with_interval(bleu),
                difference(summary, cell),
            ])
        })
        .collect();
    table(["method", ">length", ">n", ">exact", ">interval", ">BLEU-4", &against(summary, "BLEU-4")], &rows)
}

fn levels(cell: &Cell) -> [String; 3] {
    let levels: Vec<String> = cell.survival.iter().map(|level| format!("{} > {}", level.entered, level.left)).collect();
    [cell.method.clone(), grouped(cell.length as u64), levels.join(",  ")]
}

/// The heading of differences.
fn against(summary: &Summary, quantity: &str) -> String {
    let baseline = summary.methods.first().map_or("", |one| one.method.as_str());
    format!(">{quantity} less {baseline}'s")
}

/// How `cell` differs from the bundle's method on the same samples.
fn difference(summary: &Summary, cell: &Cell) -> String {
    let same = |other: &&Comparison| other.method == cell.method && other.length == cell.length;
    summary.comparisons.iter().find(same).map_or_else(|| "-".to_owned(), |found| with_interval(&found.difference))
}

fn with_interval(mean: &Mean) -> String {
    match mean.interval {
        Some(Interval { high, .. }) => format!("{:.3} ± {:.3}", mean.mean, high - mean.mean),
        None => format!("{:.3}", mean.mean),
    }
}
