//! Text behind a context state, token by token.

use super::compress::Compression;
use super::decode::{Continuation, Sequence};
use super::prompt::PromptIds;
use super::sampling::{LogitsError, Sampler, SamplingSettings, SamplingSettingsError};
use super::stepwise::EXPECTED_ROWS;
use super::stop::{StopMonitor, StopReason, StopSettings, StopSettingsError};
use super::{ContextState, Engines, PipelineError};
use crate::checkpoint::{CheckpointError, Tokenizer};
use std::time::Instant;

/// How a text is generated.
#[derive(Debug, Clone, PartialEq)]
pub struct GenerationSettings {
    /// How tokens are chosen.
    pub sampling: SamplingSettings,
    /// Strings that end the text; they are not part of it.
    pub stop_strings: Vec<String>,
    /// Most tokens to generate. They are counted exactly: the authors' `generate` makes one more than it is asked for,
    /// and takes the first one greedily whatever the sampling.
    pub max_tokens: usize,
    /// Whether the first token ends no text, as [`StopSettings`] says.
    pub keep_first: bool,
    /// Where the first new token is placed.
    pub continuation: Continuation,
    /// Positions that may be used, usually [`Llama::max_positions`](accordion_graphs::architecture::Llama).
    pub max_positions: usize,
}

/// Iterative compression: whenever `every` new tokens have come, the whole past is planned and compressed anew, and the
/// text goes on behind that state. The past is cut as [`PromptIds::with_generated`] says.
#[derive(Debug, Clone, Copy)]
pub struct Recompression<'a> {
    /// How the context was compressed.
    pub compression: &'a Compression,
    /// What was compressed.
    pub prompt: &'a PromptIds,
    /// New tokens between compressions, at least 1.
    pub every: usize,
}

/// What is happening, as it happens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event<'a> {
    /// More text; never empty.
    Text(&'a str),
    /// The past is being compressed anew.
    Recompressing {
        /// Tokens generated so far.
        generated: usize,
        /// Steps done.
        done: usize,
        /// Steps there are.
        total: usize,
    },
}

/// A finished text.
#[derive(Debug, Clone, PartialEq)]
pub struct Generation {
    /// The text, without special tokens.
    pub text: String,
    /// Its tokens, with the one that ended it.
    pub token_ids: Vec<u32>,
    /// Why it ended.
    pub stop: StopReason,
    /// Seconds each token took. The first needs only a choice, because its logits are part of the state.
    pub seconds: Vec<f64>,
}

/// Why no text was generated.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum GenerateError {
    /// The decoder or a compression failed.
    #[error(transparent)]
    Pipeline(#[from] PipelineError),
    /// A sampling setting is out of range.
    #[error(transparent)]
    Sampling(#[from] SamplingSettingsError),
    /// A stop setting is out of range, or no position is left.
    #[error(transparent)]
    Stop(#[from] StopSettingsError),
    /// The model computed nonsense.
    #[error(transparent)]
    Logits(#[from] LogitsError),
    /// The tokenizer cannot decode what the model wrote.
    #[error(transparent)]
    Tokenizer(#[from] CheckpointError),
}

impl GenerationSettings {
    /// Checks the settings before anything long is done.
    ///
    /// # Errors
    ///
    /// A setting is out of range.
    pub fn check(&self) -> Result<(), GenerateError> {
        Sampler::new(self.sampling)?;
        StopMonitor::new(self.stop_settings(&[], 1))?;
        Ok(())
    }

    fn stop_settings(&self, eos_token_ids: &[u32], room: usize) -> StopSettings {
        StopSettings {
            eos_token_ids: eos_token_ids.to_vec(),
            keep_first: self.keep_first,
            stop_strings: self.stop_strings.clone(),
            max_tokens: self.max_tokens,
            room,
        }
    }
}

impl Generation {
    /// Tokens per second behind the first token, if there are any.
    pub fn tokens_per_second(&self) -> Option<f64> {
        let decoded = self.seconds.get(1..).filter(|seconds| !seconds.is_empty())?;
        Some(decoded.len() as f64 / decoded.iter().sum::<f64>())
    }
}

/// Generates text behind `state`, which is not changed. `on_event` gets the text piece by piece.
///
/// # Errors
///
/// A setting is out of range, no position is left, or the decoder or a compression fails.
pub fn generate(
    engines: &mut Engines<'_>,
    tokenizer: &Tokenizer,
    state: &ContextState,
    settings: &GenerationSettings,
    recompression: Option<Recompression<'_>>,
    on_event: &mut dyn FnMut(Event<'_>),
) -> Result<Generation, GenerateError> {
    let eos_token_ids = engines.bundle().architecture().eos_token_ids();
    let start = |engines: &Engines<'_>, state: &ContextState| {
        let extra = settings.max_tokens.min(EXPECTED_ROWS);
        let sequence = Sequence::continue_from(engines, state, extra, settings.continuation)?;
        let room = settings.max_positions.saturating_sub(sequence.next_position() as usize);
        Ok::<_, PipelineError>((sequence, room))
    };
    let mut sampler = Sampler::new(settings.sampling)?;
    let (mut sequence, room) = start(engines, state)?;
    let mut monitor = StopMonitor::new(settings.stop_settings(eos_token_ids, room))?;
    let mut stream = tokenizer.stream(true);
    let (mut text, mut token_ids, mut seconds) = (String::new(), Vec::new(), Vec::new());
    let mut emit = |piece: &str, on_event: &mut dyn FnMut(Event<'_>)| {
        if !piece.is_empty() {
            text.push_str(piece);
            on_event(Event::Text(piece));
        }
    };
    // Loading the graph is no part of the second token's time.
    engines.get(sequence.step_graph(engines), &[])?;
    let mut logits = state.logits.clone();
    let mut before = Instant::now();
    let stop = loop {
        let token = sampler.sample(&logits)?;
        token_ids.push(token);
        let now = Instant::now();
        seconds.push((now - before).as_secs_f64());
        before = now;
        let piece = if eos_token_ids.contains(&token) { String::new() } else { stream.push(token)? };
        let step = monitor.push(token, &piece);
        emit(&step.emit, on_event);
        if let Some(stop) = step.stop {
            break stop;
        }
        match recompression {
            Some(Recompression { compression, prompt, every }) if token_ids.len().is_multiple_of(every.max(1)) => {
                let generated = token_ids.len();
                let mut on_progress = |done, total| on_event(Event::Recompressing { generated, done, total });
                let state = compression.compress(engines, &prompt.with_generated(&token_ids), &mut on_progress)?;
                let (continued, room) = start(engines, &state)?;
                sequence = continued;
                logits = state.logits;
                monitor.renew_room(room);
            }
            _ => logits = sequence.forward(engines, &[token], 1)?.to_f32(),
        }
    };
    if !matches!(stop, StopReason::StopString(_)) {
        // A character whose last bytes never came.
        emit(&stream.finish()?, on_event);
    }
    Ok(Generation { text, token_ids, stop, seconds })
}
