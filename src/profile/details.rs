//! What a measurement says besides latencies and sizes: where the time went, what bounds it, how loading and growing
//! caches tell, and what other programs did meanwhile.

use super::ceilings::Ceilings;
use super::decoding::GraphComparison;
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
    /// What that run spent between the graphs: planning, copying, choosing; without [`Self::wait_ms`].
    pub host_ms: Option<f64>,
    /// What that run spent waiting for the device whose results it read, copying them included; missing where engines have
    /// no device of their own.
    pub wait_ms: Option<f64>,
    /// As [`Self::host_ms`] per decoded token, on average.
    pub token_host_ms: Option<f64>,
    /// The host's time in the runs of graphs per decoded token, on average: where engines have a device, that of putting the
    /// work on its stream. Together with the time between the graphs and the waiting it makes up the token's.
    pub token_run_ms: Option<f64>,
    /// The device's time in them per decoded token, on average; missing as [`Self::wait_ms`].
    pub token_compute_ms: Option<f64>,
    /// As [`Self::wait_ms`] per decoded token, on average.
    pub token_wait_ms: Option<f64>,
    /// Bytes of device memory that were in use after the last token and free before the engines were loaded; missing as
    /// [`Self::wait_ms`].
    pub peak_device_bytes: Option<u64>,
    /// Decoding without CUDA graphs and with them, where that was asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cuda_graph: Option<GraphComparison>,
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
    /// Milliseconds of the host in all of them: where engines have a device, those of putting the work on its stream.
    pub total_ms: f64,
    /// Milliseconds of the device in all of them, from the beginning to the end of the work on its stream.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub compute_ms: Option<f64>,
}

impl StageTime {
    /// The time that decides how long a graph takes: the device's, or else the host's.
    fn deciding_ms(&self) -> f64 {
        self.compute_ms.unwrap_or(self.total_ms)
    }
}

/// One time of a run, and what it consists of, in milliseconds: the host enqueues the work of graphs, waits for results and
/// does what is left, while the device computes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct DeviceShare {
    /// The host's time for putting work on the stream.
    pub enqueue_ms: f64,
    /// The host's time for waiting and copying.
    pub wait_ms: f64,
    /// What else the host did.
    pub host_ms: f64,
    /// The device's time for the work.
    pub compute_ms: f64,
}

impl DeviceShare {
    /// What the host's parts make up.
    pub fn total_ms(&self) -> f64 {
        self.enqueue_ms + self.wait_ms + self.host_ms
    }

    /// The part of the time in which the device computes.
    pub fn busy(&self) -> f64 {
        if self.total_ms() > 0.0 { self.compute_ms / self.total_ms() } else { 0.0 }
    }
}

impl Details {
    /// What the prefix of the median time consists of; `None` where engines have no device.
    pub fn prefix_on_device(&self) -> Option<DeviceShare> {
        let compute: Option<f64> = self.stages.iter().map(|stage| stage.compute_ms).sum();
        Some(DeviceShare {
            enqueue_ms: self.stages.iter().map(|stage| stage.total_ms).sum(),
            wait_ms: self.wait_ms?,
            host_ms: self.host_ms?,
            compute_ms: compute?,
        })
    }

    /// What a decoded token consists of, on average; `None` where engines have no device.
    pub fn token_on_device(&self) -> Option<DeviceShare> {
        Some(DeviceShare {
            enqueue_ms: self.token_run_ms?,
            wait_ms: self.token_wait_ms?,
            host_ms: self.token_host_ms?,
            compute_ms: self.token_compute_ms?,
        })
    }
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
        .map(|(graph, time)| StageTime {
            graph: graph.clone(),
            calls: time.calls,
            total_ms: ms(time.host),
            compute_ms: time.device.map(ms),
        })
        .collect();
    stages.sort_by(|a, b| b.deciding_ms().total_cmp(&a.deciding_ms()));
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
    use crate::profile::stopwatch::GraphTime;

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
        let graph = |calls, ms| GraphTime { calls, host: time(ms), device: None };
        let graphs = [("head".to_owned(), graph(1, 3)), ("leaf".to_owned(), graph(8, 40))];
        let mut record = Record { graphs: graphs.into(), ..Record::default() };
        let found: Vec<_> = stages(&record).into_iter().map(|s| (s.graph, s.calls, s.total_ms)).collect();
        assert_eq!(found, [("leaf".to_owned(), 8, 40.0), ("head".to_owned(), 1, 3.0)]);
        // What takes the device longest, whatever it takes to put it there.
        for (graph, compute) in record.graphs.values_mut().zip([70, 60]) {
            graph.device = Some(time(compute));
        }
        let found: Vec<_> = stages(&record).into_iter().map(|s| (s.graph, s.total_ms, s.compute_ms)).collect();
        assert_eq!(found, [("head".to_owned(), 3.0, Some(70.0)), ("leaf".to_owned(), 40.0, Some(60.0))]);
    }
}
