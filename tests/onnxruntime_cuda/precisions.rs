//! Which graphs of which precision the provider takes: it has a kernel for every node that computes, or the graph is refused by the
//! operators that it has none for.

use super::{CHILD, child_process, goldens, open, recorded};
use accordion::bundle::{Bundle, MethodSettings};
use accordion::checkpoint::config_json;
use accordion::cuda::Origin;
use accordion::goldens::{HomerCase, RccCase, SharedLlmCase};
use accordion::pipeline::decode::{Continuation, Sequence};
use accordion::pipeline::rcc::read_slots;
use accordion::pipeline::sharedllm::{Context, inject, read};
use accordion::pipeline::{ContextState, Engines, PipelineError, homer, plain};
use accordion::precision::Recipe;
use accordion::runtime::Loader as _;
use accordion::runtime::locate::{LoadOptions, load};
use accordion::taps::NoTaps;
use accordion::verify::golden;
use accordion_calibration::ranges::{Observation, RangeEstimator, SiteLayout};
use accordion_graphs::blocks::Target;
use accordion_graphs::plan::rcc::RccPlan;
use accordion_graphs::plan::sharedllm::Quirks;
use accordion_graphs::precision::{KvCache, MatrixForm, Precision};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

const PRECISIONS: [Precision; 8] = [
    Precision::Fp32,
    Precision::Fp16,
    Precision::Bf16,
    Precision::Int8,
    Precision::Int8PerToken,
    Precision::WeightInt8,
    Precision::WeightInt4,
    Precision::Fp8,
];

/// The model of a golden case, and what a method does to its prompt.
struct Subject {
    name: &'static str,
    export: fn(&Recipe, &Path) -> Bundle,
    run: fn(&mut Engines<'_>) -> Result<ContextState, PipelineError>,
    /// An operator of its graphs that the provider does not compute without cuDNN.
    needs_cudnn: Option<&'static str>,
}

fn homer_case() -> HomerCase {
    HomerCase::open(&goldens("homer").join("homer_F.json")).unwrap()
}

fn rcc_case(name: &str) -> RccCase {
    RccCase::open(&goldens("rcc").join(format!("{name}.cases.safetensors"))).unwrap()
}

fn slots(case: &RccCase, engines: &mut Engines<'_>) -> Result<ContextState, PipelineError> {
    let run = case.runs.iter().find(|run| !run.text_ids.is_empty()).unwrap();
    let plan = RccPlan::new(run.lengths(), case.settings).unwrap();
    let mut slots = read_slots(engines, &plan, &run.text_ids, 1, &mut NoTaps, &mut |_| {})?;
    let logits = slots.read(engines, &run.prompt_ids, |_| {})?;
    slots.into_state(logits)
}

fn sharedllm_case() -> SharedLlmCase {
    SharedLlmCase::open(&goldens("sharedllm").join("case_q4.json")).unwrap()
}

/// Every method, with both encoders of RCC.
const SUBJECTS: [Subject; 5] = [
    Subject {
        name: "plain",
        export: |recipe, folder| {
            let case = homer_case();
            let files = [("config.json", config_json(&case.architecture))];
            let checkpoint = golden::checkpoint(folder, case.weights_path(), &files).unwrap();
            golden::exported(&checkpoint, MethodSettings::Plain, Target::Portable, recipe).unwrap()
        },
        run: |engines| plain::prefill(engines, &(0..20).collect::<Vec<u32>>(), |_| {}),
        needs_cudnn: None,
    },
    Subject {
        name: "homer",
        export: |recipe, folder| {
            let (case, target) = (homer_case(), Target::Portable);
            golden::homer::bundle(&case, &golden::homer::plan(&case).unwrap(), target, recipe, folder).unwrap()
        },
        run: |engines| {
            let case = homer_case();
            let plan = golden::homer::plan(&case).unwrap();
            let bias: Vec<&[f32]> = case.bias.iter().map(Vec::as_slice).collect();
            let prompt =
                homer::Prompt { prefix: &case.prefix_ids, context: &case.context_ids, suffix: &case.suffix_ids };
            homer::compress(engines, &plan, prompt, &bias, usize::MAX, &mut NoTaps, &mut |_| {})
        },
        needs_cudnn: None,
    },
    Subject {
        name: "rcc",
        export: |recipe, folder| golden::rcc::bundle(&rcc_case("neox_r32"), Target::Portable, recipe, folder).unwrap(),
        run: |engines| slots(&rcc_case("neox_r32"), engines),
        needs_cudnn: None,
    },
    Subject {
        name: "rcc with Mamba",
        export: |recipe, folder| {
            golden::rcc::bundle(&rcc_case("mamba_pairs"), Target::Portable, recipe, folder).unwrap()
        },
        run: |engines| slots(&rcc_case("mamba_pairs"), engines),
        needs_cudnn: Some("Conv"),
    },
    Subject {
        name: "sharedllm",
        export: |recipe, folder| {
            let case = sharedllm_case();
            let (weights, quirks) = (case.weights_path(), Quirks::Faithful);
            golden::sharedllm::bundle(&case, weights, quirks, Target::Portable, recipe, folder).unwrap()
        },
        run: |engines| {
            let case = sharedllm_case();
            let plan = golden::sharedllm::plan(&case, Quirks::Faithful).unwrap();
            let (ids, running) = (&case.context_ids, &case.running_ids);
            let context = Context { ids, mask: None, running, query_index: case.query_index };
            let injected = inject(engines, &plan, context, 2, &mut NoTaps, &mut |_| {})?;
            read(engines, injected, running, |_| {})
        },
        needs_cudnn: Some("ReduceL2"),
    },
];

/// A file of ranges for what `bundle` multiplies, all alike: nothing is computed with them here.
fn ranges(bundle: &Bundle, file: &Path) -> PathBuf {
    let linears = bundle.manifest().graphs.values().flat_map(|graph| graph.signature.linears.keys());
    let matrices: BTreeSet<&String> = linears.collect();
    let columns = |matrix: &String| bundle.weights().index().get(matrix).unwrap().shape[1];
    let site = |matrix: &&String| SiteLayout { weights: vec![(*matrix).clone()], channels: columns(matrix) };
    let mut estimator = RangeEstimator::new(matrices.iter().map(site).collect(), vec![]).unwrap();
    estimator.begin_window("none", 0).unwrap();
    for (site, matrix) in matrices.iter().enumerate() {
        let rows: Vec<f32> = (0..4 * columns(matrix)).map(|i| (i as f32).sin()).collect();
        estimator.observe(&[Observation::Rows(site, &rows)]).unwrap();
    }
    let table = estimator.finish(bundle.manifest().identity(), "none".to_owned(), 4, "test".to_owned()).unwrap();
    table.save(file).unwrap();
    file.to_owned()
}

#[test]
#[ignore = "needs what `prepare` fetches"]
fn every_precision_is_the_gpus_or_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    super::kernels(folder.path());
    child_process("precisions::precisions_child", folder.path());
}

#[test]
#[ignore = "runs in a process of its own, started by another test"]
fn precisions_child() {
    let Some(folder) = std::env::var_os(CHILD).map(PathBuf::from) else { return };
    let runtime = load(LoadOptions::default()).unwrap();
    let log = PathBuf::from(std::env::var_os("ACCORDION_EMULATOR_LOG").unwrap());
    let kernels = folder.join("kernels");
    for Subject { name, export, run, needs_cudnn } in SUBJECTS {
        let out = |what: &str| {
            let out = folder.join(name).join(what);
            std::fs::create_dir_all(&out).unwrap();
            out
        };
        let calibrated = export(&Recipe::fp32(), &out("calibrated"));
        let table = ranges(&calibrated, &folder.join(name).join("ranges.safetensors"));
        for precision in PRECISIONS {
            let what = format!("{name}, {precision}");
            let ranges = precision.needs_ranges().then(|| table.clone());
            // With the decoder of either cache.
            let recipe = Recipe { kv_cache: KvCache::Int8, ranges, ..Recipe::of(precision) };
            let bundle = export(&recipe, &out(&what));
            for kernels in [None, Some(Origin::Folder(kernels.clone()))] {
                let loader = open(runtime, &bundle, kernels);
                for graph in bundle.manifest().graphs.keys() {
                    let signature = bundle.signature(graph).unwrap();
                    let loaded = loader.load(graph, &bundle.graph(graph).unwrap(), &signature.weights);
                    loaded.map_or_else(|error| panic!("{what}: {error}"), drop);
                }
            }
            let attempt = |keep: Vec<String>| {
                let recipe = Recipe { kv_cache: KvCache::Fp32, keep, ..recipe.clone() };
                let bundle = export(&recipe, &out(&format!("{what}, run, kept {}", recipe.keep.len())));
                let loader = open(runtime, &bundle, Some(Origin::Folder(kernels.clone())));
                let mut engines = Engines::new(&bundle, Box::new(loader));
                let before = recorded(&log, "to the host").len();
                let result = decoded(&mut engines, run).map_err(|error| error.to_string());
                let copies = recorded(&log, "to the host").split_off(before);
                println!("{what}, {} matrices kept: {copies:?}, {result:?}", recipe.keep.len());
                // Lengths go to the host, and nothing else does.
                assert!(copies.iter().all(|&bytes| bytes == 8), "{what}: {copies:?}");
                result
            };
            let in_blocks = in_blocks_of_int8(&bundle);
            let mut result = attempt(Vec::new());
            if !in_blocks.is_empty() {
                let error = result.unwrap_err();
                let expected = error.contains("DequantizeLinear") && error.contains("Unsupported quantization type");
                assert!(expected, "{what}: {error}");
                if precision == Precision::WeightInt8 {
                    continue;
                }
                result = attempt(in_blocks);
            }
            // Activations in 8 bits by rows need the maximum of each.
            let by_rows = (precision == Precision::Int8PerToken).then_some("ReduceMax");
            let needs_cudnn: Vec<&str> = needs_cudnn.into_iter().chain(by_rows).collect();
            match result {
                Ok(()) => assert!(needs_cudnn.is_empty(), "{what}"),
                Err(error) => {
                    let named = needs_cudnn.iter().any(|operator| error.contains(&format!("{operator} node")));
                    assert!(named && error.contains("cuDNN is unavailable"), "{what}: {error}");
                }
            }
        }
    }
}

/// The matrices that the provider places on the GPU and refuses to run: its `DequantizeLinear` has no blocks of int8.
fn in_blocks_of_int8(bundle: &Bundle) -> Vec<String> {
    let matrices = bundle.manifest().quantization.iter().flat_map(|quantization| &quantization.matrices);
    matrices
        .filter(|(_, form)| matches!(form, MatrixForm::Block { bits: 8, .. }))
        .map(|(name, _)| name.clone())
        .collect()
}

/// Compresses a prompt, and reads some tokens behind it.
fn decoded(
    engines: &mut Engines<'_>,
    run: fn(&mut Engines<'_>) -> Result<ContextState, PipelineError>,
) -> Result<(), PipelineError> {
    let state = run(engines)?;
    let mut sequence = Sequence::continue_from(engines, &state, 3, Continuation::Next)?;
    (0..3).try_for_each(|id| sequence.forward(engines, &[id], 1).map(drop))
}
