//! `accordion profile` on a bundle of a few kilobytes: rows, files and refusals.

use super::tiny::Tiny;
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
            for field in ["prefix_limit", "token_limit"] {
                assert!(row[field]["fraction"].as_f64().unwrap() > 0.0, "{row}");
            }
            assert_eq!(row["floor_fraction"], row["prefix_limit"]["fraction"]);
            assert!(row["ceilings"]["read_bytes"].as_f64().unwrap() > 0.0);
            assert!(row["stages"].as_array().unwrap().iter().all(|stage| stage["calls"].as_u64().unwrap() > 0));
            for field in ["host_ms", "token_host_ms", "load_ms", "first_run_ms"] {
                assert!(row[field].as_f64().unwrap() >= 0.0, "{field}: {row}");
            }
            let is_homer = row["configuration"]["method"] == "homer";
            assert_eq!(row["prefix_speedup"].is_number(), is_homer);
            let number = |value: &serde_json::Value| value.as_u64().unwrap();
            (if is_homer { "homer" } else { "plain" }, number(&row["prompt"]["context"]), number(&row["tokens_kept"]))
        })
        .collect();
    assert_eq!(rows, [("homer", 20, 15), ("homer", 40, 15), ("plain", 20, 25), ("plain", 40, 45)]);
    // Two runs of a prefix are too few, whatever else is the case.
    assert_eq!(report["trust"]["trusted"], false);
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
    let table = run.out.lines().skip(1).take_while(|line| !line.is_empty());
    let rows: Vec<&str> = table.map(|line| line.split_whitespace().next().unwrap()).collect();
    assert_eq!(rows, ["homer", "homer", "plain"]);
    assert!(
        run.err.contains("homer at 20 context tokens: built 1 times instead of 2, because --budget is 0 s"),
        "{run:?}"
    );

    let mut profile = command();
    profile.arg("profile").arg(workspace.path("homer")).args(["--methods", "plain", "--context", "70"]);
    let run = Run::of(profile.args(&FLAGS[..4]).args(["--new-tokens", "1,3"]).args(&FLAGS[6..12]));
    // Eight tokens warm up: 2 + 70 + 3 rows and those, then 1 and 3 more.
    let spans: Vec<Vec<&str>> = run
        .out
        .lines()
        .skip_while(|line| !line.contains("by tokens"))
        .map(|line| line.split_whitespace().collect())
        .collect();
    assert_eq!((&spans[2][..4], &spans[3][..4]), (&["1", "to", "1", "84"][..], &["2", "to", "3", "86"][..]), "{run:?}");
    assert!(run.out.contains("between graphs") && run.out.contains("decoder"), "{run:?}");
    assert!(run.out.contains("These numbers"), "{run:?}");
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
fn two_sides_are_measured_alternately() {
    let workspace = homer();
    let bundle = workspace.path("homer");
    let paired = |more: &[&str]| {
        let mut profile = command();
        profile.args(["--json", "profile"]).arg(&bundle).args(&FLAGS[..6]).args(["--min-time", "0", "--threads", "1"]);
        let run = Run::of(profile.args(["--context", "40", "--paired", "--pairs", "4"]).args(more));
        run.json("accordion.profile/1")
    };
    let same = paired(&[bundle.to_str().unwrap()]);
    let comparison = &same["comparisons"][0];
    assert_eq!((&comparison["a"], &comparison["pairs"]), (&comparison["b"], &4.into()));
    let quantities = comparison["differences"].as_array().unwrap();
    assert_eq!(quantities.len(), 3);
    for quantity in quantities {
        let [ratio, low, high] = ["ratio", "low", "high"].map(|field| quantity[field].as_f64().unwrap());
        assert!(low <= ratio && ratio <= high, "{quantity}");
        let verdict = quantity["verdict"].as_str().unwrap();
        assert!(verdict == "no_difference" || low > 1.0 || high < 1.0, "{quantity}");
    }
    let rows = same["rows"].as_array().unwrap();
    assert_eq!(rows.len(), 2);
    assert!(rows.iter().all(|row| row["prefix"]["runs"] == 4 && row["configuration"]["method"] == "homer"));
    assert!(rows.iter().all(|row| row["token_limit"]["fraction"].as_f64().unwrap() > 0.0));
    assert!(rows.iter().all(|row| row["load_ms"].as_f64().unwrap() > 0.0), "the turn that loads comes before all");

    // One bundle in two ways.
    let sides = |more: &[&str]| {
        let report = paired(more);
        ["a", "b"].map(|side| report["comparisons"][0][side].as_str().unwrap().to_owned())
    };
    let fused = "homer, homer, fused operators";
    assert_eq!(sides(&["--against-operators", "portable"]), [fused, "homer, homer, portable operators"]);
    assert_eq!(sides(&["--methods", "homer,plain"]), [fused, "homer, plain, fused operators"]);
}

#[test]
fn what_is_not_two_sides_is_refused() {
    let workspace = homer();
    let bundle = workspace.path("homer");
    let refused = |bundles: usize, more: &[&str]| {
        let mut profile = command();
        profile.arg("profile").args(vec![&bundle; bundles]).args(&FLAGS[..4]).args(["--paired", "--context", "40"]);
        Run::of(profile.args(more))
    };
    assert!(refused(1, &[]).error().contains("give a second one"));
    assert!(refused(3, &[]).error().contains("compares two bundles, or one in two ways; 3 were given"));
    assert!(refused(2, &["--methods", "homer,plain,homer"]).error().contains("one for each"));
    assert!(refused(2, &["--context", "0"]).error().contains("--context 0"));
    assert!(refused(2, &["--methods", "rcc"]).error().contains("rcc"));
    for wrong in [&["--pairs", "5"][..], &["--pairs", "2"], &["--trace", "t.json"], &["--min-runs", "3"]] {
        let run = refused(2, wrong);
        assert_eq!((run.code, run.out.as_str()), (Some(2), ""), "{run:?}");
    }
    let mut alone = command();
    let run = Run::of(alone.arg("profile").arg(&bundle).args(["--pairs", "4"]));
    assert!(run.code == Some(2) && run.err.contains("--paired"), "{run:?}");
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
    for tokens in ["0", "4,4", "8,4"] {
        let mut profile = command();
        let run = Run::of(profile.arg("profile").arg(&bundle).args(["--new-tokens", tokens]));
        assert!(run.error().contains("--new-tokens: expected numbers from 1 on, each larger"));
    }
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

/// The limits of a machine are measured in the precision of the bundle.
#[test]
fn a_quantized_bundle_is_held_against_the_rates_of_its_precision() {
    let tiny = Tiny::new();
    for precision in ["weight-int8", "weight-int4", "int8-per-token", "fp16"] {
        let export = ["export", "plain", "checkpoint", "quantized", "--precision", precision, "--force"];
        tiny.succeed(&export);
        let flags = [
            "--context",
            "24",
            "--prefix",
            "2",
            "--suffix",
            "2",
            "--new-tokens",
            "2",
            "--min-runs",
            "2",
            "--min-time",
            "0",
        ];
        let report: serde_json::Value =
            serde_json::from_str(&tiny.succeed(&[&["profile", "quantized", "--json"], &flags[..]].concat())).unwrap();
        let rate = &report["rows"][0]["ceilings"]["linear_flops"];
        assert!(rate.as_f64().is_some_and(|rate| rate > 0.0), "{precision}: {}", report["rows"][0]);
    }
}
