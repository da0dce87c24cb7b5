//! Measuring small bundles: everything but the times themselves is known beforehand.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use accordion::bundle::{Bundle, ExportOptions, MethodSettings, WeightStorage, export};
use accordion::checkpoint::{Checkpoint, config_json};
use accordion::goldens::HomerCase;
use accordion::pipeline::Engines;
use accordion::pipeline::compress::{Compression, Homer, Significance};
use accordion::pipeline::prompt::PromptIds;
use accordion::precision::Recipe;
use accordion::profile::ceilings::Ceilings;
use accordion::profile::measure::{Effort, Runner, Step, measure, random_tokens};
use accordion::profile::roofline::Demand;
use accordion::profile::stats::Protocol;
use accordion::profile::stopwatch::Stopwatch;
use accordion::runtime::locate::{LoadOptions, load};
use accordion::runtime::ort_cpu::{OrtCpu, OrtOptions};
use accordion_graphs::architecture::Architecture;
use accordion_graphs::blocks::Target;
use accordion_graphs::plan::OperationCount;
use accordion_graphs::plan::homer::HomerPlan;
use std::path::Path;
use std::time::Duration;

/// A golden case's model, exported for its own prompt.
fn bundle(case: &HomerCase, folder: &Path, target: Target) -> Bundle {
    let checkpoint = folder.join("checkpoint");
    std::fs::create_dir(&checkpoint).unwrap();
    std::fs::copy(case.weights_path(), checkpoint.join("model.safetensors")).unwrap();
    std::fs::write(checkpoint.join("config.json"), config_json(&case.architecture).to_string()).unwrap();
    let plan = HomerPlan::new(case.architecture.num_layers, case.lengths(), case.settings).unwrap();
    let method =
        MethodSettings::Homer { settings: case.settings, tree_heights: vec![plan.tree_height], significance: None };
    let options = ExportOptions { method, target, weights: WeightStorage::Link, recipe: Recipe::fp32(), force: false };
    export(&Checkpoint::open(&checkpoint).unwrap(), &folder.join("bundle"), &options).unwrap();
    Bundle::open(folder.join("bundle")).unwrap()
}

fn golden(name: &str) -> HomerCase {
    HomerCase::open(&Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/goldens/homer/homer_{name}.json")))
        .unwrap()
}

fn loader(bundle: &Bundle) -> OrtCpu {
    let runtime = load(LoadOptions::fetching(&mut |_| {})).unwrap();
    OrtCpu::new(runtime, bundle.weights().clone(), &OrtOptions { fused_operators: true }).unwrap()
}

#[test]
fn everything_but_the_times_follows_from_the_plan() {
    let case = golden("F");
    let folder = tempfile::tempdir().unwrap();
    let bundle = bundle(&case, folder.path(), Target::OrtCpu);
    let arch = &Architecture::from(case.architecture.clone());
    let runner = Runner { engine: "ort-cpu fp32".into(), threads: 2, stopwatch: Stopwatch::default() };
    let mut engines = Engines::new(&bundle, runner.stopwatch.watch(loader(&bundle)));
    let plan = HomerPlan::new(arch.num_layers(), case.lengths(), case.settings).unwrap();
    let mut prefix = random_tokens(arch.vocab_size(), case.lengths().total(), 7);
    let mut context = prefix.split_off(case.lengths().prefix);
    let suffix = context.split_off(case.lengths().context);
    let prompt = PromptIds { prefix, context, suffix };
    let protocol = Protocol {
        warm_up_time: Duration::ZERO,
        warm_up_runs: 1,
        min_time: Duration::ZERO,
        min_runs: 3,
        max_time: None,
    };
    let effort = Effort { prefix: protocol, first_token: protocol, new_tokens: vec![1, 4], cuda_graph: None };

    let significance = Some(Significance::Uncalibrated);
    let plain_operations = OperationCount::plain_prefill(arch, case.lengths().total()).total();
    let homer = Compression::Homer(Homer { settings: case.settings, significance, width: 2 });
    for (compression, kept, operations) in [
        (homer, plan.root().out_len, plan.operations(arch).total()),
        (Compression::Plain { allow_overlong: true }, case.lengths().total(), plain_operations),
    ] {
        let mut steps = Vec::new();
        let found =
            measure(&mut engines, &compression, &prompt, &effort, &runner, &mut |step| steps.push(step)).unwrap();
        assert_eq!(found.prompt, case.lengths());
        assert_eq!(found.tokens_kept, kept);
        assert_eq!(found.operations, Some(operations));
        let state = 2 * arch.num_layers() * arch.num_kv_heads() * arch.head_dim() * kept * size_of::<f32>();
        assert_eq!(found.state_bytes, state as u64);
        assert_eq!((found.prefix.runs, found.per_token.runs), (3, 4));
        assert!(found.peak_resident_bytes > 1 << 20);
        assert_eq!(steps.iter().filter(|step| **step == Step::Run).count(), 4);
        assert!(matches!(steps.last(), Some(Step::Built { done, total }) if done == total), "{steps:?}");

        // One run's graphs: those of the plan's nodes, and the head; plainly, the decoder.
        let details = &found.details;
        let calls = |prefix: &str| -> usize {
            details.stages.iter().filter(|stage| stage.graph.starts_with(prefix)).map(|stage| stage.calls).sum()
        };
        if found.configuration.method == "homer" {
            let merges = plan.nodes.len() - plan.leaves();
            assert_eq!(
                (calls("leaf"), calls("merge"), calls("head")),
                (plan.leaves().div_ceil(2), merges, 1),
                "{details:?}"
            );
        } else {
            assert_eq!((details.stages.len(), calls("decoder")), (1, 1), "{details:?}");
        }
        let in_graphs: f64 = details.stages.iter().map(|stage| stage.total_ms).sum();
        assert!(in_graphs + details.host_ms.unwrap() <= found.prefix.max_ms * 1.0001, "{details:?}");
        assert!(details.token_host_ms.unwrap() < found.per_token.mean_ms);
        // The plain measurement finds the decoder loaded.
        assert_eq!(details.load_ms.unwrap() > 0.0, found.configuration.method == "homer");
        assert!(details.first_run_ms.unwrap() > 0.0);
        let spans: Vec<_> = details.decoded.iter().map(|s| (s.from, s.to, s.cache_rows, s.per_token.runs)).collect();
        assert_eq!(spans, [(0, 1, kept + 9, 1), (1, 4, kept + 12, 3)]);

        // Halfway through the tokens, behind those that warm up, a step reads every weight but the table of embeddings,
        // and the cache.
        let index = bundle.weights().index();
        let table = if arch.tie_word_embeddings() { 0 } else { index.get("model.embed_tokens.weight").unwrap().len };
        let past = kept + 8 + 2;
        let cache = arch.kv_bytes_per_token() * past as u64;
        let step =
            OperationCount::layer_after(arch, past, 1, 1).times(arch.num_layers()) + OperationCount::lm_head(arch, 1);
        let expected = Demand {
            linear_operations: step.linear,
            attention_operations: step.attention,
            read_bytes: index.byte_count() - table + cache,
        };
        assert_eq!(details.token_demand, Some(expected));
        let prefix = details.prefix_demand.unwrap();
        assert_eq!(prefix.linear_operations + prefix.attention_operations, operations);
        assert!(prefix.read_bytes > 0 && prefix.read_bytes <= index.byte_count());
    }
}

#[test]
fn the_rates_of_both_targets_are_numbers() {
    let case = golden("D");
    for target in [Target::OrtCpu, Target::Portable] {
        let folder = tempfile::tempdir().unwrap();
        let bundle = bundle(&case, folder.path(), target);
        let found = Ceilings::measure(&loader(&bundle), &bundle, 32, 2).unwrap();
        for rate in [found.linear_flops, found.attention_flops, found.read_bytes] {
            assert!(rate.is_finite() && rate > 1e3, "{target:?}: {found:?}");
        }
    }
}

#[test]
fn random_tokens_are_of_the_vocabulary_and_of_the_seed() {
    let tokens = random_tokens(50, 1000, 1);
    assert!(tokens.iter().all(|&id| id < 50) && tokens.iter().any(|&id| id > 40));
    assert_eq!(tokens, random_tokens(50, 1000, 1));
    assert_ne!(tokens, random_tokens(50, 1000, 2));
}
