//! Every graph of every method through the ONNX parser and the builder of TensorRT-RTX, by `accordion build`.

use super::{goldens, prepared};
use accordion::bundle::{ExportOptions, MethodSettings, WeightStorage, export};
use accordion::checkpoint::{Checkpoint, RCC_FILE, architecture_json, config_json, rcc_json};
use accordion::goldens::{HomerCase, RccCase, SharedLlmCase};
use accordion::precision::Recipe;
use accordion::tensorrt::engines::sha256;
use accordion::verify::golden;
use accordion_graphs::blocks::Target;
use accordion_graphs::plan::sharedllm::Quirks;
use accordion_graphs::precision::Precision;
use serde_json::Value;
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
    check(&llama, MethodSettings::Plain, &["--context", "200"]);
    let folder = tempfile::tempdir().unwrap();
    let case = RccCase::open(&goldens().join("rcc/neox_r32.config.json")).unwrap();
    let neox = checkpoint(folder.path(), case.weights_path(), &[("config.json", architecture_json(&case.decoder))]);
    check(&neox, MethodSettings::Plain, &["--context", "200"]);
}

/// Weights in 8 and 4 bits, and matrix products in 8-bit integers. The builder takes quantized constants in front of
/// `DequantizeLinear` only, and embeddings are looked up first: they stay as they are.
#[test]
#[ignore = "needs NVIDIA's libraries: tests/tensorrt/prepare"]
fn quantized_graphs_become_engines() {
    for precision in [Precision::WeightInt8, Precision::WeightInt4, Precision::Int8PerToken] {
        let folder = tempfile::tempdir().unwrap();
        let case = HomerCase::open(&goldens().join("homer/homer_E.json")).unwrap();
        let llama = checkpoint(folder.path(), case.weights_path(), &[("config.json", config_json(&case.architecture))]);
        let bundle = folder.path().join("bundle");
        let options = ExportOptions {
            method: MethodSettings::Plain,
            target: Target::Portable,
            weights: WeightStorage::Link,
            recipe: Recipe { keep: vec!["embed".to_owned()], ..Recipe::of(precision) },
            force: false,
        };
        export(&Checkpoint::open(llama).unwrap(), &bundle, &options).unwrap();
        built(&bundle, &["--context", "200"]);
    }
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
        check(&checkpoint, method, &lengths);
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
        check(&checkpoint, MethodSettings::Rcc(case.settings), &["--context", "1000", "--suffix", "8", "--width", "4"]);
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
            let bundle = golden::sharedllm::bundle(
                &case,
                case.weights_path(),
                quirks,
                Target::Portable,
                &Recipe::fp32(),
                folder.path(),
            );
            let context = case.context_ids.len().to_string();
            built(bundle.unwrap().dir(), &["--prefix", "0", "--context", &context]);
        }
    }
}
