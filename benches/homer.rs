//! HOMER against plain on one model, one text and one runtime, in one run; docs/performance.md explains the numbers.
//!
//! `cargo bench --bench homer [-- OPTIONS]`
//!
//! - `--context N`: tokens of the whole prompt (32768)
//! - `--plain N`: tokens of the plain prefill to compare with (the same as `--context`; it takes minutes)
//! - `--runs N`: HOMER builds, of which the median counts (3)
//! - `--width N`: leaves per batch (1)
//! - `--operators portable`: ONNX Runtime's own operators on both sides instead of our kernels
#![allow(missing_docs, clippy::print_stdout)]

use accordion::bundle::{Bundle, ExportOptions, MethodSettings, WeightStorage, export, tree_heights};
use accordion::checkpoint::{Checkpoint, Tokenizer};
use accordion::environment::{peak_resident_bytes, reset_peak_resident};
use accordion::fetch::{Cache, asset};
use accordion::pipeline::decode::{Continuation, Sequence};
use accordion::pipeline::homer::{Prompt, compress};
use accordion::pipeline::{ContextState, Engines, plain};
use accordion::profile::ceilings::Ceilings;
use accordion::runtime::Loader;
use accordion::runtime::locate::{LoadOptions, load};
use accordion::runtime::ort_cpu::{OrtCpu, OrtOptions};
use accordion::taps::NoTaps;
use accordion_graphs::architecture::Architecture;
use accordion_graphs::blocks::Target;
use accordion_graphs::plan::homer::{HomerPlan, HomerSettings};
use accordion_graphs::plan::{OperationCount, PromptLengths};
use anyhow::{Context, ensure};
use std::path::Path;
use std::time::Instant;

const PREFIX: usize = 64;
const SUFFIX: usize = 64;
const SETTINGS: HomerSettings =
    HomerSettings { max_chunk_len: 2048, max_initial_chunk_len: None, target_len: 2048, layers_warmup: 12 };
/// Tokens decoded after a context; the median step counts.
const NEW_TOKENS: usize = 64;

fn option(name: &str) -> Option<String> {
    let mut arguments = std::env::args().skip_while(|argument| argument != name);
    arguments.nth(1)
}

fn number(name: &str, default: usize) -> anyhow::Result<usize> {
    option(name).map_or(Ok(default), |text| text.parse().with_context(|| format!("{name} {text}")))
}

fn megabytes(bytes: u64) -> f64 {
    bytes as f64 / 1e6
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// Median seconds of one decoding step behind `state`.
fn decode(engines: &mut Engines<'_>, state: &ContextState) -> anyhow::Result<f64> {
    let mut sequence = Sequence::continue_from(engines, state, NEW_TOKENS, Continuation::Next)?;
    let mut steps = Vec::with_capacity(NEW_TOKENS);
    for step in 0..NEW_TOKENS {
        let start = Instant::now();
        sequence.forward(engines, &[100 + step as u32], 1)?;
        steps.push(start.elapsed().as_secs_f64());
    }
    Ok(median(steps))
}

/// The bytes that one decoding step has to read: the weights and the cache.
fn step_bytes(checkpoint: &Checkpoint, state: &ContextState) -> u64 {
    checkpoint.weights().byte_count() + state.cache_bytes()
}

fn token_ids(checkpoint: &Checkpoint, vocab_size: usize, text: &Path) -> anyhow::Result<Vec<u32>> {
    let tokenizer = Tokenizer::open(checkpoint.dir(), vocab_size)?;
    Ok(tokenizer.encode(&std::fs::read_to_string(text)?, false)?)
}

/// Peak resident bytes of a process that does nothing but open the bundle and build the prefix once. Memory depends on
/// lengths alone: the tokens are made up, so that no tokenizer and no text count.
fn memory_of_a_build(bundle: &Path, context: usize) -> anyhow::Result<u64> {
    let program = std::env::current_exe()?;
    let output = std::process::Command::new(program)
        .args(["--memory".as_ref(), bundle.as_os_str()])
        .args(["--context", &context.to_string()])
        .args(["--width", &number("--width", 1)?.to_string()])
        .output()?;
    ensure!(
        output.status.success(),
        "the process that measures memory failed: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(String::from_utf8(output.stdout)?.trim().parse()?)
}

/// What that process does.
fn build_once(bundle: &Path, context: usize) -> anyhow::Result<()> {
    let bundle = Bundle::open(bundle)?;
    let arch = bundle.architecture();
    let runtime = load(LoadOptions::fetching(&mut |_| {}))?;
    let loader = OrtCpu::new(runtime, bundle.weights().clone(), &OrtOptions { fused_operators: true })?;
    let mut engines = Engines::new(&bundle, Box::new(loader));
    let ids: Vec<u32> = (0..context).map(|i| (i * 31 % arch.vocab_size()) as u32).collect();
    let (plan, zeros) = plan(arch, context)?;
    let bias: Vec<&[f32]> = vec![&zeros; arch.num_layers()];
    let width = number("--width", 1)?;
    compress(&mut engines, &plan, prompt(&ids, context), &bias, width, &mut NoTaps, &mut |_| {})?;
    println!("{}", peak_resident_bytes().context("this system does not tell the peak memory")?);
    Ok(())
}

/// The plan, and a table of zeros for it: the time does not depend on which tokens survive.
fn plan(arch: &Architecture, context: usize) -> anyhow::Result<(HomerPlan, Vec<f32>)> {
    let lengths = PromptLengths { prefix: PREFIX, context: context - PREFIX - SUFFIX, suffix: SUFFIX };
    let plan = HomerPlan::new(arch.num_layers(), lengths, SETTINGS)?;
    let zeros = vec![0.0; plan.max_distance() + 1];
    Ok((plan, zeros))
}

fn prompt(ids: &[u32], context: usize) -> Prompt<'_> {
    let suffix = context - SUFFIX;
    Prompt { prefix: &ids[..PREFIX], context: &ids[PREFIX..suffix], suffix: &ids[suffix..context] }
}

fn main() -> anyhow::Result<()> {
    let context = number("--context", 32_768)?;
    if let Some(bundle) = option("--memory") {
        return build_once(Path::new(&bundle), context);
    }
    let plain_context = number("--plain", context)?;
    let fused_operators = option("--operators").as_deref() != Some("portable");
    let threads = std::thread::available_parallelism()?.get();

    let cache = Cache::from_environment()?;
    let folder = accordion::models::resolve(Path::new("smollm2-135m"), &cache, &mut |_| {})?;
    let checkpoint = Checkpoint::open(folder)?;
    let arch = checkpoint.architecture().clone();
    let emma = cache.fetch(&asset::EMMA, &mut |_| {})?;
    let ids = token_ids(&checkpoint, arch.vocab_size(), emma.path())?;
    ensure!(ids.len() >= context.max(plain_context), "the text has {} tokens", ids.len());

    let (plan, zeros) = plan(&arch, context)?;
    let work = tempfile::tempdir_in(checkpoint.dir().parent().context("a checkpoint lies in a folder")?)?;
    let out = work.path().join("bundle");
    let heights = tree_heights(arch.num_layers(), SETTINGS, context)?;
    let method = MethodSettings::Homer { settings: SETTINGS, tree_heights: heights, significance: None };
    let options = ExportOptions { method, target: Target::OrtCpu, weights: WeightStorage::Link, force: false };
    export(&checkpoint, &out, &options)?;
    let bundle = Bundle::open(&out)?;
    let runtime = load(LoadOptions::fetching(&mut |_| {}))?;
    let loader = || OrtCpu::new(runtime, bundle.weights().clone(), &OrtOptions { fused_operators });

    let weights = megabytes(checkpoint.weights().byte_count());
    let operations = plan.operations(&arch);
    let plain_operations = OperationCount::plain_prefill(&arch, plain_context);
    println!(
        "{} threads, {} operators, weights {weights:.0} MB",
        threads,
        if fused_operators { "fused" } else { "portable" }
    );
    let tera = |n: u64| n as f64 / 1e12;
    println!(
        "homer {context}: {:.2} TFLOP linear, {:.2} attention",
        tera(operations.linear),
        tera(operations.attention)
    );
    println!(
        "plain {plain_context}: {:.2} TFLOP linear, {:.2} attention",
        tera(plain_operations.linear),
        tera(plain_operations.attention)
    );

    // Rates before and after: a machine that slows down meanwhile shows.
    let rates = |loader: &dyn Loader| Ceilings::measure(loader, &bundle, SETTINGS.max_chunk_len, threads);
    let before = rates(&loader()?)?;
    let mut engines = Engines::new(&bundle, Box::new(loader()?));
    let prompt = prompt(&ids, context);
    let bias: Vec<&[f32]> = vec![&zeros; arch.num_layers()];

    let mut builds = Vec::new();
    let mut state: Option<ContextState> = None;
    for _ in 0..number("--runs", 3)?.max(1) {
        drop(state.take());
        let start = Instant::now();
        let built = compress(&mut engines, &plan, prompt, &bias, number("--width", 1)?, &mut NoTaps, &mut |_| {})?;
        builds.push(start.elapsed().as_secs_f64());
        state = Some(built);
    }
    let state = state.context("at least one build")?;
    let homer_step = decode(&mut engines, &state)?;
    let homer_bytes = step_bytes(&checkpoint, &state);
    drop(state);
    let short = plain::prefill(&mut engines, &ids[..SETTINGS.target_len], |_| {})?;
    let plain_step = decode(&mut engines, &short)?;
    drop(short);

    reset_peak_resident()?;
    let start = Instant::now();
    let whole = plain::prefill(&mut engines, &ids[..plain_context], |_| {})?;
    let plain_build = start.elapsed().as_secs_f64();
    let plain_peak = peak_resident_bytes().unwrap_or(0);
    drop(whole);
    let after = rates(&loader()?)?;

    let best = Ceilings {
        linear_flops: before.linear_flops.max(after.linear_flops),
        attention_flops: before.attention_flops.max(after.attention_flops),
        read_bytes: before.read_bytes.max(after.read_bytes),
    };
    for (when, rate) in [("before", before), ("after", after)] {
        let [linear, attention, read] = [rate.linear_flops, rate.attention_flops, rate.read_bytes].map(|r| r / 1e9);
        println!("rates {when}: linear {linear:.0} GFLOP/s, attention {attention:.0} GFLOP/s, read {read:.1} GB/s");
    }
    let slowest = builds.iter().copied().fold(0.0, f64::max);
    let homer_build = median(builds);
    let floor = best.floor_seconds(&operations);
    let plain_floor = best.floor_seconds(&plain_operations);
    println!(
        "homer {context}: {homer_build:.2} s (slowest {slowest:.2}), floor {floor:.2} s: {:.2} times",
        homer_build / floor
    );
    println!(
        "plain {plain_context}: {plain_build:.1} s, floor {plain_floor:.1} s: {:.2} times",
        plain_build / plain_floor
    );
    println!("speed-up: {:.1} times (floor over floor {:.1})", plain_build / homer_build, plain_floor / floor);
    let peak = memory_of_a_build(&out, context)?;
    println!(
        "peak: homer {:.0} MB = weights + {:.0} MB; plain {:.0} MB",
        megabytes(peak),
        megabytes(peak) - weights,
        megabytes(plain_peak)
    );
    let bound = best.read_seconds(homer_bytes);
    println!(
        "decode: after homer {:.1} ms, after plain {} {:.1} ms ({:.2} times); memory bound {:.1} ms: {:.2} times",
        homer_step * 1e3,
        SETTINGS.target_len,
        plain_step * 1e3,
        homer_step / plain_step,
        bound * 1e3,
        homer_step / bound
    );
    Ok(())
}
