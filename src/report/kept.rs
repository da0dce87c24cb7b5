//! What HOMER kept of a context: its text, with the tokens marked that passed each level of the tree.

use super::format::{percent, tokens};
use super::html::Html;
use super::page::pairs;
use super::table::{Cell, Column, Table};
use crate::eval::kept::{KeptText, Part};
use std::cmp::Reverse;
use std::collections::HashSet;

/// Tokens of a passage, about: what is left out is left out by passages.
const PASSAGE: usize = 96;
/// Levels that are told apart; in higher trees the lowest ones look like one.
const SHADES: usize = 9;
/// What a run takes on the page besides its text.
const MARKUP: usize = 40;

/// Levels that a token must pass in order to be in the cache.
fn top(kept: &KeptText) -> usize {
    kept.levels.len()
}

/// Tokens of a part, and how many of them are in the cache.
fn count(part: &Part, top: usize) -> (usize, usize) {
    match part {
        Part::Run { tokens, passed, .. } => (*tokens, if *passed >= top && top > 0 { *tokens } else { 0 }),
        Part::Omitted { omitted, kept } => (*omitted, *kept),
    }
}

/// `kept` with at most about `limit` bytes of markup: of longer texts the passages of which most is in the cache.
pub(super) fn condensed(kept: &KeptText, limit: usize) -> KeptText {
    let top = top(kept);
    let mut passages: Vec<Vec<&Part>> = Vec::new();
    let (mut filled, mut place) = (0, 0usize);
    for part in &kept.parts {
        let leaf_starts = place.is_multiple_of(kept.leaf_tokens.max(1));
        match passages.last_mut() {
            Some(passage) if filled < PASSAGE && !leaf_starts => passage.push(part),
            _ => {
                passages.push(vec![part]);
                filled = 0;
            }
        }
        let (tokens, _) = count(part, top);
        (filled, place) = (filled.saturating_add(tokens), place.saturating_add(tokens));
    }
    let density = |passage: &[&Part]| {
        let sum = |of: &dyn Fn(&Part) -> usize| passage.iter().fold(0, |sum: usize, part| sum.saturating_add(of(part)));
        let passed = |part: &Part| match part {
            Part::Run { tokens, passed, .. } => tokens.saturating_mul(*passed),
            Part::Omitted { .. } => 0,
        };
        (sum(&|part| count(part, top).1), sum(&passed))
    };
    let mut ranked: Vec<usize> = (0..passages.len()).collect();
    ranked.sort_by_key(|&place| (Reverse(density(&passages[place])), place));
    let mut left = limit;
    let fits = |place: &usize| {
        let cost = passages[*place].iter().fold(0, |sum: usize, part| sum.saturating_add(cost(part)));
        left = left.checked_sub(cost)?;
        Some(*place)
    };
    let shown: HashSet<usize> = ranked.iter().map_while(fits).collect();
    let mut parts: Vec<Part> = Vec::new();
    for (place, passage) in passages.iter().enumerate() {
        for part in passage {
            let (more, more_kept) = count(part, top);
            match (shown.contains(&place), parts.last_mut()) {
                (true, _) => parts.push((*part).clone()),
                (false, Some(Part::Omitted { omitted, kept })) => {
                    (*omitted, *kept) = (omitted.saturating_add(more), kept.saturating_add(more_kept));
                }
                (false, _) => parts.push(Part::Omitted { omitted: more, kept: more_kept }),
            }
        }
    }
    KeptText { parts, ..kept.clone() }
}

/// Bytes of a part on the page, at most, and in its data.
fn cost(part: &Part) -> usize {
    let longest = |c: char| if c.is_control() || "<>&\"'\\".contains(c) { 6 } else { c.len_utf8() };
    match part {
        Part::Run { text, .. } => text.chars().map(longest).fold(MARKUP, usize::saturating_add),
        Part::Omitted { .. } => MARKUP,
    }
}

/// `number` tells the texts of a page apart.
pub(super) fn section(html: &mut Html, kept: &KeptText, number: usize) {
    html.leaf("h3", &[], title(kept));
    html.leaf("p", &[("class", &"lead")], lead(kept));
    levels(kept).html(html);
    html.element("div", &[("class", &"kept")], |html| {
        choice(html, kept, number);
        let label = "The context, with the tokens marked that were kept";
        let region: [(&str, &dyn std::fmt::Display); 4] =
            [("class", &"scroll tall"), ("tabindex", &0), ("role", &"region"), ("aria-label", &label)];
        html.element("div", &region, |html| text(html, kept));
    });
    pairs(html, "Settings", &kept.settings);
}

pub(super) fn title(kept: &KeptText) -> String {
    format!("{}, {} context tokens", kept.method, tokens(kept.prompt.context))
}

pub(super) fn lead(kept: &KeptText) -> String {
    let left = kept.levels.last().map_or(0, |root| root.left);
    let share = left as f64 / kept.prompt.context.max(1) as f64;
    let question = kept.question.trim();
    format!("{} tokens, {}, are in the cache when the model is asked: “{question}”", tokens(left), percent(share))
}

/// What each level did.
pub(super) fn levels(kept: &KeptText) -> Table {
    let count = |n: usize| Cell::number(Some(n as f64), |_| tokens(n));
    let row = |(place, level): (usize, &crate::eval::kept::KeptLevel)| {
        let share = level.left as f64 / kept.prompt.context.max(1) as f64;
        let kept_share = Cell { bar: Some(share), ..Cell::number(Some(share), percent) };
        let name = Cell { key: Some(level.height as f64), ..Cell::text(level_name(kept, place)) };
        vec![name, count(level.nodes), count(level.entered), count(level.left), kept_share]
    };
    Table {
        caption: "Context tokens by level of the tree".to_owned(),
        columns: vec![
            Column::text("Level"),
            Column::number("Nodes", ""),
            Column::number("Entered", "tokens"),
            Column::number("Left", "tokens"),
            Column::number("Still there", "of the context"),
        ],
        rows: kept.levels.iter().enumerate().map(row).collect(),
        sortable: false,
    }
}

fn level_name(kept: &KeptText, place: usize) -> String {
    match place {
        _ if place + 1 == top(kept) => "root".to_owned(),
        0 => "leaves".to_owned(),
        height => format!("merges of height {height}"),
    }
}

/// Which of the page's shades tokens have that passed so many levels: 0 to [`SHADES`].
fn shade(kept: &KeptText, passed: usize) -> usize {
    passed.min(top(kept)).saturating_sub(top(kept).saturating_sub(SHADES))
}

/// Radio buttons that the style sheet heeds; also the legend.
fn choice(html: &mut Html, kept: &KeptText, number: usize) {
    let name = format!("kept-{number}");
    let top_shade = shade(kept, top(kept));
    html.element("fieldset", &[], |html| {
        html.leaf("legend", &[], "Mark the tokens that passed");
        for shown in 0..=top_shade {
            html.element("label", &[], |html| {
                let mut attributes: Vec<(&str, &dyn std::fmt::Display)> =
                    vec![("type", &"radio"), ("name", &name), ("value", &shown)];
                if shown == 0 {
                    attributes.push(("checked", &"checked"));
                }
                html.void("input", &attributes);
                html.text(" ");
                if shown == 0 {
                    html.text("any level, by how far they came");
                } else {
                    let place = top(kept) - top_shade + shown - 1;
                    let class = mark_class(shown, top_shade);
                    let name = level_name(kept, place);
                    html.leaf("mark", &[("class", &class)], if name == "root" { "the root".to_owned() } else { name });
                }
            });
        }
    });
}

/// The style of a shade: which it is, and how far up among all of them.
fn mark_class(shade: usize, top_shade: usize) -> String {
    let strength = (shade * 5).div_ceil(top_shade.max(1));
    if shade == top_shade { format!("k{shade} root") } else { format!("k{shade} f{strength}") }
}

fn text(html: &mut Html, kept: &KeptText) {
    let top_shade = shade(kept, top(kept));
    let mut place = 0usize;
    let mut parts = kept.parts.iter().peekable();
    // One block for each leaf of which something is shown, and one for each gap.
    while let Some(part) = parts.peek() {
        let leaf = place / kept.leaf_tokens.max(1);
        if let Part::Omitted { omitted, kept: in_cache } = part {
            let words =
                format!("{} tokens are not shown; {} of them are in the cache.", tokens(*omitted), tokens(*in_cache));
            html.leaf("p", &[("class", &"omitted")], words);
            place = place.saturating_add(*omitted);
            parts.next();
            continue;
        }
        let heading = format!("node.h0.i{leaf}, from token {}", tokens(place));
        html.leaf("p", &[("class", &"leaf")], heading);
        html.element("p", &[("class", &"verbatim"), ("dir", &"auto")], |html| {
            while let Some(Part::Run { text, tokens, passed }) =
                parts.next_if(|part| matches!(part, Part::Run { .. }) && place / kept.leaf_tokens.max(1) == leaf)
            {
                match shade(kept, *passed) {
                    0 => html.text(text),
                    shade => html.leaf("mark", &[("class", &mark_class(shade, top_shade))], text),
                }
                place = place.saturating_add((*tokens).max(1));
            }
        });
        html.newline();
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::eval::kept::{KeptLevel, SCHEMA};
    use accordion_graphs::plan::PromptLengths;

    /// Leaves of 1000 tokens of 10 bytes; one run of 20 in every 100 is in the cache, in the third leaf every second one.
    fn kept() -> KeptText {
        let run = |i: usize| {
            let passed = if i.is_multiple_of(5) || (i / 50 == 2 && i.is_multiple_of(2)) { 2 } else { i % 2 };
            Part::Run { text: format!("{i:>199} "), tokens: 20, passed }
        };
        let level = |height, entered, left| KeptLevel { height, nodes: 1, entered, left };
        KeptText {
            schema: SCHEMA.into(),
            method: "homer".into(),
            model: "m".into(),
            prompt: PromptLengths { prefix: 1, context: 5000, suffix: 1 },
            question: "?".into(),
            settings: Vec::new(),
            leaf_tokens: 1000,
            levels: vec![level(0, 5000, 3000), level(1, 3000, 1100)],
            parts: (0..250).map(run).collect(),
        }
    }

    fn totals(kept: &KeptText) -> (usize, usize) {
        kept.parts.iter().map(|part| count(part, top(kept))).fold((0, 0), |sum, part| (sum.0 + part.0, sum.1 + part.1))
    }

    #[test]
    fn a_short_text_is_whole() {
        assert_eq!(condensed(&kept(), 1 << 20), kept());
    }

    #[test]
    fn of_a_long_text_the_dense_places_stay_and_nothing_is_uncounted() {
        let shown = condensed(&kept(), 15_000);
        assert_eq!(totals(&shown), totals(&kept()));
        let cost = |kept: &KeptText| kept.parts.iter().map(cost).sum::<usize>();
        assert!(cost(&shown) < 15_000 + 1000 && cost(&kept()) > 50_000, "{}", cost(&shown));
        // Of the third leaf, runs 100 to 149, most is kept and so most is shown.
        let leaf =
            |part: &&Part| matches!(part, Part::Run { text, .. } if (100..150).contains(&text.trim().parse().unwrap()));
        let runs = |part: &&Part| matches!(part, Part::Run { .. });
        let (in_leaf, all) = (shown.parts.iter().filter(leaf).count(), shown.parts.iter().filter(runs).count());
        assert_eq!((in_leaf, in_leaf <= all), (50, true));
        assert_eq!(condensed(&shown, 15_000).parts.len(), shown.parts.len());
        let nothing = condensed(&kept(), 10);
        assert_eq!(nothing.parts, [Part::Omitted { omitted: 5000, kept: totals(&kept()).1 }]);
    }

    #[test]
    fn high_trees_have_as_many_shades_as_there_are() {
        let mut high = kept();
        high.levels = (0..14).map(|height| KeptLevel { height, nodes: 1, entered: 2, left: 1 }).collect();
        assert_eq!([0, 1, 5, 6, 13, 14, usize::MAX].map(|passed| shade(&high, passed)), [0, 0, 0, 1, 8, 9, 9]);
        assert_eq!([0, 1, 2, 3].map(|passed| shade(&kept(), passed)), [0, 1, 2, 2]);
        let classes: Vec<String> = (1..=3).map(|shade| mark_class(shade, 3)).collect();
        assert_eq!(classes, ["k1 f2", "k2 f4", "k3 root"]);
    }
}
