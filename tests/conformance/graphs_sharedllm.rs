//! SharedLLM's exported graphs where there is no golden case.

use super::Implementation;
use super::compare::{Comparison, SINGLE, Verdict};
use super::graphs::Graphs;
use super::reference::Reference;
use accordion::bundle::MethodSettings;
use accordion::checkpoint::config_json;
use accordion::goldens::SharedLlmCase;
use accordion::pipeline::decode::Sequence;
use accordion::pipeline::sharedllm::{Context, inject};
use accordion::taps::NoTaps;
use accordion::tensor::Tensor;
use accordion::verify::golden::sharedllm::{bundle, plan};
use accordion::verify::golden::{checkpoint, exported};
use accordion_graphs::plan::sharedllm::{Keep, Quirks};
use safetensors::SafeTensors;
use safetensors::tensor::TensorView;
use std::path::Path;

fn case(name: &str) -> SharedLlmCase {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens/sharedllm");
    SharedLlmCase::open(&folder.join(format!("case_{name}.json"))).unwrap()
}

/// Cross attention that adds nothing leaves the model what it was, to the last bit.
#[test]
fn a_context_without_output_projections_changes_nothing() {
    let case = case("q4");
    let bytes = std::fs::read(case.weights_path()).unwrap();
    let weights = SafeTensors::deserialize(&bytes).unwrap();
    let silent = |name: &str| name.ends_with("cross_attn.o_proj.weight");
    let views = weights.tensors().into_iter().map(|(name, view)| {
        let data = if silent(&name) { vec![0; view.data().len()] } else { view.data().to_vec() };
        (name, view.dtype(), view.shape().to_vec(), data)
    });
    let views: Vec<_> = views.collect();
    assert_eq!(views.iter().filter(|(name, ..)| silent(name)).count(), case.model.injected_layers);
    let folder = tempfile::tempdir().unwrap();
    let silenced = folder.path().join("silenced.safetensors");
    let views = views
        .iter()
        .map(|(name, dtype, shape, data)| (name.as_str(), TensorView::new(*dtype, shape.clone(), data).unwrap()));
    safetensors::serialize_to_file(views, None, &silenced).unwrap();

    for graphs in Graphs::single() {
        let folder = tempfile::tempdir().unwrap();
        let shared = bundle(&case, &silenced, Quirks::Faithful, graphs.target, &graphs.recipe, folder.path()).unwrap();
        let mut engines = graphs.engines(&shared).unwrap();
        let (ids, running) = (&case.context_ids, &case.running_ids);
        let context = Context { ids, mask: None, running, query_index: running.len() - 1 };
        let plan = plan(&case, Quirks::Faithful).unwrap();
        let injected = inject(&mut engines, &plan, context, 1, &mut NoTaps, &mut |_| {}).unwrap();
        let mut sequence = Sequence::attending_to(&engines, injected, running.len()).unwrap();
        let with = sequence.forward(&mut engines, running, running.len()).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let config = config_json(&case.architecture);
        let plain = checkpoint(folder.path(), &silenced, &[("config.json", config)]).unwrap();
        let plain = exported(&plain, MethodSettings::Plain, graphs.target, &graphs.recipe).unwrap();
        let mut engines = graphs.engines(&plain).unwrap();
        let mut sequence = Sequence::new(&engines, running.len()).unwrap();
        let without = sequence.forward(&mut engines, running, running.len()).unwrap();
        assert_eq!(with.to_f32(), without.to_f32());
    }
}

/// The halves that are compared and the leaves that are joined are those of one entry.
#[test]
fn entries_of_a_batch_are_contexts_of_their_own() {
    let case = case("q4");
    for graphs in Graphs::single() {
        let folder = tempfile::tempdir().unwrap();
        let bundle =
            bundle(&case, case.weights_path(), Quirks::Faithful, graphs.target, &graphs.recipe, folder.path()).unwrap();
        let mut engines = graphs.engines(&bundle).unwrap();
        let ids = |ids: &[u32]| ids.iter().copied().map(i64::from).collect::<Vec<_>>();
        let contexts = [ids(&case.context_ids), ids(&case.context_ids).into_iter().rev().collect()];
        let runnings = [ids(&case.running_ids), ids(&case.running_ids).into_iter().rev().collect()];
        let mut run = |entries: std::ops::Range<usize>| {
            let count = entries.len();
            let [context, running] = [&contexts, &runnings].map(|all| all[entries.clone()].concat());
            let one = |value: usize| Tensor::from_i64([1], vec![value as i64]).unwrap();
            let tensor = |shape: &[usize], values| Tensor::from_i64(shape, values).unwrap();
            let inputs = [
                ("context_ids", tensor(&[count, case.chunks(), case.chunk_len], context)),
                ("running_ids", tensor(&[count, case.running_ids.len()], running)),
                ("query_index", one(case.query_index)),
                ("first_chunk", one(0)),
                ("num_chunks", one(case.chunks())),
            ];
            let inputs: Vec<(&str, &Tensor)> = inputs.iter().map(|(name, tensor)| (*name, tensor)).collect();
            let outputs = ["injected.1.key", "injected.1.value", "injected.1.single_key"];
            let results = engines.get("compress", &[]).unwrap().run(&inputs, &mut [], &outputs).unwrap();
            results.iter().map(Tensor::to_f32).collect::<Vec<_>>()
        };
        let (both, alone) = (run(0..2), [run(0..1), run(1..2)]);
        for (output, both) in both.iter().enumerate() {
            let separate = [alone[0][output].as_slice(), &alone[1][output]].concat();
            let worst = both.iter().zip(&separate).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(both.len() == separate.len() && worst <= 1e-5, "output {output} is off by {worst}");
        }
    }
}

/// Case q4 with other settings.
fn variations() -> Vec<(&'static str, SharedLlmCase)> {
    let vary = |name, change: fn(&mut SharedLlmCase)| {
        let mut case = case("q4");
        change(&mut case);
        (name, case)
    };
    vec![
        vary("one layer", |case| case.model.injected_layers = 1),
        vary("one layer, always the right half", |case| {
            case.model.injected_layers = 1;
            case.retrieval = false;
        }),
        vary("a tree of its leaves", |case| {
            case.tree_depth = 1;
            case.retrieval = false;
        }),
        vary("a token over in every leaf's parent", |case| {
            case.chunk_len = 60;
            case.context_ids.truncate(4 * 60);
            case.context_mask.truncate(4 * 60);
        }),
        vary("everything kept", |case| case.keep = Keep::All),
        vary("a running text of one token", |case| {
            case.running_ids.truncate(1);
            case.query_index = 0;
        }),
        vary("a running text as long as there are chunks", |case| {
            case.running_ids.truncate(4);
            case.query_index = 3;
        }),
    ]
}

/// Chunks of one token over and over: their halves are equal, and of equals the left one is split further.
#[test]
fn of_equal_halves_the_left_one_is_split() {
    let mut case = case("q4");
    case.context_ids.fill(7);
    for quirks in [Quirks::Faithful, Quirks::Fixed] {
        let expected = Reference.sharedllm(&case, quirks).unwrap();
        for mut graphs in Graphs::single() {
            let found = graphs.sharedllm(&case, quirks).unwrap();
            let mut ties = 0;
            for w in 0..case.tree_depth - 1 {
                let similarity = found[&format!("tree.d{w}.sim")].to_f32();
                let chosen = found[&format!("tree.d{w}.chosen")].as_i64().unwrap();
                for (node, &chosen) in chosen.iter().enumerate() {
                    let [left, right] = match quirks {
                        Quirks::Faithful => [2 * node, 2 * node + 1],
                        Quirks::Fixed => [node, case.chunks() + node],
                    };
                    if similarity[left].to_bits() == similarity[right].to_bits() {
                        ties += 1;
                        assert_eq!(chosen, 0, "{quirks:?}, {}", graphs.name());
                    }
                }
            }
            assert!(ties > 0, "{quirks:?}, {}", graphs.name());
            // Whichever it is, what is kept is the same.
            let mut result = Comparison::new("");
            for name in ["kv.layer1.key", "kv.layer1.value", "prefill.logits", "decode.3.logits"] {
                result.compare(name, &expected[name], &found, SINGLE);
            }
            let findings: Vec<_> = result.findings().collect();
            assert_eq!(result.verdict(), Verdict::Pass, "{quirks:?}, {}: {findings:?}", graphs.name());
        }
    }
}

/// What no golden has: the graphs and the reference agree.
#[test]
fn other_settings_agree_with_the_reference() {
    for (what, case) in variations() {
        for quirks in [Quirks::Faithful, Quirks::Fixed] {
            let expected = Reference.sharedllm(&case, quirks).unwrap();
            for mut graphs in Graphs::single() {
                let found = graphs.sharedllm(&case, quirks).unwrap();
                let mut result = Comparison::new("");
                // The released code lists the two nodes of a tree without others apart.
                let apart = |name: &str| case.tree_depth == 1 && name.starts_with("kv.");
                // The graphs are fed what the golden's model chose.
                let is_fed = |name: &str| name.starts_with("teacher_forced") || name.ends_with(".input_id");
                let shared = |name: &str| found.contains_key(name) && !apart(name) && !is_fed(name);
                for (name, expected) in expected.iter().filter(|(name, _)| shared(name)) {
                    result.compare(name, expected, &found, SINGLE);
                }
                let findings: Vec<_> = result.findings().collect();
                assert_eq!(result.verdict(), Verdict::Pass, "{what}, {quirks:?}, {}: {findings:?}", graphs.name());
                let needed = ["cross.layer0.o", "prefill.logits", "decode.3.logits"];
                assert!(needed.iter().all(|name| expected.contains_key(*name) && shared(name)), "{what}");
            }
        }
    }
}
