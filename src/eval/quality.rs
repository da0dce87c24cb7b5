//! What a precision costs and what it brings: several bundles of one model on the same windows of a text, each against the
//! first of them.
//!
//! All sides are loaded at once and take turns, so that what disturbs one disturbs the others as well.

pub mod report;

use super::EvalError;
use super::attempt::{OnRow, predictions};
use super::stats::{Mean, mean};
use super::task::Goal;
use super::{Sample, Task};
use crate::bundle::Bundle;
use crate::environment::current_resident_bytes;
use crate::pipeline::compress::Compression;
use crate::pipeline::decode::{Continuation, Sequence};
use crate::pipeline::sampling::LogitsError;
use crate::pipeline::{Engines, PipelineError};
use serde::{Deserialize, Deserializer, Serialize};
use std::collections::BTreeSet;
use std::time::Instant;

/// Tokens that are generated at a time to be timed.
pub const DECODED: usize = 16;

/// A bundle that takes part.
pub struct Side<'b> {
    engines: Engines<'b>,
    compression: Compression,
    loss: Losses,
    resident: Option<u64>,
    prefill: Vec<f64>,
    decode: Vec<f64>,
}

/// What was found of a side's predictions, token by token in units of nats.
#[derive(Debug, Clone, Default)]
struct Losses {
    /// Negative log-likelihood of the text.
    nll: Vec<f64>,
    /// Divergence of the side's distribution from the first side's.
    divergence: Vec<f64>,
    /// Tokens that both hold for the likeliest.
    same_best: usize,
}

/// What came of one side.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Quality {
    /// Bytes of the tensors that the graphs link to.
    pub weight_bytes: u64,
    /// By how much this process's resident memory grew when the bundle was loaded and first run; absent where the system does
    /// not say.
    pub resident_bytes: Option<u64>,
    /// Tokens predicted.
    pub tokens: usize,
    /// `exp` of their mean negative log-likelihood.
    #[serde(deserialize_with = "infinite_if_null")]
    pub perplexity: f64,
    /// Seconds from a window's past to its state, run by run.
    pub prefill_seconds: Vec<f64>,
    /// Seconds per token behind it, one token at a time, run by run.
    pub decode_seconds: Vec<f64>,
    /// Beside the first side; absent of itself.
    pub against: Option<Against>,
}

/// A side beside the first one.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Against {
    /// Its perplexity divided by the first one's, less one.
    #[serde(deserialize_with = "infinite_if_null")]
    pub perplexity_increase: f64,
    /// Increase of the negative log-likelihood, window by window.
    pub loss_increase: Option<Mean>,
    /// Mean Kullback-Leibler divergence of its predictions from the first one's, in nats.
    #[serde(deserialize_with = "infinite_if_null")]
    pub divergence: f64,
    /// The divergence that 99 of 100 tokens do not exceed.
    #[serde(deserialize_with = "infinite_if_null")]
    pub divergence_p99: f64,
    /// Share of tokens at which both hold the same for the likeliest.
    pub same_best: f64,
    /// How often faster the past is read.
    pub prefill_speedup: Option<Speedup>,
    /// How often faster tokens are generated.
    pub decode_speedup: Option<Speedup>,
}

/// JSON knows no infinity; it is written as null.
fn infinite_if_null<'de, D: Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
    Ok(Option::deserialize(deserializer)?.unwrap_or(f64::INFINITY))
}

/// The first side's time divided by the other's, in runs next to each other.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Speedup {
    /// Median of the runs.
    pub median: f64,
    /// The least of all runs.
    pub low: f64,
    /// The most of all runs.
    pub high: f64,
}

/// What a speed-up says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pace {
    /// Every run was faster.
    Faster,
    /// Every run was slower.
    Slower,
    /// Some were and some were not.
    Unclear,
}

impl Speedup {
    /// Of pairs of runs; `None` without any.
    fn of(first: &[f64], other: &[f64]) -> Option<Self> {
        let mut ratios: Vec<f64> = first.iter().zip(other).map(|(first, other)| first / other).collect();
        ratios.sort_by(f64::total_cmp);
        let (low, high) = (*ratios.first()?, *ratios.last()?);
        let middle = ratios.len() / 2;
        let median =
            if ratios.len() % 2 == 1 { ratios[middle] } else { f64::midpoint(ratios[middle - 1], ratios[middle]) };
        Some(Self { median, low, high })
    }

    /// What the runs agree on.
    pub fn pace(self) -> Pace {
        match self {
            Self { low, .. } if low > 1.0 => Pace::Faster,
            Self { high, .. } if high < 1.0 => Pace::Slower,
            _ => Pace::Unclear,
        }
    }
}

impl<'b> Side<'b> {
    /// A bundle in its engines, which reads pasts as `compression` does.
    pub fn new(engines: Engines<'b>, compression: Compression) -> Self {
        let (loss, prefill, decode) = (Losses::default(), Vec::new(), Vec::new());
        Self { engines, compression, loss, resident: None, prefill, decode }
    }

    fn failed(&self, sample: &Sample) -> impl FnOnce(PipelineError) -> EvalError + use<'b> {
        let (contender, length) = (self.engines.bundle().dir().display().to_string(), sample.prompt.lengths().total());
        move |source| EvalError::Contender { contender, length, source: Box::new(source) }
    }

    /// Seconds from the sample's past to its state, and per token of those behind it, one at a time.
    fn timed(&mut self, sample: &Sample, ids: &[u32]) -> Result<[f64; 2], EvalError> {
        let failed = self.failed(sample);
        let mut run = || {
            let started = Instant::now();
            let state = self.compression.compress(&mut self.engines, &sample.prompt, &mut |_, _| {})?;
            let read = started.elapsed().as_secs_f64();
            let ids = &ids[..ids.len().min(DECODED)];
            let mut sequence = Sequence::continue_from(&self.engines, &state, ids.len(), Continuation::Next)?;
            let started = Instant::now();
            for id in ids {
                sequence.forward(&mut self.engines, std::slice::from_ref(id), 1)?;
            }
            Ok([read, started.elapsed().as_secs_f64() / ids.len().max(1) as f64])
        };
        run().map_err(failed)
    }

    /// Loads the graphs that the sample needs, and notes by how much the process grows.
    fn warm_up(&mut self, sample: &Sample, ids: &[u32]) -> Result<(), EvalError> {
        let before = current_resident_bytes();
        self.timed(sample, ids)?;
        self.resident = before.zip(current_resident_bytes()).map(|(before, now)| now.saturating_sub(before));
        Ok(())
    }

    /// Shows the side's logits for every token behind the sample's past.
    fn predict(&mut self, sample: &Sample, ids: &[u32], on_row: &mut OnRow<'_>) -> Result<(), EvalError> {
        let failed = self.failed(sample);
        let state = self.compression.compress(&mut self.engines, &sample.prompt, &mut |_, _| {}).map_err(failed)?;
        predictions(&mut self.engines, &state, ids, on_row)
    }
}

/// Puts every sample of `task` to all `sides`, then times `rounds` runs of each in turn. Returns what came of each, in their
/// order. `on_step` hears how many of how many steps are done.
///
/// # Errors
///
/// A side cannot read a past or computes no probabilities, or `task` predicts nothing.
pub fn compare(
    sides: &mut [Side<'_>],
    task: &dyn Task,
    rounds: usize,
    on_step: &mut dyn FnMut(usize, usize),
) -> Result<Vec<Quality>, EvalError> {
    let cases = task.cases();
    let total = (cases.len() + rounds + 1) * sides.len();
    let mut done = 0;
    let mut step = || {
        done += 1;
        on_step(done, total);
    };
    let mut windows = Vec::with_capacity(cases.len());
    for &case in &cases {
        let sample = task.sample(case)?;
        let Goal::Predict { ids, .. } = &sample.goal else { continue };
        if windows.is_empty() {
            for side in &mut *sides {
                side.warm_up(&sample, ids)?;
                step();
            }
        }
        // The first side's logits, as a distribution per row.
        let mut expected: Vec<Distribution> = Vec::with_capacity(ids.len());
        let mut first = true;
        for side in &mut *sides {
            let mut loss = std::mem::take(&mut side.loss);
            side.predict(&sample, ids, &mut |row, logits, id| {
                let found = Distribution::new(logits)?;
                loss.nll.push(found.nll(id)?);
                if first {
                    expected.push(found);
                } else if let Some(expected) = expected.get(row) {
                    loss.divergence.push(expected.divergence(&found));
                    loss.same_best += usize::from(expected.best == found.best);
                }
                Ok(())
            })?;
            side.loss = loss;
            first = false;
            step();
        }
        windows.push(ids.len());
    }
    let timed = cases.first().map(|&case| task.sample(case)).transpose()?;
    if let Some((sample, Goal::Predict { ids, .. })) = timed.as_ref().map(|sample| (sample, &sample.goal)) {
        let count = sides.len();
        for round in 0..rounds {
            // Nobody is always the one behind a slow one.
            for place in 0..count {
                let side = &mut sides[(round + place) % count];
                let [prefill, decode] = side.timed(sample, ids)?;
                side.prefill.push(prefill);
                side.decode.push(decode);
                step();
            }
        }
    }
    Ok(summarised(sides, &windows))
}

fn summarised(sides: &[Side<'_>], windows: &[usize]) -> Vec<Quality> {
    let Some(first) = sides.first() else { return Vec::new() };
    let quality = |number: usize, side: &Side<'_>| {
        let tokens = side.loss.nll.len();
        Quality {
            weight_bytes: weight_bytes(side.engines.bundle()),
            resident_bytes: side.resident,
            tokens,
            perplexity: average(&side.loss.nll).exp(),
            prefill_seconds: side.prefill.clone(),
            decode_seconds: side.decode.clone(),
            against: (number > 0).then(|| against(first, side, windows)),
        }
    };
    sides.iter().enumerate().map(|(number, side)| quality(number, side)).collect()
}

fn against(first: &Side<'_>, side: &Side<'_>, windows: &[usize]) -> Against {
    let (mut increases, mut start) = (Vec::with_capacity(windows.len()), 0);
    for window in windows {
        let mean_of = |side: &Side<'_>| average(&side.loss.nll[start..start + window]);
        increases.push(mean_of(side) - mean_of(first));
        start += window;
    }
    let mut divergences = side.loss.divergence.clone();
    divergences.sort_by(f64::total_cmp);
    let p99 = (divergences.len() * 99).div_ceil(100).saturating_sub(1);
    Against {
        perplexity_increase: (average(&side.loss.nll) - average(&first.loss.nll)).exp() - 1.0,
        loss_increase: mean(&increases),
        divergence: average(&divergences),
        divergence_p99: divergences.get(p99).copied().unwrap_or(0.0),
        same_best: side.loss.same_best as f64 / divergences.len().max(1) as f64,
        prefill_speedup: Speedup::of(&first.prefill, &side.prefill),
        decode_speedup: Speedup::of(&first.decode, &side.decode),
    }
}

fn average(numbers: &[f64]) -> f64 {
    numbers.iter().sum::<f64>() / numbers.len().max(1) as f64
}

/// Bytes of all tensors that the graphs of `bundle` link to.
pub fn weight_bytes(bundle: &Bundle) -> u64 {
    let graphs = bundle.manifest().graphs.values();
    let names: BTreeSet<&String> = graphs.flat_map(|graph| &graph.signature.weights).collect();
    names.into_iter().filter_map(|name| bundle.weights().index().get(name)).map(|weight| weight.len).sum()
}

fn not_a_number(token: usize, value: f32) -> EvalError {
    PipelineError::from(LogitsError::NotANumber { token, value }).into()
}

/// A prediction.
struct Distribution {
    /// Logarithms of the probabilities.
    log: Vec<f32>,
    /// The likeliest token, the first of equals.
    best: usize,
}

impl Distribution {
    fn new(logits: &[f32]) -> Result<Self, EvalError> {
        let mut best = 0;
        for (id, &logit) in logits.iter().enumerate() {
            if logit > logits[best] {
                best = id;
            }
        }
        let most = logits.get(best).copied().map_or(0.0, f64::from);
        let sum: f64 = logits.iter().map(|&logit| (f64::from(logit) - most).exp()).sum();
        let normalizer = most + sum.ln();
        if !normalizer.is_finite() {
            let wrong = logits.iter().position(|logit| !logit.is_finite()).unwrap_or_default();
            return Err(not_a_number(wrong, logits.get(wrong).copied().unwrap_or(f32::NAN)));
        }
        Ok(Self { log: logits.iter().map(|&logit| (f64::from(logit) - normalizer) as f32).collect(), best })
    }

    fn nll(&self, id: u32) -> Result<f64, EvalError> {
        match self.log.get(id as usize) {
            Some(log) if log.is_finite() => Ok(-f64::from(*log)),
            Some(&log) => Err(not_a_number(id as usize, log)),
            None => Err(PipelineError::TokenId { id, vocab_size: self.log.len() }.into()),
        }
    }

    /// `sum p (log p - log q)`, nats.
    fn divergence(&self, other: &Self) -> f64 {
        let term = |(&p, &q): (&f32, &f32)| {
            let p = f64::from(p);
            if p == f64::NEG_INFINITY { 0.0 } else { p.exp() * (p - f64::from(q)) }
        };
        // Rounding may leave less than nothing of equal ones.
        self.log.iter().zip(&other.log).map(term).sum::<f64>().max(0.0)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use approx::assert_relative_eq;

    fn distribution(probabilities: &[f32]) -> Distribution {
        let logits: Vec<f32> = probabilities.iter().map(|p| p.ln() + 30.0).collect();
        Distribution::new(&logits).unwrap()
    }

    #[test]
    fn divergences_by_hand() {
        let [p, q] = [[0.5_f32, 0.25, 0.25], [0.25, 0.5, 0.25]].map(|p| distribution(&p));
        // 0.5 ln 2 + 0.25 ln 0.5
        assert_relative_eq!(p.divergence(&q), 0.25 * 2_f64.ln(), epsilon = 1e-5);
        assert_eq!((p.best, q.best, distribution(&[0.3, 0.3, 0.4]).best, distribution(&[0.5, 0.5]).best), (0, 1, 2, 0));
        assert!(p.divergence(&p).abs() < 1e-12);
        assert_relative_eq!(p.nll(2).unwrap(), 4_f64.ln(), epsilon = 1e-5);
        assert!(p.nll(3).is_err() && Distribution::new(&[1.0, f32::NAN]).is_err());
        // What the first side holds for impossible does not count; what only the other does is infinitely far.
        let certain = Distribution::new(&[0.0, f32::NEG_INFINITY]).unwrap();
        assert_relative_eq!(certain.divergence(&distribution(&[0.5, 0.5])), 2_f64.ln(), epsilon = 1e-5);
        assert!(distribution(&[0.5, 0.5]).divergence(&certain).is_infinite());
    }

    #[test]
    fn faster_is_what_every_run_says() {
        let pace = |other: [f64; 3]| Speedup::of(&[2.0, 2.0, 2.0], &other).unwrap().pace();
        assert_eq!(pace([1.0, 1.5, 1.9]), Pace::Faster);
        assert_eq!(pace([2.1, 3.0, 4.0]), Pace::Slower);
        assert_eq!(pace([1.0, 2.0, 1.0]), Pace::Unclear);
        let speedup = Speedup::of(&[2.0, 2.0, 3.0, 2.0], &[1.0, 2.0, 1.0, 0.5]).unwrap();
        assert_eq!(speedup, Speedup { median: 2.5, low: 1.0, high: 4.0 });
        assert_eq!(Speedup::of(&[], &[]), None);
    }
}
