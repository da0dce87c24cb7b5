//! `accordion convert`, and checkpoints whose tensors have several names.

#![allow(clippy::unwrap_used)]

use crate::program::{Run, Workspace, command};
use crate::sparse;
use crate::tiny::{LONG, Tiny};
use accordion::bundle::Bundle;
use accordion::checkpoint::{Checkpoint, NamedShape, architecture_json, config_json, decoder_tensors};
use accordion::pipeline::Engines;
use accordion::reference::rcc::Rcc;
use accordion::runtime::locate::{LoadOptions, load};
use accordion::runtime::ort_cpu::{OrtCpu, OrtOptions};
use accordion::verify::Detail;
use accordion::verify::rcc::{RccInput, compare_rcc};
use accordion::verify::verdict::Verdict;
use accordion_graphs::architecture::{Architecture, Compressor, Encoder, GptNeox, Llama, Rope, RopeScaling};
use accordion_graphs::plan::PromptLengths;
use accordion_graphs::plan::rcc::RccPlan;
use accordion_graphs::plan::sharedllm::Keep;
use safetensors::SafeTensors;
use safetensors::tensor::TensorView;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// A workspace with a source in `checkpoint`, converted into `out`.
fn convert(workspace: &Workspace, more: &[&str]) -> Run {
    convert_to("sharedllm", workspace, more)
}

fn convert_to(method: &str, workspace: &Workspace, more: &[&str]) -> Run {
    let mut command = command();
    command.args(["convert", method, "--from"]).arg(workspace.path("checkpoint"));
    Run::of(command.args(more).arg(workspace.path("out")))
}

/// Replaces the source.
fn source(workspace: &Workspace, model: &Llama, dtype: &str, shards: usize) {
    let folder = workspace.path("checkpoint");
    fs::remove_dir_all(&folder).unwrap();
    fs::create_dir(&folder).unwrap();
    sparse::write(&folder, model, dtype, shards);
}

fn json_file(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

/// The place of a tensor: file name, offset, shape.
fn place(checkpoint: &Checkpoint, name: &str) -> (String, u64, Vec<usize>) {
    let weight = checkpoint.weights().get(name).unwrap_or_else(|| panic!("no {name}"));
    let file = checkpoint.weights().file_of(weight).unwrap().file_name().unwrap().to_str().unwrap().to_owned();
    (file, weight.offset, weight.shape.clone())
}

#[test]
fn the_lower_model_and_the_cross_attention_are_parts_of_the_source() {
    let mut untied = sparse::tiny_model();
    untied.tie_word_embeddings = false;
    for (model, shards) in [(sparse::tiny_model(), 1), (untied, 3)] {
        let workspace = Workspace::new();
        source(&workspace, &model, "BF16", shards);
        fs::write(workspace.path("checkpoint").join("tokenizer.json"), "{}").unwrap();
        let plain = Checkpoint::open(workspace.path("checkpoint")).unwrap();
        let found = convert(&workspace, &["--layers", "2", "--json"]).json("accordion.convert/1");

        let made = Checkpoint::open(workspace.path("out")).unwrap();
        for layer in 0..2 {
            let [new, old] = ["cross_attn", "self_attn"].map(|part| format!("model.layers.{layer}.{part}"));
            for name in ["q_proj", "o_proj"] {
                let [new, old] = [&new, &old].map(|part| place(&made, &format!("{part}.{name}.weight")));
                assert_eq!(new, old);
            }
            let norm = format!("model.layers.{layer}.post_attention_layernorm.weight");
            assert_eq!(place(&made, &format!("{new}.layernorm.weight")), place(&made, &norm));
        }
        let Some(Compressor::SharedLlm(shared)) = made.compressor() else { panic!("{:?}", made.compressor()) };
        assert_eq!(shared.injected_layers, 2);
        assert_eq!(shared.lower, Llama { num_layers: 2, ..model.clone() });
        assert_eq!(made.architecture(), plain.architecture());
        let settings = made.sharedllm_settings().unwrap();
        assert_eq!((settings.keep, settings.tree_depth, settings.retrieval), (Keep::Tokens(32), 3, true));

        // Nine tensors a layer, the embedding and the norm; three of the cross attention a layer.
        assert_eq!((&found["aliases"], made.weights().aliases().len()), (&json!(26), 26));
        for (alias, target) in made.weights().aliases().iter().filter(|(alias, _)| alias.starts_with("encoder.")) {
            assert_eq!(&alias.replacen("encoder.", "model.", 1), target);
            assert_eq!(place(&made, alias), place(&plain, target));
        }
        assert!(made.weights().get("encoder.layers.1.mlp.down_proj.weight").is_some());
        assert!(made.weights().get("encoder.layers.2.mlp.down_proj.weight").is_none());
        assert_eq!(made.weights().get("lm_head.weight").is_some(), !model.tie_word_embeddings);
        assert!(made.weights().get("encoder.lm_head.weight").is_none());

        // Aliases cost nothing and are no parameters; they are part of the model's identity.
        assert_eq!(made.weights().parameter_count(), plain.weights().parameter_count());
        assert_eq!(made.weights().byte_count(), plain.weights().byte_count());
        assert_ne!(made.fingerprint(), plain.fingerprint());

        // Weights are links, everything else is what was written.
        let mut written = 0;
        for entry in fs::read_dir(workspace.path("out")).unwrap().map(Result::unwrap) {
            let meta = entry.metadata().unwrap();
            if entry.path().extension().unwrap() == "safetensors" {
                assert_eq!(meta.nlink(), 2, "{entry:?} is no link");
            } else {
                assert_eq!(meta.nlink(), 1, "{entry:?} is a link: changing one would change the other");
                written += meta.len();
            }
        }
        assert_eq!(found["bytes_written"], written);
        assert!(workspace.path("out").join("tokenizer.json").exists());
    }
}

#[test]
fn zeros_are_one_tensor_that_takes_no_room() {
    for shards in [1, 3] {
        let workspace = Workspace::new();
        source(&workspace, &sparse::large_model(), "BF16", shards);
        let found = convert(&workspace, &["--layers", "4", "--init", "zero", "--json"]).json("accordion.convert/1");
        assert!(found["bytes_written"].as_u64().unwrap() < 100_000, "{found}");
        let made = Checkpoint::open(workspace.path("out")).unwrap();
        let [first, last] = [0, 3].map(|i| place(&made, &format!("model.layers.{i}.cross_attn.o_proj.weight")));
        assert_eq!(first, last);
        assert_eq!((first.0.as_str(), first.2), ("cross_attention.safetensors", vec![4096, 4096]));
        let zeros = made.tensor("model.layers.2.cross_attn.o_proj.weight").unwrap();
        assert!(zeros.bytes().iter().all(|byte| *byte == 0));
        let meta = fs::metadata(workspace.path("out").join("cross_attention.safetensors")).unwrap();
        assert!(meta.len() > 4096 * 4096 * 2 && meta.blocks() * 512 < 100_000, "{} blocks", meta.blocks());
        assert!(made.weights().get("lm_head.weight").is_some());
        assert_eq!(made.weights().files().len(), shards + 1);
    }
}

#[test]
fn the_configuration_says_what_the_authors_code_reads() {
    let workspace = Workspace::new();
    let path = workspace.path("checkpoint").join("config.json");
    let mut config = json_file(&path);
    config["some_field"] = json!({"of": "the source"});
    fs::write(&path, config.to_string()).unwrap();
    let write = |keep: &str, more: &[&str]| {
        convert(&workspace, &[&["--layers", "3", "--force", "--keep", keep], more].concat()).output();
        json_file(&workspace.path("out").join("config.json"))
    };
    fs::create_dir(workspace.path("out")).unwrap();
    fs::write(workspace.path("out").join("aliases.json"), "").unwrap();
    let made = write("0.5", &["--tree-depth", "2", "--retrieval", "false"]);
    for (name, value) in config.as_object().unwrap().iter().filter(|(name, _)| *name != "architectures") {
        assert_eq!(&made[name], value, "{name}");
    }
    for (name, value) in [
        ("num_cross_attn_layers", json!(-3)),
        ("do_cross_attention", json!(true)),
        ("last_p", json!("0.5")),
        ("segment_tree_depth", json!(2)),
        ("do_retrieval", json!(false)),
        ("tie_word_embeddings", json!(true)),
    ] {
        assert_eq!(made[name], value, "{name}");
    }
    assert_eq!(made["encoder_config"]["num_hidden_layers"], 3);
    assert_eq!(made["encoder_config"]["hidden_size"], config["hidden_size"]);
    let read = Checkpoint::open(workspace.path("out")).unwrap().sharedllm_settings().unwrap();
    assert_eq!((read.keep, read.tree_depth, read.retrieval), (Keep::Fraction(0.5), 2, false));
    let defaults = write("all", &[]);
    assert_eq!((&defaults["last_p"], &defaults["do_retrieval"]), (&json!("-1"), &json!(true)));
    assert_eq!(write("16", &[])["last_p"], "16");
    assert_eq!(write("1.0", &[])["last_p"], "1.0");
}

#[test]
fn what_cannot_be_converted_is_refused_and_leaves_nothing() {
    let workspace = Workspace::new();
    let refuse = |more: &[&str], parts: &[&str]| {
        let message = convert(&workspace, more).error();
        for part in parts {
            assert!(message.contains(part), "'{message}' does not say '{part}'");
        }
        let left: Vec<_> = fs::read_dir(workspace.path("")).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert!(left.iter().all(|name| name == "checkpoint" || name == "out"), "{left:?}");
    };
    refuse(&["--layers", "0"], &["--layers is 0", "1 to 6"]);
    refuse(&["--layers", "7"], &["--layers is 7", "1 to 6", "checkpoint"]);
    refuse(&["--layers", "2", "--keep", "0"], &["--keep is 0"]);
    refuse(&["--layers", "2", "--keep", "1.5"], &["--keep is 1.5"]);
    refuse(&["--layers", "2", "--tree-depth", "0"], &["--tree-depth is 0"]);
    assert!(!workspace.path("out").exists());

    let biased = Llama { qkv_bias: true, o_bias: true, ..sparse::tiny_model() };
    source(&workspace, &biased, "F32", 1);
    refuse(&["--layers", "2"], &["model.layers.0.self_attn.q_proj.bias", "no biases"]);

    for (qkv_bias, found) in [(true, "'qwen2'"), (false, "'mistral'")] {
        source(&workspace, &Llama { qkv_bias, sliding_window: Some(64), ..sparse::tiny_model() }, "F32", 1);
        refuse(&["--layers", "2"], &[found]);
    }
    let yarn = json!({"type": "yarn", "factor": 2.0});
    source(&workspace, &sparse::tiny_model(), "F32", 1);
    let path = workspace.path("checkpoint").join("config.json");
    let mut config = json_file(&path);
    config["rope_scaling"] = yarn;
    fs::write(path, config.to_string()).unwrap();
    refuse(&["--layers", "2"], &["rotary scaling"]);

    source(&workspace, &sparse::tiny_model(), "F32", 1);
    fs::create_dir(workspace.path("out")).unwrap();
    refuse(&["--layers", "2"], &["out exists already", "--force"]);
    // Not even with --force: nothing says that the folder came from here.
    refuse(&["--layers", "2", "--force"], &["not a converted checkpoint"]);
    fs::remove_dir(workspace.path("out")).unwrap();
    convert(&workspace, &["--layers", "2"]).output();
    convert(&workspace, &["--layers", "3", "--force"]).output();
    let again = Run::of(
        command()
            .args(["convert", "sharedllm", "--layers", "2", "--from"])
            .args(["out", "twice"].map(|n| workspace.path(n))),
    );
    assert!(again.error().contains("sharedllm already"));
    assert_eq!(json_file(&workspace.path("out").join("config.json"))["num_cross_attn_layers"], -3);
}

/// A GPT-NeoX of three layers.
fn neox() -> Architecture {
    Architecture::GptNeox(GptNeox {
        num_layers: 3,
        hidden_size: 32,
        intermediate_size: 48,
        num_heads: 4,
        vocab_size: 50,
        max_positions: 64,
        layer_norm_eps: 1e-5,
        rope: Rope { theta: 10_000.0, scaling: RopeScaling::None },
        rotary_dims: 2,
        parallel_residual: true,
        tie_word_embeddings: false,
        attention_bias: true,
        eos_token_ids: vec![0],
        bos_token_id: Some(0),
    })
}

fn write_checkpoint(workspace: &Workspace, arch: &Architecture, dtype: &str, shards: usize) {
    let folder = workspace.path("checkpoint");
    fs::remove_dir_all(&folder).unwrap();
    fs::create_dir(&folder).unwrap();
    fs::write(folder.join("config.json"), architecture_json(arch).to_string()).unwrap();
    sparse::write_tensors(&folder, &decoder_tensors(arch), dtype, shards);
}

#[test]
fn the_encoder_is_the_decoder_and_the_maps_are_diagonal() {
    let llama = |tied| Architecture::Llama(Llama { tie_word_embeddings: tied, ..sparse::tiny_model() });
    for (arch, body, dtype, shards, scale) in [
        (llama(true), "model", "F32", 1, 0.125),
        (llama(false), "model", "F16", 3, 0.125),
        (neox(), "gpt_neox", "BF16", 2, 0.25),
    ] {
        let workspace = Workspace::new();
        write_checkpoint(&workspace, &arch, dtype, shards);
        let plain = Checkpoint::open(workspace.path("checkpoint")).unwrap();
        let settings = ["--window", "16", "--ratio", "8", "--json"];
        let found = convert_to("rcc", &workspace, &settings).json("accordion.convert/1");
        assert_eq!((&found["method"], &found["window"], &found["ratio"]), (&json!("rcc"), &json!(16), &json!(8)));

        let made = Checkpoint::open(workspace.path("out")).unwrap();
        assert_eq!(made.architecture(), plain.architecture());
        let Some(Compressor::Rcc(model)) = made.compressor() else { panic!("{:?}", made.compressor()) };
        assert_eq!(model.encoder, Encoder::Transformer(arch.clone()));
        let settings = made.rcc_settings().unwrap();
        assert_eq!((settings.window, settings.ratio, settings.pairs), (16, 8, false));

        // Every tensor once more, and the maps of all layers but the first.
        let tensors: Vec<NamedShape> = decoder_tensors(&arch);
        assert_eq!(found["aliases"], tensors.len() + arch.num_layers() - 1);
        for (name, _) in &tensors {
            let encoder = place(&made, &format!("{body}.rcc_encoder.{name}"));
            assert_eq!(encoder, place(&made, name));
            assert_eq!((encoder.1, encoder.2), (place(&plain, name).1, place(&plain, name).2));
        }
        let map = |name: &str| made.tensor(&format!("{body}.rcc_encoder2gpt_{name}.weight")).unwrap().to_f32();
        let diagonal =
            |number: f32| -> Vec<f32> { (0..32 * 32).map(|i| if i % 33 == 0 { number } else { 0.0 }).collect() };
        assert!(map("embed") == diagonal(1.0));
        for layer in 0..arch.num_layers() {
            assert!(map(&format!("A_matrix.{layer}")) == diagonal(scale), "{layer}");
        }
        let maps = 2 * 32 * 32 * if dtype == "F32" { 4 } else { 2 };
        assert_eq!(made.weights().byte_count(), plain.weights().byte_count() + maps);
        let size = |name: &str| fs::metadata(workspace.path("out").join(name)).unwrap();
        let (config, source) =
            (size("config.json"), fs::read(workspace.path("checkpoint").join("config.json")).unwrap());
        assert_eq!((config.nlink(), config.len()), (1, source.len() as u64));
        assert!(found["bytes_written"].as_u64().unwrap() < 20_000 + maps, "{found}");
    }
}

#[test]
fn what_rcc_is_not_made_of_is_refused_and_leaves_nothing() {
    let workspace = Workspace::new();
    let refuse = |more: &[&str], parts: &[&str]| {
        let message = convert_to("rcc", &workspace, more).error();
        for part in parts {
            assert!(message.contains(part), "'{message}' does not say '{part}'");
        }
        assert_eq!(fs::read_dir(workspace.path("")).unwrap().count(), 1);
    };
    refuse(&["--ratio", "3"], &["ratio is 3", "2048"]);
    refuse(&["--window", "0"], &["window is 0"]);
    for (qkv_bias, found) in [(true, "'qwen2'"), (false, "'mistral'")] {
        source(&workspace, &Llama { qkv_bias, sliding_window: Some(64), ..sparse::tiny_model() }, "F32", 1);
        refuse(&[], &["rcc is made of a plain Llama or GPT-NeoX", found]);
    }
    write_checkpoint(&workspace, &neox(), "F32", 1);
    let message = convert(&workspace, &["--layers", "1"]).error();
    assert!(message.contains("sharedllm is made of a plain Llama") && message.contains("'gpt_neox'"), "{message}");
    convert_to("rcc", &workspace, &[]).output();
    for method in ["rcc", "sharedllm"] {
        let mut command = command();
        command.args(["convert", method, "--from"]).args(["out", "twice"].map(|n| workspace.path(n)));
        if method == "sharedllm" {
            command.args(["--layers", "1"]);
        }
        assert!(Run::of(&mut command).error().contains("rcc already"), "{method}");
    }
}

#[test]
fn a_converted_model_runs_as_rcc_and_agrees_with_the_reference() {
    let tiny = Tiny::new();
    tiny.succeed(&["convert", "rcc", "--from", "checkpoint", "--window", "16", "--ratio", "4", "converted"]);
    let checkpoint = Checkpoint::open(tiny.path("converted")).unwrap();
    let (Some(Compressor::Rcc(model)), Some(settings)) = (checkpoint.compressor(), checkpoint.rcc_settings()) else {
        panic!("{:?}", checkpoint.compressor())
    };
    let arch = checkpoint.architecture();
    let reference = Rcc::load(arch, model, settings, |name: &str| checkpoint.tensor(name)).unwrap();
    let text: Vec<u32> = LONG.bytes().map(u32::from).collect();
    let lengths = PromptLengths { prefix: 0, context: text.len(), suffix: 2 };
    let plan = RccPlan::new(lengths, settings).unwrap();
    for target in ["portable", "ort-cpu"] {
        tiny.succeed(&["export", "rcc", "converted", target, "--target", target]);
        let run = ["run", target, "--context", "long.txt", "--prompt", "?", "--max-tokens", "4", "--json"];
        let found: Value = serde_json::from_str(&tiny.succeed(&run)).unwrap();
        assert!(found["text"].as_str().is_some_and(|text| !text.is_empty()), "{found}");

        let bundle = Bundle::open(tiny.path(target)).unwrap();
        let runtime = load(LoadOptions::fetching(&mut |_| {})).unwrap();
        let loader = OrtCpu::new(runtime, bundle.weights().clone(), &OrtOptions { fused_operators: true }).unwrap();
        let mut engines = Engines::new(&bundle, Box::new(loader));
        let input = RccInput { plan: &plan, text: &text, prompt: &[63, 32], teacher: &[65, 66] };
        let findings = compare_rcc(&mut engines, &reference, &input, Detail::All, &mut |_| {}).unwrap();
        for tap in &findings.taps {
            assert_eq!(tap.verdict, Verdict::Pass, "{target}: {}: {}", tap.name, tap.reason);
        }
        let last = format!("segments.{}.layers.0.injected", plan.segments - 1);
        assert!(findings.taps.iter().any(|tap| tap.name == last), "{last}");
    }
}

/// A checkpoint of golden weights, in which the tensors of layer 1 are those of layer 0: as copies, or as aliases.
fn repeated(tiny: &Tiny, name: &str, aliased: bool) {
    let bytes = fs::read(tiny.checkpoint().join("model.safetensors")).unwrap();
    let found = SafeTensors::deserialize(&bytes).unwrap();
    let first = |name: &str| name.replace("layers.1.", "layers.0.");
    let tensors: BTreeMap<String, TensorView<'_>> = found
        .names()
        .into_iter()
        .filter(|name| !(aliased && name.contains("layers.1.")))
        .map(|name| (name.to_owned(), found.tensor(&first(name)).unwrap()))
        .collect();
    let folder = tiny.path(name);
    fs::create_dir(&folder).unwrap();
    fs::write(folder.join("model.safetensors"), safetensors::serialize(&tensors, None).unwrap()).unwrap();
    for file in ["config.json", "tokenizer.json", "tokenizer_config.json"] {
        fs::copy(tiny.checkpoint().join(file), folder.join(file)).unwrap();
    }
    if aliased {
        let names = found.names().into_iter().filter(|name| name.contains("layers.1."));
        let names: BTreeMap<&str, String> = names.map(|name| (name, first(name))).collect();
        let json = json!({"schema": "accordion.aliases/1", "tensors": names});
        fs::write(folder.join("aliases.json"), json.to_string()).unwrap();
    }
}

#[test]
fn a_bundle_of_aliased_weights_runs_without_its_checkpoint() {
    let tiny = Tiny::new();
    let [copied, aliased] = [("copied", false), ("aliased", true)].map(|(name, aliased)| {
        repeated(&tiny, name, aliased);
        let bundle = format!("{name}-bundle");
        tiny.succeed(&["export", "plain", name, &bundle]);
        fs::remove_dir_all(tiny.path(name)).unwrap();
        let run = ["run", &bundle, "--context", "long.txt", "--prompt", "?", "--max-tokens", "8", "--json"];
        let found: Value = serde_json::from_str(&tiny.succeed(&run)).unwrap();
        tiny.succeed(&["verify", &bundle]);
        found["text"].clone()
    });
    assert!(copied.as_str().is_some_and(|text| !text.is_empty()));
    assert_eq!(copied, aliased);
    let original = ["run", "plain", "--context", "long.txt", "--prompt", "?", "--max-tokens", "8", "--json"];
    let original: Value = serde_json::from_str(&tiny.succeed(&original)).unwrap();
    assert_ne!(original["text"], aliased, "layer 1 has an effect");

    let open = || Bundle::open(tiny.path("aliased-bundle"));
    assert!(!open().unwrap().weights().index().aliases().is_empty());
    let file = tiny.path("aliased-bundle").join("aliases.json");
    fs::write(&file, fs::read_to_string(&file).unwrap().replace("q_proj", "k_proj")).unwrap();
    let message = open().unwrap_err().to_string();
    assert!(message.contains("aliases.json") && message.contains("SHA-256"), "{message}");
}

#[test]
fn a_tensor_of_two_names_is_stored_once_in_16_bits() {
    let tiny = Tiny::new();
    let [copied, aliased] = [("copied", false), ("aliased", true)].map(|(name, aliased)| {
        repeated(&tiny, name, aliased);
        let bundle = format!("{name}-bundle");
        tiny.succeed(&["export", "plain", name, &bundle, "--target", "portable", "--precision", "fp16"]);
        fs::remove_dir_all(tiny.path(name)).unwrap();
        tiny.succeed(&["verify", &bundle]);
        fs::metadata(tiny.path(&bundle).join("weights.safetensors")).unwrap().len()
    });
    assert!(aliased < copied, "{aliased} bytes, and {copied}");
    assert!(!Bundle::open(tiny.path("aliased-bundle")).unwrap().weights().index().aliases().is_empty());
}

#[test]
fn an_alias_that_lies_is_refused_by_name() {
    let workspace = Workspace::new();
    let model = sparse::tiny_model();
    let write = |alias: &str, target: &str| {
        let json = json!({"schema": "accordion.aliases/1", "tensors": {alias: target}});
        fs::write(workspace.path("checkpoint").join("aliases.json"), json.to_string()).unwrap();
        workspace.export("plain", "bundle", &[]).error()
    };
    let message = write("model.norm.weight", "model.embed_tokens.weight");
    assert!(message.contains("aliases.json") && message.contains("'model.norm.weight'"), "{message}");
    let message = write("extra.weight", "model.nothing.weight");
    assert!(message.contains("model.nothing.weight"), "{message}");
    // A name that the model needs, for a tensor of another shape.
    let config = config_json(&Llama { tie_word_embeddings: false, ..model });
    fs::write(workspace.path("checkpoint").join("config.json"), config.to_string()).unwrap();
    let message = write("lm_head.weight", "model.norm.weight");
    assert!(message.contains("lm_head.weight") && message.contains("shape [32]"), "{message}");
}
