//! What is in the source of the page.

use crate::markup::{Tag, tags};
use crate::sample::{HOSTILE, report};
use accordion::report::{Report, render};
use accordion_graphs::plan::PromptLengths;
use std::collections::HashSet;

fn count(tags: &[Tag<'_>], name: &str) -> usize {
    tags.iter().filter(|tag| tag.name == name).count()
}

fn has_class(tag: &Tag<'_>, class: &str) -> bool {
    tag.attributes.iter().any(|(name, value)| *name == "class" && value.split(' ').any(|c| c == class))
}

#[test]
fn a_full_report_is_small_balanced_and_complete() {
    let page = render(&report());
    assert!(page.len() < 2_000_000, "{} bytes", page.len());
    let tags = tags(&page);
    assert_eq!(count(&tags, "h1"), 1);
    assert_eq!(count(&tags, "section"), 5);
    assert_eq!(tags.iter().filter(|tag| has_class(tag, "chart")).count(), 5);
    assert_eq!(tags.iter().filter(|tag| has_class(tag, "node")).count(), 63);
    let rows = tags.iter().filter(|tag| tag.attributes.iter().any(|(name, _)| *name == "data-verdict")).count();
    let listed: usize = report().verifications.iter().map(|v| v.counts.total().min(400)).sum();
    assert_eq!(rows, listed);
    for lost in ["NaN", "inf\"", "undefined"] {
        assert!(tags.iter().all(|tag| tag.attributes.iter().all(|(_, value)| !value.contains(lost))), "{lost}");
    }
}

#[test]
fn nothing_is_loaded_and_no_handler_is_inline() {
    let page = render(&report());
    for tag in tags(&page) {
        assert!(!["link", "img", "iframe", "object", "embed", "base"].contains(&tag.name), "<{}>", tag.name);
        for (name, value) in tag.attributes {
            assert!(!name.starts_with("on") && !["src", "style", "srcset"].contains(&name), "{name}={value}");
            assert!(name != "href" || value.starts_with('#'), "{name}={value}");
        }
    }
    let (head, _) = page.split_once("</style>").unwrap();
    assert!(!head.contains("url(") && !head.contains("@import"));
}

#[test]
fn every_reference_inside_the_page_has_a_target() {
    let page = render(&report());
    let tags = tags(&page);
    let values = |wanted: &'static str| {
        tags.iter().flat_map(|tag| &tag.attributes).filter(move |(name, _)| *name == wanted).map(|(_, value)| *value)
    };
    let ids: Vec<&str> = values("id").collect();
    assert_eq!(ids.len(), ids.iter().collect::<HashSet<_>>().len(), "an id occurs twice");
    for target in values("href").map(|href| &href[1..]).chain(values("aria-labelledby")) {
        assert!(ids.contains(&target), "#{target}");
    }
}

#[test]
fn hostile_text_stays_text() {
    let page = render(&report());
    assert!(!page.contains("<img"));
    assert!(!page.contains(HOSTILE));
    assert!(page.contains("&lt;/script&gt;&lt;img src=x onerror=&quot;"));
    let (_, data) = page.split_once("id=\"data\">").unwrap();
    let (data, _) = data.split_once("</script>").unwrap();
    let read: Report = serde_json::from_str(data).unwrap();
    assert_eq!(read.generations[1].text, HOSTILE);
    assert_eq!(read.verifications[1].subject.model, HOSTILE);
}

#[test]
fn a_report_without_results_is_still_a_page() {
    let page = render(&Report { title: "Nothing yet".into(), ..Report::default() });
    assert_eq!(count(&tags(&page), "section"), 0);
}

#[test]
fn rendering_is_deterministic() {
    assert_eq!(render(&report()), render(&report()));
}

#[test]
fn absurd_numbers_from_files_do_no_harm() {
    let mut absurd = report();
    let plan = &mut absurd.plans[0];
    plan.prompt = PromptLengths { prefix: usize::MAX, context: usize::MAX, suffix: usize::MAX };
    plan.nodes[0].height = usize::MAX;
    plan.nodes[1].in_len = usize::MAX;
    (plan.nodes[2].layers.start, plan.nodes[2].layers.end) = (usize::MAX, 0);
    plan.nodes[3].index = usize::MAX;
    let row = &mut absurd.profiles[0].rows[0];
    row.measured.prompt.context = usize::MAX;
    row.measured.prefix.median_ms = -1e308;
    row.measured.per_token.median_ms = 1e308;
    row.measured.operations = Some(u64::MAX);
    row.prefix_speedup = Some(-1e300);
    absurd.verifications[0].scopes[0].taps[0].bound_use = Some(-1e300);
    let page = render(&absurd);
    assert!(page.len() < 2_000_000);
    tags(&page);
}
