//! Accumulates scores per layer and distance over windows of text.

use super::smoothing::fit_at;
use super::{MAX_ENTRIES, Provenance, SignificanceTable};

/// Fixed-point unit of the sums. Scores are single precision, so at the magnitudes of logits nothing is lost.
const UNIT: f64 = (1_u64 << 32) as f64;

/// Scores must be smaller than this: then even squares of 2^33 samples cannot overflow a sum.
const LIMIT: f32 = (1_u32 << 31) as f32;

/// Measures the expected score by layer and distance.
///
/// Sums are kept in fixed point, so they are exact: the table does not depend on the order of windows nor on how they were
/// divided among estimators that are [merged](Self::merge), down to the last bit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SignificanceEstimator {
    num_layers: usize,
    /// Samples per distance: the same in every layer, not increasing, since a window of length L has one score at each of
    /// the distances `0 .. L`.
    counts: Vec<u64>,
    /// `[num_layers, counts.len()]`, in fixed point.
    sums: Vec<i128>,
    /// Sum of squares per layer, in fixed point.
    squares: Vec<i128>,
}

/// Why scores were not accepted or no table could be made of them.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum EstimateError {
    /// No layer, or more entries than a table may have.
    #[error(
        "a significance table of {num_layers} layers and distances up to {max_distance} is not possible: it must have 1 to {MAX_ENTRIES} entries"
    )]
    Size {
        /// Layers asked for.
        num_layers: usize,
        /// Largest distance asked for.
        max_distance: usize,
    },
    /// The scores are not `[num_layers, L]` with `L >= 1`.
    #[error("{found} scores are not one row of equal length for each of {num_layers} layers")]
    Shape {
        /// Number of scores.
        found: usize,
        /// Layers of the estimator.
        num_layers: usize,
    },
    /// A score is NaN, infinite or absurdly large.
    #[error(
        "the score of layer {layer} at distance {distance} is {value}: the model does not compute finite logits on this text"
    )]
    NotFinite {
        /// Layer.
        layer: usize,
        /// Distance from the last token.
        distance: usize,
        /// The score.
        value: f32,
    },
    /// Estimators of different sizes were merged.
    #[error("estimators of {found:?} and {expected:?} (layers, distances) cannot be merged")]
    MergeSize {
        /// Layers and distances of the other one.
        found: (usize, usize),
        /// Layers and distances of this one.
        expected: (usize, usize),
    },
    /// Nothing was measured.
    #[error("no window was measured")]
    NoWindows,
    /// A smoothing setting is out of range.
    #[error("max_relative_width is {found}, expected a number from 0 to 1")]
    RelativeWidth {
        /// The setting.
        found: f64,
    },
}

impl SignificanceEstimator {
    /// Nothing measured yet, for distances `0 ..= max_distance`.
    ///
    /// # Errors
    ///
    /// The table would be empty or larger than [`MAX_ENTRIES`].
    pub fn new(num_layers: usize, max_distance: usize) -> Result<Self, EstimateError> {
        let entries = max_distance.checked_add(1).and_then(|n| n.checked_mul(num_layers));
        match entries {
            Some(n @ 1..=MAX_ENTRIES) => Ok(Self {
                num_layers,
                counts: vec![0; max_distance + 1],
                sums: vec![0; n],
                squares: vec![0; num_layers],
            }),
            _ => Err(EstimateError::Size { num_layers, max_distance }),
        }
    }

    /// Adds the scores of one window: `[num_layers, L]`, where entry `j` of a row is the maximum over heads of the last
    /// token's logit against key `j`, that is at distance `L-1-j`. Scores beyond the largest distance are not used.
    ///
    /// # Errors
    ///
    /// The scores have another shape or are not finite; the estimator is then unchanged.
    pub fn add_window(&mut self, layer_scores: &[f32]) -> Result<(), EstimateError> {
        let found = layer_scores.len();
        if found == 0 || !found.is_multiple_of(self.num_layers) {
            return Err(EstimateError::Shape { found, num_layers: self.num_layers });
        }
        let length = found / self.num_layers;
        if let Some(i) = layer_scores.iter().position(|score| score.is_nan() || score.abs() >= LIMIT) {
            let (layer, distance) = (i / length, length - 1 - i % length);
            return Err(EstimateError::NotFinite { layer, distance, value: layer_scores[i] });
        }
        for count in self.counts.iter_mut().take(length) {
            *count += 1;
        }
        let rows = layer_scores.chunks_exact(length).zip(self.sums.chunks_exact_mut(self.counts.len()));
        for ((scores, sums), squares) in rows.zip(&mut self.squares) {
            for (&score, sum) in scores.iter().rev().zip(sums) {
                let score = f64::from(score);
                *sum += (score * UNIT).round() as i128;
                *squares += (score * score * UNIT).round() as i128;
            }
        }
        Ok(())
    }

    /// Adds everything another estimator has measured.
    ///
    /// # Errors
    ///
    /// It has other numbers of layers or distances.
    pub fn merge(&mut self, other: &Self) -> Result<(), EstimateError> {
        let size = |estimator: &Self| (estimator.num_layers, estimator.counts.len());
        if size(self) != size(other) {
            return Err(EstimateError::MergeSize { found: size(other), expected: size(self) });
        }
        self.counts.iter_mut().zip(&other.counts).for_each(|(a, b)| *a += b);
        self.sums.iter_mut().zip(&other.sums).for_each(|(a, b)| *a += b);
        self.squares.iter_mut().zip(&other.squares).for_each(|(a, b)| *a += b);
        Ok(())
    }

    /// Windows measured so far.
    pub fn windows(&self) -> u64 {
        self.counts[0]
    }

    /// The table: means by distance, smoothed as `provenance.smoothing` says and continued to the largest distance.
    ///
    /// # Errors
    ///
    /// No window was added, or the smoothing settings are out of range.
    pub fn finish(&self, provenance: Provenance) -> Result<SignificanceTable, EstimateError> {
        if self.windows() == 0 {
            return Err(EstimateError::NoWindows);
        }
        let smoothing = provenance.smoothing;
        if !(0.0..=1.0).contains(&smoothing.max_relative_width) {
            return Err(EstimateError::RelativeWidth { found: smoothing.max_relative_width });
        }
        let supports = smoothing.supports(&self.counts);
        let samples: f64 = self.counts.iter().map(|&n| n as f64).sum();
        let mut bias = Vec::with_capacity(self.sums.len());
        let mut deviation = Vec::with_capacity(self.num_layers);
        for (sums, &squares) in self.sums.chunks_exact(self.counts.len()).zip(&self.squares) {
            let sums: Vec<f64> = sums.iter().map(|&sum| sum as f64 / UNIT).collect();
            let measured: Vec<f64> = supports
                .iter()
                .enumerate()
                .map(|(at, support)| fit_at(at, support.clone(), &self.counts, &sums))
                .collect();
            // Sum over samples of (score - bias)^2, expanded.
            let residual = measured
                .iter()
                .zip(&sums)
                .zip(&self.counts)
                .fold(squares as f64 / UNIT, |total, ((b, sum), &n)| total + b * (n as f64 * b - 2.0 * sum));
            deviation.push((residual.max(0.0) / samples).sqrt() as f32);
            let last = measured.last().copied().unwrap_or_default();
            let continued = std::iter::repeat_n(last, self.counts.len() - measured.len());
            bias.extend(measured.into_iter().chain(continued).map(|b| b as f32));
        }
        Ok(SignificanceTable::from_estimate(self.counts.clone(), bias, deviation, provenance))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::significance::{ModelIdentity, Smoothing};
    use approx::assert_abs_diff_eq;
    use proptest::prelude::*;

    fn provenance(smoothing: Smoothing) -> Provenance {
        Provenance {
            model: ModelIdentity { fingerprint: "f".into(), rope: "none".into() },
            text_sha256: String::new(),
            window_tokens: 4,
            seed: 0,
            smoothing,
            tool: "test".into(),
        }
    }

    fn table(estimator: &SignificanceEstimator) -> SignificanceTable {
        estimator.finish(provenance(Smoothing::default())).unwrap()
    }

    #[test]
    fn entries_are_means_by_distance_from_the_last_token() {
        let mut estimator = SignificanceEstimator::new(2, 3).unwrap();
        estimator.add_window(&[4.0, 3.0, 2.0, 1.0, 40.0, 30.0, 20.0, 10.0]).unwrap();
        estimator.add_window(&[6.0, 5.0, 60.0, 50.0]).unwrap();
        let table = table(&estimator);
        assert_eq!(table.bias(0), [3.0, 4.0, 3.0, 4.0]);
        assert_eq!(table.bias(1), [30.0, 40.0, 30.0, 40.0]);
        assert_eq!(table.counts(), [2, 2, 1, 1]);
        // Residuals of layer 0 are -2, 2 at distance 0 and the same at 1; the single samples fit exactly.
        assert_abs_diff_eq!(table.deviation(0), (16.0_f32 / 6.0).sqrt(), epsilon = 1e-6);
        assert_abs_diff_eq!(table.deviation(1), 10.0 * (16.0_f32 / 6.0).sqrt(), epsilon = 1e-5);
    }

    #[test]
    fn unmeasured_distances_continue_with_the_last_value() {
        let mut estimator = SignificanceEstimator::new(1, 6).unwrap();
        estimator.add_window(&[7.0, 2.0, 1.0]).unwrap();
        let table = table(&estimator);
        assert_eq!(table.bias(0), [1.0, 2.0, 7.0, 7.0, 7.0, 7.0, 7.0]);
        assert_eq!(table.measured_distance(), 2);
    }

    #[test]
    fn scores_beyond_the_largest_distance_are_not_used() {
        let mut estimator = SignificanceEstimator::new(1, 1).unwrap();
        estimator.add_window(&[100.0, 2.0, 1.0]).unwrap();
        let table = table(&estimator);
        assert_eq!(table.bias(0), [1.0, 2.0]);
        assert_abs_diff_eq!(table.deviation(0), 0.0);
    }

    #[test]
    fn smoothing_brings_noisy_means_closer_to_the_truth() {
        let truth = |distance: usize| 5.0 / (1.0 + distance as f32 / 50.0);
        let mut estimator = SignificanceEstimator::new(1, 1999).unwrap();
        let mut state = 1_u64;
        for _ in 0..8 {
            let scores: Vec<f32> = (0..2000)
                .rev()
                .map(|distance| {
                    state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                    truth(distance) + (state >> 40) as f32 / (1 << 23) as f32 - 1.0
                })
                .collect();
            estimator.add_window(&scores).unwrap();
        }
        let error = |smoothing| {
            let table = estimator.finish(provenance(smoothing)).unwrap();
            let squares = table.bias(0).iter().enumerate().map(|(i, b)| (b - truth(i)).powi(2));
            (squares.sum::<f32>() / 2000.0).sqrt()
        };
        let [raw, smooth] = [Smoothing { min_samples: 0, ..Smoothing::default() }, Smoothing::default()].map(error);
        assert!(raw > 0.15 && smooth < 0.05, "raw {raw}, smoothed {smooth}");
    }

    #[test]
    fn refuses_bad_scores_and_keeps_what_it_has() {
        let mut estimator = SignificanceEstimator::new(2, 3).unwrap();
        estimator.add_window(&[1.0; 4]).unwrap();
        let before = estimator.clone();
        for (scores, value) in [([1.0, 1.0, f32::INFINITY, 1.0], f32::INFINITY), ([1.0, 1.0, 3e9, 1.0], 3e9)] {
            let error = estimator.add_window(&scores).unwrap_err();
            assert_eq!(error, EstimateError::NotFinite { layer: 1, distance: 1, value });
        }
        assert!(matches!(
            estimator.add_window(&[1.0, f32::NAN]),
            Err(EstimateError::NotFinite { layer: 1, distance: 0, .. })
        ));
        assert_eq!(estimator.add_window(&[]), Err(EstimateError::Shape { found: 0, num_layers: 2 }));
        assert_eq!(estimator.add_window(&[1.0; 3]), Err(EstimateError::Shape { found: 3, num_layers: 2 }));
        let other = SignificanceEstimator::new(2, 4).unwrap();
        assert_eq!(estimator.merge(&other), Err(EstimateError::MergeSize { found: (2, 5), expected: (2, 4) }));
        assert_eq!(estimator, before);
    }

    #[test]
    fn refuses_impossible_sizes_and_settings() {
        for (num_layers, max_distance) in [(0, 10), (1 << 60, 10), (32, usize::MAX), (1 << 14, 1 << 14)] {
            let error = SignificanceEstimator::new(num_layers, max_distance).unwrap_err();
            assert_eq!(error, EstimateError::Size { num_layers, max_distance });
        }
        let mut estimator = SignificanceEstimator::new(1, 1).unwrap();
        assert_eq!(estimator.finish(provenance(Smoothing::default())).unwrap_err(), EstimateError::NoWindows);
        estimator.add_window(&[1.0]).unwrap();
        for bad in [-0.1, 1.5, f64::NAN] {
            let smoothing = Smoothing { max_relative_width: bad, ..Smoothing::default() };
            assert!(matches!(estimator.finish(provenance(smoothing)), Err(EstimateError::RelativeWidth { .. })));
        }
    }

    proptest! {
        #[test]
        fn order_and_division_of_windows_do_not_matter(
            windows in prop::collection::vec(prop::collection::vec(-30.0_f32..30.0, 1..60), 1..12), split in 0_usize..12,
        ) {
            let measure = |windows: &mut dyn Iterator<Item = &Vec<f32>>| {
                let mut estimator = SignificanceEstimator::new(1, 50).unwrap();
                windows.for_each(|w| estimator.add_window(w).unwrap());
                estimator
            };
            let all = measure(&mut windows.iter());
            let split = split.min(windows.len());
            let mut merged = measure(&mut windows[split..].iter().rev());
            merged.merge(&measure(&mut windows[..split].iter())).unwrap();
            prop_assert_eq!(&merged, &all);
            let (merged, all) = (table(&merged), table(&all));
            prop_assert!(merged.bias(0).iter().zip(all.bias(0)).all(|(a, b)| a.to_bits() == b.to_bits()));
            prop_assert!(all.bias(0).iter().all(|b| b.is_finite()));
        }
    }
}
