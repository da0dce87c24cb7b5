//! The results as Markdown: what a pull request would show of them.

use crate::sample::{HOSTILE, report};
use accordion::report::{Report, markdown};

/// Cells of a line of a table, as GitHub splits it.
fn cells(line: &str) -> usize {
    let inner = line.trim().trim_start_matches('|').trim_end_matches('|');
    1 + inner.replace("\\|", "").matches('|').count()
}

#[test]
fn every_section_has_its_tables_and_they_are_rectangular() {
    let text = markdown(&report());
    for heading in [
        "# HOMER on SmolLM2-135M",
        "## Parity",
        "## Latency and memory: `SmolLM2-135M`",
        "## Precision: homer, 3 bundles",
        "**How far from the limits of the machine**",
        "## Passkey, model 9f2c6b1de847",
    ] {
        assert!(text.lines().any(|line| line == heading), "{heading}");
    }
    let lines: Vec<&str> = text.lines().collect();
    let mut tables = 0;
    for table in
        lines.chunk_by(|a, b| a.starts_with('|') == b.starts_with('|')).filter(|lines| lines[0].starts_with('|'))
    {
        tables += 1;
        assert!(table.len() >= 3 && table[1].starts_with("|--"), "{table:#?}");
        assert!(table.iter().all(|line| cells(line) == cells(table[0])), "{table:#?}");
    }
    // Verdicts, failures of two, measurements with 3 tables behind them and 2 folded, operators of two; measurements on a device
    // with 3 tables behind them and 1 folded, layers of one; precisions; 3 grids, 1 table and 1 of survival of passkey, 2 of
    // perplexity, 1 of reconstruct, 2 of the hostile task; levels of two texts; environment.
    assert_eq!(tables, 3 + 6 + 2 + 6 + 1 + 5 + 2 + 1 + 2 + 2 + 1);
    for line in [
        "| ❌ FAIL | `SmolLM2-135M` | `homer` | `ort-cpu fp32` | `reference` |",
        "| `layers.21.attn.out` |",
        "| plain | 8\u{202f}192 | 8\u{202f}214 | 17.",
    ] {
        assert!(text.lines().any(|found| found.starts_with(line)), "{line} is not in\n{text}");
    }
    let homer = lines.iter().find(|line| line.starts_with("| homer | 8\u{202f}192 | 2\u{202f}048 |")).unwrap();
    assert!(
        homer.split(" | ").nth(4).is_some_and(|speed_up| speed_up.starts_with("3.3") && speed_up.ends_with('×')),
        "{homer}"
    );
}

#[test]
fn nothing_of_a_result_is_markup() {
    let text = markdown(&report());
    let mut fenced = false;
    for line in text.lines() {
        if line.starts_with("```") {
            fenced = !fenced;
            continue;
        }
        // Outside of code there is no tag but those that fold.
        let mut outside: Vec<&str> = line.split('`').step_by(2).collect();
        if fenced {
            outside.clear();
        }
        let ours = ["<details>", "</details>", "<summary>", "</summary>", "<br>"];
        let rest = outside.concat();
        let rest = ours.iter().fold(rest, |rest, tag| rest.replace(tag, ""));
        assert!(!rest.contains('<'), "{line}");
    }
    assert!(!fenced);
    assert!(text.contains(HOSTILE), "as code it is as it was");
}

#[test]
fn the_same_results_give_the_same_text_and_none_give_a_heading() {
    assert_eq!(markdown(&report()), markdown(&report()));
    assert_eq!(markdown(&Report { title: "Nothing_yet".into(), ..Report::default() }), "# Nothing\\_yet\n");
}
