//! RCC's graphs and the reference in step, as `accordion verify` compares them.

use super::graphs::Graphs;
use accordion::goldens::RccCase;
use accordion::reference::rcc::Rcc;
use accordion::tensor::Tensor;
use accordion::verify::golden::rcc::bundle;
use accordion::verify::rcc::{RccInput, compare_rcc};
use accordion::verify::verdict::Verdict;
use accordion::verify::{Detail, Findings};
use accordion_graphs::plan::rcc::RccPlan;
use std::path::Path;

/// What is found where the reference reads its weights through `change`.
fn findings(name: &str, graphs: &Graphs, change: impl Fn(&str, Tensor) -> Tensor) -> Findings {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens/rcc");
    let case = RccCase::open(&folder.join(format!("{name}.cases.safetensors"))).unwrap();
    let workspace = tempfile::tempdir().unwrap();
    let bundle = bundle(&case, graphs.target, &graphs.recipe, workspace.path()).unwrap();
    let source = |name: &str| case.weight(name).map(|weight| change(name, weight));
    let reference = Rcc::load(&case.decoder, &case.model, case.settings, source).unwrap();
    let plans = case.runs.iter().map(|run| (run, RccPlan::new(run.lengths(), case.settings).unwrap()));
    let (run, plan) = plans.into_iter().find(|(_, plan)| plan.segments > 1).unwrap();
    let input = RccInput { plan: &plan, text: &run.text_ids, prompt: &run.prompt_ids, teacher: &[5, 9, 3] };
    let mut segments = 0;
    let mut on_progress = |done| segments = done;
    let findings =
        compare_rcc(&mut graphs.engines(&bundle).unwrap(), &reference, &input, Detail::All, &mut on_progress).unwrap();
    assert_eq!(segments, plan.segments);
    findings
}

#[test]
fn graphs_and_reference_agree_segment_by_segment() {
    for name in ["neox_r32", "qwen2_r8", "mamba_pairs"] {
        for graphs in [&Graphs::single()[0], &Graphs::single()[5]] {
            let findings = findings(name, graphs, |_, weight| weight);
            assert_eq!(findings.not_comparable, 0);
            for tap in &findings.taps {
                assert_eq!(tap.verdict, Verdict::Pass, "{name}: {}: {}", tap.name, tap.reason);
            }
            for expected in ["segments.0.encoder.states.1", "segments.1.maps.2", "segments.1.layers.0.injected"] {
                assert!(findings.taps.iter().any(|tap| tap.name == expected), "{name}: {expected}");
            }
            let last = ["prompt.logits", "teacher.layers.1.out", "teacher.logits", "cache.v.2"];
            assert!(last.iter().all(|name| findings.taps.iter().any(|tap| tap.name == *name)), "{name}");
        }
    }
}

#[test]
fn the_first_difference_is_where_the_fault_is() {
    let faulty = findings("qwen2_r8", &Graphs::single()[5], |name, weight| {
        if !name.ends_with("A_matrix.1.weight") {
            return weight;
        }
        let values = weight.to_f32().iter().map(|w| w * 1.01).collect();
        Tensor::from_f32(weight.shape(), values).unwrap()
    });
    let first = faulty.taps.iter().find(|tap| tap.verdict == Verdict::Fail).unwrap();
    assert_eq!(first.name, "segments.0.maps.2");
    assert!(faulty.taps.iter().any(|tap| tap.name == "teacher.logits" && tap.verdict == Verdict::Fail));
}
