//! One method at one prompt length, measured from token ids to the last new token.
//!
//! Time does not depend on which tokens a prompt has, nor on which of them a method keeps: every shape follows from the
//! plan. So the tokens may be random, and HOMER may run without a significance table.

use super::ProfileError;
use super::decoding::{CudaGraph, WARM_UP_TOKENS, compare_graphs, decode, largest};
use super::details::{Details, ms, spans, stages};
use super::layers::operators;
use super::load::Watch;
use super::roofline::Demand;
use super::schema::{Configuration, Measurement, decoder_in_words, describe};
use super::stats::{self, LatencyStats, Protocol, monotonic};
use super::stopwatch::{Record, Stopwatch};
use super::trace::{OperatorTime, Trace};
use crate::bundle::Bundle;
use crate::environment::{peak_resident_bytes, reset_peak_resident};
use crate::pipeline::compress::Compression;
use crate::pipeline::decode::{Continuation, DECODER_STEP, Sequence};
use crate::pipeline::prompt::PromptIds;
use crate::pipeline::question::with_suffix;
use crate::pipeline::{ContextState, Engines, plain};
use crate::tensorrt::layers::LayerRecord;
use accordion_graphs::architecture::{Architecture, Compressor};
use accordion_graphs::plan::sharedllm::SharedLlmSettings;
use accordion_graphs::plan::{OperationCount, PromptLengths};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};
use std::path::Path;
use std::time::Duration;

/// Tokens that a traced run decodes.
const TRACED_TOKENS: usize = 4;

/// How much is measured.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Effort {
    /// How often the prefix is built.
    pub prefix: Protocol,
    /// How often a first token is taken from it.
    pub first_token: Protocol,
    /// How many tokens are decoded behind it, at least one: the last number is that of all, and between two numbers the
    /// tokens have statistics of their own. Ascending.
    pub new_tokens: Vec<usize>,
    /// How they are decoded by an engine that has a choice.
    pub cuda_graph: Option<CudaGraph>,
}

impl Effort {
    /// One turn of many: a prefix, or as many as `min_time` asks for, cold or warm as they come, and `new_tokens` behind
    /// it.
    pub fn turn(min_time: Duration, new_tokens: usize, cuda_graph: Option<CudaGraph>) -> Self {
        Self {
            prefix: Protocol { min_runs: 1, min_time, ..Protocol::UNTIMED },
            first_token: Protocol { warm_up_runs: 1, min_runs: 5, ..Protocol::UNTIMED },
            new_tokens: vec![new_tokens],
            cuda_graph,
        }
    }
}

/// What the measurement is about to do, for a progress display.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Another building of the prefix begins.
    Run,
    /// So many of its steps are done.
    Built {
        /// Steps done.
        done: usize,
        /// Steps there are.
        total: usize,
    },
}

/// Operations of building `compression`'s prefix for a prompt of `lengths`, and the most rows that attend to each other
/// in one call.
///
/// # Errors
///
/// The method cannot compress such a prompt with the graphs of `bundle`.
pub fn work(
    bundle: &Bundle,
    compression: &Compression,
    lengths: PromptLengths,
) -> Result<(OperationCount, usize), ProfileError> {
    compression.check(bundle, lengths)?;
    let arch = bundle.architecture();
    Ok(match compression {
        Compression::Plain { .. } => {
            (OperationCount::plain_prefill(arch, lengths.total()), lengths.total().min(plain::PREFILL_ROWS))
        }
        Compression::Homer(homer) => {
            let plan = homer.plan(bundle, lengths)?;
            (plan.operations(arch), plan.nodes.iter().map(|node| node.in_len).max().unwrap_or(0))
        }
        Compression::Rcc(rcc) => {
            let Some(Compressor::Rcc(model)) = &bundle.manifest().compressor else { return Err(ProfileError::NoModel) };
            let plan = rcc.plan(bundle, lengths)?;
            (plan.operations(arch, &model.encoder), plan.settings.window)
        }
        Compression::SharedLlm(shared) => {
            let Some(Compressor::SharedLlm(model)) = &bundle.manifest().compressor else {
                return Err(ProfileError::NoModel);
            };
            let plan = shared.plan(bundle, lengths)?;
            let lower = Architecture::from(model.lower.clone());
            let longest_node = plan.levels.iter().map(|level| level.node_len).max().unwrap_or(0);
            let rows = plan.running.min(plain::PREFILL_ROWS).max(longest_node);
            (plan.operations(arch, &lower, model.injected_layers), rows)
        }
    })
}

/// What a measurement is of.
struct Subject {
    method: String,
    settings: Vec<(String, String)>,
    lengths: PromptLengths,
    operations: Option<OperationCount>,
}

/// What something is run on.
#[derive(Debug, Clone)]
pub struct Runner {
    /// The engine, with its precision: `ort-cpu fp32`.
    pub engine: String,
    /// Threads it may use.
    pub threads: usize,
    /// What watches the loader of the engines. Where nothing does, time per graph is not known.
    pub stopwatch: Stopwatch,
}

/// Measures `compression` on `prompt`; `runner` is what `engines` run on.
///
/// The prefix is built as often as `effort` says. First token: the time to make the state continuable (a copy of the
/// cache with room behind it) and to choose the token its logits predict; the suffix is part of the prefix, so that
/// nothing has to be run for it. Then tokens are decoded one by one.
///
/// Memory is that of the process from the beginning to the last token. Engines that are loaded already stay so: a first
/// run counts as cold only with fresh ones. What earlier
/// work in the same process left behind counts too: for a comparison each method has to be measured in a process of its
/// own.
///
/// # Errors
///
/// The prompt is too long for the method, the bundle does not fit it, or a graph fails.
pub fn measure(
    engines: &mut Engines<'_>,
    compression: &Compression,
    prompt: &PromptIds,
    effort: &Effort,
    runner: &Runner,
    on_step: &mut dyn FnMut(Step),
) -> Result<Measurement, ProfileError> {
    let lengths = prompt.lengths();
    let (operations, _) = work(engines.bundle(), compression, lengths)?;
    let subject = Subject {
        method: compression.method().to_owned(),
        settings: settings(compression),
        lengths,
        operations: Some(operations),
    };
    let mut build = |engines: &mut Engines<'_>, on_step: &mut dyn FnMut(Step)| {
        let mut on_progress = |done, total| on_step(Step::Built { done, total });
        Ok(compression.compress(engines, prompt, &mut on_progress)?)
    };
    let mut first = |_: &mut Engines<'_>, state: &ContextState| Ok(state.clone());
    measure_state(engines, subject, effort, runner, &mut build, &mut first, on_step)
}

/// Measures a state that was saved in the file `path`, with the question `suffix` behind it: the prefix is reading the
/// file, the first token reading the question.
///
/// # Errors
///
/// As [`ContextState::load`], or a graph fails.
pub fn measure_saved(
    engines: &mut Engines<'_>,
    path: &Path,
    suffix: &[u32],
    effort: &Effort,
    runner: &Runner,
    on_step: &mut dyn FnMut(Step),
) -> Result<Measurement, ProfileError> {
    let saved = ContextState::load(path, engines.bundle())?;
    let lengths = PromptLengths { suffix: suffix.len(), ..saved.origin.lengths };
    let old_suffix = saved.suffix_ids.len();
    let subject = Subject {
        method: saved.origin.method.name().to_owned(),
        settings: vec![("context state".to_owned(), "from a file".to_owned())],
        lengths,
        operations: None,
    };
    drop(saved);
    let mut build =
        |engines: &mut Engines<'_>, _: &mut dyn FnMut(Step)| Ok(ContextState::load(path, engines.bundle())?.state);
    let mut first =
        |engines: &mut Engines<'_>, state: &ContextState| Ok(with_suffix(engines, state, old_suffix, suffix)?);
    measure_state(engines, subject, effort, runner, &mut build, &mut first, on_step)
}

/// Makes a state.
type Build<'a> = &'a mut dyn FnMut(&mut Engines<'_>, &mut dyn FnMut(Step)) -> Result<ContextState, ProfileError>;
/// Makes a state that predicts a token of one that may not.
type First<'a> = &'a mut dyn FnMut(&mut Engines<'_>, &ContextState) -> Result<ContextState, ProfileError>;

fn measure_state(
    engines: &mut Engines<'_>,
    subject: Subject,
    effort: &Effort,
    runner: &Runner,
    build: Build<'_>,
    first: First<'_>,
    on_step: &mut dyn FnMut(Step),
) -> Result<Measurement, ProfileError> {
    // Where the peak cannot be reset it is that of the whole process, which in a process of its own is the same.
    let _ = reset_peak_resident();
    let watch = Watch::start();
    let stopwatch = &runner.stopwatch;
    stopwatch.take()?;
    let has_steps = engines.may_step(DECODER_STEP);
    if effort.cuda_graph == Some(CudaGraph::Both) && !has_steps {
        return Err(ProfileError::NoSteps);
    }
    engines.record_steps(effort.cuda_graph != Some(CudaGraph::Off));

    let mut built: Option<ContextState> = None;
    let mut runs: Vec<(Duration, Record)> = Vec::new();
    let prefix = stats::measure(&effort.prefix, monotonic(), || {
        // The state of the run before does not count as memory of this one.
        built = None;
        on_step(Step::Run);
        let clock = monotonic();
        built = Some(build(engines, on_step)?);
        runs.push((clock(), stopwatch.take()?));
        Ok::<(), ProfileError>(())
    })?;
    let state = built.ok_or(ProfileError::NoRun)?;

    let decoded = effort.new_tokens.last().copied().unwrap_or(1).max(1);
    let mut start = |engines: &mut Engines<'_>| {
        let state = first(engines, &state)?;
        let sequence = Sequence::continue_from(engines, &state, WARM_UP_TOKENS + decoded, Continuation::Next)?;
        Ok::<_, ProfileError>((sequence, largest(&state.logits)))
    };
    let first_token = stats::measure(&effort.first_token, monotonic(), || start(engines).map(drop))?;

    let loaded = runs.iter().map(|(_, record)| record.loading).sum::<Duration>() + stopwatch.take()?.loading;
    let tokens = decode(engines, &mut start, stopwatch, decoded)?;
    // Before anything is done that another run would not do.
    let peak = peak_resident_bytes().unwrap_or(0);
    let peak_device_bytes = stopwatch.device_bytes()?;
    let cuda_graph = match effort.cuda_graph {
        Some(CudaGraph::Both) => Some(compare_graphs(engines, &mut start, stopwatch, decoded)?),
        Some(CudaGraph::On | CudaGraph::Off) | None => None,
    };

    let Subject { method, mut settings, lengths, operations } = subject;
    if let Some(graph) = effort.cuda_graph {
        let word = if graph == CudaGraph::Off || !has_steps { "off" } else { "on" };
        settings.push(("CUDA graph".to_owned(), word.to_owned()));
    }
    let bundle = engines.bundle();
    let decoder = bundle.architecture();
    let mut details = Details {
        load_ms: Some(ms(loaded + tokens.loading)),
        first_run_ms: runs.first().map(|(time, _)| ms(*time)),
        decoded: spans(&tokens.times, &effort.new_tokens, tokens.rows),
        token_demand: Some(Demand::of_step(bundle, &state, WARM_UP_TOKENS + decoded / 2)),
        others_busy: watch.others_busy(),
        peak_device_bytes,
        cuda_graph,
        ..Details::default()
    };
    // The runs that count are the last ones.
    let mut counted = runs.split_off(runs.len().saturating_sub(prefix.len()));
    if let Some((time, record)) = median_run(&mut counted) {
        let graphs = record.graphs.keys().map(String::as_str);
        details.prefix_demand = operations.map(|operations| Demand::of_prefix(bundle, &operations, graphs));
        details.stages = stages(record);
        let waiting = record.waiting.unwrap_or_default();
        let host = time.saturating_sub(record.running() + record.loading + waiting);
        details.host_ms = (!record.graphs.is_empty()).then_some(ms(host));
        details.wait_ms = record.waiting.map(ms);
    }
    if !tokens.record.graphs.is_empty() {
        let Record { waiting, .. } = tokens.record;
        let running = tokens.record.running();
        let total: Duration = tokens.times.iter().sum();
        let host = total.saturating_sub(running + waiting.unwrap_or_default());
        let each = |time| tokens.per_token_ms(time);
        details.token_host_ms = Some(each(host));
        details.token_run_ms = Some(each(running));
        details.token_compute_ms = tokens.record.computing().map(each);
        details.token_wait_ms = waiting.map(each);
    }
    Ok(Measurement {
        configuration: Configuration {
            method,
            decoder: decoder_in_words(decoder),
            engine: runner.engine.clone(),
            threads: runner.threads,
            settings,
        },
        prompt: lengths,
        tokens_kept: state.tokens_kept(),
        prefix: statistics(&prefix)?,
        first_token: statistics(&first_token)?,
        per_token: statistics(&tokens.times)?,
        peak_resident_bytes: peak,
        state_bytes: state.cache_bytes(),
        plain_state_bytes: decoder.kv_bytes_per_token() * lengths.total() as u64,
        operations: operations.map(|operations| operations.total()),
        floor_fraction: None,
        operators: Vec::new(),
        details,
    })
}

/// The run whose time is the median, nearest-rank.
fn median_run(runs: &mut [(Duration, Record)]) -> Option<&(Duration, Record)> {
    runs.sort_by_key(|(time, _)| *time);
    runs.get(runs.len().div_ceil(2).checked_sub(1)?)
}

/// Builds the state of `prompt` once and decodes a few tokens behind it, with `engines` whose loader records into
/// `folder`, and reads the records.
///
/// # Errors
///
/// As [`measure`], or the records cannot be read.
pub fn record(
    mut engines: Engines<'_>,
    compression: &Compression,
    prompt: &PromptIds,
    folder: &Path,
) -> Result<Trace, ProfileError> {
    run_once(&mut engines, compression, prompt)?;
    // The runtime writes its records when a session ends, and tensors that it allocated keep theirs alive.
    drop(engines);
    Trace::read(folder)
}

/// Builds the state of `prompt` once and decodes a few tokens behind it, with `engines` whose loader tells `layers` what
/// their layers take.
///
/// # Errors
///
/// As [`measure`], or no layer was told of.
pub fn record_layers(
    mut engines: Engines<'_>,
    layers: &LayerRecord,
    compression: &Compression,
    prompt: &PromptIds,
) -> Result<Vec<OperatorTime>, ProfileError> {
    // What is repeated as a whole has no layers.
    engines.record_steps(false);
    run_once(&mut engines, compression, prompt)?;
    let times = layers.times();
    if times.is_empty() { Err(ProfileError::NoLayers) } else { Ok(operators(&times)) }
}

fn run_once(engines: &mut Engines<'_>, compression: &Compression, prompt: &PromptIds) -> Result<(), ProfileError> {
    let state = compression.compress(engines, prompt, &mut |_, _| {})?;
    let mut sequence = Sequence::continue_from(engines, &state, TRACED_TOKENS, Continuation::Next)?;
    let mut token = largest(&state.logits);
    for _ in 0..TRACED_TOKENS {
        token = largest(&sequence.forward(engines, &[token], 1)?.to_f32());
    }
    Ok(())
}

fn settings(compression: &Compression) -> Vec<(String, String)> {
    let width = |width: usize| {
        let width = if width == usize::MAX { "max".to_owned() } else { width.to_string() };
        ("width".to_owned(), width)
    };
    let named = |name: &str, value: String| (name.to_owned(), value);
    match compression {
        Compression::Plain { .. } => vec![named("rows per call", plain::PREFILL_ROWS.to_string())],
        Compression::Homer(homer) => {
            let mut listed = describe(&homer.settings);
            listed.push(width(homer.width));
            listed
        }
        Compression::Rcc(rcc) => vec![
            named("window", rcc.settings.window.to_string()),
            named("ratio", rcc.settings.ratio.to_string()),
            width(rcc.width),
        ],
        Compression::SharedLlm(shared) => {
            let SharedLlmSettings { chunk_len, tree_depth, quirks, .. } = shared.settings;
            let kept = shared.settings.kept_per_chunk().map_or_else(|_| "?".to_owned(), |kept| kept.to_string());
            vec![
                named("chunk length", chunk_len.to_string()),
                named("chunks", shared.policy.to_string()),
                named("kept per chunk", kept),
                named("tree depth", tree_depth.to_string()),
                named("quirks", format!("{quirks:?}").to_lowercase()),
                width(shared.width),
            ]
        }
    }
}

/// `count` token ids of a vocabulary, the same for the same `seed`.
pub fn random_tokens(vocab_size: usize, count: usize, seed: u64) -> Vec<u32> {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let size = u32::try_from(vocab_size).unwrap_or(u32::MAX).max(1);
    (0..count).map(|_| random.next_u32() % size).collect()
}

fn statistics(samples: &[Duration]) -> Result<LatencyStats, ProfileError> {
    LatencyStats::new(samples).ok_or(ProfileError::NoRun)
}
