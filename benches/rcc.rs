//! RCC: what its export, its encoder and its memory cost; docs/performance.md explains the numbers.
//!
//! `cargo bench --bench rcc [-- OPTIONS]`
//!
//! - `--model M`: the checkpoint of all but the first measurement (`random:rcc-pythia-70m`)
//! - `--lengths N,N`: prompts over which the encoder's cost per token is compared (16384,65536,262144)
//! - `--context N`: tokens of the prompt whose memory is compared (65536)
//! - `--plain N`: tokens of the plain prefill to compare with (the same as `--context`)
//! - `--runs N`: runs of the encoder, of which the median counts (3)
//! - `--width N`: segments per batch (1)
//! - `--operators portable`: ONNX Runtime's own operators instead of our kernels
//! - `--large`: exports a checkpoint of the size of Pythia-1.4b that has weights (12 GB, written to the cache), rather than
//!   one of headers and holes
#![allow(missing_docs, clippy::print_stdout)]

#[allow(dead_code, reason = "each comparison uses its part")]
mod common;
#[path = "../tests/cli/sparse.rs"]
#[allow(dead_code, reason = "each target that shares the file uses its part")]
mod sparse;

use accordion::bundle::{Bundle, MethodSettings};
use accordion::checkpoint::{Checkpoint, RCC_FILE, architecture_json, decoder_tensors, rcc_json, rcc_tensors};
use accordion::fetch::Cache;
use accordion::models;
use accordion::pipeline::Engines;
use accordion::pipeline::compress::Compression;
use accordion::pipeline::rcc::{ENCODER, Rcc};
use accordion::profile::ceilings::Ceilings;
use accordion::tensor::Tensor;
use accordion_graphs::architecture::{Architecture, Compressor, Encoder, GptNeox, RccModel, Rope, RopeScaling};
use accordion_graphs::plan::rcc::{RccPlan, RccSettings};
use accordion_graphs::plan::{OperationCount, PromptLengths};
use anyhow::{Context, bail};
use common::{median, megabytes, number, timed};
use std::path::{Path, PathBuf};

/// Tokens of the question: they are no part of the text that segments are cut from, so that a text of a multiple of the
/// window less these fills its last segment without a further one of padding.
const SUFFIX: usize = 64;

fn lengths(total: usize) -> PromptLengths {
    PromptLengths { prefix: 0, context: total - SUFFIX, suffix: SUFFIX }
}

fn compression(bundle: &Bundle, method: &str) -> anyhow::Result<Compression> {
    match method {
        "plain" => Ok(Compression::Plain { allow_overlong: true }),
        "rcc" => Ok(Compression::Rcc(Rcc { settings: settings(bundle)?, width: number("--width", 1)? })),
        other => bail!("--method {other}"),
    }
}

fn settings(bundle: &Bundle) -> anyhow::Result<RccSettings> {
    match bundle.manifest().method {
        accordion::bundle::Method::Rcc { settings } => Ok(settings),
        _ => bail!("{} is not of RCC", bundle.dir().display()),
    }
}

/// The shape of RCC's released model, as headers and holes.
fn released_shape(folder: PathBuf) -> anyhow::Result<PathBuf> {
    let arch = Architecture::GptNeox(GptNeox {
        num_layers: 24,
        hidden_size: 2048,
        intermediate_size: 8192,
        num_heads: 16,
        vocab_size: 50_304,
        max_positions: 2048,
        layer_norm_eps: 1e-5,
        rope: Rope { theta: 10_000.0, scaling: RopeScaling::None },
        rotary_dims: 32,
        parallel_residual: true,
        tie_word_embeddings: false,
        attention_bias: true,
        eos_token_ids: vec![0],
        bos_token_id: Some(0),
    });
    let settings = RccSettings { window: 2048, ratio: 32, pairs: false, first_state_is_embedding: false };
    let model = RccModel {
        encoder: Encoder::Transformer(arch.clone()),
        encoder_path: "gpt_neox.rcc_encoder".to_owned(),
        embed_map: "gpt_neox.rcc_encoder2gpt_embed".to_owned(),
        layer_maps: "gpt_neox.rcc_encoder2gpt_A_matrix".to_owned(),
    };
    std::fs::create_dir(&folder)?;
    std::fs::write(folder.join("config.json"), architecture_json(&arch).to_string())?;
    std::fs::write(folder.join(RCC_FILE), rcc_json(&model.encoder, settings).to_string())?;
    let tensors = [decoder_tensors(&arch), rcc_tensors(&model, &arch, settings)].concat();
    sparse::write_tensors(&folder, &tensors, "F32", 3);
    Ok(folder)
}

fn measure_export(cache: &Cache) -> anyhow::Result<()> {
    let work = tempfile::tempdir()?;
    let large = if common::flag("--large") {
        models::resolve(Path::new("random:rcc-pythia-1.4b"), cache, &mut |_| {})?
    } else {
        released_shape(work.path().join("checkpoint"))?
    };
    let settings = Checkpoint::open(&large)?.rcc_settings().context("a checkpoint of RCC")?;
    let beside = common::folder_beside(&large)?;
    let what = if common::flag("--large") { "rcc-pythia-1.4b" } else { "rcc-pythia-1.4b (headers and holes)" };
    common::measure_export(what, &large, &beside.path().join("bundle"), &MethodSettings::Rcc(settings))
}

/// Seconds in the encoder alone over the segments of a prompt.
fn encode(engines: &mut Engines<'_>, plan: &RccPlan, text: &[u32], width: usize) -> anyhow::Result<f64> {
    let engine = engines.get(ENCODER, &[])?;
    let mut seconds = 0.0;
    for first in (0..plan.segments).step_by(width) {
        let batch = first..(first + width).min(plan.segments);
        let shape = [batch.len(), plan.settings.window];
        let ids = batch.flat_map(|segment| plan.segment(text, segment)).map(i64::from).collect();
        let ids = Tensor::from_i64(shape, ids)?;
        seconds += timed(|| Ok(engine.run(&[("input_ids", &ids)], &mut [], &["maps"])?))?.0;
    }
    Ok(seconds)
}

fn main() -> anyhow::Result<()> {
    let context = number("--context", 65_536)?;
    if let Some(bundle) = common::option("--memory") {
        let method = common::option("--method").context("--method is missing")?;
        return common::read_once(Path::new(&bundle), lengths(context), |bundle| compression(bundle, &method));
    }
    let totals = common::option("--lengths").unwrap_or_else(|| "16384,65536,262144".to_owned());
    let totals: Vec<usize> = totals.split(',').map(str::parse).collect::<Result<_, _>>().context("--lengths")?;
    let plain_context = number("--plain", context)?;
    let width = number("--width", 1)?.max(1);
    let threads = common::threads()?;
    let cache = Cache::from_environment()?;
    measure_export(&cache)?;

    let checkpoint = Checkpoint::open(common::model("random:rcc-pythia-70m", &cache)?)?;
    let arch = checkpoint.architecture();
    let (Some(Compressor::Rcc(model)), Some(settings)) = (checkpoint.compressor(), checkpoint.rcc_settings()) else {
        bail!("{} is no checkpoint of RCC", checkpoint.dir().display());
    };
    let work = common::folder_beside(checkpoint.dir())?;
    let out = work.path().join("bundle");
    common::exported(checkpoint.dir(), &out, &MethodSettings::Rcc(settings))?;
    let bundle = Bundle::open(&out)?;
    let weights = megabytes(checkpoint.weights().byte_count());
    println!("{threads} threads, weights {weights:.0} MB, {width} segments per batch");

    let rates = || anyhow::Ok(Ceilings::measure(&common::loader(&bundle)?, &bundle, settings.window, threads)?);
    let before = rates()?;
    let mut engines = common::engines(&bundle)?;
    let plans = totals.iter().map(|&total| RccPlan::new(lengths(total), settings)).collect::<Result<Vec<_>, _>>()?;
    let longest = made_up(&checkpoint, totals.iter().copied().max().unwrap_or_default());
    let mut encoding = vec![Vec::new(); totals.len()];
    // Turn by turn: a machine that slows down meanwhile slows all of them.
    for _ in 0..number("--runs", 3)?.max(1) {
        for (plan, seconds) in plans.iter().zip(&mut encoding) {
            seconds.push(encode(&mut engines, plan, &longest[..plan.text_len()], width)?);
        }
    }
    let rcc = compression(&bundle, "rcc")?;
    let mut whole = Vec::new();
    for &total in &totals {
        let prompt = common::prompt(&longest[..total], lengths(total));
        let (seconds, state) = timed(|| Ok(rcc.compress(&mut engines, &prompt, &mut |_, _| {})?))?;
        whole.push((seconds, state.cache_bytes()));
    }
    let best = common::best_rates(before, rates()?);
    let per_token: Vec<f64> =
        encoding.into_iter().zip(&plans).map(|(seconds, plan)| median(seconds) / plan.text_len() as f64).collect();
    for (i, plan) in plans.iter().enumerate() {
        let operations = plan.operations(arch, &model.encoder);
        let (floor, (seconds, kept)) = (best.floor_seconds(&operations), whole[i]);
        common::print_operations(&format!("rcc {}", totals[i]), &operations);
        println!(
            "rcc {}: encoder {:.2} ms per 1000 tokens, {:.3} of the first; with slots and prompt {seconds:.2} s, floor \
             {floor:.2} s: {:.2} times; {:.1} MB kept",
            totals[i],
            per_token[i] * 1e6,
            per_token[i] / per_token[0],
            seconds / floor,
            megabytes(kept)
        );
    }

    let own_process = |method: &str, context: usize| {
        let arguments =
            [("--method", method.to_owned()), ("--context", context.to_string()), ("--width", width.to_string())];
        common::in_own_process(&out, &arguments)
    };
    // Of the weights only what is read is resident: growth over one segment shows the context's own memory.
    let compare = |method: &str, context: usize| {
        let [short, long] = [settings.window, context].map(|context| own_process(method, context));
        let (short, long) = (short?, long?);
        println!(
            "{method} {context}: {:.1} s; peak {:.0} MB, {:.0} MB above that of {} tokens; {:.1} MB kept",
            long.seconds,
            megabytes(long.peak),
            megabytes(long.peak) - megabytes(short.peak),
            settings.window,
            megabytes(long.kept)
        );
        anyhow::Ok(long)
    };
    let compressed = compare("rcc", context)?;
    let plain = compare("plain", plain_context)?;
    let plain_operations = OperationCount::plain_prefill(arch, plain_context);
    println!(
        "plain {plain_context}: floor {:.1} s; rcc is {:.1} times as fast and keeps 1/{:.1} of the bytes per token",
        best.floor_seconds(&plain_operations),
        plain.seconds / compressed.seconds,
        (plain.kept as f64 / plain_context as f64) / (compressed.kept as f64 / context as f64)
    );
    Ok(())
}

fn made_up(checkpoint: &Checkpoint, count: usize) -> Vec<u32> {
    let encoder = match checkpoint.compressor() {
        Some(Compressor::Rcc(model)) => model.encoder.vocab_size(),
        _ => usize::MAX,
    };
    common::made_up(count, encoder.min(checkpoint.architecture().vocab_size()))
}
