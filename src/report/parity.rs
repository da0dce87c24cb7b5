//! How well two computations agree: heat maps over layers and tree nodes, and the table of taps.

use super::format::{error, grouped, percent, tokens};
use super::html::Html;
use super::page::{pairs, sort_key, verdict_mark};
use crate::verify::logits::LogitAgreement;
use crate::verify::order::scope;
use crate::verify::schema::VerifyReport;
use crate::verify::verdict::{TapResult, Verdict};
use std::collections::{HashMap, HashSet};

const CELL: f64 = 14.0;
const LABELS: f64 = 138.0;
/// Rows of the table of logits: decoding steps may be a thousand.
const MOST_LOGITS: usize = 100;

/// The part of a report whose taps are listed: everything that did not pass, then the largest differences, `limit` taps
/// in all, still in model order. Keeps the page small however many taps were compared.
pub(super) fn condensed(report: &VerifyReport, limit: usize) -> VerifyReport {
    let severity = |tap: &TapResult| tap.bound_use.unwrap_or(f64::INFINITY);
    let mut ranked: Vec<(usize, &TapResult)> = report.taps().enumerate().collect();
    ranked.sort_by(|(_, a), (_, b)| b.verdict.cmp(&a.verdict).then(severity(b).total_cmp(&severity(a))));
    let chosen: HashSet<usize> = ranked.into_iter().take(limit).map(|(place, _)| place).collect();
    let mut listed = report.clone();
    let mut places = 0..;
    for scope in &mut listed.scopes {
        scope.taps.retain(|_| places.next().is_some_and(|place| chosen.contains(&place)));
    }
    listed.scopes.retain(|scope| !scope.taps.is_empty());
    listed
}

/// `full` is drawn, `listed` (see [`condensed`]) becomes the table.
pub(super) fn section(html: &mut Html, full: &VerifyReport, listed: &VerifyReport) {
    let subject = &full.subject;
    html.leaf(
        "h3",
        &[],
        format_args!("{}, {}: {} against {}", subject.model, subject.method, subject.actual, subject.expected),
    );
    html.element("p", &[("class", &"lead")], |html| {
        verdict_mark(html, full.verdict);
        html.text(format_args!(
            " {} of {} taps pass, {} are ambiguous, {} fail.",
            grouped(full.counts.pass as u128),
            grouped(full.counts.total() as u128),
            full.counts.ambiguous,
            full.counts.fail
        ));
    });
    let pointers = [("First failure in model order", &full.first_failure), ("Largest difference", &full.worst)];
    let found: Vec<_> =
        pointers.into_iter().filter_map(|(what, tap)| Some((what.to_owned(), tap.as_ref()?.clone()))).collect();
    pairs(html, "Where to look", &found);
    for family in families(full) {
        if family.columns.len() > 1 {
            heat_map(html, &family);
        }
    }
    legend(html);
    logits(html, full);
    table(html, full, listed);
    if !subject.environment.is_empty() {
        pairs(html, "Machine", &subject.environment);
    }
}

/// The taps of one kind of place (`layers`, `node`, `cache`) as a grid.
struct Family<'a> {
    name: &'a str,
    /// Places: layers, tree nodes.
    columns: Vec<String>,
    /// What is tapped there.
    rows: Vec<String>,
    /// The worst tap of each place and row (`in_k` of a node stands for all layers so far).
    cells: HashMap<(usize, usize), &'a TapResult>,
}

/// Where a tap is shown: family, column and row. `node.h1.i0.in_k.3` is `node`, `h1.i0`, `in_k`; `cache.k.3` is `cache`,
/// `3`, `k`. What is inside a layer inside something else is shown twice, by that and by layer: `node.h1.i0.layers.3.attn.q`
/// is `node`, `h1.i0`, `attn.q` and `layers`, `3`, `attn.q`. The layers of a model that compresses are a family of their own:
/// `segments.0.encoder.layers.3.out` is `segments`, `0`, `encoder.out` and `encoder.layers`, `3`, `out`.
fn places(name: &str) -> Vec<(&str, String, String)> {
    const LAYERS: &str = "layers.";
    let scope = scope(name);
    let (family, numbers) = scope.split_once('.').unwrap_or((scope, ""));
    let rest = name[scope.len()..].trim_start_matches('.');
    let within = rest.find(LAYERS).filter(|&at| at == 0 || rest[..at].ends_with('.'));
    if let Some(at) = within
        && let Some((layer, part)) = rest[at + LAYERS.len()..].split_once('.')
    {
        let layers = if family == "tree" { "lower.layers" } else { rest[..at + LAYERS.len()].trim_end_matches('.') };
        let inside = format!("{}{part}", &rest[..at]);
        return vec![(family, numbers.to_owned(), inside), (layers, layer.to_owned(), part.to_owned())];
    }
    let row = rest.trim_end_matches(|c: char| c.is_ascii_digit() || c == '.');
    let column = if numbers.is_empty() { rest[row.len()..].trim_start_matches('.') } else { numbers };
    vec![(family, column.to_owned(), row.to_owned())]
}

fn families(report: &VerifyReport) -> Vec<Family<'_>> {
    let mut families: Vec<Family<'_>> = Vec::new();
    let mut seen: HashMap<(usize, bool, String), usize> = HashMap::new();
    let shown = report.taps().flat_map(|tap| places(&tap.name).into_iter().map(move |place| (tap, place)));
    for (tap, (name, column, row)) in shown {
        let family = families.iter().position(|family| family.name == name).unwrap_or_else(|| {
            families.push(Family { name, columns: Vec::new(), rows: Vec::new(), cells: HashMap::new() });
            families.len() - 1
        });
        let found = &mut families[family];
        let mut number = |is_column: bool, label: String, list: &mut Vec<String>| {
            *seen.entry((family, is_column, label)).or_insert_with_key(|(_, _, label)| {
                list.push(label.clone());
                list.len() - 1
            })
        };
        let at = (number(true, column, &mut found.columns), number(false, row, &mut found.rows));
        let severity = |tap: &TapResult| (tap.verdict, tap.bound_use.unwrap_or(f64::INFINITY));
        let cell = found.cells.entry(at).or_insert(tap);
        if severity(tap) > severity(cell) {
            *cell = tap;
        }
    }
    families
}

/// The style of a cell: verdict first, then the share of the bound in decades.
fn heat(tap: &TapResult) -> &'static str {
    match (tap.verdict, tap.bound_use) {
        (Verdict::Fail, _) => "fail",
        (Verdict::Ambiguous, _) => "ambiguous",
        (Verdict::Pass, None | Some(..=1e-3)) => "b0",
        (Verdict::Pass, Some(..=1e-2)) => "b1",
        (Verdict::Pass, Some(..=1e-1)) => "b2",
        (Verdict::Pass, Some(..=0.5)) => "b3",
        (Verdict::Pass, Some(_)) => "b4",
    }
}

fn heat_map(html: &mut Html, family: &Family<'_>) {
    let title = match family.name {
        "layers" => "Parity by layer",
        "encoder.layers" => "Parity by layer of the encoder",
        "lower.layers" => "Parity by layer of the lower model",
        "node" => "Parity by tree node",
        "segments" => "Parity by segment",
        "tree" => "Parity by level of the context tree",
        "kv" => "Parity of what is kept of the context, by layer",
        "steps" => "Parity by decoding step",
        "cache" => "Parity of the context state, by layer",
        _ => "Parity by place",
    };
    let width = LABELS + family.columns.len() as f64 * CELL + 4.0;
    let height = 22.0 + family.rows.len() as f64 * CELL + 4.0;
    html.element("figure", &[("class", &"heat")], |html| {
        html.element("figcaption", &[], |html| html.leaf("strong", &[], title));
        html.element(
            "div",
            &[("class", &"scroll"), ("tabindex", &0), ("role", &"region"), ("aria-label", &title)],
            |html| {
                let view = format!("0 0 {width} {height}");
                let label = format!(
                    "{title}: {} places, {} kinds of tap. The numbers are in the table.",
                    family.columns.len(),
                    family.rows.len()
                );
                html.element(
                    "svg",
                    &[
                        ("viewBox", &view),
                        ("width", &width),
                        ("height", &height),
                        ("role", &"img"),
                        ("aria-label", &label),
                    ],
                    |html| grid(html, family),
                );
            },
        );
    });
}

fn grid(html: &mut Html, family: &Family<'_>) {
    let mut group = "";
    for (c, column) in family.columns.iter().enumerate() {
        let head = column.split('.').next().unwrap_or_default();
        let numbered = head.parse::<usize>().is_ok_and(|n| n.is_multiple_of(5));
        // Columns of two numbers (height and index) are labelled where the first changes.
        if if column.contains('.') { head != group } else { numbered || family.columns.len() <= 12 } {
            html.leaf("text", &[("class", &"tick"), ("x", &(LABELS + c as f64 * CELL + 1.0)), ("y", &14)], head);
        }
        group = head;
    }
    for (r, row) in family.rows.iter().enumerate() {
        let y = 22.0 + r as f64 * CELL + CELL - 3.5;
        html.leaf(
            "text",
            &[("class", &"tick end"), ("x", &(LABELS - 8.0)), ("y", &y)],
            row.chars().take(22).collect::<String>(),
        );
    }
    let mut cells: Vec<_> = family.cells.iter().collect();
    cells.sort_by_key(|(at, _)| **at);
    for ((c, r), tap) in cells {
        let (x, y) = (LABELS + *c as f64 * CELL, 22.0 + *r as f64 * CELL);
        html.element("g", &[("class", &heat(tap))], |html| {
            html.leaf("title", &[], format_args!("{}: {} – {}", tap.name, tap.verdict, tap.reason));
            html.element(
                "rect",
                &[
                    ("x", &(x + 0.5)),
                    ("y", &(y + 0.5)),
                    ("width", &(CELL - 1.0)),
                    ("height", &(CELL - 1.0)),
                    ("rx", &2),
                ],
                |_| {},
            );
            // Not by colour alone.
            let mark = match tap.verdict {
                Verdict::Pass => return,
                Verdict::Ambiguous => "≈",
                Verdict::Fail => "×",
            };
            html.leaf("text", &[("class", &"mark"), ("x", &(x + CELL / 2.0)), ("y", &(y + CELL - 3.0))], mark);
        });
    }
}

fn legend(html: &mut Html) {
    html.element("p", &[("class", &"legend")], |html| {
        html.text("Largest difference as a share of what is permitted: ");
        for (class, label) in [
            ("b0", "≤ 0.1 %"),
            ("b1", "≤ 1 %"),
            ("b2", "≤ 10 %"),
            ("b3", "≤ 50 %"),
            ("b4", "≤ 100 %"),
            ("ambiguous", "≈ ambiguous"),
            ("fail", "× fail"),
        ] {
            html.element("span", &[("class", &"key")], |html| {
                html.element(
                    "svg",
                    &[("width", &12), ("height", &12), ("aria-hidden", &"true"), ("class", &class)],
                    |html| {
                        html.element("rect", &[("width", &12), ("height", &12), ("rx", &2)], |_| {});
                    },
                );
                html.text(label);
            });
        }
    });
}

/// Whether both sides would choose, rank and sample the same tokens.
fn logits(html: &mut Html, full: &VerifyReport) {
    if full.logits().next().is_none() {
        return;
    }
    html.element(
        "div",
        &[("class", &"scroll"), ("tabindex", &0), ("role", &"region"), ("aria-label", &"Logits")],
        |html| {
            html.element("table", &[("class", &"sortable")], |html| {
                html.leaf("caption", &[], "Logits: what both sides would choose");
                html.element("thead", &[], |html| {
                    html.element("tr", &[], |html| {
                        html.leaf("th", &[("scope", &"col")], "Tap");
                        for name in [
                            "Rows",
                            "Same argmax",
                            "Top-k overlap",
                            "Rank-biased overlap",
                            "KL, nats (mean)",
                            "KL (worst)",
                        ] {
                            html.leaf("th", &[("scope", &"col"), ("class", &"num")], name);
                        }
                    });
                });
                html.element("tbody", &[], |html| {
                    for (name, choices) in full.logits().take(MOST_LOGITS) {
                        html.element("tr", &[], |html| logits_row(html, name, choices));
                        html.newline();
                    }
                });
            });
        },
    );
}

fn logits_row(html: &mut Html, name: &str, choices: &LogitAgreement) {
    html.element("th", &[("scope", &"row")], |html| html.leaf("code", &[], name));
    let ranks = choices.ranks.as_ref();
    let share = choices.argmax_matches as f64 / choices.rows.max(1) as f64;
    let number = |value: f64, text: String| (sort_key(value), text);
    let cells = [
        Some(number(choices.rows as f64, tokens(choices.rows))),
        Some(number(share, percent(share))),
        Some(number(choices.mean_overlap, percent(choices.mean_overlap))),
        ranks.map(|ranks| number(ranks.mean_overlap, format!("{:.4}", ranks.mean_overlap))),
        ranks.map(|ranks| number(ranks.mean_divergence, error(ranks.mean_divergence))),
        ranks.map(|ranks| number(ranks.max_divergence, error(ranks.max_divergence))),
    ];
    for cell in cells {
        match cell {
            Some((key, text)) => html.leaf("td", &[("class", &"num"), ("data-v", &key)], text),
            None => html.leaf("td", &[("class", &"num none")], "–"),
        }
    }
}

fn table(html: &mut Html, full: &VerifyReport, listed: &VerifyReport) {
    let (all, shown) = (full.taps().count(), listed.taps().count());
    let caption = if shown < all {
        format!("Taps: the {} with the worst verdicts and largest differences of {}", tokens(shown), tokens(all))
    } else {
        format!("Taps: all {}, in model order", tokens(all))
    };
    html.element("form", &[("class", &"filter"), ("hidden", &"hidden"), ("aria-label", &"Filter taps")], |html| {
        html.element("label", &[], |html| {
            html.text("Verdict ");
            html.element("select", &[("name", &"verdict")], |html| {
                for verdict in ["all", "FAIL", "AMBIGUOUS", "PASS"] {
                    html.leaf("option", &[("value", &verdict)], verdict);
                }
            });
        });
        html.element("label", &[], |html| {
            html.text("Name contains ");
            html.void(
                "input",
                &[("type", &"search"), ("name", &"name"), ("autocomplete", &"off"), ("spellcheck", &"false")],
            );
        });
        html.leaf("output", &[("aria-live", &"polite")], "");
    });
    html.element(
        "div",
        &[("class", &"scroll tall"), ("tabindex", &0), ("role", &"region"), ("aria-label", &"Taps")],
        |html| {
            html.element("table", &[("class", &"sortable taps")], |html| {
                html.leaf("caption", &[], caption);
                html.element("thead", &[], |html| {
                    html.element("tr", &[], |html| {
                        html.leaf("th", &[("scope", &"col")], "Tap");
                        html.leaf("th", &[("scope", &"col")], "Verdict");
                        for name in ["Max abs", "Mean abs", "Relative", "1 − cosine", "Of bound"] {
                            html.leaf("th", &[("scope", &"col"), ("class", &"num")], name);
                        }
                        html.leaf("th", &[("scope", &"col")], "Reason");
                    });
                });
                html.element("tbody", &[], |html| listed.taps().for_each(|tap| table_row(html, tap)));
            });
        },
    );
}

fn table_row(html: &mut Html, tap: &TapResult) {
    let values = tap.difference.values();
    html.element("tr", &[("data-verdict", &tap.verdict)], |html| {
        html.element("th", &[("scope", &"row")], |html| {
            html.leaf("code", &[], &tap.name);
            html.text(" ");
            html.leaf("small", &[], format_args!("{:?}", tap.shape));
        });
        // Sorted from bad to good.
        html.element("td", &[("data-v", &-(tap.verdict as i32))], |html| verdict_mark(html, tap.verdict));
        for value in [
            values.map(|v| v.max_abs),
            values.map(|v| v.mean_abs),
            values.and_then(|v| v.norm_rel),
            values.and_then(|v| v.cosine).map(|cosine| 1.0 - cosine),
        ] {
            match value {
                Some(value) => html.leaf("td", &[("class", &"num"), ("data-v", &sort_key(value))], error(value)),
                None => html.leaf("td", &[("class", &"num none")], "–"),
            }
        }
        match tap.bound_use {
            Some(share) => html.leaf("td", &[("class", &"num"), ("data-v", &sort_key(share))], percent(share)),
            None => html.leaf("td", &[("class", &"num none")], "–"),
        }
        html.leaf("td", &[("class", &"reason")], &tap.reason);
    });
    html.newline();
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use crate::tensor::Tensor;
    use crate::verify::schema::Subject;
    use crate::verify::verdict::{Bounds, TapKind, judge};
    use accordion_graphs::dtype::DType;

    fn report(taps: &[(&str, f32)]) -> VerifyReport {
        let one = |value| Tensor::from_f32([1], vec![value]).unwrap();
        let bounds = Bounds::new(TapKind::Value, DType::F32);
        let subject = Subject {
            model: String::new(),
            method: String::new(),
            actual: String::new(),
            expected: String::new(),
            environment: Vec::new(),
        };
        VerifyReport::new(
            subject,
            taps.iter().map(|(name, off)| judge(name, &one(1.0 + off), &one(1.0), None, &bounds)).collect(),
        )
    }

    #[test]
    fn taps_have_a_place_in_a_grid() {
        assert_eq!(places("layers.7.attn.out"), [("layers", "7".into(), "attn.out".into())]);
        assert_eq!(places("node.h1.i0.in_k.3"), [("node", "h1.i0".into(), "in_k".into())]);
        let attn_q = |family, column: &str| (family, column.to_owned(), "attn.q".to_owned());
        assert_eq!(places("node.h1.i0.layers.3.attn.q"), [attn_q("node", "h1.i0"), attn_q("layers", "3")]);
        assert_eq!(places("cache.k.3"), [("cache", "3".into(), "k".into())]);
        let place = |family, column: &str, row: &str| (family, column.to_owned(), row.to_owned());
        let encoder = [place("segments", "0", "encoder.out"), place("encoder.layers", "3", "out")];
        assert_eq!(places("segments.0.encoder.layers.3.out"), encoder);
        let slots = [place("segments", "1", "injected"), place("layers", "2", "injected")];
        assert_eq!(places("segments.1.layers.2.injected"), slots);
        assert_eq!(places("segments.1.maps.2"), [place("segments", "1", "maps")]);
        assert_eq!(places("tree.1.layers.2.key"), [place("tree", "1", "key"), place("lower.layers", "2", "key")]);
        assert_eq!(places("kv.2.key"), [place("kv", "2", "key")]);
        assert_eq!(places("running.layers.0.cross.out")[1], place("layers", "0", "cross.out"));
        assert_eq!(places("logits"), [("logits", String::new(), String::new())]);
    }

    #[test]
    fn a_cell_shows_its_worst_tap() {
        let report = report(&[("node.h0.i0.in_k.0", 0.0), ("node.h0.i0.in_k.1", 0.5), ("node.h0.i0.in_k.2", 5e-5)]);
        let families = families(&report);
        assert_eq!(families[0].cells.len(), 1);
        assert_eq!(families[0].cells[&(0, 0)].name, "node.h0.i0.in_k.1");
    }

    #[test]
    fn the_list_keeps_what_matters() {
        let names: Vec<String> = (0..100).map(|i| format!("layers.{i}.out")).collect();
        let taps: Vec<(&str, f32)> = names
            .iter()
            .enumerate()
            .map(|(i, name)| {
                (
                    name.as_str(),
                    match i {
                        70 => 1.0,
                        99 => 5e-5,
                        _ => 0.0,
                    },
                )
            })
            .collect();
        let full = report(&taps);
        let listed = condensed(&full, 3);
        assert_eq!(
            listed.taps().map(|tap| tap.name.as_str()).collect::<Vec<_>>(),
            ["layers.0.out", "layers.70.out", "layers.99.out"]
        );
        assert_eq!(listed.counts, full.counts);
        assert_eq!(condensed(&full, 100), full);
        assert_eq!(condensed(&full, 0).taps().count(), 0);
    }
}
