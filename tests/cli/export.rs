//! `accordion export`.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use crate::program::{Run, Workspace, accordion, command};
use crate::sparse;
use crate::tiny::Tiny;
use accordion::bundle::{Bundle, Method};
use accordion::precision::Basis;
use accordion_calibration::ranges::{Observation, RangeEstimator, SiteLayout};
use accordion_graphs::architecture::{Architecture, RopeScaling};
use accordion_graphs::dtype::DType;
use accordion_graphs::precision::KvCache;
use std::fs;

const SMALL: &[&str] = &["--context", "100", "--max-chunk-len", "32"];

#[test]
fn the_same_export_gives_the_same_bytes() {
    let workspace = Workspace::new();
    for (method, more) in [("plain", &[][..]), ("homer", SMALL)] {
        for weights in ["link", "copy"] {
            let options: Vec<&str> = more.iter().copied().chain(["--weights", weights]).collect();
            let [first, second] = ["first", "second"].map(|which| {
                let name = format!("{method}-{weights}-{which}");
                let text = workspace.export(method, &name, &options).output();
                assert!(
                    text.contains(&format!("{method}, "))
                        && text.contains(if weights == "link" { "linked" } else { "copied" })
                );
                workspace.path(&name)
            });
            let files: Vec<_> = fs::read_dir(&first).unwrap().map(|entry| entry.unwrap().file_name()).collect();
            assert_eq!(fs::read_dir(&second).unwrap().count(), files.len());
            for file in files {
                assert_eq!(fs::read(first.join(&file)).unwrap(), fs::read(second.join(&file)).unwrap(), "{file:?}");
            }
        }
    }
}

#[test]
fn the_summary_counts_what_was_written() {
    let workspace = Workspace::new();
    let linked = workspace.export("homer", "linked", &[SMALL, &["--json"]].concat()).json("accordion.export/1");
    let copied = workspace
        .export("homer", "copied", &[SMALL, &["--json", "--weights", "copy"]].concat())
        .json("accordion.export/1");
    assert_eq!((&linked["weights"], &copied["weights"]), (&"linked".into(), &"copied".into()));
    let size = |bundle: &str, skip: &[&str]| -> u64 {
        let entries = fs::read_dir(workspace.path(bundle)).unwrap().map(|entry| entry.unwrap());
        let counted = entries.filter(|entry| !skip.contains(&entry.file_name().to_str().unwrap()));
        counted.map(|entry| entry.metadata().unwrap().len()).sum()
    };
    assert_eq!(linked["bytes_written"], size("linked", &["model.safetensors", "config.json"]));
    assert_eq!(copied["bytes_written"], size("copied", &[]));
    let bundle = Bundle::open(workspace.path("linked")).unwrap();
    assert_eq!(linked["graphs"], bundle.manifest().graphs.len());
}

#[test]
fn every_context_up_to_the_longest_gets_its_tree() {
    let workspace = Workspace::new();
    let heights = |more: &[&str]| {
        workspace.export("homer", "bundle", &[more, &["--force", "--max-chunk-len", "32"]].concat()).output();
        let bundle = Bundle::open(workspace.path("bundle")).unwrap();
        let Method::Homer { settings, tree_heights } = &bundle.manifest().method else { unreachable!() };
        (*settings, tree_heights.clone())
    };
    // Affixes of half a chunk leave room for 16 tokens: 100 take seven leaves, so eight.
    let (settings, found) = heights(&["--context", "100", "--target-len", "24", "--layers-warmup", "1"]);
    assert_eq!((settings.target_len, settings.layers_warmup), (24, 1));
    assert_eq!(found, [0, 1, 2, 3]);
    // 64 leaves of 16 would leave one empty, with just these affixes; others need a tree of the same height.
    assert_eq!(heights(&["--context", "1000"]).1, [0, 1, 2, 3, 4, 5, 6]);
    // The affixes are within the target: 24 tokens of room, five leaves, so eight.
    assert_eq!(heights(&["--context", "100", "--target-len", "8"]).1, [0, 1, 2, 3]);
}

#[test]
fn rope_scaling_can_be_replaced() {
    let workspace = Workspace::new();
    for (flag, expected) in [
        ("none", RopeScaling::None),
        ("linear=2", RopeScaling::Linear { factor: 2.0 }),
        ("dynamic=2:32", RopeScaling::Dynamic { factor: 2.0, original_max_positions: 32 }),
    ] {
        workspace.export("plain", "bundle", &["--force", "--rope-scaling", flag]).output();
        let bundle = Bundle::open(workspace.path("bundle")).unwrap();
        let Architecture::Llama(model) = &bundle.manifest().architecture else { unreachable!() };
        assert_eq!(model.rope.scaling, expected);
    }
    let error = workspace.export("plain", "other", &["--rope-scaling", "yarn=none"]).error();
    assert!(error.contains("--rope-scaling") && error.contains("none"), "{error}");
    assert!(!workspace.path("other").exists());
}

#[test]
fn what_cannot_be_exported_is_one_line_and_leaves_nothing() {
    let workspace = Workspace::new();
    let before = fs::read_dir(workspace.path("")).unwrap().count();
    for (more, word) in [
        (&["--context", "0"][..], "context length is 0"),
        (&["--context", "100", "--max-chunk-len", "1"], "max_chunk_len"),
        (&["--layers-warmup", "7"], "layers_warmup"),
        (&["--context", "18446744073709551615"], "context length"),
        (&["--table", "nowhere"], "nowhere"),
    ] {
        let error = workspace.export("homer", "bundle", more).error();
        assert!(error.contains(word), "{error}");
    }
    let error = Run::of(command().args(["export", "plain", "no-such-model"]).arg(workspace.path("bundle"))).error();
    assert!(error.contains("no-such-model") && error.contains("smollm2-135m"), "{error}");
    assert_eq!(fs::read_dir(workspace.path("")).unwrap().count(), before);
}

#[test]
fn a_sharded_model_of_seven_billion_parameters_is_exported_without_its_weights() {
    let workspace = Workspace::new();
    let checkpoint = workspace.path("large");
    fs::create_dir(&checkpoint).unwrap();
    sparse::write(&checkpoint, &sparse::large_model(), "BF16", 3);
    let mut arguments = vec!["export".into(), "homer".into(), checkpoint.into_os_string()];
    arguments.extend([workspace.path("bundle").into_os_string(), "--json".into()]);
    let summary = accordion(arguments).json("accordion.export/1");
    assert_eq!((&summary["weight_files"], &summary["weights"]), (&3.into(), &"linked".into()));
    assert!(summary["bytes_written"].as_u64().unwrap() < 5_000_000, "{summary}");
    assert_eq!(Bundle::open(workspace.path("bundle")).unwrap().weights().index().parameter_count(), 6_738_415_616);
}

#[test]
fn rcc_is_exported_with_the_settings_of_the_checkpoint_or_the_flags() {
    let tiny = Tiny::rcc(|_| {});
    let settings = |bundle: &str| match Bundle::open(tiny.path(bundle)).unwrap().manifest().method {
        Method::Rcc { settings } => settings,
        _ => unreachable!(),
    };
    let trained = settings("rcc");
    assert_eq!((trained.window, trained.ratio, trained.pairs), (64, 8, false));
    tiny.succeed(&["export", "rcc", "checkpoint", "other", "--window", "32", "--ratio", "4"]);
    let other = settings("other");
    assert_eq!((other.window, other.ratio, other.pairs), (32, 4, false));
    for (flags, expected) in [
        (&["--ratio", "7"][..], "ratio is 7, expected a divisor of the window, 64"),
        (&["--window", "0"], "window is 0"),
        // Four blocks are too few for four decoder layers of two states each.
        (&["--pairs"], "two for every decoder layer"),
    ] {
        let message = tiny.refuse(&[&["export", "rcc", "checkpoint", "bundle"], flags].concat());
        assert!(message.contains(expected), "{flags:?}: {message}");
        assert!(!tiny.path("bundle").exists());
    }
}

#[test]
fn trained_methods_need_a_checkpoint_of_theirs() {
    let workspace = Workspace::new();
    for (method, expected) in [("rcc", "an encoder and maps"), ("sharedllm", "a lower model")] {
        let error = workspace.export(method, "bundle", &[]).error();
        assert!(error.contains(expected), "{error}");
    }
    let run = workspace.export("sharedllm", "bundle", &["--keep", "1.5"]);
    assert!(run.err.contains("a fraction above 0 and up to 1.0"), "{run:?}");
}

#[test]
fn a_cache_of_integers_is_recorded_and_has_a_decoder_of_its_own() {
    let workspace = Workspace::new();
    for target in ["portable", "ort-cpu"] {
        workspace.export("plain", target, &["--target", target, "--kv-cache", "int8"]).output();
        let bundle = Bundle::open(workspace.path(target)).unwrap();
        assert_eq!(bundle.manifest().kv_cache, KvCache::Int8);
        let types = |graph: &str, name: &str| {
            let signature = bundle.signature(graph).unwrap();
            let found = signature.inputs.iter().chain(&signature.outputs).find(|value| value.name == name);
            found.map(|value| (value.dtype, value.shape[2].clone()))
        };
        let rows = if target == "portable" { "past" } else { "capacity" };
        assert_eq!(types("decoder_kv_int8", "past_key_values.1.value"), Some((DType::I8, rows.to_owned())));
        assert_eq!(types("decoder_kv_int8", "present.0.key_scale"), Some((DType::F32, "1".to_owned())));
        assert_eq!(types("decoder", "past_key_values.1.value"), Some((DType::F32, rows.to_owned())));
        assert_eq!(types("decoder", "present.0.key_scale"), None);
    }
    workspace.export("plain", "fp32", &["--kv-cache", "fp32"]).output();
    let manifest = fs::read_to_string(workspace.path("fp32").join("bundle.json")).unwrap();
    assert!(!manifest.contains("kv_cache") && !manifest.contains("decoder_kv_int8"), "{manifest}");
    let run = workspace.export("plain", "none", &["--kv-cache", "int4"]);
    assert!(run.err.contains("fp32, int8"), "{run:?}");
}

#[test]
fn half_precision_says_what_stays_in_fp32_and_why() {
    let workspace = Workspace::new();
    let portable = |name: &str, more: &[&str]| {
        workspace.export("plain", name, &[&["--target", "portable"], more].concat()).output();
        Bundle::open(workspace.path(name)).unwrap()
    };
    let bundle = portable("by-rule", &["--precision", "fp16"]);
    let quantization = bundle.manifest().quantization.clone().unwrap();
    assert_eq!(quantization.rounding.unwrap().decided_by, Basis::Rules);
    assert_eq!(quantization.kept["rows.rotary Cos"], "rotary angles are rounded last");
    let matrix = "model.layers.1.mlp.down_proj.weight";
    let stored = |bundle: &Bundle| bundle.weights().index().get(matrix).unwrap().dtype;
    assert_eq!(stored(&bundle), DType::F16);
    let signature = bundle.signature("decoder").unwrap();
    assert!(signature.inputs.iter().chain(&signature.outputs).all(|value| value.dtype != DType::F16));

    let channels = bundle.weights().index().get(matrix).unwrap().shape[1];
    let site = SiteLayout { weights: vec![matrix.to_owned()], channels };
    let mut estimator = RangeEstimator::new(vec![site], vec!["layers.0.out".to_owned()]).unwrap();
    estimator.begin_window(&"0".repeat(64), 0).unwrap();
    let rows = vec![40_000.0; channels];
    estimator.observe(&[Observation::Rows(0, &rows), Observation::Tap(0, &[1.0, 1e-9])]).unwrap();
    let table = estimator.finish(bundle.manifest().identity(), "{}".into(), 1, "a test".into()).unwrap();
    let path = workspace.path("ranges.safetensors");
    table.save(&path).unwrap();
    let ranges = path.to_str().unwrap();
    let bundle = portable("derived", &["--precision", "fp16", "--ranges", ranges]);
    let quantization = bundle.manifest().quantization.clone().unwrap();
    assert_eq!(quantization.rounding.unwrap().decided_by, Basis::RulesAndRanges);
    assert!(quantization.ranges.is_some());
    let down = &quantization.kept["model.layers.1.mlp.down_proj Gemm"];
    assert!(down.starts_with("its input reaches 40000,"), "{down}");
    assert!(quantization.kept["model.layers.0 Add"].contains("50 % of numbers that become zero"));
    assert_eq!(stored(&bundle), DType::F32);
    // bf16 reaches as far as fp32.
    let bundle = portable("bf16", &["--precision", "bf16", "--ranges", ranges]);
    assert_eq!(stored(&bundle), DType::Bf16);
}

#[test]
fn sixteen_bits_are_emulated_for_portable_graphs_alone() {
    let workspace = Workspace::new();
    for more in [&["--precision", "bf16"][..], &["--precision", "int8-per-token", "--target", "portable"]] {
        let error = workspace.export("plain", "bundle", &[more, &["--emulate"]].concat()).error();
        assert!(error.contains("cannot be emulated"), "{error}");
    }
    workspace.export("plain", "emulated", &["--precision", "bf16", "--target", "portable", "--emulate"]).output();
    workspace.export("plain", "native", &["--precision", "bf16", "--target", "portable"]).output();
    let run = |name: &str| Run::of(command().args(["verify", "--quiet"]).arg(workspace.path(name)));
    let error = run("native").error();
    assert!(error.contains("does not compute in bf16") && error.contains("--emulate"), "{error}");
}
