//! A plan as a tree: leaves at the bottom, the root at the top, every node with the tokens that enter and leave.

use super::format::tokens;
use super::html::Html;
use super::page::pairs;
use super::result::{LevelNode, PlanSummary};
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
    if levels.values().map(Vec::len).max().is_some_and(|widest| widest <= MAX_LEAVES) {
        tree(html, &levels);
    }
    table(html, &levels);
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

fn tree(html: &mut Html, levels: &Levels<'_>) {
    let widest = levels.values().map(Vec::len).max().unwrap_or(1);
    let longest = levels.values().flatten().map(|node| node.in_len).max().unwrap_or(1).max(1);
    let (width, height) = (LABELS + widest as f64 * SLOT + 6.0, levels.len() as f64 * LEVEL + 6.0);
    html.element("figure", &[("class", &"tree")], |html| {
        html.element("figcaption", &[], |html| {
            html.leaf("strong", &[], "From leaves to root");
            html.text(" Below each bar the tokens that enter, above it those that survive. The outline is what enters, the fill what leaves.");
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
                        level_label(html, level, nodes, top);
                        for (place, node) in nodes.iter().enumerate() {
                            let x = center(levels, level, place);
                            // Edges run up to the parent, which is drawn one row above.
                            if row > 0 {
                                edge(html, x, top + 6.0, center(levels, level + 1, place / 2), top - 21.0);
                            }
                            bar(html, node, x, top, longest);
                        }
                    }
                },
            );
        });
    });
}

fn level_label(html: &mut Html, level: usize, nodes: &[&LevelNode], top: f64) {
    let middle = top + LEVEL / 2.0;
    html.leaf("text", &[("class", &"level"), ("x", &0), ("y", &(middle - 4.0))], format_args!("Height {level}"));
    let range = nodes.first().map(|node| layers(&node.layers)).unwrap_or_default();
    let count = match nodes.len() {
        1 => "1 node".to_owned(),
        n => format!("{n} nodes"),
    };
    html.leaf("text", &[("class", &"tick"), ("x", &0), ("y", &(middle + 12.0))], format_args!("layers {range}"));
    html.leaf("text", &[("class", &"tick"), ("x", &0), ("y", &(middle + 26.0))], count);
}

fn edge(html: &mut Html, x: f64, y: f64, parent_x: f64, parent_y: f64) {
    let middle = f64::midpoint(y, parent_y);
    let path = format!("M{x:.1} {y:.1}V{middle:.1}H{parent_x:.1}V{parent_y:.1}");
    html.element("path", &[("class", &"edge"), ("d", &path)], |_| {});
}

fn bar(html: &mut Html, node: &LevelNode, x: f64, top: f64, longest: usize) {
    let size = |len: usize| (len as f64 / longest as f64).min(1.0) * BAR;
    let base = top + 20.0 + BAR;
    let left = x - BAR_WIDTH / 2.0;
    html.element("g", &[("class", &"node")], |html| {
        html.leaf(
            "title",
            &[],
            format_args!(
                "Height {}, node {}: {} tokens enter, {} leave; layers {}",
                node.height,
                node.index,
                tokens(node.in_len),
                tokens(node.out_len),
                layers(&node.layers)
            ),
        );
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
        html.leaf("text", &[("class", &"len strong"), ("x", &x), ("y", &(top + 16.0))], node.out_len);
        html.leaf("text", &[("class", &"len"), ("x", &x), ("y", &(base + 12.0))], node.in_len);
    });
}

fn table(html: &mut Html, levels: &Levels<'_>) {
    html.element(
        "div",
        &[("class", &"scroll"), ("tabindex", &0), ("role", &"region"), ("aria-label", &"Levels of the plan")],
        |html| {
            html.element("table", &[], |html| {
                html.leaf("caption", &[], "Levels, root first");
                html.element("thead", &[], |html| {
                    html.element("tr", &[], |html| {
                        for name in ["Height", "Nodes", "Layers", "Tokens in", "Tokens out"] {
                            html.leaf("th", &[("scope", &"col"), ("class", &"num")], name);
                        }
                    });
                });
                html.element("tbody", &[], |html| {
                    for (level, nodes) in levels.iter().rev() {
                        html.element("tr", &[], |html| {
                            html.leaf("th", &[("scope", &"row"), ("class", &"num")], level);
                            html.leaf("td", &[("class", &"num")], nodes.len());
                            html.leaf(
                                "td",
                                &[("class", &"num")],
                                nodes.first().map(|n| layers(&n.layers)).unwrap_or_default(),
                            );
                            html.leaf("td", &[("class", &"num")], extent(nodes.iter().map(|n| n.in_len)));
                            html.leaf("td", &[("class", &"num")], extent(nodes.iter().map(|n| n.out_len)));
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
