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

#[allow(dead_code, reason = "each comparison uses its part")]
mod common;

use accordion::bundle::{Bundle, MethodSettings, tree_heights};
use accordion::checkpoint::Checkpoint;
use accordion::environment::{peak_resident_bytes, reset_peak_resident};
use accordion::fetch::Cache;
use accordion::pipeline::compress::{Compression, Homer, Significance};
use accordion::pipeline::decode::{Continuation, Sequence};
use accordion::pipeline::{ContextState, Engines, plain};
use accordion::profile::ceilings::Ceilings;
use accordion_graphs::plan::homer::{HomerPlan, HomerSettings};
use accordion_graphs::plan::{OperationCount, PromptLengths};
use anyhow::Context;
use common::{median, megabytes, number, timed};
use std::path::Path;

const PREFIX: usize = 64;
const SUFFIX: usize = 64;
const SETTINGS: HomerSettings =
    HomerSettings { max_chunk_len: 2048, max_initial_chunk_len: None, target_len: 2048, layers_warmup: 12 };
/// Tokens decoded after a context; the median step counts.
const NEW_TOKENS: usize = 64;

/// Median seconds of one decoding step behind `state`.
fn decode(engines: &mut Engines<'_>, state: &ContextState) -> anyhow::Result<f64> {
    let mut sequence = Sequence::continue_from(engines, state, NEW_TOKENS, Continuation::Next)?;
    let mut steps = Vec::with_capacity(NEW_TOKENS);
    for step in 0..NEW_TOKENS {
        let (seconds, _) = timed(|| Ok(sequence.forward(engines, &[100 + step as u32], 1)?))?;
        steps.push(seconds);
    }
    Ok(median(steps))
}

/// The bytes that one decoding step has to read: the weights and the cache.
fn step_bytes(checkpoint: &Checkpoint, state: &ContextState) -> u64 {
    checkpoint.weights().byte_count() + state.cache_bytes()
}

fn lengths(context: usize) -> PromptLengths {
    PromptLengths { prefix: PREFIX, context: context - PREFIX - SUFFIX, suffix: SUFFIX }
}

/// Scores as they are: the time does not depend on which tokens survive.
fn homer() -> anyhow::Result<Compression> {
    let significance = Some(Significance::Uncalibrated);
    Ok(Compression::Homer(Homer { settings: SETTINGS, significance, width: number("--width", 1)? }))
}

fn main() -> anyhow::Result<()> {
    let context = number("--context", 32_768)?;
    if let Some(bundle) = common::option("--memory") {
        return common::read_once(Path::new(&bundle), lengths(context), |_| homer());
    }
    let plain_context = number("--plain", context)?;
    let threads = common::threads()?;

    let cache = Cache::from_environment()?;
    let checkpoint = Checkpoint::open(common::model("smollm2-135m", &cache)?)?;
    let arch = checkpoint.architecture().clone();
    let ids = common::emma(&checkpoint, &cache, context.max(plain_context))?;

    let plan = HomerPlan::new(arch.num_layers(), lengths(context), SETTINGS)?;
    let work = common::folder_beside(checkpoint.dir())?;
    let out = work.path().join("bundle");
    let tree_heights = tree_heights(arch.num_layers(), SETTINGS, context)?;
    let method = MethodSettings::Homer { settings: SETTINGS, tree_heights, significance: None };
    common::exported(checkpoint.dir(), &out, &method)?;
    let bundle = Bundle::open(&out)?;

    let weights = megabytes(checkpoint.weights().byte_count());
    let operations = plan.operations(&arch);
    let plain_operations = OperationCount::plain_prefill(&arch, plain_context);
    let operators = if common::fused_operators() { "fused" } else { "portable" };
    println!("{threads} threads, {operators} operators, weights {weights:.0} MB");
    common::print_operations(&format!("homer {context}"), &operations);
    common::print_operations(&format!("plain {plain_context}"), &plain_operations);

    let rates = || anyhow::Ok(Ceilings::measure(&common::loader(&bundle)?, &bundle, SETTINGS.max_chunk_len, threads)?);
    let before = rates()?;
    let mut engines = common::engines(&bundle)?;
    let (homer, prompt) = (homer()?, common::prompt(&ids[..context], lengths(context)));

    let mut builds = Vec::new();
    let mut state: Option<ContextState> = None;
    for _ in 0..number("--runs", 3)?.max(1) {
        drop(state.take());
        let (seconds, built) = timed(|| Ok(homer.compress(&mut engines, &prompt, &mut |_, _| {})?))?;
        builds.push(seconds);
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
    let (plain_build, whole) = timed(|| Ok(plain::prefill(&mut engines, &ids[..plain_context], |_| {})?))?;
    let plain_peak = peak_resident_bytes().unwrap_or(0);
    drop(whole);
    let best = common::best_rates(before, rates()?);
    let slowest = common::slowest(&builds);
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
    let arguments = [("--context", context.to_string()), ("--width", number("--width", 1)?.to_string())];
    let peak = common::in_own_process(&out, &arguments)?.peak;
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
