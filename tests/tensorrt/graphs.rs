//! Every graph of every method in every precision through the ONNX parser and the builder of TensorRT-RTX, by `accordion
//! build`.

use super::{goldens, prepared};
use accordion::bundle::{Bundle, ExportOptions, MethodSettings, WeightStorage, export};
use accordion::checkpoint::{Checkpoint, RCC_FILE, architecture_json, config_json, rcc_json, sharedllm_json};
use accordion::goldens::{HomerCase, RccCase, SharedLlmCase};
use accordion::precision::Recipe;
use accordion::tensorrt::engines::sha256;
use accordion::verify::golden;
use accordion_calibration::ranges::{Observation, RangeEstimator, SiteLayout};
use accordion_graphs::blocks::Target;
use accordion_graphs::plan::sharedllm::Quirks;
use accordion_graphs::precision::Precision;
use serde_json::Value;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// `accordion build` of a bundle with the prepared libraries.
fn build(bundle: &Path, more: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_accordion"));
    command.args(["build", "--runtime", "tensorrt-rtx", "--json"]).arg(bundle);
    for root in ["libraries/tensorrt_rtx_libs", "headers/TRT-RTX-1.7"] {
        command.arg("--root").arg(prepared(root));
    }
    command.args(more).env("ACCORDION_CACHE", prepared("libraries").with_file_name("cache")).output().unwrap()
}

/// Builds all graphs of a bundle and returns what the command says of them.
pub(super) fn built(bundle: &Path, more: &[&str]) -> Value {
    let output = build(bundle, more);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(0), "{}: {errors}", bundle.display());
    serde_json::from_slice(&output.stdout).unwrap()
}

fn check(checkpoint: &Path, method: MethodSettings, more: &[&str]) {
    let bundle = golden::exported(checkpoint, method, Target::Portable, &Recipe::fp32()).unwrap();
    built(bundle.dir(), more);
}

/// A checkpoint with these weights.
fn checkpoint(folder: &Path, weights: &Path, files: &[(&str, Value)]) -> PathBuf {
    golden::checkpoint(folder, weights, files).unwrap()
}

/// Both families of decoders.
#[test]
#[ignore = "needs NVIDIA's libraries: tests/tensorrt/prepare"]
fn plain_graphs_become_engines() {
    let folder = tempfile::tempdir().unwrap();
    let case = HomerCase::open(&goldens().join("homer/homer_E.json")).unwrap();
    let llama = checkpoint(folder.path(), case.weights_path(), &[("config.json", config_json(&case.architecture))]);
    check_precisions(&llama, &MethodSettings::Plain, &["--context", "200"], &[]);
    let folder = tempfile::tempdir().unwrap();
    let case = RccCase::open(&goldens().join("rcc/neox_r32.config.json")).unwrap();
    let neox = checkpoint(folder.path(), case.weights_path(), &[("config.json", architecture_json(&case.decoder))]);
    check_precisions(&neox, &MethodSettings::Plain, &["--context", "200"], &[]);
}

/// All that bundles compute in.
const PRECISIONS: [Precision; 8] = [
    Precision::Fp32,
    Precision::Fp16,
    Precision::Bf16,
    Precision::WeightInt8,
    Precision::WeightInt4,
    Precision::Int8PerToken,
    Precision::Int8,
    Precision::Fp8,
];

/// Ranges for every linear layer of `bundle`, in fp32: of numbers that nobody computed, but scales are scales.
fn ranges(bundle: &Bundle, path: &Path) {
    let graphs = bundle.manifest().graphs.values();
    let names: BTreeSet<&String> = graphs.flat_map(|graph| graph.signature.linears.keys()).collect();
    let channels = |name: &String| bundle.weights().index().get(name).unwrap().shape[1];
    let site = |name: &&String| SiteLayout { weights: vec![(*name).clone()], channels: channels(name) };
    let mut estimator = RangeEstimator::new(names.iter().map(site).collect(), vec![]).unwrap();
    estimator.begin_window("any", 0).unwrap();
    for (number, name) in names.iter().enumerate() {
        let rows: Vec<f32> = (0..4 * channels(name)).map(|i| (i as f32).sin()).collect();
        estimator.observe(&[Observation::Rows(number, &rows)]).unwrap();
    }
    let table = estimator.finish(bundle.manifest().identity(), "plain".to_owned(), 4, "test".to_owned());
    table.unwrap().save(path).unwrap();
}

/// What the builder says of a Mamba in 16 bits: its own compiler reshapes to another number of elements.
const REFUSED_MAMBA: [(Precision, &str); 2] = [
    (Precision::Fp16, "Mismatched number of elements in reshape op"),
    (Precision::Bf16, "Mismatched number of elements in reshape op"),
];

/// What it says of SharedLLM's graph `compress` over integers: an exception of its own that it did not expect.
const REFUSED_SHAREDLLM: [(Precision, &str); 4] = [
    (Precision::WeightInt8, "Unexpected exception vector::_M_range_check"),
    (Precision::WeightInt4, "Unexpected exception vector::_M_range_check"),
    (Precision::Int8PerToken, "Unexpected exception vector::_M_range_check"),
    (Precision::Int8, "Unexpected exception vector::_M_range_check"),
];

/// Builds every graph of the checkpoint in every precision; those of `refused` have to be refused with these words.
fn check_precisions(checkpoint: &Path, method: &MethodSettings, more: &[&str], refused: &[(Precision, &str)]) {
    let table = checkpoint.with_file_name("ranges.safetensors");
    let mut problems = Vec::new();
    for precision in PRECISIONS {
        let mut recipe = Recipe::of(precision);
        recipe.ranges = precision.needs_ranges().then(|| table.clone());
        let out = checkpoint.with_file_name(precision.name());
        let options = ExportOptions {
            method: method.clone(),
            target: Target::Portable,
            weights: WeightStorage::Link,
            recipe,
            force: false,
        };
        export(&Checkpoint::open(checkpoint).unwrap(), &out, &options).unwrap();
        if precision == Precision::Fp32 {
            ranges(&Bundle::open(&out).unwrap(), &table);
        }
        let output = build(&out, more);
        let message = String::from_utf8_lossy(&output.stderr);
        let as_expected = match refused.iter().find(|(of, _)| *of == precision) {
            Some((_, words)) => output.status.code() == Some(2) && message.contains(words),
            None => output.status.code() == Some(0),
        };
        if !as_expected {
            problems.push(format!("{precision}: {message}"));
        }
    }
    assert!(problems.is_empty(), "{}", problems.join("\n"));
}

/// What was built is found again, with its hashes; another plan in its place is refused.
#[test]
#[ignore = "needs NVIDIA's libraries: tests/tensorrt/prepare"]
fn engines_are_recorded_and_checked() {
    let folder = tempfile::tempdir().unwrap();
    let case = HomerCase::open(&goldens().join("homer/homer_E.json")).unwrap();
    let llama = checkpoint(folder.path(), case.weights_path(), &[("config.json", config_json(&case.architecture))]);
    let bundle = golden::exported(&llama, MethodSettings::Plain, Target::Portable, &Recipe::fp32()).unwrap();
    let said = built(bundle.dir(), &["--context", "200"]);
    assert_eq!(said["schema"], "accordion.build/1");
    let engines = PathBuf::from(said["engines"].as_str().unwrap());
    assert_eq!(engines, bundle.dir().join("engines/tensorrt-rtx-1.7.1"));
    let [plan, record] = ["decoder.plan", "engines.json"].map(|name| engines.join(name));
    let recorded: Value = serde_json::from_slice(&std::fs::read(record).unwrap()).unwrap();
    assert_eq!(recorded, said["record"]);
    let decoder = &recorded["engines"]["decoder"];
    assert_eq!(decoder["sha256"], sha256(&std::fs::read(&plan).unwrap()));
    assert_eq!(decoder["graph_sha256"], bundle.manifest().graphs["decoder"].sha256);
    assert_eq!(decoder["profiles"][1]["name"], "step");

    let refused = |more: &[&str], expected: &str| {
        let output = build(bundle.dir(), more);
        let message = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(2), "{message}");
        assert!(message.starts_with("error: ") && message.contains(expected), "{message}");
    };
    refused(&["--context", "200"], "--force");
    let checked = build(bundle.dir(), &["--check"]);
    assert_eq!(checked.status.code(), Some(0), "{}", String::from_utf8_lossy(&checked.stderr));
    std::fs::write(&plan, "another program").unwrap();
    refused(&["--check"], "--trust");
    built(bundle.dir(), &["--context", "200", "--force"]);
    assert_ne!(std::fs::read(&plan).unwrap(), b"another program");
}

/// A graph that the parser does not take: the error names the node, nothing is left behind.
#[test]
#[ignore = "needs NVIDIA's libraries: tests/tensorrt/prepare"]
fn a_graph_that_is_refused_leaves_nothing_behind() {
    let folder = tempfile::tempdir().unwrap();
    let case = HomerCase::open(&goldens().join("homer/homer_E.json")).unwrap();
    let llama = checkpoint(folder.path(), case.weights_path(), &[("config.json", config_json(&case.architecture))]);
    let bundle = golden::exported(&llama, MethodSettings::Plain, Target::Portable, &Recipe::fp32()).unwrap();
    // An operator that nobody has; of the same length, so that the file stays a model.
    let [graph, manifest] = ["decoder.onnx", "bundle.json"].map(|name| bundle.dir().join(name));
    let mut bytes = std::fs::read(&graph).unwrap();
    let (from, to): (&[u8], &[u8]) = (b"\x22\x0fRotaryEmbedding", b"\x22\x0fRotaryEmbeddinG");
    let at = bytes.windows(from.len()).position(|part| part == from).unwrap();
    bytes[at..at + to.len()].copy_from_slice(to);
    std::fs::write(&graph, &bytes).unwrap();
    let text = std::fs::read_to_string(&manifest).unwrap();
    let text = text.replace(&bundle.manifest().graphs["decoder"].sha256, &sha256(&bytes));
    std::fs::write(&manifest, text).unwrap();
    let output = build(bundle.dir(), &["--context", "200"]);
    let message = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(2), "{message}");
    assert!(message.starts_with("error: graph 'decoder'") && message.contains("RotaryEmbeddinG"), "{message}");
    let left: Vec<_> = std::fs::read_dir(bundle.dir().join("engines")).unwrap().collect();
    assert!(left.is_empty(), "{left:?}");
}

/// Grouped heads, a rotary scaling, and trees with and without layers in every node.
#[test]
#[ignore = "needs NVIDIA's libraries: tests/tensorrt/prepare"]
fn homers_graphs_become_engines() {
    for name in ["C", "E", "F"] {
        let case = HomerCase::open(&goldens().join(format!("homer/homer_{name}.json"))).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let files = [("config.json", config_json(&case.architecture))];
        let checkpoint = checkpoint(folder.path(), case.weights_path(), &files);
        let tree_heights = vec![0, 1, 2, 3];
        let method = MethodSettings::Homer { settings: case.settings, tree_heights, significance: None };
        let [prefix, context, suffix] =
            [&case.prefix_ids, &case.context_ids, &case.suffix_ids].map(|ids| ids.len().to_string());
        let lengths = ["--prefix", &prefix, "--context", &context, "--suffix", &suffix, "--width", "2"];
        // What differs between the cases is not what computes in other precisions.
        if name == "E" {
            check_precisions(&checkpoint, &method, &lengths, &[]);
        } else {
            check(&checkpoint, method, &lengths);
        }
    }
}

/// A Mamba as encoder, and one state and two for every layer.
#[test]
#[ignore = "needs NVIDIA's libraries: tests/tensorrt/prepare"]
fn rccs_graphs_become_engines() {
    for path in RccCase::find(&goldens().join("rcc")).unwrap() {
        let case = RccCase::open(&path).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let rcc = rcc_json(&case.model.encoder, case.settings);
        let files = [("config.json", architecture_json(&case.decoder)), (RCC_FILE, rcc)];
        let checkpoint = checkpoint(folder.path(), case.weights_path(), &files);
        let lengths = ["--context", "1000", "--suffix", "8", "--width", "4"];
        let refused = if case.name.starts_with("mamba") { &REFUSED_MAMBA[..] } else { &[] };
        check_precisions(&checkpoint, &MethodSettings::Rcc(case.settings), &lengths, refused);
    }
}

/// The released computation and the repaired one.
#[test]
#[ignore = "needs NVIDIA's libraries: tests/tensorrt/prepare"]
fn sharedllms_graphs_become_engines() {
    for path in SharedLlmCase::find(&goldens().join("sharedllm")).unwrap() {
        let case = SharedLlmCase::open(&path).unwrap();
        for quirks in [Quirks::Faithful, Quirks::Fixed] {
            let folder = tempfile::tempdir().unwrap();
            let settings = case.settings(quirks);
            let config = sharedllm_json(&case.architecture, &case.model, &settings);
            let checkpoint = checkpoint(folder.path(), case.weights_path(), &[("config.json", config)]);
            let context = case.context_ids.len().to_string();
            let (method, lengths) = (MethodSettings::SharedLlm(settings), ["--prefix", "0", "--context", &context]);
            if case.name == "q4" && quirks == Quirks::Faithful {
                check_precisions(&checkpoint, &method, &lengths, &REFUSED_SHAREDLLM);
            } else {
                check(&checkpoint, method, &lengths);
            }
        }
    }
}
