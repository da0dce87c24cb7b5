//! The rows that go into linear layers.

use super::calibrator::{Calibrator, Distribution};
use super::histogram::Histogram;
use super::sample::{EXTREME_ROWS, SAMPLE_ROWS, Sample, WindowKey};
use std::fmt;

/// Unit of the sum of largest magnitudes, which is in fixed point so that it is exact.
const UNIT: f64 = (1_u64 << 32) as f64;

/// Larger magnitudes count as this in that sum: those of 2^32 windows cannot overflow it.
const LARGEST: f64 = (1_u64 << 63) as f64;

/// What is known about the input of some linear layers: of those whose matrices are multiplied by the same rows.
#[derive(Debug, Clone, PartialEq)]
pub struct Site {
    /// Names of the matrices, ascending.
    pub(super) weights: Vec<String>,
    pub(super) rows: u64,
    /// Windows in which there was a row.
    pub(super) windows: u64,
    /// Of the largest magnitude in each window, in fixed point.
    pub(super) absmax_sum: u128,
    pub(super) channel_min: Vec<f32>,
    pub(super) channel_max: Vec<f32>,
    pub(super) histogram: Histogram,
    pub(super) sample: Sample,
    pub(super) extremes: Sample,
}

/// Numbers that are NaN or infinite.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NotFinite {
    /// How many.
    pub count: usize,
    /// Of how many.
    pub of: usize,
}

impl fmt::Display for NotFinite {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} of {} numbers are NaN or infinite", self.count, self.of)
    }
}

/// The largest magnitude of `values`. Bit patterns of magnitudes are ordered like the magnitudes, with infinity and NaN
/// above all numbers, and integers are compared many at a time.
pub(super) fn absmax(values: &[f32]) -> f32 {
    f32::from_bits(values.iter().fold(0, |max, x| max.max(x.to_bits() & 0x7FFF_FFFF)))
}

impl Site {
    pub(super) fn new(weights: Vec<String>, channels: usize) -> Self {
        Self {
            weights,
            rows: 0,
            windows: 0,
            absmax_sum: 0,
            channel_min: vec![f32::INFINITY; channels],
            channel_max: vec![f32::NEG_INFINITY; channels],
            histogram: Histogram::default(),
            sample: Sample::new(SAMPLE_ROWS),
            extremes: Sample::new(EXTREME_ROWS),
        }
    }

    /// Adds `rows`, those from `first` on of a window, and returns the largest magnitude. Nothing is added if one is not
    /// finite.
    pub(super) fn observe(&mut self, rows: &[f32], window: WindowKey, first: u64) -> Result<f32, NotFinite> {
        let channels = self.channels();
        let largest = absmax(rows);
        if !largest.is_finite() {
            let count = rows.iter().filter(|x| !x.is_finite()).count();
            return Err(NotFinite { count, of: rows.len() });
        }
        for row in rows.chunks_exact(channels) {
            for ((min, max), &x) in self.channel_min.iter_mut().zip(&mut self.channel_max).zip(row) {
                *min = if x < *min { x } else { *min };
                *max = if x > *max { x } else { *max };
            }
        }
        // Of equal zeros the one that came first was kept; the sum with 0 is the positive one.
        self.channel_min.iter_mut().chain(&mut self.channel_max).for_each(|x| *x += 0.0);
        self.histogram.count(rows, largest);
        self.sample.offer(rows, channels, window, first);
        self.extremes.offer_extremes(rows, channels, window, first, largest);
        self.rows += (rows.len() / channels) as u64;
        Ok(largest)
    }

    /// Counts a window in which `absmax` was the largest magnitude.
    pub(super) fn end_window(&mut self, absmax: f32) {
        self.windows += 1;
        self.absmax_sum += (f64::from(absmax).min(LARGEST) * UNIT).round() as u128;
    }

    /// Adds what another site of the same matrices has seen, or returns `None` if that cannot be counted.
    pub(super) fn merge(&mut self, other: &Self) -> Option<()> {
        let rows = self.rows.checked_add(other.rows)?;
        rows.checked_mul(self.channels() as u64)?;
        let windows = self.windows.checked_add(other.windows)?;
        self.absmax_sum = self.absmax_sum.checked_add(other.absmax_sum)?;
        (self.rows, self.windows) = (rows, windows);
        self.channel_min.iter_mut().zip(&other.channel_min).for_each(|(a, b)| *a = a.min(*b));
        self.channel_max.iter_mut().zip(&other.channel_max).for_each(|(a, b)| *a = a.max(*b));
        self.histogram.merge(&other.histogram);
        self.sample.merge(&other.sample);
        self.extremes.merge(&other.extremes);
        Some(())
    }

    /// Names of the matrices that are multiplied by these rows.
    pub fn weights(&self) -> &[String] {
        &self.weights
    }

    /// Rows seen.
    pub fn rows(&self) -> u64 {
        self.rows
    }

    /// Numbers in a row.
    pub fn channels(&self) -> usize {
        self.channel_min.len()
    }

    /// The smallest and the largest number of each channel.
    pub fn channel_ranges(&self) -> impl ExactSizeIterator<Item = (f32, f32)> {
        self.channel_min.iter().copied().zip(self.channel_max.iter().copied())
    }

    /// The largest magnitude in each channel.
    pub fn channel_absmax(&self) -> Vec<f32> {
        self.channel_ranges().map(|(min, max)| max.max(-min)).collect()
    }

    /// The largest magnitude.
    pub fn absmax(&self) -> f32 {
        absmax(&self.channel_min).max(absmax(&self.channel_max))
    }

    /// The mean over windows of the largest magnitude in each.
    pub fn average_absmax(&self) -> f32 {
        (self.absmax_sum as f64 / UNIT / self.windows as f64) as f32
    }

    /// All magnitudes.
    pub fn histogram(&self) -> &Histogram {
        &self.histogram
    }

    /// A uniform sample of the rows, `[k, channels]` with `k` up to [`SAMPLE_ROWS`](super::SAMPLE_ROWS).
    pub fn sample(&self) -> &[f32] {
        self.sample.rows()
    }

    /// The rows with the largest magnitudes, `[k, channels]` with `k` up to [`EXTREME_ROWS`], the largest first.
    pub fn extremes(&self) -> &[f32] {
        self.extremes.rows()
    }

    /// How many of all rows each row of the sample stands for, and each of the extremes. Many models have one row with very
    /// large activations in every text: the extremes stand for one row per window.
    pub fn row_weights(&self) -> (u64, u64) {
        let each = |all: u64, kept: usize| (all / (kept as u64).max(1)).max(1);
        (each(self.rows, self.sample.keys().len()), each(self.windows, self.extremes.keys().len()))
    }

    /// The magnitude at which a quantizer of these rows clips: above 0, and not above the largest.
    pub fn threshold(&self, calibrator: Calibrator) -> f32 {
        let (absmax, average) = (self.absmax(), self.average_absmax());
        calibrator.threshold(&Distribution { absmax, average, histogram: &self.histogram })
    }

    /// [`Self::threshold`] for rows whose channels are multiplied by `factors`.
    ///
    /// The largest magnitude is exact. The distribution is that of sample and extremes, as often as [they
    /// count](Self::row_weights), and the largest magnitude of every channel once; means over windows change like the largest
    /// magnitude.
    pub fn smoothed_threshold(&self, factors: &[f32], calibrator: Calibrator) -> f32 {
        let largest: Vec<f32> = self.channel_absmax().iter().zip(factors).map(|(x, f)| x * f.abs()).collect();
        let largest_of_all = absmax(&largest);
        let average = self.average_absmax() / self.absmax() * largest_of_all;
        let mut histogram = Histogram::default();
        if !matches!(calibrator, Calibrator::MinMax | Calibrator::Average) {
            let weights = self.row_weights();
            for (rows, weight) in [(self.sample(), weights.0), (self.extremes(), weights.1)] {
                let smoothed: Vec<f32> = rows.iter().zip(factors.iter().cycle()).map(|(x, f)| x * f).collect();
                let mut part = Histogram::default();
                part.count(&smoothed, absmax(&smoothed));
                part.multiply(weight);
                histogram.merge(&part);
            }
            for &x in &largest {
                histogram.add(x, 1);
            }
        }
        calibrator.threshold(&Distribution { absmax: largest_of_all, average, histogram: &histogram })
    }
}
