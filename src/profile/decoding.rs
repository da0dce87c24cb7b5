//! Tokens decoded one by one: how long each takes, and what the graphs and the device have of that.

use super::ProfileError;
use super::paired::{Difference, turns};
use super::stats::{Protocol, measure, monotonic};
use super::stopwatch::{Record, Stopwatch};
use crate::pipeline::Engines;
use crate::pipeline::decode::Sequence;
use serde::{Deserialize, Serialize};
use std::time::Duration;

/// Tokens that are decoded before those that are counted.
pub(super) const WARM_UP_TOKENS: usize = 8;

/// Turns of each side, where decoding is measured with and without CUDA graphs; even, so that each begins as often.
const PAIRS: usize = 10;

/// Makes a sequence with room for the tokens, and the first of them.
pub(super) type Start<'a> = &'a mut dyn FnMut(&mut Engines<'_>) -> Result<(Sequence, u32), ProfileError>;

/// Whether an engine records what a token does as a CUDA graph, and repeats that for every token.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum CudaGraph {
    /// Yes, if it can.
    #[default]
    On,
    /// No: it does the same work call by call.
    Off,
    /// Yes; and then both are measured in turns.
    Both,
}

/// Tokens decoded with and without CUDA graphs, in turns.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct GraphComparison {
    /// Turns of each side.
    pub pairs: usize,
    /// A is without, B is with: each further token, the host's time to put one on the device's stream, and the device's time
    /// for one, where they could be compared.
    pub differences: Vec<Difference>,
}

/// Tokens that have been decoded.
pub(super) struct Decoded {
    /// The time of each, those that warmed up left out.
    pub(super) times: Vec<Duration>,
    /// What they took in graphs.
    pub(super) record: Record,
    /// Rows in the cache before the first.
    pub(super) rows: usize,
    /// Time that it took to load graphs.
    pub(super) loading: Duration,
}

/// Decodes `count` tokens of a sequence that `start` makes, and some before to warm up.
pub(super) fn decode(
    engines: &mut Engines<'_>,
    start: Start<'_>,
    stopwatch: &Stopwatch,
    count: usize,
) -> Result<Decoded, ProfileError> {
    let (mut sequence, mut token) = start(engines)?;
    let mut next = |engines: &mut Engines<'_>| {
        token = largest(&sequence.forward(engines, &[token], 1)?.to_f32());
        Ok::<(), ProfileError>(())
    };
    for _ in 0..WARM_UP_TOKENS {
        next(engines)?;
    }
    let before = stopwatch.take()?;
    let times = measure(&Protocol { min_runs: count, ..Protocol::UNTIMED }, monotonic(), || next(engines))?;
    let record = stopwatch.take()?;
    let loading = before.loading + record.loading;
    let rows = sequence.len() - times.len();
    Ok(Decoded { times, record, rows, loading })
}

impl Decoded {
    /// A time of all tokens as that of one, in milliseconds.
    pub(super) fn per_token_ms(&self, time: Duration) -> f64 {
        time.as_secs_f64() * 1e3 / self.times.len().max(1) as f64
    }
}

/// Decodes `count` tokens behind the same state again and again, without CUDA graphs and with them in turns.
pub(super) fn compare_graphs(
    engines: &mut Engines<'_>,
    start: Start<'_>,
    stopwatch: &Stopwatch,
    count: usize,
) -> Result<GraphComparison, ProfileError> {
    // Both sides once, so that whatever is made for a side is there.
    for recorded in [true, false] {
        engines.record_steps(recorded);
        decode(engines, start, stopwatch, count)?;
    }
    let mut pairs = Vec::with_capacity(PAIRS);
    for order in turns(PAIRS) {
        let mut pair = [[f64::NAN; 3]; 2];
        for side in order {
            engines.record_steps(side == 1);
            let decoded = decode(engines, start, stopwatch, count)?;
            let times = [Some(decoded.times.iter().sum()), Some(decoded.record.running()), decoded.record.computing()];
            // What is not a number is not compared.
            pair[side] = times.map(|time| time.map_or(f64::NAN, |time| decoded.per_token_ms(time)));
        }
        pairs.push(pair);
    }
    engines.record_steps(true);
    let names = ["each further token", "putting one on the stream", "computing one"];
    let differences = names.into_iter().enumerate().filter_map(|(i, name)| {
        Difference::of(name, &pairs.iter().map(|[off, on]| [off[i], on[i]]).collect::<Vec<_>>())
    });
    Ok(GraphComparison { pairs: PAIRS, differences: differences.collect() })
}

/// Index of the largest value: the greedy choice.
pub(super) fn largest(logits: &[f32]) -> u32 {
    let best = logits.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1));
    best.map_or(0, |(id, _)| u32::try_from(id).unwrap_or(0))
}
