//! What a measurement says besides latencies and sizes: where the time went, what bounds it, how loading and growing
//! caches tell, and what other programs did meanwhile.

use super::ceilings::Ceilings;
use super::roofline::{Demand, Roofline};
use super::stats::LatencyStats;
use super::stopwatch::Record;
use serde::{Deserialize, Serialize};
use std::time::Duration;

/// Each part may be missing: results of earlier versions have none.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Details {
    /// Where the prefix run whose time is the median spent it, the longest first.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub stages: Vec<StageTime>,
    /// What that run spent between the graphs: planning, copying, choosing.
    pub host_ms: Option<f64>,
    /// The same per decoded token, on average.
    pub token_host_ms: Option<f64>,
    /// Time spent loading all graphs that were needed.
    pub load_ms: Option<f64>,
    /// Time of the first prefix, whose graphs had to be loaded and whose memory had never been touched.
    pub first_run_ms: Option<f64>,
    /// Tokens by how many were decoded before; empty where only one number was asked for.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub decoded: Vec<DecodedSpan>,
    /// What the prefix has to do at least.
    pub prefix_demand: Option<Demand>,
    /// What a decoding step has to do at least, halfway through.
    pub token_demand: Option<Demand>,
    /// The machine's rates when this was measured.
    pub ceilings: Option<Ceilings>,
    /// How far the median prefix is from the limit.
    pub prefix_limit: Option<Roofline>,
    /// How far the median decoding step is from the limit.
    pub token_limit: Option<Roofline>,
    /// Share of the processors that other programs kept busy during the measurement, between 0 and 1.
    pub others_busy: Option<f64>,
}

/// The runs of one graph.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StageTime {
    /// The graph.
    pub graph: String,
    /// How often it ran.
    pub calls: usize,
    /// Milliseconds in all of them.
    pub total_ms: f64,
}

/// Decoded tokens that follow each other.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct DecodedSpan {
    /// Tokens decoded before the first of these.
    pub from: usize,
    /// Tokens decoded with the last of these.
    pub to: usize,
    /// Rows in the cache when the last of these was decoded.
    pub cache_rows: usize,
    /// Time of each.
    pub per_token: LatencyStats,
}

/// The graphs of `record`, the longest first.
pub(super) fn stages(record: &Record) -> Vec<StageTime> {
    let mut stages: Vec<StageTime> = record
        .graphs
        .iter()
        .map(|(graph, (calls, time))| StageTime { graph: graph.clone(), calls: *calls, total_ms: ms(*time) })
        .collect();
    stages.sort_by(|a, b| b.total_ms.total_cmp(&a.total_ms));
    stages
}

pub(super) fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

/// The samples in spans that end after `marks` tokens, in ascending order; `rows` are in the cache before the first. None
/// for a single mark.
pub(super) fn spans(samples: &[Duration], marks: &[usize], rows: usize) -> Vec<DecodedSpan> {
    if marks.len() < 2 {
        return Vec::new();
    }
    let begins = std::iter::once(0).chain(marks.iter().copied());
    let found = begins.zip(marks).filter_map(|(from, &to)| {
        let per_token = LatencyStats::new(samples.get(from..to)?)?;
        Some(DecodedSpan { from, to, cache_rows: rows + to, per_token })
    });
    found.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_follow_each_other() {
        let samples: Vec<Duration> = (1..=10).map(Duration::from_millis).collect();
        let found = spans(&samples, &[2, 4, 10], 100);
        let found: Vec<_> = found.iter().map(|s| (s.from, s.to, s.cache_rows, s.per_token.runs)).collect();
        assert_eq!(found, [(0, 2, 102, 2), (2, 4, 104, 2), (4, 10, 110, 6)]);
        assert!(spans(&samples, &[10], 100).is_empty());
    }

    #[test]
    fn the_longest_graph_comes_first() {
        let time = |ms| Duration::from_millis(ms);
        let graphs = [("head".to_owned(), (1, time(3))), ("leaf".to_owned(), (8, time(40)))];
        let record = Record { graphs: graphs.into(), ..Record::default() };
        let found: Vec<_> = stages(&record).into_iter().map(|s| (s.graph, s.calls, s.total_ms)).collect();
        assert_eq!(found, [("leaf".to_owned(), 8, 40.0), ("head".to_owned(), 1, 3.0)]);
    }
}
