//! Graphs whose taps are outputs, through NVIDIA's parser and builder.

use super::goldens;
use super::graphs::built;
use accordion::bundle::Bundle;
use accordion::goldens::{HomerCase, RccCase, SharedLlmCase};
use accordion::precision::Recipe;
use accordion::verify::golden;
use accordion_graphs::blocks::Target;
use accordion_graphs::plan::sharedllm::Quirks;

fn check(bundle: &Bundle, lengths: &[&str]) {
    let said = built(bundle.dir(), &[lengths, &["--taps"]].concat());
    assert_eq!(said["record"]["taps"], true);
    let graphs = &bundle.manifest().graphs;
    assert_eq!(said["record"]["engines"].as_object().unwrap().len(), graphs.len());
}

#[test]
#[ignore = "needs NVIDIA's libraries: tests/tensorrt/prepare"]
fn every_tap_may_be_an_output() {
    let (portable, fp32) = (Target::Portable, Recipe::fp32());
    let folder = tempfile::tempdir().unwrap();
    let case = HomerCase::open(&goldens().join("homer/homer_E.json")).unwrap();
    let plan = golden::homer::plan(&case).unwrap();
    let bundle = golden::homer::bundle(&case, &plan, portable, &fp32, folder.path()).unwrap();
    let [prefix, context, suffix] =
        [&case.prefix_ids, &case.context_ids, &case.suffix_ids].map(|ids| ids.len().to_string());
    check(&bundle, &["--prefix", &prefix, "--context", &context, "--suffix", &suffix, "--plain"]);

    let folder = tempfile::tempdir().unwrap();
    let case = RccCase::open(&goldens().join("rcc/neox_r32.config.json")).unwrap();
    check(&golden::rcc::bundle(&case, portable, &fp32, folder.path()).unwrap(), &["--context", "1000"]);

    let folder = tempfile::tempdir().unwrap();
    let paths = SharedLlmCase::find(&goldens().join("sharedllm")).unwrap();
    let case = SharedLlmCase::open(&paths[0]).unwrap();
    let (weights, context) = (case.weights_path(), case.context_ids.len().to_string());
    let bundle = golden::sharedllm::bundle(&case, weights, Quirks::Fixed, portable, &fp32, folder.path()).unwrap();
    check(&bundle, &["--prefix", "0", "--context", &context]);
}
