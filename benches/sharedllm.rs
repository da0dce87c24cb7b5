//! SharedLLM against plain on one model, one text and one runtime, in one run; docs/performance.md explains the numbers.
//!
//! `cargo bench --bench sharedllm [-- OPTIONS]`
//!
//! The model is a Llama converted as the paper begins its training (`accordion convert sharedllm --layers 4 --init copy`);
//! what it says means nothing, what it costs is what a trained one costs.
//!
//! - `--model M`: the Llama (`smollm2-135m`)
//! - `--context N`: tokens of the whole prompt (32768)
//! - `--plain N`: tokens of the plain prefill to compare with (the same as `--context`; it takes minutes)
//! - `--runs N`: compressions of every kind, of which the median counts (3)
//! - `--operators portable`: ONNX Runtime's own operators instead of our kernels
#![allow(missing_docs, clippy::print_stdout)]

#[allow(dead_code, reason = "each comparison uses its part")]
mod common;

use accordion::bundle::{Bundle, Method, MethodSettings};
use accordion::checkpoint::Checkpoint;
use accordion::convert::{CrossAttention, SharedLlmOptions, to_sharedllm};
use accordion::fetch::Cache;
use accordion::pipeline::Engines;
use accordion::pipeline::compress::Compression;
use accordion::pipeline::sharedllm::{Context as Compressed, SharedLlm, inject, read};
use accordion::profile::ceilings::Ceilings;
use accordion::taps::NoTaps;
use accordion_graphs::architecture::{Architecture, Compressor};
use accordion_graphs::plan::sharedllm::{ChunkPolicy, Keep, Quirks, SharedLlmPlan, SharedLlmSettings};
use accordion_graphs::plan::{OperationCount, PromptLengths};
use anyhow::{Context, bail};
use common::{median, megabytes, number, timed};
use std::path::Path;

const LAYERS: usize = 4;
const KEEP: Keep = Keep::Tokens(32);
const DEPTH: usize = 3;
const FAITHFUL: SharedLlmSettings =
    SharedLlmSettings { chunk_len: 1024, tree_depth: DEPTH, keep: KEEP, retrieval: true, quirks: Quirks::Faithful };
const FIXED: SharedLlmSettings = SharedLlmSettings { quirks: Quirks::Fixed, ..FAITHFUL };
/// Chunks whose cost is compared with those of the whole prompt.
const FEWER_CHUNKS: [usize; 2] = [8, 16];

/// All chunks but the last, which the upper model reads, as in fine-tuning.
fn plan(total: usize, settings: SharedLlmSettings) -> anyhow::Result<SharedLlmPlan> {
    Ok(SharedLlmPlan::new(lengths(total), settings, ChunkPolicy::FineTuning)?)
}

/// A question of one token: the method makes no difference between it and the rest.
fn lengths(total: usize) -> PromptLengths {
    PromptLengths { prefix: 0, context: total - 1, suffix: 1 }
}

fn compression(bundle: &Bundle, method: &str) -> anyhow::Result<Compression> {
    match (method, bundle.manifest().method.clone()) {
        ("plain", _) => Ok(Compression::Plain { allow_overlong: true }),
        ("sharedllm", Method::SharedLlm { settings }) => {
            let width = number("--width", usize::MAX)?;
            Ok(Compression::SharedLlm(SharedLlm { settings, policy: ChunkPolicy::FineTuning, width }))
        }
        _ => bail!("--method {method}"),
    }
}

/// One way of compressing a prompt, and the seconds of its runs.
struct Way<'a> {
    name: String,
    bundle: usize,
    plan: SharedLlmPlan,
    width: usize,
    ids: &'a [u32],
    compressing: Vec<f64>,
    reading: Vec<f64>,
}

impl Way<'_> {
    fn run(&mut self, engines: &mut Engines<'_>) -> anyhow::Result<()> {
        let (ids, running) = self.ids.split_at(self.plan.compressed().end);
        let context = Compressed { ids, mask: None, running, query_index: running.len() - 1 };
        let (compressing, injected) =
            timed(|| Ok(inject(engines, &self.plan, context, self.width, &mut NoTaps, &mut |_| {})?))?;
        let (reading, _) = timed(|| Ok(read(engines, injected, running, |_| {})?))?;
        self.compressing.push(compressing);
        self.reading.push(reading);
        Ok(())
    }
}

fn main() -> anyhow::Result<()> {
    let context = number("--context", 32_768)?;
    if let Some(bundle) = common::option("--memory") {
        let method = common::option("--method").context("--method is missing")?;
        return common::read_once(Path::new(&bundle), lengths(context), |bundle| compression(bundle, &method));
    }
    let plain_context = number("--plain", context)?;
    let threads = common::threads()?;
    let cache = Cache::from_environment()?;
    let source = Checkpoint::open(common::model("smollm2-135m", &cache)?)?;
    let ids = common::emma(&source, &cache, context)?;

    let work = common::folder_beside(source.dir())?;
    let folder = work.path().join("checkpoint");
    let options = SharedLlmOptions {
        layers: LAYERS,
        cross_attention: CrossAttention::Copy,
        keep: KEEP,
        tree_depth: DEPTH,
        retrieval: true,
        force: false,
    };
    to_sharedllm(&source, &folder, &options)?;
    let paths = ["faithful", "fixed"].map(|name| work.path().join(name));
    for (path, settings) in paths.iter().zip([FAITHFUL, FIXED]) {
        let what = format!("sharedllm {:?}", settings.quirks).to_lowercase();
        common::measure_export(&what, &folder, path, &MethodSettings::SharedLlm(settings))?;
    }
    let bundles = [Bundle::open(&paths[0])?, Bundle::open(&paths[1])?];
    let plain_bundle = work.path().join("plain");
    common::exported(source.dir(), &plain_bundle, &MethodSettings::Plain)?;
    let arch = source.architecture();
    let weights = megabytes(source.weights().byte_count());
    println!("{threads} threads, weights {weights:.0} MB");

    let rows = FAITHFUL.chunk_len;
    let rates = || anyhow::Ok(Ceilings::measure(&common::loader(&bundles[0])?, &bundles[0], rows, threads)?);
    let before = rates()?;
    let mut engines = [common::engines(&bundles[0])?, common::engines(&bundles[1])?];
    let mut ways = Vec::new();
    let mut add = |name: String, bundle: usize, total: usize, settings, width| -> anyhow::Result<()> {
        let (plan, ids) = (plan(total, settings)?, &ids[..total]);
        ways.push(Way { name, bundle, plan, width, ids, compressing: Vec::new(), reading: Vec::new() });
        Ok(())
    };
    add("faithful".to_owned(), 0, context, FAITHFUL, usize::MAX)?;
    add("fixed, all chunks at once".to_owned(), 1, context, FIXED, usize::MAX)?;
    add("fixed, one by one".to_owned(), 1, context, FIXED, 1)?;
    for chunks in FEWER_CHUNKS.into_iter().filter(|chunks| (chunks + 1) * rows < context) {
        add(format!("faithful, {chunks} chunks"), 0, (chunks + 1) * rows, FAITHFUL, usize::MAX)?;
    }
    // Turn by turn: a machine that slows down meanwhile slows all of them.
    for _ in 0..number("--runs", 3)?.max(1) {
        for way in &mut ways {
            way.run(&mut engines[way.bundle])?;
        }
    }
    let best = common::best_rates(before, rates()?);

    let chunk_seconds = |way: &Way<'_>| median(way.compressing.clone()) / way.plan.chunks as f64;
    let first = ways.first().map_or(f64::NAN, chunk_seconds);
    for way in &ways {
        let operations = operations(&way.plan, &folder)?;
        let [compressing, reading] = [&way.compressing, &way.reading].map(|seconds| median(seconds.clone()));
        let floor = best.floor_seconds(&operations);
        println!(
            "{}: {} chunks {compressing:.2} s, {:.1} ms per chunk, {:.3} of the first; running text {reading:.2} s; floor \
             {floor:.2} s: {:.2} times",
            way.name,
            way.plan.chunks,
            chunk_seconds(way) * 1e3,
            chunk_seconds(way) / first,
            (compressing + reading) / floor
        );
    }
    let faithful = ways.first().map_or(f64::NAN, |way| median(way.compressing.clone()) + median(way.reading.clone()));
    common::print_operations(&format!("sharedllm {context}"), &operations(&plan(context, FAITHFUL)?, &folder)?);
    drop(engines);

    let own_process = |bundle: &Path, method: &str, context: usize, width: usize| {
        let arguments =
            [("--method", method.to_owned()), ("--context", context.to_string()), ("--width", width.to_string())];
        common::in_own_process(bundle, &arguments)
    };
    let report = |name: &str, cost: common::Cost| {
        println!(
            "{name}: {:.1} s; peak {:.0} MB = weights + {:.0} MB; {:.1} MB kept",
            cost.seconds,
            megabytes(cost.peak),
            megabytes(cost.peak) - weights,
            megabytes(cost.kept)
        );
    };
    report("faithful", own_process(&paths[0], "sharedllm", context, usize::MAX)?);
    report("fixed, all chunks at once", own_process(&paths[1], "sharedllm", context, usize::MAX)?);
    report("fixed, one by one", own_process(&paths[1], "sharedllm", context, 1)?);
    let plain = own_process(&plain_bundle, "plain", plain_context, 1)?;
    report(&format!("plain {plain_context}"), plain);

    let plain_operations = OperationCount::plain_prefill(arch, plain_context);
    common::print_operations(&format!("plain {plain_context}"), &plain_operations);
    let floors = [&plain_operations, &operations(&plan(context, FAITHFUL)?, &folder)?].map(|n| best.floor_seconds(n));
    println!(
        "plain {plain_context}: floor {:.1} s; speed-up {:.1} times (floor over floor {:.1})",
        floors[0],
        plain.seconds / faithful,
        floors[0] / floors[1]
    );
    Ok(())
}

fn operations(plan: &SharedLlmPlan, checkpoint: &Path) -> anyhow::Result<OperationCount> {
    let checkpoint = Checkpoint::open(checkpoint)?;
    let Some(Compressor::SharedLlm(model)) = checkpoint.compressor() else {
        bail!("{} is no checkpoint of sharedllm", checkpoint.dir().display());
    };
    let lower = Architecture::Llama(model.lower.clone());
    Ok(plan.operations(checkpoint.architecture(), &lower, model.injected_layers))
}
