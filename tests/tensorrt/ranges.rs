//! Optimization profiles, against what a plan will feed its graphs.

use super::goldens;
use accordion::goldens::HomerCase;
use accordion::pipeline::stepwise::{EXPECTED_ROWS, room_for};
use accordion::precision::Recipe;
use accordion::tensorrt::ranges::{Extent, InputRange, Workload, profiles};
use accordion::verify::golden;
use accordion_graphs::blocks::Target;
use accordion_graphs::methods::homer::graph_name;
use accordion_graphs::plan::sharedllm::ChunkPolicy;
use std::path::Path;

fn holds(extent: Extent, length: usize) -> bool {
    (extent.min..=extent.max).contains(&length) && (extent.min..=extent.max).contains(&extent.opt)
}

fn of<'r>(ranges: &'r [InputRange], input: &str) -> &'r InputRange {
    ranges.iter().find(|range| range.name == input).unwrap()
}

/// Every node of the plans that the authors' code ran fits the profiles of its graph.
#[test]
fn homers_profiles_hold_every_node_of_the_plan() {
    let mut nodes = 0;
    for name in ["C", "D", "E", "F", "G"] {
        let case = HomerCase::open(&goldens().join(format!("homer/homer_{name}.json"))).unwrap();
        let plan = golden::homer::plan(&case).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let bundle = golden::homer::bundle(&case, &plan, Target::Portable, &Recipe::fp32(), folder.path()).unwrap();
        let lengths = plan.lengths;
        let workload = Workload { lengths, new_tokens: 4, width: 2, policy: ChunkPolicy::FineTuning, plain: false };
        workload.check(bundle.manifest()).unwrap();
        let ranges = |graph: &str| -> Vec<Vec<InputRange>> {
            let signature = bundle.signature(graph).unwrap();
            let all = profiles(bundle.manifest(), graph, &workload).unwrap();
            all.iter().map(|profile| profile.inputs(graph, signature).unwrap()).collect()
        };
        for node in &plan.nodes {
            let [ranges] = &ranges(&graph_name(node.height, &node.layers))[..] else { panic!("one profile") };
            match node.children {
                None => assert!(holds(of(ranges, "input_ids").shape[1], node.in_len), "{name}: {node:?}"),
                Some(children) => {
                    for (side, child) in ["left", "right"].iter().zip(children) {
                        let length = plan.nodes[child].out_len;
                        assert!(holds(of(ranges, &format!("{side}.hidden")).shape[1], length), "{name}: {node:?}");
                        assert!(holds(of(ranges, &format!("{side}.kv")).shape[4], length), "{name}: {node:?}");
                    }
                }
            }
            for (input, value) in [("prefix_length", lengths.prefix), ("suffix_length", lengths.suffix)] {
                assert!(holds(of(ranges, input).value.unwrap(), value), "{name}, {input}: {node:?}");
            }
            if !node.layers.is_empty() {
                assert!(holds(of(ranges, "keep").value.unwrap(), node.out_len), "{name}: {node:?}");
                assert!(holds(of(ranges, "significance_bias").shape[0], plan.max_distance() + 1), "{name}: {node:?}");
            }
            nodes += 1;
        }
        let [read, step] = &ranges("decoder")[..] else { panic!("two profiles") };
        let past = plan.root().out_len;
        for profile in [read, step] {
            assert!(holds(of(profile, "past_key_values.0.key").shape[2], past + 4), "{name}");
        }
        assert!(holds(of(read, "input_ids").shape[1], lengths.suffix), "{name}");
        assert_eq!(of(step, "input_ids").shape[1], Extent { min: 1, opt: 1, max: 1 });
        // Room for whatever is expected behind whatever was decoded, and for half as much more.
        let [step] = &ranges("decoder_step")[..] else { panic!("one profile") };
        for length in [past, past + lengths.suffix + 4] {
            for capacity in [room_for(length), room_for(length + EXPECTED_ROWS), room_for(length + length / 2)] {
                assert!(holds(of(step, "past_key_values.0.key").shape[2], capacity), "{name}: {capacity}");
            }
        }
    }
    assert!(nodes > 20, "{nodes}");
}

/// What has no plan is refused before anything is built.
#[test]
fn a_workload_without_a_plan_is_refused() {
    let case = HomerCase::open(&goldens().join("homer/homer_E.json")).unwrap();
    let plan = golden::homer::plan(&case).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let bundle = golden::homer::bundle(&case, &plan, Target::Portable, &Recipe::fp32(), folder.path()).unwrap();
    let workload =
        Workload { lengths: plan.lengths, new_tokens: 4, width: 1, policy: ChunkPolicy::FineTuning, plain: false };
    let mut long = workload;
    long.lengths.suffix = 10_000;
    assert!(long.check(bundle.manifest()).unwrap_err().to_string().contains("prefix + suffix"));
    let mut endless = workload;
    endless.lengths.context = usize::MAX;
    assert!(endless.check(bundle.manifest()).unwrap_err().to_string().contains("prompt length"));
    let idle = Workload { width: 0, ..workload };
    assert!(idle.check(bundle.manifest()).unwrap_err().to_string().contains("width"));
    assert!(Path::new(bundle.dir()).join("engines").metadata().is_err());
}
