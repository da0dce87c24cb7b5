//! Where the time of a traced run went, by module of the model.

use super::format::{latency, percent, tokens};
use super::html::Html;
use super::table::{Cell, Column, Table};
use crate::profile::schema::ProfileRow;
use crate::profile::trace::OperatorTime;
use std::collections::BTreeMap;

/// Modules with a row of their own.
const LISTED: usize = 40;

/// A module, over all graphs and layers.
#[derive(Default)]
struct Module<'a> {
    /// Milliseconds by operator.
    operators: BTreeMap<&'a str, f64>,
    calls: usize,
    total_ms: f64,
}

pub(super) fn section(html: &mut Html, row: &ProfileRow) {
    if row.measured.operators.is_empty() {
        return;
    }
    let table = table(row);
    html.element("details", &[("class", &"operators")], |html| {
        html.leaf("summary", &[], &table.caption);
        let note =
            "Time inside operators, of one run that was recorded; recording makes a run slower than the measured ones.";
        html.leaf("p", &[("class", &"lead")], note);
        table.html(html);
    });
}

/// Modules, the longest first.
pub(super) fn table(row: &ProfileRow) -> Table {
    let measured = &row.measured;
    let mut modules: BTreeMap<&str, Module<'_>> = BTreeMap::new();
    for time in &measured.operators {
        add(modules.entry(&time.module).or_default(), time);
    }
    let total: f64 = modules.values().map(|module| module.total_ms).sum();
    let mut modules: Vec<(&str, Module<'_>)> = modules.into_iter().collect();
    modules.sort_by(|(_, a), (_, b)| b.total_ms.total_cmp(&a.total_ms));
    let others = modules.split_off(modules.len().min(LISTED));
    let mut rows: Vec<Vec<Cell>> = modules
        .iter()
        .map(|(path, module)| cells(if path.is_empty() { "(the graph)" } else { path }, module, total))
        .collect();
    if !others.is_empty() {
        let calls = others.iter().fold(0, |sum: usize, (_, module)| sum.saturating_add(module.calls));
        let total_ms = others.iter().map(|(_, module)| module.total_ms).sum();
        let rest = Module { operators: BTreeMap::new(), calls, total_ms };
        rows.push(cells(&format!("{} other modules", tokens(others.len())), &rest, total));
    }
    let (method, context) = (&measured.configuration.method, tokens(measured.prompt.context));
    Table {
        caption: format!("Where the time goes: {method} at {context} context tokens, {} in operators", latency(total)),
        columns: vec![
            Column::text("Module"),
            Column::text("Operators, the longest first"),
            Column::number("Calls", ""),
            Column::number("Time", ""),
            Column::number("Share", "of all operators"),
        ],
        rows,
        sortable: true,
    }
}

fn add<'a>(module: &mut Module<'a>, time: &'a OperatorTime) {
    *module.operators.entry(&time.operator).or_default() += time.total_ms;
    module.calls = module.calls.saturating_add(time.calls);
    module.total_ms += time.total_ms;
}

fn cells(path: &str, module: &Module<'_>, total: f64) -> Vec<Cell> {
    let share = if total > 0.0 { module.total_ms / total } else { 0.0 };
    let mut operators: Vec<(&&str, &f64)> = module.operators.iter().collect();
    operators.sort_by(|(_, a), (_, b)| b.total_cmp(a));
    let named: Vec<&str> = operators.iter().take(3).map(|(name, _)| **name).collect();
    let more = if operators.len() > named.len() { ", …" } else { "" };
    vec![
        Cell::text(path),
        Cell::text(named.join(", ") + more),
        Cell::number(Some(module.calls as f64), |_| tokens(module.calls)),
        Cell::number(Some(module.total_ms), latency),
        Cell { bar: Some(share), ..Cell::number(Some(share), percent) },
    ]
}
