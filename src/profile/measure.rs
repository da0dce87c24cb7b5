//! One method at one prompt length, measured from token ids to the last new token.
//!
//! Time does not depend on which tokens a prompt has, nor on which of them a method keeps: every shape follows from the
//! plan. So the tokens may be random, and HOMER needs no significance table.

use super::ProfileError;
use super::schema::{Configuration, Measurement, describe};
use super::stats::{self, LatencyStats, Protocol, monotonic};
use crate::environment::{peak_resident_bytes, reset_peak_resident};
use crate::pipeline::decode::{Continuation, Sequence};
use crate::pipeline::homer::{Prompt, compress};
use crate::pipeline::{ContextState, Engines, plain};
use crate::taps::NoTaps;
use accordion_graphs::plan::homer::{HomerPlan, HomerSettings};
use accordion_graphs::plan::{OperationCount, PromptLengths};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};
use std::time::Duration;

/// Tokens that are decoded before those that are counted.
const WARM_UP_TOKENS: usize = 2;

/// What is measured: a method with all that decides its work.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Subject {
    /// The whole prompt through the decoder.
    Plain,
    /// Hierarchical context merging.
    Homer {
        /// Chunk lengths, target and warm-up layers.
        settings: HomerSettings,
        /// Leaves that may be built in one batch.
        width: usize,
    },
}

impl Subject {
    /// The method's name.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Plain => "plain",
            Self::Homer { .. } => "homer",
        }
    }

    /// Operations of the prefix for a model of the bundle.
    ///
    /// # Errors
    ///
    /// There is no plan for the prompt, or the model is not supported.
    pub fn operations(&self, engines: &Engines<'_>, prompt: PromptLengths) -> Result<OperationCount, ProfileError> {
        let arch = engines.bundle().llama()?;
        Ok(match self {
            Self::Plain => OperationCount::plain_prefill(arch, prompt.total()),
            Self::Homer { settings, .. } => HomerPlan::new(arch.num_layers, prompt, *settings)?.operations(arch),
        })
    }
}

/// How much is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Effort {
    /// How often the prefix is built.
    pub prefix: Protocol,
    /// How many tokens are decoded behind it; at least one.
    pub new_tokens: usize,
}

/// What the measurement is about to do, for a progress display.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Step {
    /// Another building of the prefix begins.
    Run,
    /// This share of it is done.
    Built(f64),
}

/// Measures `subject` on `prompt`.
///
/// The prefix is built as often as `effort` says. First token: the time to make the state continuable (a copy of the
/// cache with room behind it) and to choose the token its logits predict; the suffix is part of the prefix, so that
/// nothing has to be run for it. Then tokens are decoded one by one.
///
/// Memory is that of the process from before the engines are loaded to the last token. What earlier work in the same
/// process left behind counts too: a configuration has to be measured in a process of its own.
///
/// # Errors
///
/// There is no plan for the prompt, or the method fails.
pub fn measure(
    engines: &mut Engines<'_>,
    subject: Subject,
    prompt: Prompt<'_>,
    effort: &Effort,
    (engine, threads): (&str, usize),
    on_step: &mut dyn FnMut(Step),
) -> Result<Measurement, ProfileError> {
    let lengths =
        PromptLengths { prefix: prompt.prefix.len(), context: prompt.context.len(), suffix: prompt.suffix.len() };
    let operations = subject.operations(engines, lengths)?;
    engines.unload();
    // Where the peak cannot be reset it is that of the whole process, which in a process of its own is the same.
    let _ = reset_peak_resident();

    let mut built: Option<ContextState> = None;
    let prefix = stats::measure(&effort.prefix, monotonic(), || {
        // The state of the run before does not count as memory of this one.
        built = None;
        on_step(Step::Run);
        built = Some(build(engines, subject, prompt, lengths, on_step)?);
        Ok::<(), ProfileError>(())
    })?;
    let state = match built {
        Some(state) => state,
        None => build(engines, subject, prompt, lengths, on_step)?,
    };

    let decoded = effort.new_tokens.max(1);
    let start = |engines: &Engines<'_>| {
        let sequence = Sequence::continue_from(engines, &state, WARM_UP_TOKENS + decoded, Continuation::Next)?;
        Ok::<_, ProfileError>((sequence, largest(&state.logits)))
    };
    let several = Protocol {
        warm_up_time: Duration::ZERO,
        warm_up_runs: 1,
        min_time: Duration::ZERO,
        min_runs: 5,
        max_time: None,
    };
    let first_token = stats::measure(&several, monotonic(), || start(engines).map(drop))?;

    let (mut sequence, mut token) = start(engines)?;
    let each = Protocol { warm_up_runs: WARM_UP_TOKENS, min_runs: decoded, ..several };
    let per_token = stats::measure(&each, monotonic(), || {
        token = largest(&sequence.forward(engines, &[token], 1)?.to_f32());
        Ok::<(), ProfileError>(())
    })?;

    Ok(Measurement {
        configuration: Configuration {
            method: subject.name().to_owned(),
            engine: engine.to_owned(),
            threads,
            settings: match &subject {
                Subject::Plain => vec![("rows per call".to_owned(), plain::PREFILL_ROWS.to_string())],
                Subject::Homer { settings, width } => {
                    let mut listed = describe(settings);
                    let width = if *width == usize::MAX { "max".to_owned() } else { width.to_string() };
                    listed.push(("width".to_owned(), width));
                    listed
                }
            },
        },
        prompt: lengths,
        tokens_kept: state.len(),
        prefix: statistics(&prefix)?,
        first_token: statistics(&first_token)?,
        per_token: statistics(&per_token)?,
        peak_resident_bytes: peak_resident_bytes().unwrap_or(0),
        state_bytes: state.cache_bytes(),
        operations: Some(operations.total()),
        floor_fraction: None,
    })
}

/// `count` token ids of a vocabulary, the same for the same `seed`.
pub fn random_tokens(vocab_size: usize, count: usize, seed: u64) -> Vec<u32> {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let size = u32::try_from(vocab_size).unwrap_or(u32::MAX).max(1);
    (0..count).map(|_| random.next_u32() % size).collect()
}

fn build(
    engines: &mut Engines<'_>,
    subject: Subject,
    prompt: Prompt<'_>,
    lengths: PromptLengths,
    on_step: &mut dyn FnMut(Step),
) -> Result<ContextState, ProfileError> {
    match subject {
        Subject::Plain => {
            let ids = [prompt.prefix, prompt.context, prompt.suffix].concat();
            let on_progress = |done| on_step(Step::Built(done as f64 / ids.len() as f64));
            Ok(plain::prefill(engines, &ids, on_progress)?)
        }
        Subject::Homer { settings, width } => {
            let num_layers = engines.bundle().llama()?.num_layers;
            let plan = HomerPlan::new(num_layers, lengths, settings)?;
            let row = vec![0.0; plan.max_distance() + 1];
            let bias = vec![row.as_slice(); num_layers];
            let mut done = 0;
            let mut on_node = |_: &_| {
                done += 1;
                on_step(Step::Built(f64::from(done) / plan.nodes.len() as f64));
            };
            Ok(compress(engines, &plan, prompt, &bias, width, &mut NoTaps, &mut on_node)?)
        }
    }
}

fn statistics(samples: &[Duration]) -> Result<LatencyStats, ProfileError> {
    LatencyStats::new(samples).ok_or(ProfileError::NoRun)
}

/// Index of the largest value: the greedy choice.
fn largest(logits: &[f32]) -> u32 {
    let best = logits.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1));
    best.map_or(0, |(id, _)| u32::try_from(id).unwrap_or(0))
}
