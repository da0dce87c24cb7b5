//! SharedLLM on the command line: how prompts are split, and the lengths at which the published code stops.

use super::tiny::{LONG, Tiny};
use serde_json::{Value, json};
use std::fs;

/// A model of two injected layers, whose heads are 16 wide, in chunks of 16 tokens.
fn tiny() -> Tiny {
    let tiny = Tiny::new();
    convert(&tiny, &[]);
    export(&tiny, "bundle", &["--chunk-len", "16"]);
    tiny
}

fn convert(tiny: &Tiny, more: &[&str]) {
    let head = ["convert", "sharedllm", "--from", "checkpoint", "--layers", "2", "--force"];
    let keep: &[&str] = if more.contains(&"--keep") { &[] } else { &["--keep", "2"] };
    tiny.succeed(&[&head[..], keep, more, &["shared"]].concat());
}

fn export(tiny: &Tiny, name: &str, more: &[&str]) {
    tiny.succeed(&[&["export", "sharedllm", "shared", name, "--force"], more].concat());
}

const RUN: [&str; 5] = ["run", "bundle", "--context", "long.txt", "--json"];

fn run(tiny: &Tiny, more: &[&str]) -> Value {
    let question: &[&str] = if more.contains(&"--prompt") { &[] } else { &["--prompt", " Who?"] };
    serde_json::from_str(&tiny.succeed(&[&RUN[..], &["--max-tokens", "6"], question, more].concat())).unwrap()
}

fn ids(report: &Value) -> &Vec<Value> {
    report["token_ids"].as_array().unwrap()
}

fn inspect(tiny: &Tiny, bundle: &str, more: &[&str]) -> Value {
    serde_json::from_str(&tiny.succeed(&[&["inspect", bundle, "--json"], more].concat())).unwrap()
}

#[test]
fn a_prompt_is_split_by_policy() {
    let tiny = tiny();
    let total = LONG.len() + " Who?".len();
    assert_eq!(total, 97);
    // What the upper model reads stays in the cache, and half of every chunk of 16 is injected.
    let kept = |more: &[&str]| run(&tiny, more)["tokens_kept"].as_u64().unwrap() as usize;
    assert_eq!(kept(&[]), total - 5 * 8, "one chunk less than fit");
    assert_eq!(kept(&["--chunks", "sft"]), total - 5 * 8);
    assert_eq!(kept(&["--chunks", "longbench"]), total - 8, "at least one");
    assert_eq!(kept(&["--chunks", "longbench:60"]), total - 2 * 8);
    assert_eq!(kept(&["--chunks", "3"]), total - 3 * 8);
    // As many as leave a running text of one token.
    assert_eq!(kept(&["--chunks", "6"]), 1 + 6 * 8);
    assert_ne!(ids(&run(&tiny, &["--chunks", "1"])), ids(&run(&tiny, &["--chunks", "5"])));

    for (chunks, message) in [
        ("7", "prompt length is 97, expected more than 7 x 16 tokens, so that a running text is left"),
        ("0", "invalid value '0' for '--chunks <sft|longbench[:N]|N>': expected sft, longbench"),
        ("some", "invalid value 'some' for '--chunks"),
        ("99999999", "number of chunks is 99999999, expected 1 to"),
    ] {
        let found = tiny.refuse(&[&RUN[..], &["--prompt", " Who?", "--chunks", chunks]].concat());
        assert!(found.contains(message), "{chunks}: {found}");
    }
}

#[test]
fn a_state_is_split_as_a_run_is() {
    let tiny = tiny();
    let compress = ["compress", "bundle", "--context", "long.txt", "--prompt", " Who?", "-o", "state.safetensors"];
    tiny.succeed(&[&compress[..], &["--chunks", "2"]].concat());
    let continued = ["run", "bundle", "--state", "state.safetensors", "--json", "--max-tokens", "6"];
    let continued: Value = serde_json::from_str(&tiny.succeed(&continued)).unwrap();
    assert_eq!(ids(&continued), ids(&run(&tiny, &["--chunks", "2"])));
    let message = tiny.refuse(&["run", "bundle", "--state", "state.safetensors", "--chunks", "2"]);
    assert!(message.contains("cannot be used with '--chunks <sft|longbench[:N]|N>'"), "{message}");
}

#[test]
fn only_sharedllm_is_split_so() {
    let tiny = tiny();
    fs::write(tiny.path("hay.txt"), LONG.repeat(20)).unwrap();
    let prompt = ["--context", "long.txt", "--prompt", "?"];
    for arguments in [
        [&["run", "homer", "--table", "none"], &prompt[..], &["--chunks", "2"]].concat(),
        [&["compress", "plain", "-o", "state"], &prompt[..], &["--chunks", "2"]].concat(),
        vec!["eval", "perplexity", "plain", "--text", "hay.txt", "--length", "400", "--chunks", "2"],
        vec!["profile", "plain", "homer", "--context", "40", "--chunks", "2"],
    ] {
        let found = tiny.refuse(&arguments);
        assert!(found.contains("--chunks is for sharedllm"), "{arguments:?}: {found}");
    }
    let found = tiny.refuse(&[&RUN[..], &["--prompt", "?", "--table", "none"]].concat());
    assert!(found.contains("--table is for homer, and the method is sharedllm"), "{found}");
}

#[test]
fn profiles_tell_policies_apart() {
    let tiny = tiny();
    let head = ["profile", "bundle", "--context", "80", "--prefix", "0", "--suffix", "17", "--json"];
    let quick = ["--min-runs", "1", "--min-time", "0", "--new-tokens", "2"];
    let rows =
        |more: &[&str]| -> Value { serde_json::from_str(&tiny.succeed(&[&head[..], &quick, more].concat())).unwrap() };
    let row = |profile: &Value| profile["rows"][0].clone();
    let two = rows(&["--chunks", "2"]);
    assert_eq!(two["rows"].as_array().unwrap().len(), 1);
    // Keys and values of 5 layers, and two keys and a value of 2, in 2 heads of 16; 8 tokens are kept of a chunk.
    let bytes = |chunks: u64| (97 - chunks * 16) * 2 * 5 * 2 * 16 * 4 + chunks * 8 * 3 * 2 * 2 * 16 * 4;
    assert_eq!(row(&two)["state_bytes"], bytes(2));
    assert!(row(&two)["configuration"]["settings"].as_array().unwrap().contains(&json!(["chunks", "2"])), "{two}");
    assert_eq!(row(&rows(&[]))["state_bytes"], bytes(5));
    fs::write(tiny.path("two.json"), two.to_string()).unwrap();
    let other = tiny.accordion(&[&head[..], &quick, &["--baseline", "two.json"]].concat(), b"");
    let said = String::from_utf8_lossy(&other.stderr);
    assert_eq!(other.status.code(), Some(2), "{said}");
    assert!(said.contains("no row that was measured in the same way"), "{said}");
}

/// The perplexity of the published code: so many chunks of the past, then a running text that is scored at its end.
#[test]
fn perplexity_is_that_of_the_end_of_the_running_text() {
    let tiny = tiny();
    let sentences = (0..200).map(|i| format!("The {i}. boat came home late, {}.", "with fish and salt ".repeat(i % 3)));
    fs::write(tiny.path("hay.txt"), sentences.collect::<Vec<_>>().join(" ")).unwrap();
    let head =
        ["eval", "perplexity", "bundle", "--text", "hay.txt", "--segment", "16", "--samples", "2", "--buffer", "4"];
    let evaluate = |more: &[&str]| tiny.accordion(&[&head[..], more, &["--json"]].concat(), b"");
    let four = evaluate(&["--length", "112", "--chunks", "4", "--out", "rows.jsonl"]);
    assert_eq!(four.status.code(), Some(0), "{four:?}");
    let said = String::from_utf8_lossy(&four.stderr);
    assert!(said.contains("only sharedllm is measured: its bundle has no decoder"), "{said}");
    let rows = fs::read_to_string(tiny.path("rows.jsonl")).unwrap();
    let rows: Vec<Value> = rows.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(rows.len(), 2);
    for row in &rows {
        let (method, settings) = (&row["method"], row["settings"]["policy"].as_str().unwrap());
        assert!(method == "sharedllm" && settings.contains('4'), "{row}");
    }
    for (arguments, message) in [
        (&["--length", "112", "--against", "plain"][..], "--against"),
        (&["--from-start", "112"], "a bundle of sharedllm has no decoder that reads a context plainly"),
        (&["--length", "12"], "prompt length is 12, expected more than 1 x 16 tokens"),
        (&["--length", "64", "--chunks", "4"], "prompt length is 64, expected more than 4 x 16 tokens"),
    ] {
        let output = evaluate(arguments);
        let found = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}: {found}");
        assert!(found.contains(message), "{arguments:?}: {found}");
    }
}

/// Lengths and settings at which the published code raises an exception.
#[test]
fn what_the_published_code_cannot_is_defined_or_refused() {
    let tiny = tiny();
    let sixteen = ["--chunk-len", "16"];
    for (converted, exported, message) in [
        (&[][..], &["--chunk-len", "62"][..], "chunk length is 62, expected a multiple of 4"),
        (&[], &["--chunk-len", "63"], "chunk length is 63, expected a multiple of 4"),
        (&[], &["--chunk-len", "0"], "chunk length is 0"),
        (
            &[],
            &["--chunk-len", "16", "--tree-depth", "5"],
            "expected a multiple of 16 that leaves leaves of at least 1",
        ),
        (&[], &["--chunk-len", "16", "--tree-depth", "0"], "tree depth is 0"),
        (&["--keep", "3"], &sixteen, "number of kept tokens is 3, expected 1 to 2 tokens, the length of a node"),
        (&["--keep", "0.25"], &sixteen, "number of kept tokens is 0.25, which is 0 tokens of a node"),
        (&[], &["--chunk-len", "16", "--keep", "0"], "--keep"),
        (&[], &["--chunk-len", "16", "--rope-scaling", "yarn=4"], "rotary scaling none, linear or dynamic only"),
    ] {
        convert(&tiny, converted);
        let refused = tiny.refuse(&[&["export", "sharedllm", "shared", "refused"], exported].concat());
        assert!(refused.contains(message), "{converted:?} {exported:?}: {refused}");
        assert!(!tiny.path("refused").exists());
    }

    // A node with a token over, a tree of its leaves, everything kept: these are defined.
    for (converted, exported, kept) in [
        (&["--keep", "1"][..], &["--chunk-len", "20"][..], 1 + 1 + 2),
        (&["--tree-depth", "1"], &sixteen, 4),
        (&["--tree-depth", "1", "--retrieval", "false"], &sixteen, 4),
        (&["--keep", "all"], &sixteen, 16),
        (&["--keep", "0.5"], &sixteen, 8),
    ] {
        convert(&tiny, converted);
        for quirks in ["faithful", "fixed"] {
            export(&tiny, "bundle", &[exported, &["--quirks", quirks]].concat());
            let plan = &inspect(&tiny, "bundle", &["--context", "90"])["plan"];
            assert_eq!(plan["chunks"]["kept_per_chunk"], kept, "{converted:?}");
            assert_eq!(ids(&run(&tiny, &[])).len(), 6, "{converted:?}, {quirks}");
        }
    }
}

/// From one token to more than there are chunks, 2 to n + 1 of them included, where the published code ends.
#[test]
fn every_length_of_the_running_text_is_read() {
    let tiny = tiny();
    for quirks in ["faithful", "fixed"] {
        export(&tiny, "bundle", &["--chunk-len", "16", "--quirks", quirks]);
        for running in 1..=8 {
            fs::write(tiny.path("long.txt"), &LONG[..5 * 16 + running - 1]).unwrap();
            let report = run(&tiny, &["--chunks", "5", "--prompt", "?"]);
            assert_eq!(
                (&report["tokens_kept"], ids(&report).len()),
                (&json!(running + 5 * 8), 6),
                "{quirks}, {running}"
            );
        }
    }
    // Shorter than a chunk, or one exactly.
    for length in [1, 15] {
        fs::write(tiny.path("long.txt"), &LONG[..length]).unwrap();
        let refused = tiny.refuse(&[&RUN[..], &["--prompt", "?"]].concat());
        let expected = format!("prompt length is {}, expected more than 1 x 16 tokens", length + 1);
        assert!(refused.contains(&expected), "{refused}");
    }
    fs::write(tiny.path("long.txt"), "").unwrap();
    let refused = tiny.refuse(&[&RUN[..], &["--prompt", "?"]].concat());
    assert!(refused.contains("the context is empty"), "{refused}");
}

/// As released, a single token's rotation is not defined for `n + 1` chunks from the width of a head on.
#[test]
fn too_many_chunks_for_the_published_rotation_are_refused() {
    let tiny = tiny();
    fs::write(tiny.path("long.txt"), LONG.repeat(4)).unwrap();
    let refuse = |bundle, chunks| {
        let refused = tiny.refuse(&["run", bundle, "--context", "long.txt", "--prompt", "?", "--chunks", chunks]);
        assert!(refused.contains("or export with --quirks fixed"), "{refused}");
        refused
    };
    assert!(refuse("bundle", "15").contains("15 chunks are too many for heads of 16"));
    assert_eq!(ids(&run(&tiny, &["--chunks", "14"])).len(), 6);
    export(&tiny, "fixed", &["--chunk-len", "16", "--quirks", "fixed"]);
    tiny.succeed(&["run", "fixed", "--context", "long.txt", "--prompt", "?", "--chunks", "15", "--max-tokens", "2"]);
    // Its two leaves make a chunk of a tree without other nodes count twice.
    export(&tiny, "leaves", &["--chunk-len", "16", "--tree-depth", "1"]);
    assert!(refuse("leaves", "8").contains("16 chunks"));
    tiny.succeed(&["run", "leaves", "--context", "long.txt", "--prompt", "?", "--chunks", "7", "--max-tokens", "2"]);
}

#[test]
fn plans_are_told_before_anything_runs() {
    let tiny = tiny();
    let found = inspect(&tiny, "bundle", &["--context", "92", "--suffix", "5"]);
    let plan = &found["plan"];
    // Nodes of 8, 4 and twice 2 tokens, two kept of each.
    let levels = json!([
        {"node_len": 8, "nodes": 1, "step": 4, "kept": 2},
        {"node_len": 4, "nodes": 1, "step": 2, "kept": 2},
        {"node_len": 2, "nodes": 2, "step": 1, "kept": 2},
    ]);
    let chunks = &plan["chunks"];
    assert_eq!(
        (&chunks["levels"], &chunks["kept_per_chunk"], &chunks["compression_ratio"]),
        (&levels, &json!(8), &json!(2.0))
    );
    let (default, others) = (&chunks["default"], &chunks["others"]);
    assert_eq!((&default["policy"], &default["chunks"], &default["running"]), (&json!("sft"), &json!(5), &json!(17)));
    assert_eq!((&others[0]["policy"], &others[0]["chunks"]), (&json!("longbench:3584"), &json!(1)));
    // The plan's state is that of the file that is written.
    let compress = ["compress", "bundle", "--context", "long.txt", "--prompt", " Who?", "-o", "state", "--json"];
    let written: Value = serde_json::from_str(&tiny.succeed(&compress)).unwrap();
    assert_eq!((&plan["state_bytes"], &plan["state_tokens"]), (&written["cache_bytes"], &json!(17)));
    assert!(plan["operations"]["linear"].as_u64() > Some(0));
    assert_eq!(plan["operations"], default["operations"]);

    let text = tiny.succeed(&["inspect", "bundle", "--context", "92"]);
    for word in ["chunks of 16", "8 kept of each (1 of 2.0)", "longbench:3584", "NODE LENGTH", "by the bottom 2 of 5"] {
        assert!(text.contains(word), "{word} is not in\n{text}");
    }
    let refused = tiny.refuse(&["inspect", "bundle", "--context", "900"]);
    assert!(refused.contains("--quirks fixed"), "{refused}");
    let refused = tiny.refuse(&["inspect", "bundle", "--context", "15"]);
    assert!(refused.contains("prompt length is 16"), "{refused}");

    let checkpoint = inspect(&tiny, "shared", &[]);
    assert_eq!((&checkpoint["method"]["name"], &checkpoint["aliases"]), (&json!("sharedllm"), &json!(26)));
    assert_eq!(checkpoint["compressor"]["injected_layers"], 2);
    let text = tiny.succeed(&["inspect", "shared"]);
    for word in ["trained for", "2 layers, hidden 64", "26 tensors are others"] {
        assert!(text.contains(word), "{word} is not in\n{text}");
    }
}

#[test]
fn what_cannot_read_plainly_is_compared_with_a_bundle_that_can() {
    let tiny = tiny();
    fs::write(tiny.path("book.txt"), LONG.repeat(20)).unwrap();
    let eval = |more: &[&'static str]| -> Vec<&'static str> {
        let fixed = [
            "eval",
            "perplexity",
            "bundle",
            "--text",
            "book.txt",
            "--length",
            "64",
            "--segment",
            "8",
            "--buffer",
            "8",
            "--bucket",
            "8",
            "--samples",
            "2",
            "--json",
        ];
        [&fixed[..], more].concat()
    };
    let summary = |more: &[&'static str]| -> Value { serde_json::from_str(&tiny.succeed(&eval(more))).unwrap() };
    let methods = |summary: &Value| -> Vec<String> {
        let all = summary["methods"].as_array().unwrap().iter();
        all.map(|one| one["method"].as_str().unwrap().to_owned()).collect()
    };
    assert_eq!(methods(&summary(&[])), ["sharedllm"]);
    let compare = ["--compare", "plain", "--against", "plain,last:24", "--out", "rows.jsonl"];
    let found = summary(&compare);
    assert_eq!(methods(&found), ["sharedllm", "plain", "last:24"]);
    // The same tokens are predicted by everyone, and differences are taken sample by sample.
    let cells = found["cells"].as_array().unwrap();
    assert!(cells.iter().all(|cell| cell["n"] == 2 && cell["result"]["tokens"] == 16), "{cells:?}");
    assert_eq!(found["comparisons"].as_array().unwrap().len(), 2, "{found}");
    let rows = fs::read_to_string(tiny.path("rows.jsonl")).unwrap();
    assert_eq!(rows.lines().count(), 6);
    // The second time nothing is computed, and nothing added.
    assert_eq!(methods(&summary(&compare)), methods(&found));
    assert_eq!(fs::read_to_string(tiny.path("rows.jsonl")).unwrap(), rows);
    let beside = tiny.succeed(&[
        "eval",
        "perplexity",
        "plain",
        "--text",
        "book.txt",
        "--length",
        "64",
        "--segment",
        "8",
        "--buffer",
        "8",
        "--samples",
        "1",
        "--json",
        "--compare",
        "bundle",
        "--against",
        "none",
    ]);
    assert_eq!(methods(&serde_json::from_str(&beside).unwrap()), ["plain", "sharedllm"]);

    let tokenizer = fs::read_to_string(tiny.path("plain/tokenizer.json")).unwrap();
    // It may be a link to the checkpoint's.
    fs::remove_file(tiny.path("plain/tokenizer.json")).unwrap();
    fs::write(tiny.path("plain/tokenizer.json"), tokenizer + "\n").unwrap();
    let message = tiny.refuse(&eval(&["--compare", "plain"]));
    assert!(message.contains("--compare plain: its tokenizer.json is another one than that of bundle"), "{message}");
    assert!(tiny.refuse(&eval(&["--compare", "nowhere"])).contains("--compare nowhere"));
    assert!(tiny.refuse(&eval(&["--against", "plain"])).contains("--against"));
}
