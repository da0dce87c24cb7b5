//! Bundles in the hands of tools that are not ours; see `check.py` beside this file.

#![allow(clippy::unwrap_used)]

mod float16;

use accordion::bundle::{ExportOptions, MethodSettings, WeightStorage, export};
use accordion::checkpoint::{Checkpoint, RCC_FILE, architecture_json, config_json, rcc_json, sharedllm_json};
use accordion::goldens::{HomerCase, RccCase, SharedLlmCase};
use accordion::precision::Recipe;
use accordion_graphs::blocks::Target;
use accordion_graphs::plan::sharedllm::Quirks;
use std::env::consts::{DLL_PREFIX, DLL_SUFFIX};
use std::path::{Path, PathBuf};
use std::process::Command;

fn goldens() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens")
}

/// Our operators as a shared library, which cargo builds beside the tests.
fn library() -> PathBuf {
    std::env::current_exe().unwrap().with_file_name(format!("{DLL_PREFIX}accordion_operators{DLL_SUFFIX}"))
}

/// Exports the checkpoint in `dir` for every target, beside it, and has the bundles checked with our operators and without.
fn check(what: &str, dir: &Path, method: &MethodSettings) {
    let python = std::env::var_os("ACCORDION_STOCK_PYTHON").unwrap();
    let checkpoint = Checkpoint::open(dir).unwrap();
    let bundles = [Target::Portable, Target::OrtCpu].map(|target| {
        let out = dir.with_file_name(format!("{target:?}"));
        let options = ExportOptions {
            method: method.clone(),
            target,
            weights: WeightStorage::Link,
            recipe: Recipe::fp32(),
            force: false,
        };
        export(&checkpoint, &out, &options).unwrap();
        out
    });
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/stock/check.py");
    let status = Command::new(&python).arg(script).arg("--library").arg(library()).args(&bundles).status().unwrap();
    assert!(status.success(), "golden {what}: check.py says no");
}

/// Grouped heads, a rotary scaling, and trees with and without layers in every node.
#[test]
#[ignore = "needs Python with tests/stock/requirements.txt, named by ACCORDION_STOCK_PYTHON"]
fn stock_tools_accept_every_graph_of_homer() {
    for case in ["C", "E", "F"] {
        let case = HomerCase::open(&goldens().join(format!("homer/homer_{case}.json"))).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let dir = folder.path().join("checkpoint");
        std::fs::create_dir(&dir).unwrap();
        std::fs::copy(case.weights_path(), dir.join("model.safetensors")).unwrap();
        std::fs::write(dir.join("config.json"), config_json(&case.architecture).to_string()).unwrap();
        let method =
            MethodSettings::Homer { settings: case.settings, tree_heights: vec![0, 1, 2, 3], significance: None };
        check(&case.name, &dir, &method);
    }
}

/// Both families of decoders, a Mamba as encoder, one state and two for every layer.
#[test]
#[ignore = "needs Python with tests/stock/requirements.txt, named by ACCORDION_STOCK_PYTHON"]
fn stock_tools_accept_every_graph_of_rcc() {
    for path in RccCase::find(&goldens().join("rcc")).unwrap() {
        let case = RccCase::open(&path).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let dir = folder.path().join("checkpoint");
        std::fs::create_dir(&dir).unwrap();
        std::fs::copy(case.weights_path(), dir.join("model.safetensors")).unwrap();
        std::fs::write(dir.join("config.json"), architecture_json(&case.decoder).to_string()).unwrap();
        std::fs::write(dir.join(RCC_FILE), rcc_json(&case.model.encoder, case.settings).to_string()).unwrap();
        check(&case.name, &dir, &MethodSettings::Rcc(case.settings));
    }
}

/// Halves that similarity chooses and that are fixed, nodes that do not divide, a mask; as released and as repaired.
#[test]
#[ignore = "needs Python with tests/stock/requirements.txt, named by ACCORDION_STOCK_PYTHON"]
fn stock_tools_accept_every_graph_of_sharedllm() {
    for path in SharedLlmCase::find(&goldens().join("sharedllm")).unwrap() {
        let case = SharedLlmCase::open(&path).unwrap();
        for quirks in [Quirks::Faithful, Quirks::Fixed] {
            let settings = case.settings(quirks);
            let folder = tempfile::tempdir().unwrap();
            let dir = folder.path().join("checkpoint");
            std::fs::create_dir(&dir).unwrap();
            std::fs::copy(case.weights_path(), dir.join("model.safetensors")).unwrap();
            let config = sharedllm_json(&case.architecture, &case.model, &settings);
            std::fs::write(dir.join("config.json"), config.to_string()).unwrap();
            check(&case.name, &dir, &MethodSettings::SharedLlm(settings));
        }
    }
}
