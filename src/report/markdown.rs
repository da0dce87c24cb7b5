//! The results as GitHub-flavoured Markdown, for a pull request or a comment.
//!
//! Nothing that comes from a result can become markup, a mention of somebody or a link: words of ours are written as they
//! are, words of others as [`code`] or, where they are whole texts, as [`block`].

use super::format::grouped;
use super::table::{Cell, Table};
use super::{Report, details, evaluation, generation, kept, operators, performance, quality};
use crate::profile::schema::ProfileReport;
use crate::verify::schema::VerifyReport;
use crate::verify::verdict::{TapResult, Verdict};
use std::fmt::Write;

/// Failing taps that are listed for each verification.
const FAILURES: usize = 5;

/// The results of `report`. The same report gives the same text.
pub fn markdown(report: &Report) -> String {
    let mut sections = vec![format!("# {}\n", prose(&report.title))];
    if !report.verifications.is_empty() {
        sections.push("## Parity\n".to_owned());
        sections.push(verdicts(&report.verifications));
        sections.extend(report.verifications.iter().filter_map(failures));
    }
    for profile in &report.profiles {
        sections.push(format!("## Latency and memory: {}\n", code(&profile.model)));
        sections.extend(profile.trust.as_ref().map(|trust| prose(&trust.sentence) + "\n"));
        sections.extend(warnings(profile));
        sections.push(table(&performance::measurements(profile)));
        sections.extend(details::open(profile).iter().map(captioned));
        sections.extend(details::folded(profile).iter().map(folded));
        let traced = profile.rows.iter().filter(|row| !row.measured.operators.is_empty());
        sections.extend(traced.map(|row| folded(&operators::table(row))));
    }
    for found in &report.qualities {
        sections.push(format!("## Precision: {}\n\n{}\n", prose(&quality::title(found)), prose(&quality::note(found))));
        sections.push(table(&quality::table(found)));
    }
    for summary in &report.evaluations {
        sections.push(format!("## {}\n\n{}\n", prose(&evaluation::title(summary)), evaluation::note(summary)));
        let evaluation::Tables { grids, whole, further } = evaluation::tables(summary);
        sections.extend(whole.iter().chain(&grids).map(captioned));
        sections.extend(further.iter().map(folded));
    }
    for text in &report.kept {
        sections.push(format!("## What was kept: {}\n\n{}\n", prose(&kept::title(text)), prose(&kept::lead(text))));
        sections.push(table(&kept::levels(text)));
    }
    for text in &report.generations {
        let (title, asked, written) = (prose(&generation::title(text)), block(&text.prompt), block(&text.text));
        sections.push(format!("## Generated text: {title}\n\nAsked:\n\n{asked}\nWritten:\n\n{written}"));
    }
    sections.extend(environment(report));
    sections.join("\n")
}

fn verdicts(verifications: &[VerifyReport]) -> String {
    let mut out = String::from(
        "| Verdict | Model | Method | Tested | Held against | Pass | Ambiguous | Fail | First failure |\n\
         |---|---|---|---|---|--:|--:|--:|---|\n",
    );
    for found in verifications {
        let subject = &found.subject;
        let names = [&subject.model, &subject.method, &subject.actual, &subject.expected].map(|name| cell_code(name));
        let first = found.first_failure.as_deref().map_or("–".to_owned(), cell_code);
        let counts = [found.counts.pass, found.counts.ambiguous, found.counts.fail].map(|count| grouped(count as u128));
        let (mark, names, counts) = (mark(found.verdict), names.join(" | "), counts.join(" | "));
        // Writing to a string cannot fail.
        let _ = writeln!(out, "| {mark} | {names} | {counts} | {first} |");
    }
    out
}

fn mark(verdict: Verdict) -> String {
    let sign = match verdict {
        Verdict::Pass => "✅",
        Verdict::Ambiguous => "⚠️",
        Verdict::Fail => "❌",
    };
    format!("{sign} {verdict}")
}

/// The first taps that failed; nothing where none did.
fn failures(found: &VerifyReport) -> Option<String> {
    let failed: Vec<&TapResult> = found.taps().filter(|tap| tap.verdict == Verdict::Fail).collect();
    if failed.is_empty() {
        return None;
    }
    let which =
        if failed.len() > FAILURES { format!("The first {FAILURES} of {}", failed.len()) } else { "All".to_owned() };
    let subject = &found.subject;
    let mut out = format!(
        "{which} taps that failed, {} against {}:\n\n| Tap | Why |\n|---|---|\n",
        code(&subject.actual),
        code(&subject.expected)
    );
    for tap in failed.into_iter().take(FAILURES) {
        let _ = writeln!(out, "| {} | {} |", cell_code(&tap.name), cell_code(&tap.reason));
    }
    Some(out)
}

fn warnings(profile: &ProfileReport) -> Option<String> {
    let listed: Vec<String> = profile.warnings.iter().map(|warning| format!("> - {}\n", prose(warning))).collect();
    (!listed.is_empty()).then(|| format!("> [!WARNING]\n{}", listed.concat()))
}

fn environment(report: &Report) -> Option<String> {
    if report.environment.is_empty() {
        return None;
    }
    let rows: Vec<String> = report
        .environment
        .iter()
        .map(|(name, value)| format!("| {} | {} |\n", prose(name), cell_code(value)))
        .collect();
    let made = prose(&report.generated_at);
    Some(format!(
        "<details><summary>Environment, {made}</summary>\n\n| | |\n|---|---|\n{}\n</details>\n",
        rows.concat()
    ))
}

fn captioned(shown: &Table) -> String {
    format!("**{}**\n\n{}", prose(&shown.caption), table(shown))
}

fn folded(shown: &Table) -> String {
    format!("<details><summary>{}</summary>\n\n{}\n</details>\n", prose(&shown.caption), table(shown))
}

fn table(shown: &Table) -> String {
    let heads: Vec<String> =
        shown.columns.iter().map(|column| beside(&prose(&column.name), &column.detail, "<br>")).collect();
    let rules: Vec<&str> = shown.columns.iter().map(|column| if column.numeric { "--:" } else { "---" }).collect();
    let mut out = format!("| {} |\n|{}|\n", heads.join(" | "), rules.join("|"));
    for row in &shown.rows {
        let cells: Vec<String> = row.iter().map(table_cell).collect();
        let _ = writeln!(out, "| {} |", cells.join(" | "));
    }
    out
}

fn table_cell(shown: &Cell) -> String {
    // What the page says by a wavy line.
    let doubt = if shown.class == "unstable" { " (unsteady)" } else { "" };
    beside(&prose(&shown.text), &shown.detail, " · ") + doubt
}

fn beside(text: &str, detail: &str, between: &str) -> String {
    if detail.is_empty() { text.to_owned() } else { format!("{text}{between}{}", prose(detail)) }
}

/// Words as they are: whatever could be markup is escaped, and nobody is mentioned. One line.
fn prose(text: &str) -> String {
    let mut out = String::with_capacity(text.len() + 8);
    let mut rest = text.chars();
    while let Some(c) = rest.next() {
        match c {
            c if c.is_control() => out.push(' '),
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            // A character without width, lest a name or a number behind it become a link.
            '@' | '#' => out.extend(['\\', c, '\u{2060}']),
            ':' if rest.as_str().starts_with("//") => out.extend([c, '\u{2060}']),
            '\\' | '`' | '*' | '_' | '[' | ']' | '|' | '~' | '$' | '!' => out.extend(['\\', c]),
            c => out.push(c),
        }
    }
    out
}

/// A word of somebody else's, literally. One line.
fn code(text: &str) -> String {
    let line: String = text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    let line = line.trim();
    if line.is_empty() {
        return "–".to_owned();
    }
    let fence = "`".repeat(longest_run(line) + 1);
    let space = if line.starts_with('`') || line.ends_with('`') { " " } else { "" };
    format!("{fence}{space}{line}{space}{fence}")
}

/// [`code`] in a table, where a bar ends the cell even inside of code.
fn cell_code(text: &str) -> String {
    code(text).replace('|', "\\|")
}

/// A text of somebody else's, literally.
fn block(text: &str) -> String {
    let keep = |c: char| c == '\n' || c == '\t' || !c.is_control();
    let text: String = text.chars().map(|c| if keep(c) { c } else { '\u{fffd}' }).collect();
    let fence = "`".repeat(longest_run(&text).max(2) + 1);
    format!("{fence}text\n{}\n{fence}\n", text.trim_end_matches('\n'))
}

/// Length of the longest run of backticks.
fn longest_run(text: &str) -> usize {
    text.split(|c| c != '`').map(str::len).max().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn code_is_literal() {
        assert_eq!(code("cache.k.3"), "`cache.k.3`");
        assert_eq!(code("a `b` ``c``"), "``` a `b` ``c`` ```");
        assert_eq!(code("\n"), "–");
        assert_eq!(cell_code("a|b\n<i>"), "`a\\|b <i>`");
        assert_eq!(block("```\nx\r"), "````text\n```\nx\u{fffd}\n````\n");
    }

    #[test]
    fn prose_is_no_markup_and_mentions_nobody() {
        assert_eq!(prose("<img>\n**x** [y](z)"), "&lt;img&gt; \\*\\*x\\*\\* \\[y\\](z)");
        assert_eq!(prose("@all #7"), "\\@\u{2060}all \\#\u{2060}7");
        assert_eq!(prose("https://a"), "https:\u{2060}//a");
        assert_eq!(prose("a|b: c"), "a\\|b: c");
    }
}
