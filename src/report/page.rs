//! The page around the sections: head, summary, navigation, provenance, data.

use super::format::{bytes, grouped, latency, significant, tokens};
use super::html::{Html, embeddable_json};
use super::{Report, evaluation, generation, kept, parity, performance, plan, quality};
use crate::eval::kept::KeptText;
use crate::profile::schema::ProfileRow;
use crate::verify::schema::VerifyReport;
use crate::verify::verdict::Verdict;
use sha2::{Digest, Sha256};

const STYLE: &str = include_str!("assets/report.css");
const SCRIPT: &str = include_str!("assets/report.js");

/// Taps listed on a page, over all comparisons.
const LISTED_TAPS: usize = 800;
/// Records of operators in the page's data, over all profiled rows.
const LISTED_OPERATORS: usize = 1500;
/// Bytes of the texts of which something was kept, over all of them.
const KEPT_BYTES: usize = 400_000;

/// What of the results is on the page: the whole of them might not fit.
struct Shown {
    verifications: Vec<VerifyReport>,
    kept: Vec<KeptText>,
}

/// Renders the page. The same report gives the same bytes.
pub fn render(report: &Report) -> String {
    let taps = LISTED_TAPS / report.verifications.len().max(1);
    let bytes = KEPT_BYTES / report.kept.len().max(1);
    let shown = Shown {
        verifications: report.verifications.iter().map(|full| parity::condensed(full, taps)).collect(),
        kept: report.kept.iter().map(|full| kept::condensed(full, bytes)).collect(),
    };
    let mut html = Html::default();
    html.trusted("<!doctype html>\n");
    html.element("html", &[("lang", &"en")], |html| {
        head(html, report);
        html.element("body", &[], |html| {
            html.leaf("a", &[("class", &"skip"), ("href", &"#content")], "Skip to content");
            header(html, report);
            html.element("main", &[("id", &"content")], |html| {
                tiles(html, report);
                sections(html, report, &shown);
            });
            html.leaf("footer", &[], "Made by accordion. This file loads nothing from elsewhere.");
            data(html, report, shown);
            html.element("script", &[], |html| html.trusted(SCRIPT));
        });
    });
    html.newline();
    html.finish()
}

fn head(html: &mut Html, report: &Report) {
    // Whatever slipped through would find no script, no connection and no resource it may use.
    let policy = format!(
        "default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{}'; base-uri 'none'; form-action 'none'",
        base64(&Sha256::digest(SCRIPT))
    );
    html.element("head", &[], |html| {
        html.void("meta", &[("charset", &"utf-8")]);
        html.void("meta", &[("http-equiv", &"Content-Security-Policy"), ("content", &policy)]);
        html.void("meta", &[("name", &"viewport"), ("content", &"width=device-width, initial-scale=1")]);
        html.void("meta", &[("name", &"color-scheme"), ("content", &"light dark")]);
        html.leaf("title", &[], &report.title);
        html.element("style", &[], |html| html.trusted(STYLE));
    });
    html.newline();
}

fn header(html: &mut Html, report: &Report) {
    html.element("header", &[], |html| {
        html.element("div", &[("class", &"title")], |html| {
            html.leaf("h1", &[], &report.title);
            html.leaf("p", &[], &report.generated_at);
        });
        html.element("div", &[("class", &"tools"), ("hidden", &"hidden")], |html| {
            html.leaf("button", &[("type", &"button"), ("id", &"theme")], "Dark");
            html.leaf("a", &[("id", &"download"), ("download", &"report.json")], "Data (JSON)");
        });
    });
    html.element("nav", &[("aria-label", &"Sections")], |html| {
        for (id, title, present) in outline(report) {
            if present {
                html.leaf("a", &[("href", &format!("#{id}"))], title);
            }
        }
    });
    html.newline();
}

/// The sections in order, and whether there is anything to show in each.
fn outline(report: &Report) -> [(&'static str, &'static str, bool); 8] {
    [
        ("parity", "Parity", !report.verifications.is_empty()),
        ("performance", "Latency and memory", !report.profiles.is_empty()),
        ("precision", "Precision", !report.qualities.is_empty()),
        ("evaluations", "Evaluations", !report.evaluations.is_empty()),
        ("kept", "What was kept", !report.kept.is_empty()),
        ("plan", "Plan", !report.plans.is_empty()),
        ("text", "Generated text", !report.generations.is_empty()),
        ("environment", "Environment", !report.environment.is_empty()),
    ]
}

fn sections(html: &mut Html, report: &Report, shown: &Shown) {
    for (id, title, present) in outline(report) {
        if !present {
            continue;
        }
        html.newline();
        let heading = format!("{id}-heading");
        html.element("section", &[("id", &id), ("aria-labelledby", &heading)], |html| {
            html.leaf("h2", &[("id", &heading)], title);
            match id {
                "parity" => report
                    .verifications
                    .iter()
                    .zip(&shown.verifications)
                    .for_each(|(full, listed)| parity::section(html, full, listed)),
                "performance" => report.profiles.iter().for_each(|profile| performance::section(html, profile)),
                "precision" => report.qualities.iter().for_each(|found| quality::section(html, found)),
                "evaluations" => report.evaluations.iter().for_each(|summary| evaluation::section(html, summary)),
                "kept" => shown.kept.iter().enumerate().for_each(|(number, text)| kept::section(html, text, number)),
                "plan" => report.plans.iter().for_each(|summary| plan::section(html, summary)),
                "text" => report.generations.iter().for_each(|record| generation::section(html, record)),
                _ => pairs(html, "Where the results come from", &report.environment),
            }
        });
    }
}

/// The few numbers that answer whether it is right, fast and small.
fn tiles(html: &mut Html, report: &Report) {
    html.element("div", &[("class", &"tiles")], |html| {
        for found in &report.verifications {
            let verdict = |html: &mut Html| verdict_mark(html, found.verdict);
            let detail = format!(
                "{} of {} taps within bounds, {} against {}",
                grouped(found.counts.pass as u128),
                grouped(found.counts.total() as u128),
                found.subject.actual,
                found.subject.expected
            );
            tile(html, "Parity", verdict, &detail);
        }
        for profile in &report.profiles {
            // The longest context at which a method could be compared with the baseline says most.
            let compared = |row: &&ProfileRow| row.prefix_speedup.is_some();
            let Some(row) = profile.rows.iter().filter(compared).max_by_key(|row| row.measured.prompt.context) else {
                continue;
            };
            let measured = &row.measured;
            let (method, context) = (&measured.configuration.method, tokens(measured.prompt.context));
            let prefix = format!("{} at {context} context tokens, in {}", method, latency(measured.prefix.median_ms));
            let factor = row.prefix_speedup.map(significant).unwrap_or_default();
            tile(html, "Context state, against plain", |html| html.text(format_args!("{factor}×")), &prefix);
            let per_token = latency(measured.per_token.median_ms);
            tile(
                html,
                "Each further token",
                |html| html.text(per_token),
                &format!("{method} after {context} context tokens"),
            );
            let kept = tokens(measured.tokens_kept);
            let size = format!("of {context} context tokens, {} of state", bytes(measured.state_bytes as f64));
            tile(html, "Tokens kept", |html| html.text(kept), &size);
            let peak = bytes(measured.peak_resident_bytes as f64);
            tile(html, "Peak memory", |html| html.text(peak), &format!("{method}, weights included"));
        }
    });
}

fn tile(html: &mut Html, name: &str, value: impl FnOnce(&mut Html), detail: &str) {
    html.element("div", &[("class", &"tile")], |html| {
        html.leaf("span", &[("class", &"name")], name);
        html.element("span", &[("class", &"value")], value);
        html.leaf("span", &[("class", &"detail")], detail);
    });
}

/// A verdict in words, colour and sign.
pub(super) fn verdict_mark(html: &mut Html, verdict: Verdict) {
    let (class, sign) = match verdict {
        Verdict::Pass => ("verdict pass", "✓"),
        Verdict::Ambiguous => ("verdict ambiguous", "≈"),
        Verdict::Fail => ("verdict fail", "✗"),
    };
    html.element("span", &[("class", &class)], |html| {
        html.leaf("span", &[("aria-hidden", &"true")], sign);
        html.text(format_args!(" {verdict}"));
    });
}

/// A list of names and values under a small heading; nothing if it is empty.
pub(super) fn pairs(html: &mut Html, heading: &str, pairs: &[(String, String)]) {
    if pairs.is_empty() {
        return;
    }
    html.element("div", &[("class", &"pairs")], |html| {
        html.leaf("h4", &[], heading);
        html.element("dl", &[], |html| {
            for (name, value) in pairs {
                html.element("div", &[], |html| {
                    html.leaf("dt", &[], name);
                    html.leaf("dd", &[], value);
                });
            }
        });
    });
}

/// A number as the script compares it when it sorts.
pub(super) fn sort_key(value: f64) -> String {
    format!("{value:e}")
}

/// The results themselves, as far as they are shown.
fn data(html: &mut Html, report: &Report, shown: Shown) {
    let Shown { verifications, kept } = shown;
    let mut shown = Report { verifications, kept, ..report.clone() };
    let rows = || report.profiles.iter().flat_map(|profile| &profile.rows);
    let operators = LISTED_OPERATORS / rows().filter(|row| !row.measured.operators.is_empty()).count().max(1);
    for row in shown.profiles.iter_mut().flat_map(|profile| &mut profile.rows) {
        row.measured.operators.truncate(operators);
    }
    // Serialising plain structs of strings and finite numbers into memory cannot fail.
    let json = serde_json::to_string(&shown).unwrap_or_default();
    html.element("script", &[("type", &"application/json"), ("id", &"data")], |html| {
        html.trusted(&embeddable_json(&json));
    });
    html.newline();
}

/// Base64 with padding, as hashes in a content security policy are written.
fn base64(bytes: &[u8]) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut out = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for group in bytes.chunks(3) {
        let bits = group.iter().fold(0u32, |bits, &byte| bits << 8 | u32::from(byte)) << (8 * (3 - group.len()));
        for digit in 0..4 {
            let index = (bits >> (18 - 6 * digit)) as usize & 63;
            out.push(if digit <= group.len() { char::from(ALPHABET[index]) } else { '=' });
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::base64;

    #[test]
    fn base64_is_that_of_rfc_4648() {
        for (plain, encoded) in [("", ""), ("f", "Zg=="), ("fo", "Zm8="), ("foo", "Zm9v"), ("foobar", "Zm9vYmFy")] {
            assert_eq!(base64(plain.as_bytes()), encoded);
        }
    }
}
