//! What a profile says of engines on a device: under the emulated driver, whose clock moves only by what the double's layers take.

use super::double::{Machine, device_ms, layers_of, portable};
use super::execution::Subject;
use super::prepared;
use accordion::pipeline::Engines;
use accordion::profile::ProfileError;
use accordion::profile::decoding::CudaGraph;
use accordion::profile::measure::{Effort, Runner, measure, record_layers};
use accordion::profile::schema::Measurement;
use accordion::profile::stats::Protocol;
use accordion::profile::stopwatch::Stopwatch;
use accordion::runtime::Loader;
use accordion::tensorrt::layers::LayerRecord;
use accordion::tensorrt::{ExecutionOptions, TensorRt};
use std::collections::BTreeMap;
use std::process::Command;
use std::sync::Arc;

const TOKENS: usize = 4;

fn effort(cuda_graph: Option<CudaGraph>) -> Effort {
    let three = Protocol { min_runs: 3, ..Protocol::UNTIMED };
    Effort { prefix: three, first_token: three, new_tokens: vec![TOKENS], cuda_graph }
}

/// A profile of `subject` on what `loader` loads.
fn profile(subject: &Subject, loader: impl Loader, cuda_graph: Option<CudaGraph>) -> Result<Measurement, ProfileError> {
    let runner = Runner { engine: "tensorrt fp32".into(), threads: 1, stopwatch: Stopwatch::default() };
    let mut engines = Engines::new(&subject.bundle, runner.stopwatch.watch(loader));
    measure(&mut engines, &subject.compression(), &subject.prompt(), &effort(cuda_graph), &runner, &mut |_| {})
}

fn close(found: f64, expected: f64) -> bool {
    (found - expected).abs() <= 1e-4 * expected
}

/// Every graph's time on the device is what its layers take there, however long the host needed to put them on the stream, and the
/// host's times make up the run.
#[test]
#[ignore = "needs a C++ compiler"]
fn enqueue_and_compute_are_told_apart() {
    for subject in [Subject::plain().built(), Subject::homer().built()] {
        // With a stream of its own, which has kept nothing yet.
        let machine = Machine::open();
        let free = machine.free_bytes();
        let loader = machine.loader(&subject.bundle, &ExecutionOptions::default()).unwrap();
        let found = profile(&subject, loader, Some(CudaGraph::Off)).unwrap();
        let details = &found.details;
        assert!(!details.stages.is_empty());
        for stage in &details.stages {
            let (compute, calls) = (stage.compute_ms.unwrap(), stage.calls as f64);
            assert!(close(compute, calls * device_ms(&stage.graph)), "{stage:?}");
        }
        let prefix = details.prefix_on_device().unwrap();
        let sum: f64 = details.stages.iter().map(|stage| stage.calls as f64 * device_ms(&stage.graph)).sum();
        assert!(close(prefix.compute_ms, sum), "{prefix:?}");
        assert!(prefix.enqueue_ms > 0.0 && prefix.wait_ms > 0.0, "{prefix:?}");
        assert!(prefix.total_ms() <= found.prefix.max_ms * 1.0001, "{prefix:?} of {:?}", found.prefix);
        // A token is one run of the decoder.
        let token = details.token_on_device().unwrap();
        assert!(close(token.compute_ms, device_ms("decoder")), "{token:?}");
        assert!(close(token.total_ms(), found.per_token.mean_ms), "{token:?} of {:?}", found.per_token);
        assert_eq!(details.peak_device_bytes.unwrap(), free - machine.free_bytes());
        let (peak, state) = (details.peak_device_bytes.unwrap(), found.state_bytes);
        assert!(peak >= state, "{peak} of {state}");
    }
}

/// Tokens that are decoded before others, in a profile.
const WARM_UP: usize = 8;

/// Both ways are measured in turns, and each does what it is called: one repeats what was recorded, one does not.
#[test]
#[ignore = "needs a C++ compiler"]
fn decoding_is_measured_with_cuda_graphs_and_without() {
    let machine = Machine::open();
    let subject = Subject::homer().built();
    let loader = || machine.loader(&subject.bundle, &machine.options()).unwrap();
    // What was recorded and repeated, and how a profile calls it.
    let counted = |which| {
        let before = machine.counts();
        let found = profile(&subject, loader(), Some(which)).unwrap();
        let now = machine.counts();
        let setting = found.configuration.settings.iter().find(|(name, _)| name == "CUDA graph").unwrap().1.clone();
        (found, setting, now.records - before.records, now.graphs - before.graphs)
    };
    let steps = WARM_UP + TOKENS;
    // The first step of a sequence is not recorded.
    let repeated = |sequences: usize| ((sequences as u64), (sequences * (steps - 1)) as u64);
    let (found, setting, records, graphs) = counted(CudaGraph::Off);
    assert_eq!((setting.as_str(), records, graphs, found.details.cuda_graph), ("off", 0, 0, None));
    let (found, setting, records, graphs) = counted(CudaGraph::On);
    assert_eq!((setting.as_str(), (records, graphs), found.details.cuda_graph), ("on", repeated(1), None));
    let (found, setting, records, graphs) = counted(CudaGraph::Both);
    let compared = found.details.cuda_graph.clone().unwrap();
    // As with `on`, once to warm up, and every pair.
    assert_eq!((setting.as_str(), (records, graphs)), ("on", repeated(2 + compared.pairs)));
    let names: Vec<_> = compared.differences.iter().map(|d| d.quantity.as_str()).collect();
    assert_eq!(names, ["each further token", "putting one on the stream", "computing one"]);
    let compute = &compared.differences[2];
    assert!(close(compute.a_ms, device_ms("decoder_step")) && close(compute.ratio, 1.0), "{compute:?}");
    for difference in &compared.differences {
        assert!(difference.a_ms > 0.0 && difference.b_ms > 0.0 && difference.low <= difference.high, "{difference:?}");
    }
    // A step waits for its results, which is not putting it there.
    let token = found.details.token_on_device().unwrap();
    assert!(close(token.compute_ms, device_ms("decoder_step")), "{token:?}");
    assert!(
        token.wait_ms > 0.0 && close(token.total_ms(), found.per_token.mean_ms),
        "{token:?} of {:?}",
        found.per_token
    );
    assert_eq!(machine.live(), 0);
    // Without the kernel that a step needs there is none.
    let without = machine.loader(&subject.bundle, &ExecutionOptions::default()).unwrap();
    let refused = profile(&subject, without, Some(CudaGraph::Both)).unwrap_err().to_string();
    assert!(refused.contains("--cuda-graph both") && refused.contains("kernel"), "{refused}");
}

/// Engines of the host have no other time than the host's.
#[test]
#[ignore = "needs a C++ compiler"]
fn engines_without_a_device_have_no_time_on_one() {
    let subject = Subject::plain();
    let details = profile(&subject, portable(&subject.bundle), None).unwrap().details;
    assert!(details.stages.iter().all(|stage| stage.compute_ms.is_none()));
    assert_eq!((details.prefix_on_device(), details.token_on_device(), details.peak_device_bytes), (None, None, None));
    assert!(details.host_ms.is_some() && details.token_run_ms.unwrap() > 0.0);
}

/// Work that nobody asks the times of does not pile up.
#[test]
#[ignore = "needs a C++ compiler"]
fn moments_that_nobody_takes_are_settled() {
    let machine = Machine::open();
    let subject = Subject::plain().built();
    let loader = machine.loader(&subject.bundle, &ExecutionOptions::default()).unwrap();
    let meter = loader.meter().unwrap();
    meter.around("before", || ()).unwrap();
    meter.start();
    let most = (0..20_000).map(|_| {
        meter.around("work", || ()).unwrap();
        machine.pending()
    });
    assert!(most.max().unwrap() < 20_000);
    let times = meter.take().unwrap();
    let counts: Vec<_> = times.work.iter().map(|(name, (count, _))| (name.as_str(), *count)).collect();
    assert_eq!(counts, [("work", 20_000)]);
    assert!(meter.take().unwrap().work.is_empty());
}

/// What layers take, under the modules that their nodes belong to, in every graph that ran as often as it ran.
fn assert_layers(subject: &Subject, machine: &Machine, loader: TensorRt<'_>) {
    let layers = Arc::new(LayerRecord::default());
    let engines = Engines::new(&subject.bundle, Box::new(loader.measuring_layers(Arc::clone(&layers))));
    let found = record_layers(engines, &layers, &subject.compression(), &subject.prompt()).unwrap();
    assert!(found.is_sorted_by(|a, b| a.total_ms >= b.total_ms));
    let calls: BTreeMap<&str, usize> =
        found.iter().filter(|o| o.module.is_empty()).map(|o| (o.graph.as_str(), o.calls)).collect();
    // Four tokens are decoded, behind the prefix, which the decoder reads if nothing else does.
    let reads = usize::from(subject.bundle.manifest().method.name() == "plain");
    let decoder: usize = calls.iter().filter(|(graph, _)| graph.starts_with("decoder")).map(|(_, calls)| calls).sum();
    assert_eq!(decoder, 4 + reads);
    for (graph, calls) in &calls {
        let mut rows: Vec<_> = found
            .iter()
            .filter(|o| o.graph == *graph)
            .map(|o| (o.module.as_str(), o.operator.as_str(), o.calls, o.total_ms))
            .collect();
        rows.sort_by(|a, b| b.3.total_cmp(&a.3));
        let times = *calls as f64;
        let mut expected = vec![
            ("model.layers.*.mlp", "Gemm + Mul", 2 * calls, 6.0 * times),
            ("model.layers.*.self_attn.q_proj", "Gemm", *calls, times),
            ("", "", *calls, 0.5 * times),
        ];
        if graph.starts_with("leaf") {
            expected.push(("prune", "TopKPrune", *calls, 0.25 * times));
        }
        assert_eq!(rows, expected, "{graph}");
        let sum: f64 = rows.iter().map(|row| row.3).sum();
        assert!(close(sum, times * device_ms(graph)), "{graph}: {sum} of {:?}", layers_of(graph));
    }
    assert_eq!(machine.live(), 0);
}

#[test]
#[ignore = "needs a C++ compiler"]
fn layers_are_found_under_their_modules() {
    let machine = Machine::open();
    for subject in [Subject::plain().built(), Subject::homer().built()] {
        let loader = machine.loader(&subject.bundle, &machine.options()).unwrap();
        assert_layers(&subject, &machine, loader);
    }
}

/// The same through the shim itself: its profiler and NVIDIA's inspector.
#[test]
#[ignore = "needs NVIDIA's headers: tests/tensorrt/prepare"]
fn the_shim_hands_on_what_layers_take() {
    let machine = Machine::open();
    let subject = Subject::homer().built();
    let loader = machine.loader_of_nvidia(&subject.bundle, &prepared("headers/TRT-Enterprise-11.4"));
    assert_layers(&subject, &machine, loader);
}

/// What a program that is asked for what its engine has not says.
#[test]
fn other_engines_have_no_layers_and_no_cuda_graphs() {
    let subject = Subject::plain();
    let refused = |arguments: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_accordion"));
        command.arg("profile").arg(subject.bundle.dir()).args(["--context", "16"]).args(arguments);
        let output = command.env("RUST_BACKTRACE", "0").output().unwrap();
        assert_eq!(output.status.code(), Some(2), "{arguments:?}");
        assert!(output.stdout.is_empty(), "{arguments:?}");
        String::from_utf8(output.stderr).unwrap()
    };
    for which in ["on", "off", "both"] {
        let message = refused(&["--cuda-graph", which]);
        assert!(message.contains("--cuda-graph needs --engine tensorrt or tensorrt-rtx: ort-cpu"), "{message}");
    }
    let message = refused(&["--layers"]);
    assert!(message.contains("--layers needs --engine tensorrt") && message.contains("--trace"), "{message}");
    let message = refused(&["--cuda-graph", "both", "--engine", "tensorrt", "--paired"]);
    assert!(message.contains("--cuda-graph both") && message.contains("--paired"), "{message}");
    let message = refused(&["--cuda-graph", "both", "--engine", "tensorrt", "--no-cuda-graph"]);
    assert!(message.contains("--no-cuda-graph contradicts"), "{message}");
    assert!(refused(&["--layers", "--trace", "t.json"]).contains("--trace"));
    assert!(refused(&["--cuda-graph", "maybe"]).contains("both"));
}
