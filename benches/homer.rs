//! HOMER against plain on one model and one runtime, in one run. See docs/performance.md for the protocol.
//!
//! `cargo bench --bench homer -- CHECKPOINT TEXT [--context N] [--plain N] [--width N]`
#![allow(missing_docs, clippy::unwrap_used, clippy::print_stdout)]

use accordion::bundle::{Bundle, ExportOptions, MethodSettings, WeightStorage, export, tree_heights};
use accordion::checkpoint::{Checkpoint, Tokenizer};
use accordion::environment::{current_resident_bytes, peak_resident_bytes, reset_peak_resident};
use accordion::pipeline::decode::{Continuation, Sequence};
use accordion::pipeline::homer::{Prompt, compress};
use accordion::pipeline::{ContextState, Engines, plain};
use accordion::runtime::locate::{LoadOptions, load};
use accordion::runtime::ort_cpu::{OrtCpu, OrtOptions};
use accordion::taps::NoTaps;
use accordion_graphs::blocks::Target;
use accordion_graphs::plan::homer::{HomerPlan, HomerSettings};
use accordion_graphs::plan::{OperationCount, PromptLengths};
use std::path::PathBuf;
use std::time::Instant;

fn flag(name: &str) -> Option<usize> {
    let arguments: Vec<String> = std::env::args().collect();
    arguments.iter().position(|a| a == name).and_then(|i| arguments.get(i + 1)?.parse().ok())
}

fn megabytes(bytes: Option<u64>) -> u64 {
    bytes.unwrap_or(0) >> 20
}

fn decode(engines: &mut Engines<'_>, state: &ContextState, tokens: usize) -> f64 {
    let mut sequence = Sequence::continue_from(engines, state, tokens + 2, Continuation::Next).unwrap();
    let mut times = Vec::new();
    for i in 0..tokens + 2 {
        let start = Instant::now();
        sequence.forward(engines, &[100 + i as u32], 1).unwrap();
        times.push(start.elapsed().as_secs_f64());
    }
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

fn main() {
    let positional: Vec<String> = std::env::args().skip(1).filter(|a| !a.starts_with("--bench")).collect();
    let checkpoint = Checkpoint::open(PathBuf::from(&positional[0])).unwrap();
    let accordion_graphs::architecture::Architecture::Llama(arch) = checkpoint.architecture().clone() else { return };
    let tokenizer = Tokenizer::open(checkpoint.dir(), arch.vocab_size).unwrap();
    let text = std::fs::read_to_string(&positional[1]).unwrap();
    let ids = tokenizer.encode(&text, false).unwrap();
    let total = flag("--context").unwrap_or(32768);
    let (prefix, suffix) = (64, 64);
    let lengths = PromptLengths { prefix, context: total - prefix - suffix, suffix };
    let settings =
        HomerSettings { max_chunk_len: 2048, max_initial_chunk_len: None, target_len: 2048, layers_warmup: 12 };
    let plan = HomerPlan::new(arch.num_layers, lengths, settings).unwrap();

    let folder = tempfile::tempdir_in(checkpoint.dir().parent().unwrap()).unwrap();
    let out = folder.path().join("bundle");
    let heights = tree_heights(arch.num_layers, settings, total).unwrap();
    let start = Instant::now();
    let method = MethodSettings::Homer { settings, tree_heights: heights, significance: None };
    let target = if flag("--portable").is_some() { Target::Portable } else { Target::OrtCpu };
    export(&checkpoint, &out, &ExportOptions { method, target, weights: WeightStorage::Link, force: false }).unwrap();
    println!("export {:.3} s", start.elapsed().as_secs_f64());
    let bundle = Bundle::open(&out).unwrap();
    let runtime = load(LoadOptions::fetching(&mut |_| {})).unwrap();
    let options = OrtOptions { fused_operators: flag("--unfused").is_none() };
    let loader = OrtCpu::new(runtime, bundle.weights().clone(), &options).unwrap();
    let mut engines = Engines::new(&bundle, Box::new(loader));
    let prompt =
        Prompt { prefix: &ids[..prefix], context: &ids[prefix..total - suffix], suffix: &ids[total - suffix..total] };
    let zeros = vec![0.0; plan.max_distance() + 1];
    let bias: Vec<&[f32]> = vec![&zeros; arch.num_layers];
    let operations = plan.operations(&arch);
    println!(
        "operations {:.2} TFLOP linear, {:.2} attention",
        operations.linear as f64 / 1e12,
        operations.attention as f64 / 1e12
    );
    let width = flag("--width").unwrap_or(1);
    if flag("--rss").is_some() {
        let show = |what: &str| {
            let status = std::fs::read_to_string("/proc/self/status").unwrap();
            let lines: Vec<&str> =
                status.lines().filter(|l| l.starts_with("RssAnon") || l.starts_with("RssFile")).collect();
            println!("{what}: {lines:?}");
        };
        show("start");
        for (name, _) in &bundle.manifest().graphs {
            if plan.layers.iter().enumerate().any(|(h, l)| *name == accordion_graphs::methods::homer::graph_name(h, l))
            {
                engines.get(name, &[]).unwrap();
                show(name);
            }
        }
        engines.get("decoder", &[]).unwrap();
        show("decoder");
        return;
    }
    for _ in 0..flag("--runs").unwrap_or(2) {
        println!("before: {} MB", megabytes(current_resident_bytes()));
        reset_peak_resident().unwrap();
        let start = Instant::now();
        let state = compress(&mut engines, &plan, prompt, &bias, width, &mut NoTaps, &mut |_| {}).unwrap();
        let seconds = start.elapsed().as_secs_f64();
        println!("homer {total}: {seconds:.2} s, peak {} MB, kept {}", megabytes(peak_resident_bytes()), state.len());
        println!("decode after homer: {:.1} ms", decode(&mut engines, &state, 24) * 1e3);
    }
    for n in [2048, flag("--plain").unwrap_or(2048)] {
        reset_peak_resident().unwrap();
        let start = Instant::now();
        let state = plain::prefill(&mut engines, &ids[..n], |_| {}).unwrap();
        let seconds = start.elapsed().as_secs_f64();
        let count = OperationCount::plain_prefill(&arch, n);
        println!(
            "plain {n}: {seconds:.2} s ({:.0} GFLOP/s), peak {} MB; decode {:.1} ms",
            count.total() as f64 / seconds / 1e9,
            megabytes(peak_resident_bytes()),
            decode(&mut engines, &state, 24) * 1e3
        );
    }
}
