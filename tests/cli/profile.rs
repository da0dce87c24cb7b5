//! `accordion profile` on a bundle of a few kilobytes: rows, files and refusals.

use crate::program::{Run, Workspace, accordion, command};
use std::fs;

const FLAGS: [&str; 14] = [
    "--prefix",
    "2",
    "--suffix",
    "3",
    "--new-tokens",
    "4",
    "--min-runs",
    "2",
    "--min-time",
    "0",
    "--threads",
    "1",
    "--context",
    "20,40",
];

fn homer() -> Workspace {
    let workspace = Workspace::new();
    let settings = ["--max-chunk-len", "16", "--context", "40", "--target", "portable"];
    let exported = workspace.export("homer", "homer", &settings);
    assert_eq!(exported.code, Some(0), "{exported:?}");
    workspace
}

#[test]
fn every_method_and_length_is_a_row() {
    let workspace = homer();
    let (json, html) = (workspace.path("profile.json"), workspace.path("profile.html"));
    let mut profile = command();
    profile.args(["--json", "profile"]).arg(workspace.path("homer")).args(FLAGS);
    let run = Run::of(profile.arg("--out").arg(&json).arg("--html").arg(&html));
    assert_eq!(run.code, Some(0), "{run:?}");
    let report: serde_json::Value = serde_json::from_str(&run.out).unwrap();
    assert_eq!(report["schema"], "accordion.profile/1");
    let rows: Vec<(&str, u64, u64)> = report["rows"]
        .as_array()
        .unwrap()
        .iter()
        .map(|row| {
            assert_eq!((&row["prefix"]["runs"], &row["per_token"]["runs"]), (&2.into(), &4.into()));
            assert_eq!(row["configuration"]["threads"], 1);
            assert!(row["peak_resident_bytes"].as_u64().unwrap() > 1 << 20);
            assert!(row["floor_fraction"].as_f64().unwrap() > 0.0);
            let is_homer = row["configuration"]["method"] == "homer";
            assert_eq!(row["prefix_speedup"].is_number(), is_homer);
            let number = |value: &serde_json::Value| value.as_u64().unwrap();
            (if is_homer { "homer" } else { "plain" }, number(&row["prompt"]["context"]), number(&row["tokens_kept"]))
        })
        .collect();
    assert_eq!(rows, [("homer", 20, 15), ("homer", 40, 15), ("plain", 20, 25), ("plain", 40, 45)]);
    assert_eq!(serde_json::from_slice::<serde_json::Value>(&fs::read(&json).unwrap()).unwrap(), report);
    assert!(fs::read_to_string(&html).unwrap().starts_with("<!doctype html>"));
}

#[test]
fn methods_lengths_and_time_can_be_limited() {
    let workspace = homer();
    let mut profile = command();
    profile.arg("profile").arg(workspace.path("homer")).args(FLAGS);
    let run = Run::of(profile.args(["--plain-up-to", "20", "--budget", "0"]));
    assert_eq!(run.code, Some(0), "{run:?}");
    let rows: Vec<&str> = run.out.lines().skip(1).map(|line| line.split_whitespace().next().unwrap()).collect();
    assert_eq!(rows, ["homer", "homer", "plain"]);
    assert!(
        run.err.contains("homer at 20 context tokens: built 1 times instead of 2, because --budget is 0 s"),
        "{run:?}"
    );

    let mut profile = command();
    profile.arg("profile").arg(workspace.path("homer")).args(["--methods", "plain", "--context", "70"]);
    let run = Run::of(profile.args(&FLAGS[..12]));
    assert!(run.err.contains("plain at 70 context tokens is beyond the 64 positions"), "{run:?}");
}

#[test]
fn a_slower_profile_than_the_baseline_fails() {
    let workspace = homer();
    let (first, fast) = (workspace.path("first.json"), workspace.path("fast.json"));
    let profile = |more: &[&str]| {
        let mut profile = command();
        Run::of(profile.arg("profile").arg(workspace.path("homer")).args(FLAGS).args(["--methods", "homer"]).args(more))
    };
    assert_eq!(profile(&["--out", first.to_str().unwrap()]).code, Some(0));
    // Times differ from run to run, sizes do not: only a baseline with a smaller state is beaten for certain.
    let text = fs::read_to_string(&first).unwrap();
    let mut smaller: serde_json::Value = serde_json::from_str(&text).unwrap();
    let half = smaller["rows"][0]["state_bytes"].as_u64().unwrap() / 2;
    smaller["rows"][0]["state_bytes"] = half.into();
    fs::write(&fast, smaller.to_string()).unwrap();
    let passed = profile(&["--baseline", fast.to_str().unwrap(), "--max-regress", "1e6%"]);
    assert_eq!(passed.code, Some(0), "{passed:?}");
    let failed = profile(&["--baseline", fast.to_str().unwrap(), "--max-regress", "5%"]);
    assert_eq!(failed.code, Some(1), "{failed:?}");
    assert!(failed.err.contains("homer at 20 context tokens: context state grew by"), "{failed:?}");
    fs::write(&fast, text.replace("accordion.profile/1", "accordion.profile/9")).unwrap();
    let refused = profile(&["--baseline", fast.to_str().unwrap()]);
    assert_eq!(refused.code, Some(2));
    assert!(refused.err.contains("schema is 'accordion.profile/9'"), "{refused:?}");
}

#[test]
fn what_cannot_be_measured_is_refused_before_anything_is() {
    let workspace = homer();
    let bundle = workspace.path("homer");
    let refused = |arguments: &[&str]| {
        let mut profile = command();
        profile.arg("profile").arg(&bundle).args(&FLAGS[..12]).args(arguments);
        Run::of(&mut profile).error()
    };
    assert!(refused(&["--context", "0"]).contains("--context 0"));
    assert!(refused(&["--context", "20", "--text", "/nowhere/text"]).contains("tokenizer.json"));
    let short = ["--max-chunk-len", "16", "--context", "6", "--target", "portable"];
    assert_eq!(workspace.export("homer", "short", &short).code, Some(0));
    let mut profile = command();
    let message = Run::of(profile.arg("profile").arg(workspace.path("short")).args(FLAGS)).error();
    assert!(message.contains("export it again with --context 20"), "{message}");
    assert!(workspace.export("plain", "plain", &["--target", "portable"]).code == Some(0));
    let mut profile = command();
    profile.arg("profile").arg(workspace.path("plain")).args(["--methods", "homer"]);
    assert!(Run::of(&mut profile).error().contains("was exported for plain; export it with `accordion export homer`"));
    let missing = workspace.path("missing");
    assert!(accordion(["profile", missing.to_str().unwrap()]).error().contains("bundle.json"));
}
