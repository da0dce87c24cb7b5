//! What the self-test does in a runtime, with the CPU as the device: fused operators against unfused ones, and methods against plain.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod fault;
mod folder;
#[path = "../precision/host.rs"]
mod host;

use accordion::bundle::{Bundle, Method};
use accordion::checkpoint::WeightMaps;
use accordion::cuda::Element;
use accordion::pipeline::Engines;
use accordion::pipeline::compress::{Compression, Homer, Significance};
use accordion::pipeline::prompt::PromptIds;
use accordion::pipeline::rcc::Rcc;
use accordion::pipeline::sharedllm::SharedLlm;
use accordion::profile::measure::{Effort, Runner, measure, random_tokens};
use accordion::profile::stopwatch::Stopwatch;
use accordion::runtime::Loader;
use accordion::runtime::bound::{Bound, BoundOptions};
use accordion::selftest::methods::{self, Case, Measured, Wanted};
use accordion::selftest::models::{Maker, Scale};
use accordion::selftest::unfused::{compress, prune};
use accordion::selftest::{CompressShape, PruneShape, Unfused};
use accordion_graphs::plan::sharedllm::ChunkPolicy;
use accordion_graphs::precision::Precision;
use accordion_graphs::weights::WeightIndex;
use fault::SecondBest;
use host::Host;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use std::path::Path;
use std::time::Duration;

const PRUNE: PruneShape = PruneShape {
    name: "small",
    heads: 4,
    kv_heads: 2,
    head_dim: 16,
    length: 300,
    hidden: 24,
    layers: 3,
    keep: 120,
    affix: 7,
};

/// What loads graphs over `weights` there, with our kernels for the CPU.
fn on_host(weights: WeightMaps) -> Bound<Host> {
    // Loads the runtime, which operators are made by.
    let host = Host::new();
    let operators = Some(accordion_plugins::domain().unwrap());
    host.loader(weights, BoundOptions { operators, allow_fallback: false })
}

fn loader() -> impl Loader {
    on_host(WeightMaps::open(WeightIndex::default()).unwrap())
}

fn numbers_are_there(compared: &Unfused) {
    assert!(compared.runs >= 10, "{compared:?}");
    assert!(compared.fused_ms > 0.0 && compared.unfused_ms > 0.0, "{compared:?}");
    assert!((compared.ratio - compared.unfused_ms / compared.fused_ms).abs() < 1e-9, "{compared:?}");
    survives_json(compared);
}

/// What is read back is what was written, but for the last bit of a number.
fn survives_json<T: Serialize + DeserializeOwned>(value: &T) {
    fn same(a: &Value, b: &Value) -> bool {
        match (a, b) {
            (Value::Number(a), Value::Number(b)) => {
                let (a, b) = (a.as_f64().unwrap(), b.as_f64().unwrap());
                (a - b).abs() <= 1e-12 * a.abs()
            }
            (Value::Array(a), Value::Array(b)) => a.len() == b.len() && a.iter().zip(b).all(|(a, b)| same(a, b)),
            (Value::Object(a), Value::Object(b)) => {
                a.len() == b.len() && a.iter().all(|(name, value)| b.get(name).is_some_and(|other| same(value, other)))
            }
            _ => a == b,
        }
    }
    let written = serde_json::to_value(value).unwrap();
    let read: T = serde_json::from_str(&written.to_string()).unwrap();
    let again = serde_json::to_value(&read).unwrap();
    assert!(same(&written, &again), "{written} {again}");
}

#[test]
fn operators_compute_what_the_chains_do() {
    let loader = loader();
    let compared = prune(&loader, &PRUNE, Element::F32).unwrap();
    assert_eq!((compared.operator.as_str(), compared.difference.as_str(), compared.passed), ("TopKPrune", "", true));
    numbers_are_there(&compared);
    let shape = CompressShape { name: "small", segments: 3, window: 64, ratio: 8, width: 40 };
    for (name, mean) in [("StridedCompress", false), ("StridedCompressMean", true)] {
        let compared = compress(&loader, &shape, Element::F32, mean).unwrap();
        assert_eq!((compared.operator.as_str(), compared.difference.as_str()), (name, ""));
        numbers_are_there(&compared);
    }
}

#[test]
fn an_operator_that_keeps_the_second_best_row_does_not_pass() {
    let compared = prune(&SecondBest(loader()), &PRUNE, Element::F32).unwrap();
    assert!(!compared.passed, "{compared:?}");
    assert!(compared.difference.starts_with("keep_idx["), "{compared:?}");
    numbers_are_there(&compared);
}

#[test]
fn what_the_runtime_refuses_is_an_error() {
    // Rows that are no whole number of groups.
    let shape = CompressShape { name: "small", segments: 1, window: 10, ratio: 4, width: 8 };
    let error = compress(&loader(), &shape, Element::F32, false).unwrap_err().to_string();
    assert!(error.contains("StridedCompress"), "{error}");
}

/// Measures in this process what `accordion profile` measures in another.
fn in_process(case: &Case) -> Measured {
    let bundle = Bundle::open(&case.bundle).unwrap();
    let (width, vocab) = (1, bundle.architecture().vocab_size());
    let compression = match bundle.manifest().method {
        _ if case.method == "plain" => Compression::Plain { allow_overlong: true },
        Method::Homer { settings, .. } => {
            Compression::Homer(Homer { settings, significance: Some(Significance::Uncalibrated), width })
        }
        Method::Rcc { settings } => Compression::Rcc(Rcc { settings, width }),
        Method::SharedLlm { settings } => {
            Compression::SharedLlm(SharedLlm { settings, policy: ChunkPolicy::FineTuning, width })
        }
        Method::Plain => panic!("{case:?}"),
    };
    let prompt = PromptIds {
        prefix: random_tokens(vocab, 16, 1),
        context: random_tokens(vocab, case.context, 2),
        suffix: random_tokens(vocab, 16, 3),
    };
    let runner = Runner { engine: "host fp32".to_owned(), threads: 1, stopwatch: Stopwatch::default() };
    let mut engines = Engines::new(&bundle, Box::new(on_host(bundle.weights().clone())));
    let effort = Effort::turn(Duration::ZERO, 2, None);
    let measurement = measure(&mut engines, &compression, &prompt, &effort, &runner, &mut |_| {}).unwrap();
    // Any number will do: a device is not there to be asked.
    let peak_device_bytes = Some(measurement.state_bytes);
    Measured { measurement, peak_device_bytes }
}

fn maker(folder: &Path) -> Maker<'_> {
    Maker { folder, sizes: Scale::Tiny.sizes(), precision: Precision::Fp32, context: 4096 }
}

fn wanted() -> Wanted {
    Wanted {
        methods: vec!["plain", "homer", "rcc", "sharedllm"],
        context: 4096,
        longest: Some(6144),
        free_bytes: None,
        budget: Duration::MAX,
    }
}

#[test]
fn methods_are_measured_and_compared_with_plain() {
    let folder = tempfile::tempdir().unwrap();
    let (mut missing, mut steps) = (Vec::new(), Vec::new());
    let mut measure = |case: &Case, _: Duration| {
        if case.method == "sharedllm" { Err("no such kernel".to_owned()) } else { Ok(in_process(case)) }
    };
    let costs = methods::run(&maker(folder.path()), &wanted(), &mut measure, &mut missing, &mut |step| {
        steps.push(step.to_owned());
    });
    // What fails is a line, and what comes behind it is measured.
    assert_eq!(missing, ["sharedllm of llama-tiny at 4096 tokens: no such kernel"]);
    assert!(steps.iter().any(|step| step.starts_with("sharedllm of llama-tiny")), "{steps:?}");
    let rows: Vec<_> = costs.iter().map(|cost| (&*cost.model, &*cost.method, cost.context)).collect();
    let expected = [
        ("llama-tiny", "plain", 4096),
        ("llama-tiny", "homer", 4096),
        ("rcc-pythia-tiny", "plain", 4096),
        ("rcc-pythia-tiny", "rcc", 4096),
        ("rcc-pythia-tiny", "rcc", 6144),
    ];
    assert_eq!(rows, expected);
    for cost in &costs {
        assert!(cost.prefix_ms > 0.0 && cost.first_token_ms > 0.0 && cost.per_token_ms > 0.0, "{cost:?}");
        let compared = cost.method != "plain" && cost.context == 4096;
        assert_eq!(cost.against_plain.is_some(), compared, "{cost:?}");
        if let Some(against) = &cost.against_plain {
            assert_eq!(against.speed_up.iter().map(|found| found.new_tokens).collect::<Vec<_>>(), [20, 50, 100]);
            // HOMER keeps 1024 of its prompt's 4128 tokens, RCC every 32nd of its context.
            assert!(against.memory_saving_percent.unwrap() > 70.0, "{cost:?}");
            assert!(cost.tokens_kept < 1200, "{cost:?}");
        }
    }
    survives_json(&costs);
}

#[test]
fn sharedllm_is_measured_without_the_others() {
    let folder = tempfile::tempdir().unwrap();
    let wanted = Wanted { methods: vec!["sharedllm"], ..wanted() };
    let mut missing = Vec::new();
    let mut measure = |case: &Case, _: Duration| Ok(in_process(case));
    let costs = methods::run(&maker(folder.path()), &wanted, &mut measure, &mut missing, &mut |_| {});
    let [cost] = &costs[..] else { panic!("{costs:?} {missing:?}") };
    assert_eq!((cost.method.as_str(), cost.context, &cost.against_plain), ("sharedllm", 4096, &None));
}

#[test]
fn what_there_is_no_time_for_is_listed() {
    let folder = tempfile::tempdir().unwrap();
    let wanted = Wanted { budget: Duration::ZERO, ..wanted() };
    let mut missing = Vec::new();
    let mut measure = |case: &Case, _: Duration| -> Result<Measured, String> { panic!("{case:?}") };
    let costs = methods::run(&maker(folder.path()), &wanted, &mut measure, &mut missing, &mut |_| {});
    assert!(costs.is_empty());
    assert_eq!(missing.len(), 6, "{missing:?}");
    assert!(missing.iter().all(|line| line.contains("the budget of 0 s is used up")), "{missing:?}");
}

#[test]
fn what_cannot_be_written_is_listed() {
    let mut missing = Vec::new();
    let mut measure = |case: &Case, _: Duration| -> Result<Measured, String> { panic!("{case:?}") };
    let costs = methods::run(&maker(Path::new("/proc")), &wanted(), &mut measure, &mut missing, &mut |_| {});
    assert!(costs.is_empty());
    assert_eq!(missing.len(), 3, "{missing:?}");
    assert!(missing[0].starts_with("homer: its bundle cannot be made: "), "{missing:?}");
}
