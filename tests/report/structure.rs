//! What is in the source of the page.

use crate::markup::{Tag, tags};
use crate::sample::{HOSTILE, report};
use accordion::eval::kept::{KeptText, Part};
use accordion::eval::quality::report::QualityRow;
use accordion::eval::schema::CellResult;
use accordion::eval::stats::{Interval, Mean};
use accordion::report::{Report, markdown, render};
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
    assert_eq!(count(&tags, "section"), 8);
    // Five of latency and memory of each of two profiles, one of perplexity.
    assert_eq!(tags.iter().filter(|tag| has_class(tag, "chart")).count(), 2 * 5 + 1);
    // HOMER's tree; RCC's 16 segments, as many slots, and the decoder; SharedLLM's model, chunks, and the first one's tree of three levels.
    let chunks = report().plans[2].nodes.iter().filter(|node| node.height == 3).count();
    assert!(chunks > 10, "{chunks}");
    assert_eq!(tags.iter().filter(|tag| has_class(tag, "node")).count(), 63 + 2 * 16 + 1 + 1 + chunks + 3 * 2);
    assert_eq!(tags.iter().filter(|tag| has_class(tag, "split")).count(), 2);
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
    assert_eq!((read.evaluations[3].task.as_str(), read.kept[1].question.as_str()), (HOSTILE, HOSTILE));
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
    absurd.plans[1].nodes[0].parent = Some(usize::MAX);
    absurd.plans[2].levels[0].height = usize::MAX;
    absurd.plans[2].nodes[1].split = true;
    let row = &mut absurd.profiles[0].rows[0];
    row.measured.prompt.context = usize::MAX;
    row.measured.prefix.median_ms = -1e308;
    row.measured.per_token.median_ms = 1e308;
    row.measured.operations = Some(u64::MAX);
    row.prefix_speedup = Some(-1e300);
    let details = &mut row.measured.details;
    details.stages[0].total_ms = -1e308;
    details.stages[1].calls = usize::MAX;
    (details.decoded[0].from, details.decoded[0].cache_rows) = (usize::MAX, usize::MAX);
    details.prefix_demand.as_mut().unwrap().linear_operations = u64::MAX;
    details.prefix_limit.as_mut().unwrap().fraction = 1e300;
    absurd.profiles[0].comparisons[0].differences[0].ratio = 1e308;
    absurd.qualities[0].bundles[1].quality.perplexity = f64::MAX;
    absurd.qualities[0].bundles[1].quality.against.as_mut().unwrap().perplexity_increase = -1e308;
    absurd.verifications[0].scopes[0].taps[0].bound_use = Some(-1e300);
    for cell in &mut absurd.evaluations[0].cells {
        cell.length = usize::MAX;
        cell.n = usize::MAX;
        cell.result = CellResult::Answer {
            hits: usize::MAX,
            share: f64::MAX,
            interval: Interval { low: f64::MIN, high: f64::MAX },
            score: -1e300,
        };
    }
    for cell in &mut absurd.evaluations[1].cells {
        let nll = Mean { n: 0, mean: 1e300, interval: Some(Interval { low: -1e300, high: 1e300 }) };
        cell.result = CellResult::Likelihood { tokens: 0, nll, perplexity: -1.0, buckets: Vec::new() };
    }
    let row = absurd.profiles[0].rows.iter_mut().find(|row| !row.measured.operators.is_empty()).unwrap();
    row.measured.operators[0].total_ms = -1e300;
    row.measured.operators[1].calls = usize::MAX;
    for text in &mut absurd.kept {
        text.leaf_tokens = 0;
        text.prompt.context = 0;
        text.levels.truncate(1);
        text.levels[0].left = usize::MAX;
        text.parts.push(Part::Run { text: String::new(), tokens: usize::MAX, passed: usize::MAX });
        text.parts.push(Part::Omitted { omitted: usize::MAX, kept: usize::MAX });
    }
    absurd.kept[1].levels.clear();
    let page = render(&absurd);
    assert!(page.len() < 2_000_000, "{} bytes", page.len());
    tags(&page);
    markdown(&absurd);
}

#[test]
fn heat_maps_say_shares_and_samples_in_words() {
    let page = render(&report());
    let summary = &report().evaluations[0];
    let depths = summary.cells.iter().filter(|cell| cell.depth.is_some()).count();
    let heat = ["q0", "q1", "q2", "q3", "q4", "q5", "q6"];
    let tags = tags(&page);
    let cells = tags.iter().filter(|tag| tag.name == "td" && heat.iter().any(|class| has_class(tag, class))).count();
    // Those of the hostile evaluation too, and all depths together.
    assert_eq!(cells, depths + depths / 5 + 2);
    let cell = summary.cells.iter().find(|cell| cell.depth == Some(25)).unwrap();
    let CellResult::Answer { hits, share, .. } = &cell.result else { panic!("{cell:?}") };
    assert!(page.contains(&format!(">{:.0} % <small>{hits} of {}</small></td>", share * 100.0, cell.n)));
    for name in ["homer", "plain", "last:2048"] {
        assert!(page.contains(&format!("<caption>{name}: right answers by depth and length</caption>")));
    }
}

#[test]
fn of_a_long_text_all_tokens_are_accounted_for() {
    let full = &report().kept[0];
    let page = render(&report());
    let (_, data) = page.split_once("id=\"data\">").unwrap();
    let read: Report = serde_json::from_str(data.split_once("</script>").unwrap().0).unwrap();
    let tokens = |text: &KeptText| -> usize {
        let of = |part: &Part| match part {
            Part::Run { tokens, .. } => *tokens,
            Part::Omitted { omitted, .. } => *omitted,
        };
        text.parts.iter().map(of).sum()
    };
    assert_eq!(tokens(&read.kept[0]), tokens(full));
    let omitted = |text: &KeptText| text.parts.iter().filter(|part| matches!(part, Part::Omitted { .. })).count();
    assert_eq!((omitted(full), omitted(&read.kept[0]) > 3), (0, true));
    let said = page.matches("tokens are not shown;").count();
    assert_eq!(said, read.kept.iter().map(omitted).sum::<usize>());
    // Every level has its button, and one shows all of them.
    let radios = tags(&page).iter().filter(|tag| tag.attributes.contains(&("name", "kept-0"))).count();
    assert_eq!(radios, full.levels.len() + 1);
}

/// The body of the table with `caption`.
fn table<'p>(page: &'p str, caption: &str) -> &'p str {
    let (_, rest) = page.split_once(&format!("<caption>{caption}</caption>")).unwrap_or_else(|| panic!("no {caption}"));
    rest.split_once("<tbody>").unwrap().1.split_once("</tbody>").unwrap().0
}

#[test]
fn precisions_say_in_words_where_they_lose_and_where_nothing_is_certain() {
    let page = render(&report());
    let rows: Vec<&str> = table(&page, "Precisions").split("<tr>").skip(1).collect();
    let [_, bytes, blocks] = rows[..] else { panic!("{rows:#?}") };
    for said in ["170 MB", "270 MB", "+0.04 % <small>−0.16 % to +0.24 %, no difference for certain", "98.0 %"] {
        assert!(bytes.contains(said), "{said} is not in {bytes}");
    }
    assert!(bytes.contains("1.02× <small>0.97 to 1.07, no difference for certain"), "{bytes}");
    assert!(bytes.contains("2.40× <small>2.30 to 2.50, faster"), "{bytes}");
    assert!(blocks.contains("to +9.97 %, worse") && blocks.contains("0.84× <small>0.81 to 0.87, slower"), "{blocks}");
}

#[test]
fn a_profile_shows_what_bounds_it_and_where_the_time_went() {
    let page = render(&report());
    let rows = report().profiles[0].rows.len();
    for (caption, rows, said) in [
        ("Which of two is faster, measured in turns", 3, "no difference that these runs can show"),
        ("How far from the limits of the machine", 2 * rows, "<td class=\"words\">memory</td>"),
        ("Before, between and beside the graphs", rows, "1.30 %"),
        ("Where the time of a context state goes, by graph", 4 * rows, "(between the graphs)"),
        ("Each token, as the cache grows", 2 * rows, "2\u{202f}176"),
    ] {
        let body = table(&page, caption);
        assert_eq!(body.matches("<tr>").count(), rows, "{caption}");
        assert!(body.contains(said), "{caption}: {said} is not in {body}");
    }
    assert!(page.contains("B: faster</td>") && page.contains("B: slower</td>"));
    assert!(page.contains(&report().profiles[0].trust.as_ref().unwrap().sentence));
}

#[test]
fn a_profile_on_a_device_shows_what_the_host_and_what_the_device_did() {
    let mut report = report();
    let device = report.profiles.pop().unwrap();
    // Columns of a device are those of profiles that have one.
    assert!(!render(&report).contains("of the device") && !render(&report).contains("Device memory"));
    report.profiles = vec![device];
    let page = render(&report);
    for (caption, rows, said) in [
        ("Which of two is faster, measured in turns", 6, "homer, CUDA graph off"),
        ("Host and device", 4, "each token, mean"),
        ("Where the time of a context state goes, by graph", 10, "(waiting for the device)"),
        ("Before, between and beside the graphs", 2, "1.24 GB"),
    ] {
        let body = table(&page, caption);
        assert_eq!(body.matches("<tr>").count(), rows, "{caption}");
        assert!(body.contains(said), "{caption}: {said} is not in {body}");
    }
    // 2.08 ms of computing in 2.25 ms, of which 0.08 ms are those of the host that puts it there.
    let shares = table(&page, "Host and device");
    for said in ["92.4 %", "2.08 ms", "2.25 ms"] {
        assert!(shares.contains(said), "{said} is not in {shares}");
    }
    let text = markdown(&report);
    for said in ["Host and device", "Device memory", "computing one", "Where the time goes: homer"] {
        assert!(text.contains(said), "{said}");
    }
}

#[test]
fn precisions_are_read_from_what_verify_writes() {
    let [found] = &report().qualities[..] else { panic!("one of them") };
    let mut read = Report::default();
    read.add_result("quality.json", &serde_json::to_vec_pretty(found).unwrap()).unwrap();
    let [read] = &read.qualities[..] else { panic!("one of them") };
    assert_eq!(read.bundles.len(), found.bundles.len());
    for (read, found) in read.bundles.iter().zip(&found.bundles) {
        assert_eq!((&read.bundle, &read.precision), (&found.bundle, &found.precision));
        // Decimal fractions may come back as their neighbour.
        assert!((read.quality.perplexity - found.quality.perplexity).abs() < 1e-9);
        let p99 = |row: &QualityRow| row.quality.against.as_ref().map(|against| against.divergence_p99);
        assert_eq!(p99(read).map(f64::is_infinite), p99(found).map(f64::is_infinite), "what is infinite stays so");
    }
}
