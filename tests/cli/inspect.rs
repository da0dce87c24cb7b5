//! `accordion inspect`.

#![allow(clippy::unwrap_used)]

use crate::program::{Run, Workspace, command};
use crate::tiny::{LONG, Tiny};
use serde_json::{Value, json};

fn inspect(workspace: &Workspace, what: &str, more: &[&str]) -> Run {
    Run::of(command().arg("inspect").arg(workspace.path(what)).args(more))
}

#[test]
fn a_checkpoint_is_described() {
    let workspace = Workspace::new();
    let found = inspect(&workspace, "checkpoint", &["--json"]).json("accordion.inspect/1");
    assert_eq!(found["kind"], "checkpoint");
    assert_eq!(found["architecture"]["num_layers"], 6);
    // 50 x 32 embeddings; in a layer 2 (32 x 32) + 2 (16 x 32) + 3 (24 x 32) + 2 x 32; a last norm.
    assert_eq!(found["parameters"], 50 * 32 + 6 * (2048 + 1024 + 2304 + 64) + 32);
    // Keys and values, 6 layers, 2 heads of 8, 4 bytes.
    assert_eq!(found["kv_bytes_per_token"], 2 * 6 * 2 * 8 * 4);
    let text = inspect(&workspace, "checkpoint", &[]).output();
    for word in ["6, hidden 32, MLP 24", "4 query, 2 key/value, 8 wide", "34,272", "fp32 (56)", "model.safetensors"] {
        assert!(text.contains(word), "{word} is not in\n{text}");
    }
}

#[test]
fn a_bundle_is_described_with_its_plan() {
    let workspace = Workspace::new();
    workspace.export("homer", "bundle", &["--context", "100", "--max-chunk-len", "32"]).output();
    let lengths = ["--context", "100", "--prefix", "3", "--suffix", "4"];
    let found = inspect(&workspace, "bundle", &[&lengths[..], &["--json"]].concat()).json("accordion.inspect/1");
    assert_eq!((&found["kind"], &found["weights"][0]["linked"]), (&"bundle".into(), &true.into()));
    assert_eq!(found["method"]["tree_heights"], json!([0, 1, 2, 3]));
    let decoder = found["graphs"].as_array().unwrap().iter().find(|graph| graph["name"] == "decoder").unwrap();
    assert_eq!(decoder["inputs"][0]["name"], "input_ids");
    // 100 tokens in leaves of at most 32 - 7 are exactly four of 25.
    let nodes = found["plan"]["tree"]["nodes"].as_array().unwrap();
    assert_eq!(nodes.iter().filter(|node| node["height"] == 0 && node["in_len"] == 32).count(), 4);
    // Each child keeps the affixes and half of the room beside them, 12 tokens; the root has room for both.
    assert_eq!(found["plan"]["state_tokens"], 7 + 12 + 12);
    assert_eq!(found["plan"]["state_bytes"], 31 * 2 * 6 * 2 * 8 * 4);
    assert_eq!(found["plan"]["plain_state_bytes"], 107 * 2 * 6 * 2 * 8 * 4);

    let text = inspect(&workspace, "bundle", &lengths).output();
    for word in ["tree heights 0, 1, 2, 3", "leaf.0-", "past_key_values.*.key (6 of them)", "HEIGHT", "no table"] {
        assert!(text.contains(word), "{word} is not in\n{text}");
    }
    // A tree of height 1 at most, and a prompt that needs one of height 2.
    workspace.export("homer", "small", &["--context", "30", "--max-chunk-len", "32", "--layers-warmup", "1"]).output();
    let longer = inspect(&workspace, "small", &["--context", "100"]).output();
    assert!(longer.contains("not in the bundle: merge.4-4, merge.5-5; export with --context 100"), "{longer}");
}

#[test]
fn a_bundle_of_rcc_is_described_with_its_segments() {
    let tiny = Tiny::rcc(|_| {});
    let inspect = |context: usize| -> Value {
        let context = context.to_string();
        let arguments = ["inspect", "rcc", "--json", "--suffix", "5", "--context", &context];
        serde_json::from_str(&tiny.succeed(&arguments)).unwrap()
    };
    // Segments of 64, 8 tokens to a slot: a short text is repeated, a longer one preceded by its end.
    for (context, padding, repeats, count) in
        [(1, 0, 64, 1), (16, 0, 4, 1), (23, 18, 2, 1), (64, 0, 1, 1), (65, 63, 1, 2), (128, 64, 1, 3), (150, 42, 1, 3)]
    {
        let plan = &inspect(context)["plan"];
        let expected = json!({
            "count": count, "window": 64, "padding": padding, "repeats": repeats, "slots": 8 * count,
            "slots_per_segment": 8,
        });
        assert_eq!(plan["segments"], expected, "{context}");
        assert_eq!(plan["state_tokens"], 8 * count + 5);
    }
    // The plan's state is that of the file that is written.
    let compress = ["compress", "rcc", "--context", "long.txt", "--prompt", " Who?", "-o", "state", "--json"];
    let written: Value = serde_json::from_str(&tiny.succeed(&compress)).unwrap();
    let plan = &inspect(LONG.len())["plan"];
    assert_eq!((&plan["state_bytes"], &plan["state_tokens"]), (&written["cache_bytes"], &written["tokens_kept"]));
    let [compressed, plain] = ["operations", "plain_operations"].map(|kind| plan[kind]["linear"].as_u64().unwrap());
    assert!(compressed > 0 && plain > 0 && compressed != plain);

    let text = tiny.succeed(&["inspect", "rcc", "--context", "150"]);
    for word in [
        "3 of 64 tokens: the text, behind 42 tokens of its end",
        "24, 8 of a segment",
        "Llama, 4 layers, hidden 64",
        "5, to the embedding and behind 4 layers",
    ] {
        assert!(text.contains(word), "{word} is not in\n{text}");
    }
    let checkpoint = tiny.succeed(&["inspect", "checkpoint"]);
    for word in ["rcc: windows of 64, 8 tokens per slot", "encoder", "maps"] {
        assert!(checkpoint.contains(word), "{word} is not in\n{checkpoint}");
    }
    for (context, suffix, message) in [
        ("0", "5", "context length is 0, expected at least 1 token"),
        ("9", "4801", "prompt length is 4801, expected at most 600 x ratio = 4800"),
    ] {
        let refused = tiny.refuse(&["inspect", "rcc", "--context", context, "--suffix", suffix]);
        assert!(refused.contains(message), "{refused}");
    }
}

#[test]
fn what_cannot_be_described_is_refused() {
    let workspace = Workspace::new();
    workspace.export("homer", "bundle", &["--context", "100", "--max-chunk-len", "32"]).output();
    for (what, more, word) in [
        ("nowhere", &[][..], "no folder or file"),
        ("checkpoint/config.json", &[], "not a GGUF file"),
        ("bundle", &["--context", "0"], "context length is 0"),
        ("bundle", &["--context", "100", "--suffix", "0"], "suffix length is 0"),
        ("bundle", &["--context", "18446744073709551615"], "prompt length"),
        ("checkpoint", &["--context", "18446744073709551615"], "prompt length"),
    ] {
        let error = inspect(&workspace, what, more).error();
        assert!(error.contains(word), "{error}");
    }
    let graph = workspace.path("bundle/decoder.onnx");
    std::fs::write(&graph, "something else").unwrap();
    assert!(inspect(&workspace, "bundle", &[]).error().contains("decoder.onnx changed since the export"));
}

#[test]
fn one_graph_is_described_by_module() {
    let workspace = Workspace::new();
    workspace.export("homer", "bundle", &["--context", "100", "--max-chunk-len", "32"]).output();
    let found = inspect(&workspace, "bundle", &["--graph", "decoder", "--json"]).json("accordion.inspect/1");
    assert_eq!((&found["kind"], &found["name"]), (&"graph".into(), &"decoder".into()));
    let modules = found["modules"].as_array().unwrap();
    let counts = |module: &serde_json::Value| -> u64 {
        module["operators"].as_object().unwrap().values().map(|count| count.as_u64().unwrap()).sum()
    };
    assert_eq!(modules.iter().map(counts).sum::<u64>(), found["nodes"].as_u64().unwrap());
    let attention = modules.iter().find(|module| module["module"] == "model.layers.*.self_attn").unwrap();
    assert_eq!(attention["places"], 6);
    assert_eq!(attention["operators"]["ai.accordion.GroupQueryAttention"], 6);
    let text = inspect(&workspace, "bundle", &["--graph", "decoder"]).output();
    for word in ["model.layers.*.self_attn.q_proj", "x 6", "past_key_values.*.key (6 of them)", "a function of 3 nodes"]
    {
        assert!(text.contains(word), "{word} is not in\n{text}");
    }

    let unknown = inspect(&workspace, "bundle", &["--graph", "nope"]).error();
    assert!(unknown.contains("--graph is nope, expected one of decoder, head,"), "{unknown}");
    let no_bundle = inspect(&workspace, "checkpoint", &["--graph", "decoder"]).error();
    assert!(no_bundle.contains("--graph is for bundles"), "{no_bundle}");

    // A bundle from before modules were recorded opens, and says what it does not know.
    let manifest = workspace.path("bundle").join("bundle.json");
    let mut json: serde_json::Value = serde_json::from_slice(&std::fs::read(&manifest).unwrap()).unwrap();
    for graph in json["graphs"].as_object_mut().unwrap().values_mut() {
        let signature = graph["signature"].as_object_mut().unwrap();
        assert!(signature.remove("modules").is_some());
        signature.remove("functions");
    }
    std::fs::write(&manifest, json.to_string()).unwrap();
    let old = inspect(&workspace, "bundle", &["--graph", "decoder"]).output();
    assert!(old.contains("exported again, it will"), "{old}");
}
