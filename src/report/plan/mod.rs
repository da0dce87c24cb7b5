//! A plan as a tree: leaves at the bottom, the root at the top, every node with the tokens that enter and leave.

mod summary;

pub(super) use summary::PLAN;
pub use summary::{LevelName, LevelNode, PlanSummary};

use super::format::{percent, tokens};
use super::html::Html;
use super::page::pairs;
use std::collections::BTreeMap;
use std::ops::Range;

const SLOT: f64 = 28.5;
const LABELS: f64 = 132.0;
const LEVEL: f64 = 92.0;
/// Height of the bar of the longest node.
const BAR: f64 = 34.0;
const BAR_WIDTH: f64 = 18.0;
/// Wider levels are not drawn; the table has them.
const MAX_LEAVES: usize = 128;

/// Nodes of each height, left to right.
type Levels<'a> = BTreeMap<usize, Vec<&'a LevelNode>>;

pub(super) fn section(html: &mut Html, plan: &PlanSummary) {
    let mut levels: Levels<'_> = BTreeMap::new();
    for node in &plan.nodes {
        levels.entry(node.height).or_default().push(node);
    }
    for level in levels.values_mut() {
        level.sort_by_key(|node| node.index);
    }
    let prompt = plan.prompt;
    let kept = levels.values().next_back().and_then(|top| top.last()).map_or(0, |root| root.out_len);
    html.leaf("h3", &[], format_args!("{}, {} context tokens", plan.method, tokens(prompt.context)));
    html.leaf(
        "p",
        &[("class", &"lead")],
        format_args!(
            "A prompt of {} + {} + {} tokens (prefix, context, suffix) becomes a context state of {}.",
            tokens(prompt.prefix),
            tokens(prompt.context),
            tokens(prompt.suffix),
            tokens(kept)
        ),
    );
    if let Some(remark) = &plan.remark {
        html.leaf("p", &[("class", &"lead")], remark);
    }
    if levels.values().map(Vec::len).max().is_some_and(|widest| widest <= MAX_LEAVES) {
        tree(html, plan, &levels);
    }
    table(html, plan, &levels);
    if !plan.settings.is_empty() {
        pairs(html, "Settings", &plan.settings);
    }
}

fn layers(range: &Range<usize>) -> String {
    match range.len() {
        0 => "none".to_owned(),
        1 => format!("{}", range.start),
        _ => format!("{}–{}", range.start, range.end - 1),
    }
}

/// Where the node at `place` of its level stands: above the middle of its leaves. Goes by the order in a level, not by
/// the index, so that a plan from a file cannot draw outside its frame.
fn center(levels: &Levels<'_>, height: usize, place: usize) -> f64 {
    let widest = levels.values().map(Vec::len).max().unwrap_or(1);
    let here = levels.get(&height).map_or(1, Vec::len).max(1);
    LABELS + (place as f64 + 0.5) * (widest as f64 / here as f64) * SLOT
}

/// The place of the parent of `node`, which stands at `place`.
fn above(levels: &Levels<'_>, node: &LevelNode, place: usize) -> usize {
    let there = levels.get(&node.height.saturating_add(1)).map_or(1, Vec::len);
    node.parent.unwrap_or(place / 2).min(there.saturating_sub(1))
}

/// What the level is called, and what its nodes do.
fn named(plan: &PlanSummary, level: usize, nodes: &[&LevelNode]) -> [String; 2] {
    if let Some(known) = plan.levels.iter().find(|known| known.height == level) {
        return [known.name.clone(), known.detail.clone()];
    }
    let range = nodes.first().map(|node| layers(&node.layers)).unwrap_or_default();
    [format!("Height {level}"), format!("layers {range}")]
}

fn tree(html: &mut Html, plan: &PlanSummary, levels: &Levels<'_>) {
    let widest = levels.values().map(Vec::len).max().unwrap_or(1);
    let longest = levels.values().flatten().map(|node| node.in_len).max().unwrap_or(1).max(1);
    let (width, height) = (LABELS + widest as f64 * SLOT + 6.0, levels.len() as f64 * LEVEL + 6.0);
    html.element("figure", &[("class", &"tree")], |html| {
        html.element("figcaption", &[], |html| {
            html.leaf("strong", &[], "From leaves to root");
            html.text(" Below each bar the tokens that enter, above it those that leave. The outline is what enters, the fill what leaves.");
            if levels.values().flatten().any(|node| node.split) {
                html.text(" A dashed outline is split into the two below it.");
            }
        });
        let label = "The plan as a tree; the table below has the same numbers by level";
        html.element("div", &[("class", &"scroll"), ("tabindex", &0), ("role", &"region"), ("aria-label", &label)], |html| {
            let view = format!("0 0 {width:.1} {height:.1}");
            html.element(
                "svg",
                &[("viewBox", &view), ("width", &width), ("height", &height), ("role", &"img"), ("aria-label", &label)],
                |html| {
                    for (row, (&level, nodes)) in levels.iter().rev().enumerate() {
                        let top = row as f64 * LEVEL;
                        level_label(html, plan, level, nodes, top);
                        for (place, node) in nodes.iter().enumerate() {
                            let x = center(levels, level, place);
                            // Edges run up to the parent, which is drawn one row above.
                            if row > 0 {
                                edge(html, x, top + 6.0, center(levels, level + 1, above(levels, node, place)), top - 21.0);
                            }
                            let title = described(&named(plan, level, nodes), node);
                            bar(html, &title, node, x, top, longest);
                        }
                    }
                },
            );
        });
    });
}

fn level_label(html: &mut Html, plan: &PlanSummary, level: usize, nodes: &[&LevelNode], top: f64) {
    let middle = top + LEVEL / 2.0;
    let [name, detail] = named(plan, level, nodes);
    html.leaf("text", &[("class", &"level"), ("x", &0), ("y", &(middle - 4.0))], name);
    let count = match nodes.len() {
        1 => "1 node".to_owned(),
        n => format!("{n} nodes"),
    };
    html.leaf("text", &[("class", &"tick"), ("x", &0), ("y", &(middle + 12.0))], detail);
    html.leaf("text", &[("class", &"tick"), ("x", &0), ("y", &(middle + 26.0))], count);
}

fn edge(html: &mut Html, x: f64, y: f64, parent_x: f64, parent_y: f64) {
    let middle = f64::midpoint(y, parent_y);
    let path = format!("M{x:.1} {y:.1}V{middle:.1}H{parent_x:.1}V{parent_y:.1}");
    html.element("path", &[("class", &"edge"), ("d", &path)], |_| {});
}

/// A node in words.
fn described([name, detail]: &[String; 2], node: &LevelNode) -> String {
    let (entering, leaving) = (tokens(node.in_len), tokens(node.out_len));
    let does = if node.split {
        format!("{entering} tokens, split into the nodes below")
    } else {
        format!("{entering} tokens enter, {leaving} leave")
    };
    format!("{name}, node {}: {does}; {detail}", node.index)
}

fn bar(html: &mut Html, title: &str, node: &LevelNode, x: f64, top: f64, longest: usize) {
    let size = |len: usize| (len as f64 / longest as f64).min(1.0) * BAR;
    let base = top + 20.0 + BAR;
    let left = x - BAR_WIDTH / 2.0;
    let class = if node.split { "node split" } else { "node" };
    html.element("g", &[("class", &class)], |html| {
        html.leaf("title", &[], title);
        for (class, len) in [("in", node.in_len), ("out", node.out_len)] {
            let tall = size(len);
            html.element(
                "rect",
                &[
                    ("class", &class),
                    ("x", &left),
                    ("y", &format!("{:.1}", base - tall)),
                    ("width", &BAR_WIDTH),
                    ("height", &format!("{tall:.1}")),
                    ("rx", &1.5),
                ],
                |_| {},
            );
        }
        if node.split {
            html.leaf("text", &[("class", &"len"), ("x", &x), ("y", &(top + 16.0))], "split");
        } else {
            html.leaf("text", &[("class", &"len strong"), ("x", &x), ("y", &(top + 16.0))], node.out_len);
        }
        html.leaf("text", &[("class", &"len"), ("x", &x), ("y", &(base + 12.0))], node.in_len);
    });
}

fn table(html: &mut Html, plan: &PlanSummary, levels: &Levels<'_>) {
    html.element(
        "div",
        &[("class", &"scroll"), ("tabindex", &0), ("role", &"region"), ("aria-label", &"Levels of the plan")],
        |html| {
            html.element("table", &[], |html| {
                html.leaf("caption", &[], "Levels, root first");
                html.element("thead", &[], |html| {
                    html.element("tr", &[], |html| {
                        html.leaf("th", &[("scope", &"col")], "Level");
                        html.leaf("th", &[("scope", &"col")], "What it does");
                        for name in ["Nodes", "Tokens in", "Tokens out", "Left of them"] {
                            html.leaf("th", &[("scope", &"col"), ("class", &"num")], name);
                        }
                    });
                });
                html.element("tbody", &[], |html| {
                    for (level, nodes) in levels.iter().rev() {
                        let [name, detail] = named(plan, *level, nodes);
                        let own = || nodes.iter().filter(|node| !node.split);
                        let all = |of: fn(&LevelNode) -> usize| {
                            own().fold(0, |sum: usize, node| sum.saturating_add(of(node)))
                        };
                        let [entering, leaving] = [all(|node| node.in_len), all(|node| node.out_len)];
                        html.element("tr", &[], |html| {
                            html.leaf("th", &[("scope", &"row")], name);
                            html.leaf("td", &[], detail);
                            let split = nodes.len() - own().count();
                            let also = if split > 0 { format!(" and {split} split") } else { String::new() };
                            html.leaf("td", &[("class", &"num")], format_args!("{}{also}", own().count()));
                            html.leaf("td", &[("class", &"num")], extent(own().map(|n| n.in_len)));
                            html.leaf("td", &[("class", &"num")], extent(own().map(|n| n.out_len)));
                            html.leaf("td", &[("class", &"num")], percent(leaving as f64 / entering.max(1) as f64));
                        });
                    }
                });
            });
        },
    );
}

/// The smallest and largest of some lengths.
fn extent(lengths: impl Iterator<Item = usize> + Clone) -> String {
    match (lengths.clone().min(), lengths.max()) {
        (Some(low), Some(high)) if low < high => format!("{} to {}", tokens(low), tokens(high)),
        (_, high) => tokens(high.unwrap_or(0)),
    }
}
