//! `accordion verify BUNDLE --quality BUNDLE...`.

use crate::tiny::{LONG, Tiny};
use serde_json::Value;

const PROTOCOL: [&str; 6] = ["--windows", "3", "--window-len", "64", "--rounds", "2"];

/// A tiny model with a text, and its plain and HOMER bundles in blocks of 8 and of 4 bits.
fn tiny() -> Tiny {
    let tiny = Tiny::new();
    std::fs::write(tiny.path("text.txt"), LONG.repeat(10)).unwrap();
    for (method, bits) in [("plain", "8"), ("plain", "4"), ("homer", "8")] {
        let (precision, out) = (format!("weight-int{bits}"), format!("{method}{bits}"));
        let mut arguments = vec!["export", method, "checkpoint", &out, "--precision", &precision];
        if method == "homer" {
            arguments.extend(["--max-chunk-len", "40", "--layers-warmup", "2", "--context", "150"]);
        }
        tiny.succeed(&arguments);
    }
    tiny
}

fn quality(tiny: &Tiny, first: &str, others: &[&str]) -> Value {
    let arguments = [&["verify", first, "--quality"], others, &PROTOCOL, &["--text", "text.txt", "--json"]].concat();
    let report: Value = serde_json::from_str(&tiny.succeed(&arguments)).unwrap();
    assert_eq!(report["schema"], "accordion.quality/1");
    report
}

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or_else(|| panic!("{value}"))
}

#[test]
fn precisions_are_told_apart_and_a_bundle_from_itself_is_not() {
    let tiny = tiny();
    let report = quality(&tiny, "plain", &["plain", "plain8", "plain4"]);
    let bundles = report["bundles"].as_array().unwrap();
    let precisions: Vec<&str> = bundles.iter().map(|bundle| bundle["precision"].as_str().unwrap()).collect();
    assert_eq!(precisions, ["fp32", "fp32", "weight-int8", "weight-int4"]);
    assert!(bundles[0]["against"].is_null());
    let against = |bundle: usize, what: &str| number(&bundles[bundle]["against"][what]);
    assert_eq!((against(1, "divergence"), against(1, "perplexity_increase"), against(1, "same_best")), (0.0, 0.0, 1.0));
    // Fewer bits, more difference, and less to store.
    assert!(0.0 < against(2, "divergence") && against(2, "divergence") < against(3, "divergence"));
    assert!(against(3, "divergence") <= against(3, "divergence_p99") && against(3, "same_best") <= 1.0);
    let sizes: Vec<f64> = bundles[1..].iter().map(|bundle| number(&bundle["weight_bytes"])).collect();
    assert!(sizes.is_sorted_by(|a, b| a > b), "{sizes:?}");
    for bundle in bundles {
        assert_eq!(bundle["tokens"], 3 * 32);
        assert_eq!(bundle["prefill_seconds"].as_array().unwrap().len(), 2);
        assert_eq!(bundle["decode_seconds"].as_array().unwrap().len(), 2);
        assert!(number(&bundle["perplexity"]) > 1.0);
    }
    let perplexities = |report: &Value| -> Vec<Value> {
        report["bundles"].as_array().unwrap().iter().map(|bundle| bundle["perplexity"].clone()).collect()
    };
    let again = quality(&tiny, "plain", &["plain", "plain8", "plain4"]);
    assert_eq!(perplexities(&again), perplexities(&report), "the same windows give the same");
}

#[test]
fn a_method_reads_the_past_its_own_way() {
    let tiny = tiny();
    let report = quality(&tiny, "homer", &["homer8"]);
    assert_eq!(
        (&report["bundles"][1]["method"], &report["bundles"][1]["precision"]),
        (&"homer".into(), &"weight-int8".into())
    );
    assert!(number(&report["bundles"][1]["against"]["divergence"]) > 0.0);
}

#[test]
fn the_table_shows_all_and_never_calls_faster_what_was_not() {
    let tiny = tiny();
    let arguments = [&["verify", "plain", "--quality", "plain8"][..], &PROTOCOL, &["--text", "text.txt"]].concat();
    let table = tiny.succeed(&arguments);
    for word in ["text.txt: 3 windows of 64 tokens", "perplexity", "divergence", "fp32", "weight-int8", "resident"] {
        assert!(table.contains(word), "'{word}' is not in:\n{table}");
    }
    for line in table.lines().filter(|line| line.contains("times as fast")) {
        assert!(line.contains("slower than fp32 here") || line.contains("no faster than fp32 for certain"), "{line}");
    }
    assert!(!table.contains("faster than fp32 here"));
}

#[test]
fn what_cannot_be_compared_is_refused() {
    let tiny = tiny();
    let refusal = |others: &[&str], more: &[&str]| {
        tiny.refuse(&[&["verify", "plain", "--quality"], others, &["--text", "text.txt"], more].concat())
    };
    let message = refusal(&["homer"], &[]);
    assert!(message.contains("homer") && message.contains("exported otherwise"), "{message}");
    let message = refusal(&["nothing"], &[]);
    assert!(message.contains("nothing"), "{message}");
    let message = refusal(&["plain8"], &["--window-len", "4096"]);
    assert!(message.contains("--text") && message.contains("920 tokens"), "{message}");
    let other = Tiny::rcc(|_| {});
    let rcc = other.path("rcc");
    let message = refusal(&[rcc.to_str().unwrap()], &[]);
    assert!(message.contains("another model"), "{message}");
    tiny.refuse(&["verify", "plain", "--windows", "3"]);
}
