//! One sample, put to one contender.

use super::EvalError;
use super::contender::Contender;
use super::schema::{Bucket, Outcome};
use super::score::{bleu4, is_key, keyword_share};
use super::task::{Goal, Sample};
use super::trace::{KeptRows, Survival, survival};
use crate::checkpoint::Tokenizer;
use crate::pipeline::compress::Compression;
use crate::pipeline::decode::{Continuation, Sequence};
use crate::pipeline::generate::{Generation, GenerationSettings, generate};
use crate::pipeline::sampling::{LogitsError, SamplingSettings};
use crate::pipeline::{ContextState, Engines, PipelineError};
use accordion_graphs::plan::PromptLengths;
use std::time::Instant;

/// Rows of logits that are held at once: a vocabulary is large.
const LOGIT_ROWS: usize = 256;

/// What came of it.
#[derive(Debug, Clone, PartialEq)]
pub struct Attempt {
    /// Tokens of the prompt that the contender read.
    pub prompt: PromptLengths,
    /// Rows of the context state's cache.
    pub tokens_kept: usize,
    /// The result.
    pub outcome: Outcome,
    /// Where the answer was lost, if that was asked for and the method can tell.
    pub survival: Option<Survival>,
    /// From the prompt's token ids to the context state.
    pub compression_seconds: f64,
    /// From there to the outcome.
    pub answer_seconds: f64,
}

/// Compresses the sample's prompt as `contender` does and takes what it wants behind it. With `explain`, HOMER also tells
/// where the answer's tokens went.
///
/// # Errors
///
/// The contender cannot read the prompt, or a graph fails.
pub fn attempt(
    engines: &mut Engines<'_>,
    tokenizer: &Tokenizer,
    contender: &Contender,
    sample: &Sample,
    explain: bool,
) -> Result<Attempt, EvalError> {
    let prompt = contender.prompt(sample)?;
    let started = Instant::now();
    let (state, survival) = match contender.compression() {
        Compression::Homer(homer) if explain && !sample.marked.is_empty() => {
            let mut kept = KeptRows::default();
            let state = homer.compress(engines, &prompt, &mut kept, &mut |_, _| ())?;
            let plan = homer.plan(engines.bundle(), prompt.lengths())?;
            (state, Some(survival(&plan, &kept, &sample.marked)))
        }
        compression => (compression.compress(engines, &prompt, &mut |_, _| ())?, None),
    };
    let compression_seconds = started.elapsed().as_secs_f64();
    let started = Instant::now();
    let outcome = outcome(engines, tokenizer, contender, &state, &sample.goal)?;
    let answer_seconds = started.elapsed().as_secs_f64();
    let (prompt, tokens_kept) = (prompt.lengths(), state.tokens_kept());
    Ok(Attempt { prompt, tokens_kept, outcome, survival, compression_seconds, answer_seconds })
}

fn outcome(
    engines: &mut Engines<'_>,
    tokenizer: &Tokenizer,
    contender: &Contender,
    state: &ContextState,
    goal: &Goal,
) -> Result<Outcome, EvalError> {
    let mut text = |new_tokens: usize, continuation: Continuation| -> Result<Generation, EvalError> {
        let settings = GenerationSettings {
            sampling: SamplingSettings::GREEDY,
            stop_strings: Vec::new(),
            max_tokens: new_tokens,
            keep_first: false,
            continuation,
            // How plain fares beyond its trained positions is part of the question.
            max_positions: usize::MAX,
        };
        Ok(generate(engines, tokenizer, state, &settings, None, &mut |_| ())?)
    };
    Ok(match goal {
        Goal::Integer { expected, new_tokens, continuation } => {
            let plain = matches!(contender.compression(), Compression::Plain { .. });
            let continuation = if plain { Continuation::Next } else { *continuation };
            let answer = text(*new_tokens, continuation)?.text;
            let hit = is_key(&answer, expected);
            Outcome::Answer { expected: vec![expected.clone()], answer, hit, score: f64::from(u8::from(hit)) }
        }
        Goal::Keywords { expected, new_tokens } => {
            let answer = text(*new_tokens, Continuation::Next)?.text;
            let score = keyword_share(&answer, expected);
            Outcome::Answer { expected: expected.clone(), answer, hit: score >= 1.0, score }
        }
        Goal::Continue { expected } => {
            let generation = text(expected.len(), Continuation::Next)?;
            let wanted = tokenizer.decode(expected, true)?;
            let [candidate, reference] = [&generation.text, &wanted].map(|text| text.split_whitespace().collect());
            let (candidate, reference): (Vec<&str>, Vec<&str>) = (candidate, reference);
            let (exact, bleu) = (generation.token_ids == *expected, bleu4(&candidate, &reference));
            Outcome::Continuation { answer: generation.text.clone(), exact, bleu, expected: wanted.clone() }
        }
        Goal::Predict { ids, bucket } => {
            let nlls = negative_log_likelihoods(engines, state, ids)?;
            let size = (*bucket).max(1);
            let buckets = nlls.chunks(size).enumerate().map(|(i, chunk)| Bucket {
                start: i * size,
                tokens: chunk.len(),
                nll: chunk.iter().sum(),
            });
            Outcome::Likelihood { tokens: nlls.len(), nll: nlls.iter().sum(), buckets: buckets.collect() }
        }
    })
}

/// Negative log-likelihood, in nats, of each of `ids` behind `state`. The first one's is that of the state's own logits.
///
/// # Errors
///
/// The decoder fails, or computes no probabilities.
pub fn negative_log_likelihoods(
    engines: &mut Engines<'_>,
    state: &ContextState,
    ids: &[u32],
) -> Result<Vec<f64>, EvalError> {
    let mut nlls = Vec::with_capacity(ids.len());
    predictions(engines, state, ids, &mut |_, logits, id| {
        nlls.push(negative_log_likelihood(logits, id)?);
        Ok(())
    })?;
    Ok(nlls)
}

/// Takes the number of a predicted id, the logits that predict it, and the id.
pub(super) type OnRow<'a> = dyn FnMut(usize, &[f32], u32) -> Result<(), EvalError> + 'a;

/// Shows `on_row` each of `ids` with its logits behind `state` and the ids before it.
pub(super) fn predictions(
    engines: &mut Engines<'_>,
    state: &ContextState,
    ids: &[u32],
    on_row: &mut OnRow<'_>,
) -> Result<(), EvalError> {
    let Some((&first, rest)) = ids.split_first() else { return Ok(()) };
    on_row(0, &state.logits, first)?;
    let mut row = 0;
    let mut sequence = Sequence::continue_from(engines, state, rest.len(), Continuation::Next)?;
    // Calls of even lengths: some methods treat a call of a single token differently.
    let size = rest.len().div_ceil(rest.len().div_ceil(LOGIT_ROWS).max(1)).max(1);
    for (fed, predicted) in ids[..rest.len()].chunks(size).zip(rest.chunks(size)) {
        let logits = sequence.forward(engines, fed, fed.len())?;
        let vocab = logits.shape().last().copied().unwrap_or(1).max(1);
        for (logits, &id) in logits.as_f32()?.chunks_exact(vocab).zip(predicted) {
            row += 1;
            on_row(row, logits, id)?;
        }
    }
    Ok(())
}

/// `-log softmax(logits)[id]`.
fn negative_log_likelihood(logits: &[f32], id: u32) -> Result<f64, PipelineError> {
    let Some(&logit) = logits.get(id as usize) else {
        return Err(PipelineError::TokenId { id, vocab_size: logits.len() });
    };
    let max = f64::from(logits.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    let sum: f64 = logits.iter().map(|&logit| (f64::from(logit) - max).exp()).sum();
    let nll = max + sum.ln() - f64::from(logit);
    if nll.is_finite() { Ok(nll) } else { Err(LogitsError::NotANumber { token: id as usize, value: logit }.into()) }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use approx::assert_relative_eq;

    #[test]
    fn likelihoods_by_hand() {
        // Probabilities 1/6, 2/6, 3/6, whatever is added to all logits.
        let logits = [1.0_f32, 2.0, 3.0].map(|p| p.ln() + 50.0);
        for (id, probability) in [(0, 1.0 / 6.0), (1, 2.0 / 6.0), (2, 3.0 / 6.0)] {
            let nll = negative_log_likelihood(&logits, id).unwrap();
            assert_relative_eq!((-nll).exp(), probability, epsilon = 1e-5);
        }
        assert!(negative_log_likelihood(&logits, 3).is_err());
        assert!(negative_log_likelihood(&[0.0, f32::NAN], 0).is_err());
        assert!(negative_log_likelihood(&[0.0, f32::NEG_INFINITY], 1).is_err());
    }
}
