//! Bundles in the hands of tools that are not ours; see `check.py` beside this file.

#![allow(clippy::unwrap_used)]

use accordion::bundle::{ExportOptions, MethodSettings, WeightStorage, export};
use accordion::checkpoint::{Checkpoint, config_json};
use accordion::goldens::HomerCase;
use accordion_graphs::blocks::Target;
use std::path::Path;
use std::process::Command;

/// Grouped heads, a rotary scaling, and trees with and without layers in every node.
#[test]
#[ignore = "needs Python with tests/stock/requirements.txt, named by ACCORDION_STOCK_PYTHON"]
fn stock_tools_accept_every_graph() {
    let python = std::env::var_os("ACCORDION_STOCK_PYTHON").unwrap();
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    for case in ["C", "E", "F"] {
        let case = HomerCase::open(&here.join(format!("tests/goldens/homer/homer_{case}.json"))).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let dir = folder.path().join("checkpoint");
        std::fs::create_dir(&dir).unwrap();
        std::fs::copy(case.weights_path(), dir.join("model.safetensors")).unwrap();
        std::fs::write(dir.join("config.json"), config_json(&case.architecture).to_string()).unwrap();
        let checkpoint = Checkpoint::open(&dir).unwrap();
        let bundles = [Target::Portable, Target::OrtCpu].map(|target| {
            let out = folder.path().join(format!("{target:?}"));
            let method =
                MethodSettings::Homer { settings: case.settings, tree_heights: vec![0, 1, 2, 3], significance: None };
            let options = ExportOptions { method, target, weights: WeightStorage::Link, force: false };
            export(&checkpoint, &out, &options).unwrap();
            out
        });
        let status = Command::new(&python).arg(here.join("tests/stock/check.py")).args(&bundles).status().unwrap();
        assert!(status.success(), "golden {}: check.py says no", case.name);
    }
}
