//! What the comparisons of methods share: options, the text, bundles, rates, and processes of their own for memory.
#![allow(clippy::print_stdout)]

use accordion::bundle::{Bundle, ExportOptions, MethodSettings, WeightStorage, export};
use accordion::checkpoint::Checkpoint;
use accordion::environment::peak_resident_bytes;
use accordion::fetch::{Cache, asset};
use accordion::pipeline::compress::Compression;
use accordion::pipeline::prompt::PromptIds;
use accordion::pipeline::{Engines, plain};
use accordion::precision::Recipe;
use accordion::profile::ceilings::Ceilings;
use accordion::runtime::locate::{LoadOptions, load};
use accordion::runtime::ort_cpu::{OrtCpu, OrtOptions};
use accordion_graphs::blocks::Target;
use accordion_graphs::plan::{OperationCount, PromptLengths};
use anyhow::{Context, ensure};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};
use std::time::Instant;
use tempfile::TempDir;

/// The value behind the option `name`.
pub(crate) fn option(name: &str) -> Option<String> {
    let mut arguments = std::env::args().skip_while(|argument| argument != name);
    arguments.nth(1)
}

/// Whether the option `name` is there.
pub(crate) fn flag(name: &str) -> bool {
    std::env::args().any(|argument| argument == name)
}

/// The number behind the option `name`.
pub(crate) fn number(name: &str, default: usize) -> anyhow::Result<usize> {
    option(name).map_or(Ok(default), |text| text.parse().with_context(|| format!("{name} {text}")))
}

pub(crate) fn megabytes(bytes: u64) -> f64 {
    bytes as f64 / 1e6
}

pub(crate) fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

pub(crate) fn slowest(values: &[f64]) -> f64 {
    values.iter().copied().fold(0.0, f64::max)
}

/// Seconds that `work` takes, and what it gives.
pub(crate) fn timed<T>(work: impl FnOnce() -> anyhow::Result<T>) -> anyhow::Result<(f64, T)> {
    let start = Instant::now();
    let result = work()?;
    Ok((start.elapsed().as_secs_f64(), result))
}

pub(crate) fn threads() -> anyhow::Result<usize> {
    Ok(std::thread::available_parallelism()?.get())
}

/// Whether our kernels run, rather than ONNX Runtime's own operators alone.
pub(crate) fn fused_operators() -> bool {
    option("--operators").as_deref() != Some("portable")
}

/// The folder of the checkpoint that `--model` names, or of `default`.
pub(crate) fn model(default: &str, cache: &Cache) -> anyhow::Result<PathBuf> {
    let name = option("--model").unwrap_or_else(|| default.to_owned());
    Ok(accordion::models::resolve(Path::new(&name), cache, &mut |_| {})?)
}

/// The first `count` ids of *Emma*.
pub(crate) fn emma(checkpoint: &Checkpoint, cache: &Cache, count: usize) -> anyhow::Result<Vec<u32>> {
    let text = cache.fetch(&asset::EMMA, &mut |_| {})?;
    let mut ids = checkpoint.tokenizer()?.encode(&std::fs::read_to_string(text.path())?, false)?;
    ensure!(ids.len() >= count, "the text has {} tokens", ids.len());
    ids.truncate(count);
    Ok(ids)
}

/// Ids for what depends on lengths alone.
pub(crate) fn made_up(count: usize, vocab_size: usize) -> Vec<u32> {
    (0..count).map(|i| (i * 31 % vocab_size) as u32).collect()
}

/// The ids of a prompt of `lengths`, cut into its parts.
pub(crate) fn prompt(ids: &[u32], lengths: PromptLengths) -> PromptIds {
    let (prefix, rest) = ids.split_at(lengths.prefix);
    let (context, suffix) = rest.split_at(lengths.context);
    PromptIds { prefix: prefix.to_vec(), context: context.to_vec(), suffix: suffix.to_vec() }
}

/// A folder beside `checkpoint`, where its weights can be linked.
pub(crate) fn folder_beside(checkpoint: &Path) -> anyhow::Result<TempDir> {
    Ok(tempfile::tempdir_in(checkpoint.parent().context("a checkpoint lies in a folder")?)?)
}

/// Exports `checkpoint` into the folder `out`, with linked weights. Seconds, opening the checkpoint included, and bytes.
pub(crate) fn exported(checkpoint: &Path, out: &Path, method: &MethodSettings) -> anyhow::Result<(f64, u64)> {
    let (seconds, exported) = timed(|| {
        let options = ExportOptions {
            method: method.clone(),
            target: Target::OrtCpu,
            weights: WeightStorage::Link,
            recipe: Recipe::fp32(),
            force: out.exists(),
        };
        Ok(export(&Checkpoint::open(checkpoint)?, out, &options)?)
    })?;
    if let Some(problem) = exported.link_failure {
        println!("not linked: {problem}");
    }
    Ok((seconds, exported.bytes_written))
}

/// Exports five times into the folder `out` and prints what it costs.
pub(crate) fn measure_export(what: &str, checkpoint: &Path, out: &Path, method: &MethodSettings) -> anyhow::Result<()> {
    const RUNS: usize = 5;
    let exports = (0..RUNS).map(|_| exported(checkpoint, out, method)).collect::<Result<Vec<_>, _>>()?;
    let seconds: Vec<f64> = exports.iter().map(|(seconds, _)| *seconds).collect();
    let written = exports.first().map_or(0, |(_, bytes)| *bytes);
    println!(
        "export of {what}: {:.3} s (slowest of {RUNS} {:.3}), {:.2} MB written",
        median(seconds.clone()),
        slowest(&seconds),
        megabytes(written)
    );
    Ok(())
}

/// A loader of the graphs of `bundle`.
pub(crate) fn loader(bundle: &Bundle) -> anyhow::Result<OrtCpu> {
    let runtime = load(LoadOptions::fetching(&mut |_| {}))?;
    let options = OrtOptions { fused_operators: fused_operators() };
    Ok(OrtCpu::new(runtime, bundle.weights().clone(), &options)?)
}

pub(crate) fn engines(bundle: &Bundle) -> anyhow::Result<Engines<'_>> {
    Ok(Engines::new(bundle, Box::new(loader(bundle)?)))
}

/// Rates before and after what is measured: a machine that slows down meanwhile shows. The best of both make the floor.
pub(crate) fn best_rates(before: Ceilings, after: Ceilings) -> Ceilings {
    for (when, rate) in [("before", before), ("after", after)] {
        let [linear, attention, read] = [rate.linear_flops, rate.attention_flops, rate.read_bytes].map(|r| r / 1e9);
        println!("rates {when}: linear {linear:.0} GFLOP/s, attention {attention:.0} GFLOP/s, read {read:.1} GB/s");
    }
    Ceilings {
        linear_flops: before.linear_flops.max(after.linear_flops),
        attention_flops: before.attention_flops.max(after.attention_flops),
        read_bytes: before.read_bytes.max(after.read_bytes),
    }
}

pub(crate) fn print_operations(what: &str, operations: &OperationCount) {
    let tera = |n: u64| n as f64 / 1e12;
    println!("{what}: {:.2} TFLOP linear, {:.2} attention", tera(operations.linear), tera(operations.attention));
}

/// What reading one prompt costs.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(crate) struct Cost {
    /// From the prompt to the logits of its last token, with the time of loading graphs (of plain's, before).
    pub(crate) seconds: f64,
    /// The most bytes resident in the life of the process.
    pub(crate) peak: u64,
    /// Bytes of what is kept: cache and injected keys and values.
    pub(crate) kept: u64,
}

/// Runs this program again with `--memory BUNDLE` and `arguments`, and reads what [`read_once`] prints there.
pub(crate) fn in_own_process(bundle: &Path, arguments: &[(&str, String)]) -> anyhow::Result<Cost> {
    let mut command = std::process::Command::new(std::env::current_exe()?);
    command.arg("--memory").arg(bundle);
    let operators = option("--operators").map(|value| ("--operators", value));
    for (name, value) in arguments.iter().chain(&operators) {
        command.args([*name, value]);
    }
    let output = command.output()?;
    ensure!(
        output.status.success(),
        "the process that measures memory failed: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(serde_json::from_slice(&output.stdout)?)
}

/// What that process does: it opens the bundle and reads one prompt of `lengths`. Memory depends on lengths alone: the
/// tokens are made up, so that no tokenizer and no text count.
pub(crate) fn read_once(
    bundle: &Path,
    lengths: PromptLengths,
    compression: impl FnOnce(&Bundle) -> anyhow::Result<Compression>,
) -> anyhow::Result<()> {
    let bundle = Bundle::open(bundle)?;
    let compression = compression(&bundle)?;
    let mut engines = engines(&bundle)?;
    let ids = made_up(lengths.total(), bundle.architecture().vocab_size());
    if let Compression::Plain { .. } = compression {
        plain::prefill(&mut engines, &ids[..2], |_| {})?;
    }
    let prompt = prompt(&ids, lengths);
    let (seconds, state) = timed(|| Ok(compression.compress(&mut engines, &prompt, &mut |_, _| {})?))?;
    let peak = peak_resident_bytes().context("this system does not tell the peak memory")?;
    println!("{}", serde_json::to_string(&Cost { seconds, peak, kept: state.cache_bytes() })?);
    Ok(())
}
