//! Bundles of 16-bit precisions in the hands of tools that are not ours; see `float16.py` beside this file.

use super::goldens;
use accordion::bundle::Bundle;
use accordion::goldens::{HomerCase, RccCase, SharedLlmCase};
use accordion::precision::Recipe;
use accordion::verify::golden;
use accordion_graphs::blocks::Target;
use accordion_graphs::plan::sharedllm::Quirks;
use accordion_graphs::precision::Precision;
use std::path::Path;
use std::process::Command;

/// Writes a model in every 16-bit precision for every target, and has the bundles checked.
fn check(bundle: impl Fn(Target, &Recipe, &Path) -> Bundle) {
    let python = std::env::var_os("ACCORDION_STOCK_PYTHON").unwrap();
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/stock/float16.py");
    for (precision, emulated, target) in [
        (Precision::Fp16, false, Target::Portable),
        (Precision::Bf16, false, Target::Portable),
        (Precision::Bf16, true, Target::Portable),
        (Precision::Fp16, false, Target::OrtCpu),
        (Precision::Bf16, false, Target::OrtCpu),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let bundle = bundle(target, &Recipe { emulated, ..Recipe::of(precision) }, folder.path());
        let status = Command::new(&python).arg(&script).arg(bundle.dir()).status().unwrap();
        assert!(status.success(), "{precision} for {target:?}, emulated {emulated}: float16.py says no");
    }
}

/// Grouped heads, a rotary scaling, and nodes without layers.
#[test]
#[ignore = "needs Python with tests/stock/requirements.txt, named by ACCORDION_STOCK_PYTHON"]
fn stock_tools_accept_every_graph_of_homer_in_16_bits() {
    for case in ["C", "E", "F"] {
        let case = HomerCase::open(&goldens().join(format!("homer/homer_{case}.json"))).unwrap();
        let plan = golden::homer::plan(&case).unwrap();
        check(|target, recipe, folder| golden::homer::bundle(&case, &plan, target, recipe, folder).unwrap());
    }
}

/// Both families of decoders, and a Mamba as encoder.
#[test]
#[ignore = "needs Python with tests/stock/requirements.txt, named by ACCORDION_STOCK_PYTHON"]
fn stock_tools_accept_every_graph_of_rcc_in_16_bits() {
    for path in RccCase::find(&goldens().join("rcc")).unwrap() {
        let case = RccCase::open(&path).unwrap();
        check(|target, recipe, folder| golden::rcc::bundle(&case, target, recipe, folder).unwrap());
    }
}

/// Halves that similarity chooses, a mask; as released and as repaired.
#[test]
#[ignore = "needs Python with tests/stock/requirements.txt, named by ACCORDION_STOCK_PYTHON"]
fn stock_tools_accept_every_graph_of_sharedllm_in_16_bits() {
    for path in SharedLlmCase::find(&goldens().join("sharedllm")).unwrap() {
        let case = SharedLlmCase::open(&path).unwrap();
        for quirks in [Quirks::Faithful, Quirks::Fixed] {
            check(|target, recipe, folder| {
                golden::sharedllm::bundle(&case, case.weights_path(), quirks, target, recipe, folder).unwrap()
            });
        }
    }
}
