//! What travels between host and device while a context is compressed: ids, positions and expected scores there, logits and a
//! tree's positions back, and nothing between the graphs. Under the emulated driver, as in [`super::execution`].

use super::double::{Build, Counts, Machine, build, portable};
use super::execution::workload;
use super::goldens;
use accordion::bundle::Bundle;
use accordion::goldens::{HomerCase, RccCase, SharedLlmCase};
use accordion::pipeline::question::with_suffix;
use accordion::pipeline::rcc::read_slots;
use accordion::pipeline::sharedllm::{Context, inject, read};
use accordion::pipeline::{ContextState, Engines, homer, plain};
use accordion::precision::Recipe;
use accordion::taps::NoTaps;
use accordion::tensor::Tensor;
use accordion::verify::golden;
use accordion_graphs::blocks::Target;
use accordion_graphs::plan::PromptLengths;
use accordion_graphs::plan::rcc::RccPlan;
use accordion_graphs::plan::sharedllm::Quirks;
use tempfile::tempdir;

const WIDTHS: [usize; 3] = [1, 2, usize::MAX];

fn keys_and_values(state: &ContextState) -> Vec<&[u8]> {
    let injected = state.injected.iter().flat_map(|injected| &injected.layers);
    let injected = injected.flat_map(|layer| [Some(&layer.key), layer.single_key.as_ref(), Some(&layer.value)]);
    state.cache.iter().flatten().chain(injected.flatten()).map(Tensor::bytes).collect()
}

/// What `compute` copies on engines of `bundle`, which give what ONNX Runtime gives.
fn copied(
    bundle: &Bundle,
    lengths: PromptLengths,
    what: &str,
    compute: impl Fn(&mut Engines<'_>) -> ContextState,
) -> Counts {
    let machine = Machine::open();
    build(bundle, Build { workload: workload(lengths), taps: false, any_length: true });
    let expected = compute(&mut Engines::new(bundle, Box::new(portable(bundle))));
    let before = machine.counts();
    let found = compute(&mut machine.engines(bundle));
    let copied = machine.counts() - before;
    assert!(found.logits == expected.logits, "{what}");
    assert!(keys_and_values(&found) == keys_and_values(&expected), "{what}");
    drop(found);
    assert_eq!(machine.live(), 0, "{what}");
    copied
}

#[test]
#[ignore = "needs a C++ compiler"]
fn the_nodes_of_a_tree_are_joined_on_the_device() {
    for name in ["E", "F"] {
        let case = HomerCase::open(&goldens().join(format!("homer/homer_{name}.json"))).unwrap();
        let plan = golden::homer::plan(&case).unwrap();
        let folder = tempdir().unwrap();
        let bundle = golden::homer::bundle(&case, &plan, Target::Portable, &Recipe::fp32(), folder.path()).unwrap();
        let bias: Vec<&[f32]> = case.bias.iter().map(Vec::as_slice).collect();
        let prompt = homer::Prompt { prefix: &case.prefix_ids, context: &case.context_ids, suffix: &case.suffix_ids };
        let leaves = plan.nodes.iter().filter(|node| node.children.is_none());
        let tokens: usize = leaves.map(|leaf| leaf.in_len).sum();
        for width in WIDTHS {
            let what = format!("{name}, width {width}");
            let copied = copied(&bundle, plan.lengths, &what, |engines| {
                homer::compress(engines, &plan, prompt, &bias, width, &mut NoTaps, &mut |_| {}).unwrap()
            });
            let root = plan.nodes.last().unwrap();
            let logits = 4 * case.architecture.vocab_size;
            assert_eq!(copied.to_host, (logits + 8 * root.out_len) as u64, "{what}");
            // Ids and positions of the leaves, and of every call at most a row of expected scores.
            let scores = (copied.to_device as usize).checked_sub(16 * tokens).unwrap();
            let row = 4 * bias.iter().map(|row| row.len()).max().unwrap().max(plan.max_distance() + 1);
            assert!(scores <= row * plan.nodes.len(), "{what}: {scores} bytes, a row has {row}");
        }
    }
}

#[test]
#[ignore = "needs a C++ compiler"]
fn slots_are_appended_on_the_device() {
    for name in ["neox_r32", "mamba_pairs"] {
        let case = RccCase::open(&goldens().join(format!("rcc/{name}.cases.safetensors"))).unwrap();
        let plans = case.runs.iter().map(|run| (run, RccPlan::new(run.lengths(), case.settings).unwrap()));
        let (run, plan) = plans.max_by_key(|(_, plan)| plan.segments).unwrap();
        assert!(plan.segments > 1, "{name}");
        let folder = tempdir().unwrap();
        let bundle = golden::rcc::bundle(&case, Target::Portable, &Recipe::fp32(), folder.path()).unwrap();
        for width in WIDTHS {
            let what = format!("{name}, width {width}");
            let copied = copied(&bundle, run.lengths(), &what, |engines| {
                let mut slots = read_slots(engines, &plan, &run.text_ids, width, &mut NoTaps, &mut |_| {}).unwrap();
                let logits = slots.read(engines, &run.prompt_ids, |_| {}).unwrap();
                slots.into_state(logits).unwrap()
            });
            assert_eq!(copied.to_host, 4 * case.decoder.vocab_size() as u64, "{what}");
            let read = plan.segments * plan.settings.window;
            assert_eq!(copied.to_device as usize, 8 * (read + plan.slots) + 16 * run.prompt_ids.len(), "{what}");
        }
    }
}

#[test]
#[ignore = "needs a C++ compiler"]
fn what_chunks_inject_is_joined_on_the_device() {
    for (name, quirks) in [("q4", Quirks::Faithful), ("q4", Quirks::Fixed), ("lm3", Quirks::Fixed)] {
        let case = SharedLlmCase::open(&goldens().join(format!("sharedllm/case_{name}.json"))).unwrap();
        let plan = golden::sharedllm::plan(&case, quirks).unwrap();
        let (folder, weights) = (tempdir().unwrap(), case.weights_path());
        let recipe = Recipe::fp32();
        let bundle =
            golden::sharedllm::bundle(&case, weights, quirks, Target::Portable, &recipe, folder.path()).unwrap();
        let (ids, running) = (&case.context_ids, &case.running_ids);
        let lengths = PromptLengths { prefix: 0, context: ids.len(), suffix: running.len() };
        for width in WIDTHS {
            let what = format!("{name}, {quirks:?}, width {width}");
            let copied = copied(&bundle, lengths, &what, |engines| {
                let context = Context { ids, mask: None, running, query_index: case.query_index };
                let injected = inject(engines, &plan, context, width, &mut NoTaps, &mut |_| {}).unwrap();
                read(engines, injected, running, |_| {}).unwrap()
            });
            assert_eq!(copied.to_host, 4 * case.architecture.vocab_size as u64, "{what}");
            // The running text goes to every call where it decides what is kept.
            let calls = (copied.to_device as usize).checked_sub(8 * ids.len() + 16 * running.len()).unwrap();
            assert!(calls.is_multiple_of(8 * running.len()) && calls <= 8 * running.len() * plan.chunks, "{what}");
            assert!(case.retrieval || calls == 0, "{what}");
        }
    }
}

#[test]
#[ignore = "needs a C++ compiler"]
fn another_question_takes_rows_off_on_the_device() {
    let case = HomerCase::open(&goldens().join("homer/homer_E.json")).unwrap();
    let (plan, folder) = (golden::homer::plan(&case).unwrap(), tempdir().unwrap());
    let bundle = golden::homer::bundle(&case, &plan, Target::Portable, &Recipe::fp32(), folder.path()).unwrap();
    let copied = copied(&bundle, plan.lengths, "question", |engines| {
        let state = plain::prefill(engines, &case.context_ids[..20], |_| {}).unwrap();
        with_suffix(engines, &state, 4, &case.suffix_ids).unwrap()
    });
    assert_eq!(copied.to_host, 2 * 4 * case.architecture.vocab_size as u64);
    assert_eq!(copied.to_device, 16 * (20 + case.suffix_ids.len() as u64));
}
