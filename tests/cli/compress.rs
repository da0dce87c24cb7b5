//! `accordion compress`, and `accordion run` from what it writes.

use super::tiny::{LONG, Tiny};
use accordion::bundle::Bundle;
use accordion::pipeline::ContextState;
use serde_json::{Deserializer, Value};

const QUESTION: [&str; 2] = ["--prompt", " Who?"];

fn reports(tiny: &Tiny, arguments: &[&[&str]]) -> Vec<Value> {
    let text = tiny.succeed(&[&[&["run"][..], &["--json", "--max-tokens", "20"]], arguments].concat().concat());
    Deserializer::from_str(&text).into_iter().map(Result::unwrap).collect()
}

fn ids(reports: &[Value]) -> Vec<&Value> {
    reports.iter().map(|report| &report["token_ids"]).collect()
}

fn compress(tiny: &Tiny, bundle: &str, out: &str, more: &[&str]) -> Value {
    let head = ["compress", bundle, "--context", "long.txt", "-o", out, "--json"];
    serde_json::from_str(&tiny.succeed(&[&head[..], more].concat())).unwrap()
}

/// What continues from a file is what continues from the context.
fn continues(tiny: &Tiny, bundle: &str, compressed: &[&str], run: &[&str]) {
    let report = compress(tiny, bundle, "state", compressed);
    let table: &[&str] = if compressed.contains(&"--table") { &["--table", "none"] } else { &[] };
    let direct = reports(tiny, &[&[bundle, "--context", "long.txt"], table, run]);
    let saved = reports(tiny, &[&[bundle, "--state", "state"], run]);
    assert_eq!(ids(&saved), ids(&direct), "{bundle} {compressed:?} {run:?}");
    for (saved, direct) in saved.iter().zip(&direct) {
        assert_eq!((&saved["method"], &saved["lengths"]), (&direct["method"], &direct["lengths"]));
        assert_eq!(saved["tokens_kept"], direct["tokens_kept"]);
        assert_eq!(saved["compression_seconds"], 0.0);
    }
    assert_eq!(report["lengths"]["context"], direct[0]["lengths"]["context"]);
    // Read and written again, it is the same, bit by bit.
    let bundle = Bundle::open(tiny.path(bundle)).unwrap();
    let state = ContextState::load(&tiny.path("state"), &bundle).unwrap();
    assert_eq!(state.state.len() as u64, report["tokens_kept"].as_u64().unwrap());
    state.save(&tiny.path("again")).unwrap();
    assert_eq!(std::fs::read(tiny.path("state")).unwrap(), std::fs::read(tiny.path("again")).unwrap());
}

#[test]
fn a_run_from_a_state_is_a_run_from_the_context() {
    let tiny = Tiny::new();
    let several = ["--prompt", " Who?", "--prompt", "\nWhere was it?"];
    let homer = [&QUESTION[..], &["--table", "none"]].concat();
    for run in [&QUESTION[..], &several, &["--prompt", " Who?", "--temperature", "3", "--seed", "5"]] {
        continues(&tiny, "homer", &homer, run);
        continues(&tiny, "plain", &QUESTION, run);
    }
    continues(&tiny, "plain", &[], &QUESTION);
    let asked = reports(&tiny, &[&["homer", "--context", "long.txt", "--table", "none"], &QUESTION]);
    compress(&tiny, "homer", "state", &homer);
    assert_eq!(ids(&reports(&tiny, &[&["homer", "--state", "state"]])), ids(&asked), "it has its own question");
    // A plain state is any decoder's of the same model.
    compress(&tiny, "homer", "state", &["--method", "plain"]);
    let saved = reports(&tiny, &[&["plain", "--state", "state"], &QUESTION]);
    assert_eq!(ids(&saved), ids(&reports(&tiny, &[&["plain", "--context", "long.txt"], &QUESTION])));
}

#[test]
fn a_cache_of_integers_is_saved_as_it_is() {
    let tiny = Tiny::new();
    let checkpoint = tiny.checkpoint();
    tiny.succeed(&["export", "plain", checkpoint.to_str().unwrap(), "kv", "--kv-cache", "int8"]);
    continues(&tiny, "kv", &QUESTION, &["--prompt", " Who?", "--prompt", "\nWhere was it?"]);
    let [int8, fp32] = ["kv", "plain"].map(|bundle| compress(&tiny, bundle, bundle_state(bundle), &QUESTION));
    let bytes = |report: &Value| report["cache_bytes"].as_u64().unwrap();
    assert!(bytes(&int8) * 3 < bytes(&fp32), "{int8}, {fp32}");
    // Either bundle goes on from the other's.
    for (bundle, state) in [("kv", "plain.state"), ("plain", "kv.state"), ("kv", "kv.state")] {
        assert_eq!(reports(&tiny, &[&[bundle, "--state", state], &QUESTION])[0]["tokens_kept"], fp32["tokens_kept"]);
    }
}

fn bundle_state(bundle: &str) -> &'static str {
    if bundle == "kv" { "kv.state" } else { "plain.state" }
}

#[test]
fn an_rcc_document_is_compressed_once_for_all_questions() {
    let tiny = Tiny::rcc(|_| {});
    let report = compress(&tiny, "rcc", "state", &[]);
    // 92 tokens take two windows of 64, and 8 tokens a slot.
    assert_eq!((&report["tokens_kept"], &report["method"]), (&16.into(), &"rcc".into()));
    continues(&tiny, "rcc", &[], &QUESTION);
    continues(&tiny, "rcc", &["--width", "max"], &["--prompt", " Who?", "--prompt", "!", "--prompt", " Why?"]);
    continues(&tiny, "rcc", &QUESTION, &["--prompt", " Who?", "--prompt", "!"]);
    // Instructions are compressed with the context, so that they are part of the state.
    let instruct = ["--prompt", "Who?", "--instruction"];
    for mode in ["reconstruct", "manual"] {
        let instruct = [&instruct[..], &[mode]].concat();
        continues(&tiny, "rcc", &instruct, &instruct);
    }
}

#[test]
fn provenance_is_in_the_file() {
    let tiny = Tiny::rcc(|_| {});
    compress(&tiny, "rcc", "state", &QUESTION);
    let bundle = Bundle::open(tiny.path("rcc")).unwrap();
    let saved = ContextState::load(&tiny.path("state"), &bundle).unwrap();
    assert_eq!(saved.origin.model, bundle.manifest().identity());
    assert_eq!((saved.origin.lengths.context, saved.origin.lengths.suffix), (LONG.len(), 5));
    let sha256 = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
    assert_eq!(saved.origin.context_sha256.len(), sha256.len());
    assert_ne!(saved.origin.context_sha256, sha256, "the hash of nothing");
}

#[test]
fn states_of_something_else_are_refused() {
    let tiny = Tiny::new();
    compress(&tiny, "homer", "homer.state", &[&QUESTION[..], &["--table", "none"]].concat());
    compress(&tiny, "plain", "plain.state", &QUESTION);
    let refuse = |tiny: &Tiny, arguments: &[&str], words: &[&str]| {
        let message = tiny.refuse(&[&["run"], arguments].concat());
        assert!(words.iter().all(|word| message.contains(word)), "{arguments:?}: {message}");
    };
    refuse(&tiny, &["plain", "--state", "homer.state"], &["the method", "homer", "plain", "max_chunk_len"]);
    let other = Tiny::with(|arch| arch.rope.theta = 1234.0, None);
    std::fs::copy(tiny.path("plain.state"), other.path("plain.state")).unwrap();
    refuse(&other, &["plain", "--state", "plain.state"], &["plain.state", "of the state", "that of the bundle"]);
    tiny.succeed(&["export", "homer", "checkpoint", "homer48", "--max-chunk-len", "48", "--context", "200"]);
    refuse(&tiny, &["homer48", "--state", "homer.state"], &["the method", "40", "48"]);

    refuse(&tiny, &["plain", "--state", "nowhere"], &["nowhere"]);
    refuse(&tiny, &["plain", "--state", "plain.state", "--context", "long.txt"], &["cannot be used with"]);
    refuse(&tiny, &["homer", "--state", "homer.state", "--max-chunk-len", "40"], &["cannot be used with"]);
    refuse(&tiny, &["homer", "--state", "homer.state", "--width", "2"], &["cannot be used with"]);
    refuse(&tiny, &["plain", "--state", "plain.state", "--prompt", "?", "--prefix", "a"], &["another text before"]);
    compress(&tiny, "plain", "bare", &[]);
    refuse(&tiny, &["plain", "--state", "bare"], &["give one with --prompt"]);
}

#[test]
fn what_was_kept_is_written_beside_the_state() {
    let tiny = Tiny::new();
    let flags = [&QUESTION[..], &["--table", "none", "--kept", "kept.json"]].concat();
    let report = compress(&tiny, "homer", "state", &flags);
    let kept: Value = serde_json::from_slice(&std::fs::read(tiny.path("kept.json")).unwrap()).unwrap();
    assert_eq!((&kept["schema"], &kept["question"]), (&"accordion.kept/1".into(), &" Who?".into()));
    let parts = kept["parts"].as_array().unwrap();
    let text: String = parts.iter().map(|part| part["text"].as_str().unwrap()).collect();
    assert_eq!(text, LONG);
    // What passed all levels is what the state holds, besides the question.
    let levels = kept["levels"].as_array().unwrap().len() as u64;
    let in_cache = parts.iter().filter(|part| part["passed"] == levels).map(|part| part["tokens"].as_u64().unwrap());
    let affixes = report["lengths"]["prefix"].as_u64().unwrap() + report["lengths"]["suffix"].as_u64().unwrap();
    assert_eq!(in_cache.sum::<u64>() + affixes, report["tokens_kept"].as_u64().unwrap());
    // The state is the same as without it.
    compress(&tiny, "homer", "other", &[&QUESTION[..], &["--table", "none"]].concat());
    assert_eq!(std::fs::read(tiny.path("state")).unwrap(), std::fs::read(tiny.path("other")).unwrap());
    let message = tiny.refuse(
        &[&["compress", "plain", "--context", "long.txt", "-o", "third", "--kept", "third.json"][..], &QUESTION]
            .concat(),
    );
    assert!(message.contains("--kept is for homer, and the method is plain"), "{message}");
    assert!(!tiny.path("third").exists() && !tiny.path("third.json").exists());

    tiny.succeed(&["report", "kept.json", "-o", "page.html", "--markdown", "page.md"]);
    let [page, text] = ["page.html", "page.md"].map(|name| std::fs::read_to_string(tiny.path(name)).unwrap());
    assert!(page.contains("node.h0.i0, from token 0") && page.contains("<mark class="), "{page}");
    assert!(text.contains("| Level | Nodes |"), "{text}");
}

#[test]
fn what_cannot_be_compressed_leaves_nothing() {
    let tiny = Tiny::new();
    std::fs::write(tiny.path("empty.txt"), "").unwrap();
    for (arguments, expected) in [
        (&["homer", "--context", "long.txt", "--table", "none"][..], "homer compresses a context for a question"),
        (&["homer", "--context", "long.txt", "--prompt", "?"], "accordion calibrate significance"),
        (&["plain", "--context", "empty.txt"], "the context is empty"),
        (&["plain", "--context", "long.txt", "--instruction", "manual", "--prompt", "?"], "--instruction is for rcc"),
        (&["plain", "--context", "long.txt", "--truncate-prompt"], "--truncate-prompt is for rcc"),
    ] {
        let message = tiny.refuse(&[&["compress"], arguments, &["-o", "state"]].concat());
        assert!(message.contains(expected), "{arguments:?}: {message}");
        assert!(!tiny.path("state").exists());
    }
    let message = tiny.refuse(&["compress", "plain", "--context", "long.txt", "-o", "nowhere/state"]);
    assert!(message.contains("nowhere/state"), "{message}");
    let rcc = Tiny::rcc(|_| {});
    let message =
        rcc.refuse(&["compress", "rcc", "--context", "long.txt", "-o", "state", "--instruction", "reconstruct"]);
    assert!(message.contains("give it with --prompt"), "{message}");
}

/// Reading a saved state is measured with a question of the asked length behind it.
#[test]
fn questions_to_a_saved_context_are_measured() {
    let tiny = Tiny::rcc(|_| {});
    tiny.succeed(&["export", "rcc", "checkpoint", "bundle"]);
    let saved = compress(&tiny, "bundle", "state", &[]);
    let flags = ["--min-runs", "2", "--min-time", "0", "--suffix", "3", "--new-tokens", "2", "--json"];
    let measured = tiny.succeed(&[&["profile", "bundle", "--state", "state"], &flags[..]].concat());
    let report: Value = serde_json::from_str(&measured).unwrap();
    let [row] = &report["rows"].as_array().unwrap()[..] else { panic!("{report}") };
    assert_eq!(row["configuration"]["method"], "rcc");
    assert_eq!((&row["prompt"]["context"], &row["prompt"]["suffix"]), (&saved["lengths"]["context"], &3.into()));
    assert_eq!(row["tokens_kept"], saved["tokens_kept"]);
    assert_eq!((&row["prefix"]["runs"], &row["operations"]), (&2.into(), &Value::Null));

    tiny.succeed(&["export", "plain", "checkpoint", "plain"]);
    let refused = tiny.refuse(&["profile", "plain", "--state", "state"]);
    assert!(refused.contains("rcc") && refused.contains("plain"), "{refused}");
}

/// Stored in 8 bits, keys and values come back within half a step of their channel, for every method.
#[test]
fn a_state_in_eight_bits_is_a_quarter_and_close() {
    let rcc = Tiny::rcc(|_| {});
    let tiny = Tiny::new();
    for (tiny, name, more) in
        [(&tiny, "plain", &QUESTION[..]), (&rcc, "rcc", &[]), (&tiny, "homer", &["--table", "none"])]
    {
        let question = if name == "homer" { &QUESTION[..] } else { &[] };
        let flags = [more, question].concat();
        compress(tiny, name, "exact", &flags);
        compress(tiny, name, "small", &[&flags[..], &["--state-precision", "int8"]].concat());
        let bundle = Bundle::open(tiny.path(name)).unwrap();
        let [exact, small] =
            ["exact", "small"].map(|file| ContextState::load(&tiny.path(file), &bundle).unwrap().state);
        for (exact, small) in exact.cache.iter().flatten().zip(small.cache.iter().flatten()) {
            let (width, rows) = (exact.shape()[3], exact.shape()[2]);
            let (exact, small) = (exact.as_f32().unwrap(), small.as_f32().unwrap());
            let mut differs = false;
            for (head, (exact, small)) in exact.chunks(rows * width).zip(small.chunks(rows * width)).enumerate() {
                for channel in 0..width {
                    let column = |x: &[f32]| x.iter().copied().skip(channel).step_by(width).collect::<Vec<_>>();
                    let (exact, small) = (column(exact), column(small));
                    let step = exact.iter().fold(0.0_f32, |max, x| max.max(x.abs())) / 127.0;
                    for (exact, small) in exact.iter().zip(&small) {
                        differs |= exact.to_bits() != small.to_bits();
                        assert!((exact - small).abs() <= step * 0.501, "{name}, head {head}, channel {channel}");
                    }
                }
            }
            assert!(differs, "{name}: it was not quantized");
        }
        let sizes = ["exact", "small"].map(|file| std::fs::metadata(tiny.path(file)).unwrap().len());
        assert!(
            sizes[1] < sizes[0] * 6 / 10,
            "{name}: {sizes:?}, of which much is names and scales in so small a model"
        );
        let prompt = if question.is_empty() && more.is_empty() { &QUESTION[..] } else { &[] };
        reports(tiny, &[&[name, "--state", "small"], prompt]);
    }
}
