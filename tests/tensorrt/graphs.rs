//! Every graph of every method through the ONNX parser and the builder of TensorRT-RTX, by `accordion build`.

use super::prepared;
use accordion::bundle::MethodSettings;
use accordion::checkpoint::{RCC_FILE, architecture_json, config_json, rcc_json};
use accordion::goldens::{HomerCase, RccCase, SharedLlmCase};
use accordion::verify::golden;
use accordion_graphs::blocks::Target;
use accordion_graphs::plan::sharedllm::Quirks;
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

fn goldens() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens")
}

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
fn built(bundle: &Path, more: &[&str]) -> Value {
    let output = build(bundle, more);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(0), "{}: {errors}", bundle.display());
    serde_json::from_slice(&output.stdout).unwrap()
}

fn check(checkpoint: &Path, method: MethodSettings, more: &[&str]) {
    let bundle = golden::exported(checkpoint, method, Target::Portable).unwrap();
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
            let bundle = golden::sharedllm::bundle(&case, case.weights_path(), quirks, Target::Portable, folder.path());
            let context = case.context_ids.len().to_string();
            built(bundle.unwrap().dir(), &["--prefix", "0", "--context", &context]);
        }
    }
}
