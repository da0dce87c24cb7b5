//! Timing loops and latency statistics.

use serde::{Deserialize, Serialize};
use std::time::{Duration, Instant};

/// Coefficient of variation above which the samples are too scattered for their median to be trusted.
pub const UNSTABLE_ABOVE: f64 = 0.025;

/// How much the later half of the samples may differ from the earlier half before something changed while they were
/// taken.
pub const DRIFTS_ABOVE: f64 = 0.03;

/// How often to run something in order to time it. The defaults are those of `trtexec`: 200 ms of warm-up, then at least
/// 10 runs and at least 3 s.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Protocol {
    /// Least time spent on runs that are not counted.
    pub warm_up_time: Duration,
    /// Least number of runs that are not counted.
    pub warm_up_runs: usize,
    /// Least time spent on runs that are counted.
    pub min_time: Duration,
    /// Least number of runs that are counted.
    pub min_runs: usize,
    /// Time that all of it may take, before the minima are met too: no run is started that would end later if it took
    /// as long as the longest so far. There is always one run.
    pub max_time: Option<Duration>,
}

impl Default for Protocol {
    fn default() -> Self {
        Self {
            warm_up_time: Duration::from_millis(200),
            warm_up_runs: 1,
            min_time: Duration::from_secs(3),
            min_runs: 10,
            max_time: None,
        }
    }
}

impl Protocol {
    /// So many runs, whatever they take; none of them to warm up.
    pub const UNTIMED: Self =
        Self { warm_up_time: Duration::ZERO, warm_up_runs: 0, min_time: Duration::ZERO, min_runs: 0, max_time: None };
}

/// A monotonic clock: time since this function was called.
pub fn monotonic() -> impl Fn() -> Duration {
    let origin = Instant::now();
    move || origin.elapsed()
}

/// Times `run` as `protocol` says, reading `clock` (any fixed origin) before and after each call. Warm-up and counted
/// part each end with the run that satisfies both their minima, or where [`Protocol::max_time`] ends them; if that
/// leaves no counted run, the warm-up's are returned. What `run` does has to be finished when it returns: an engine that
/// only enqueues must synchronise.
///
/// # Errors
///
/// The first error of `run`, at once.
pub fn measure<E>(
    protocol: &Protocol,
    clock: impl Fn() -> Duration,
    mut run: impl FnMut() -> Result<(), E>,
) -> Result<Vec<Duration>, E> {
    let began = clock();
    let mut longest = None;
    let mut phase = |min_time: Duration, min_runs: usize| {
        let mut samples = Vec::new();
        let started = clock();
        let mut now = started;
        while samples.len() < min_runs || now.saturating_sub(started) < min_time {
            let end = longest.map(|longest| now.saturating_sub(began) + longest);
            if protocol.max_time.zip(end).is_some_and(|(limit, end)| end > limit) {
                break;
            }
            let before = clock();
            run()?;
            now = clock();
            let sample = now.saturating_sub(before);
            longest = longest.max(Some(sample));
            samples.push(sample);
        }
        Ok(samples)
    };
    let warm_up = phase(protocol.warm_up_time, protocol.warm_up_runs)?;
    let counted = phase(protocol.min_time, protocol.min_runs)?;
    Ok(if counted.is_empty() { warm_up } else { counted })
}

/// Statistics of one kind of latency, in milliseconds. Percentiles are nearest-rank: the `p`-th is the smallest sample
/// that at least `p` % of the samples do not exceed, so every percentile is a value that was measured.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct LatencyStats {
    /// Samples.
    pub runs: usize,
    /// Fastest.
    pub min_ms: f64,
    /// 50th percentile.
    pub median_ms: f64,
    /// 90th percentile.
    pub p90_ms: f64,
    /// 95th percentile.
    pub p95_ms: f64,
    /// 99th percentile.
    pub p99_ms: f64,
    /// Slowest.
    pub max_ms: f64,
    /// Arithmetic mean.
    pub mean_ms: f64,
    /// Coefficient of variation: sample standard deviation over mean; 0 for a single run.
    pub cv: f64,
    /// Median of the later half of the samples over that of the earlier half, less 1; absent below four samples.
    #[serde(default)]
    pub drift: Option<f64>,
}

/// Median of `samples`, in their unit: nearest-rank, as [`LatencyStats`] has it. Zero for none.
fn median(samples: &[Duration]) -> f64 {
    let mut sorted = samples.to_vec();
    sorted.sort();
    sorted.get(sorted.len().div_ceil(2).max(1) - 1).map_or(0.0, Duration::as_secs_f64)
}

impl LatencyStats {
    /// The statistics of `samples`, which are in the order in which they were taken; `None` if there are none.
    pub fn new(samples: &[Duration]) -> Option<Self> {
        let mut sorted: Vec<f64> = samples.iter().map(|sample| sample.as_secs_f64() * 1e3).collect();
        sorted.sort_by(f64::total_cmp);
        let (&min_ms, &max_ms) = (sorted.first()?, sorted.last()?);
        let runs = sorted.len();
        let percentile = |p: usize| sorted[(p * runs).div_ceil(100).max(1) - 1];
        let mean_ms = sorted.iter().sum::<f64>() / runs as f64;
        let squares: f64 = sorted.iter().map(|sample| (sample - mean_ms).powi(2)).sum();
        let deviation = (squares / (runs.max(2) - 1) as f64).sqrt();
        // A sample in the middle belongs to neither half.
        let half = runs / 2;
        let (earlier, later) = (median(&samples[..half]), median(&samples[runs - half..]));
        Some(Self {
            runs,
            min_ms,
            median_ms: percentile(50),
            p90_ms: percentile(90),
            p95_ms: percentile(95),
            p99_ms: percentile(99),
            max_ms,
            mean_ms,
            cv: if mean_ms > 0.0 { deviation / mean_ms } else { 0.0 },
            drift: (runs >= 4 && earlier > 0.0).then(|| later / earlier - 1.0),
        })
    }

    /// Whether the samples scatter by more than [`UNSTABLE_ABOVE`].
    pub fn is_unstable(&self) -> bool {
        self.cv > UNSTABLE_ABOVE
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use approx::assert_relative_eq;
    use std::cell::Cell;

    /// Runs `measure` on a clock that only `run` advances; returns all runs and the counted samples.
    fn measured(protocol: &Protocol, durations_ms: impl Fn(usize) -> u64) -> (usize, Vec<Duration>) {
        let (now, runs) = (Cell::new(Duration::from_secs(1000)), Cell::new(0));
        let samples = measure(
            protocol,
            || now.get(),
            || {
                now.set(now.get() + Duration::from_millis(durations_ms(runs.get())));
                runs.set(runs.get() + 1);
                Ok::<(), ()>(())
            },
        );
        (runs.get(), samples.unwrap())
    }

    fn protocol(warm_up_ms: u64, warm_up_runs: usize, min_ms: u64, min_runs: usize) -> Protocol {
        Protocol {
            warm_up_time: Duration::from_millis(warm_up_ms),
            warm_up_runs,
            min_time: Duration::from_millis(min_ms),
            min_runs,
            max_time: None,
        }
    }

    #[test]
    fn both_minima_have_to_be_met() {
        // By count: 2 + 5 runs of a second each; by time: 20 and 300 runs of 10 ms.
        assert_eq!(measured(&protocol(200, 2, 3000, 5), |_| 1000).0, 7);
        assert_eq!(measured(&protocol(200, 2, 3000, 5), |_| 10).0, 320);
        assert_eq!(measured(&protocol(0, 0, 0, 1), |_| 10).0, 1);
    }

    #[test]
    fn warm_up_is_not_counted() {
        let (_, samples) = measured(&protocol(0, 3, 0, 4), |run| if run < 3 { 500 } else { 10 });
        assert_eq!(samples, [Duration::from_millis(10); 4]);
    }

    #[test]
    fn a_limit_ends_the_runs_but_leaves_one() {
        let limited = |max_ms, run_ms: fn(usize) -> u64| {
            let limit = Some(Duration::from_millis(max_ms));
            let (runs, samples) = measured(&Protocol { max_time: limit, ..protocol(0, 1, 0, 5) }, run_ms);
            (runs, samples.iter().map(|s| s.as_millis() as u64).collect::<Vec<_>>())
        };
        // A run of 100 ms fits while at most 300 of 400 have passed; a longer one makes the next not fit.
        assert_eq!(limited(400, |_| 100), (4, vec![100; 3]));
        assert_eq!(limited(400, |run| if run == 1 { 200 } else { 100 }), (2, vec![200]));
        // The warm-up's run is all there is time for.
        assert_eq!(limited(50, |_| 300), (1, vec![300]));
    }

    #[test]
    fn an_error_ends_the_loop() {
        let runs = Cell::new(0);
        let result = measure(
            &protocol(0, 1, 0, 9),
            || Duration::ZERO,
            || {
                runs.set(runs.get() + 1);
                if runs.get() == 3 { Err("broken") } else { Ok(()) }
            },
        );
        assert_eq!((result, runs.get()), (Err("broken"), 3));
    }

    #[test]
    fn percentiles_are_nearest_rank() {
        let samples: Vec<_> = (1..=20).rev().map(Duration::from_millis).collect();
        let stats = LatencyStats::new(&samples).unwrap();
        let found = [stats.min_ms, stats.median_ms, stats.p90_ms, stats.p95_ms, stats.p99_ms, stats.max_ms];
        for (found, expected) in found.into_iter().zip([1.0, 10.0, 18.0, 19.0, 20.0, 20.0]) {
            assert_relative_eq!(found, expected, epsilon = 1e-9);
        }
        assert_relative_eq!(stats.mean_ms, 10.5, epsilon = 1e-9);
        assert_relative_eq!(stats.cv, 35f64.sqrt() / 10.5, epsilon = 1e-9);
    }

    #[test]
    fn scatter_is_noticed_and_one_run_has_none() {
        let stats = |ms: &[u64]| LatencyStats::new(&ms.iter().map(|&m| Duration::from_millis(m)).collect::<Vec<_>>());
        assert!(stats(&[100, 100, 110]).unwrap().is_unstable());
        assert!(!stats(&[1000, 1000, 1001]).unwrap().is_unstable());
        let one = stats(&[7]).unwrap();
        assert_relative_eq!(one.p99_ms, 7.0, epsilon = 1e-9);
        assert!(!one.is_unstable());
        assert!(stats(&[]).is_none());
        assert!(!stats(&[0, 0]).unwrap().is_unstable());
    }

    #[test]
    fn drift_is_the_later_half_against_the_earlier() {
        let drift = |ms: &[u64]| {
            LatencyStats::new(&ms.iter().map(|&m| Duration::from_millis(m)).collect::<Vec<_>>()).unwrap().drift
        };
        assert_relative_eq!(drift(&[100, 101, 150, 110, 111]).unwrap(), 0.1, epsilon = 1e-9);
        assert_relative_eq!(drift(&[110, 110, 55, 55]).unwrap(), -0.5, epsilon = 1e-9);
        // An outlier in either half is no drift.
        assert_relative_eq!(drift(&[100, 100, 100, 100, 900, 100]).unwrap(), 0.0, epsilon = 1e-9);
        assert_eq!(drift(&[100, 101, 200]), None);
        assert_eq!(drift(&[0, 0, 1, 1]), None);
    }
}
