//! From noisy means per distance to a row of the table.

use serde::{Deserialize, Serialize};
use std::ops::RangeInclusive;

/// How a row is smoothed over distance.
///
/// Every entry beyond `exact_distances` is the value at its distance `t` of a straight line fitted to the
/// neighbouring distances `t-h ..= t+h` (as far as they were measured), each weighted by its number of samples. `h` is
/// the smallest half-width that gathers `min_samples` samples, so plenty of windows mean no smoothing at all, but never
/// more than `max_relative_width * t`: the logits fall steeply near the last token and flatten further away, so what may
/// be averaged grows with distance. A fitted line, unlike an average, keeps linear trends exactly, also at the end of
/// the measured range where the neighbours lie on one side only.
///
/// Beyond the measured range the row continues with its last value: a trend taken from noise would run away over
/// thousands of positions.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Smoothing {
    /// Samples behind each smoothed entry, if the width limit allows. The standard error of an entry is about the
    /// deviation of the layer's scores over the square root of this.
    pub min_samples: u64,
    /// Distances `0 ..= exact_distances` stay as measured.
    pub exact_distances: usize,
    /// Largest half-width, as a fraction of the distance.
    pub max_relative_width: f64,
}

impl Default for Smoothing {
    fn default() -> Self {
        Self { min_samples: 512, exact_distances: 16, max_relative_width: 0.125 }
    }
}

impl Smoothing {
    /// The measured distances each entry is fitted to; `counts` are the samples per distance, not increasing, the
    /// first of them positive.
    pub(super) fn supports(&self, counts: &[u64]) -> Vec<RangeInclusive<usize>> {
        let last = counts.partition_point(|&n| n > 0).saturating_sub(1);
        let mut before = vec![0_u64; last + 2];
        for distance in 0..=last {
            before[distance + 1] = before[distance].saturating_add(counts[distance]);
        }
        let around = |distance: usize, half: usize| distance - half..=(distance + half).min(last);
        let samples = |range: &RangeInclusive<usize>| before[range.end() + 1] - before[*range.start()];
        let support = |distance: usize| {
            if distance <= self.exact_distances {
                return around(distance, 0);
            }
            let widest = ((distance as f64 * self.max_relative_width) as usize).min(distance);
            (0..widest)
                .map(|half| around(distance, half))
                .find(|range| samples(range) >= self.min_samples)
                .unwrap_or_else(|| around(distance, widest))
        };
        (0..=last).map(support).collect()
    }
}

/// The weighted least-squares line through the points `support` (abscissa: distance, ordinate: `sums / counts`, weight:
/// `counts`), evaluated at `at`. A single point is its own line.
pub(super) fn fit_at(at: usize, support: RangeInclusive<usize>, counts: &[u64], sums: &[f64]) -> f64 {
    let [mut weight, mut weight_x, mut weight_xx, mut sum, mut sum_x] = [0.0_f64; 5];
    for i in support {
        // Abscissas relative to `at` stay small, and the line's value there is its intercept.
        let x = i as f64 - at as f64;
        let n = counts[i] as f64;
        weight += n;
        weight_x += n * x;
        weight_xx += n * x * x;
        sum += sums[i];
        sum_x += sums[i] * x;
    }
    let determinant = weight * weight_xx - weight_x * weight_x;
    if determinant > 0.0 { (weight_xx * sum - weight_x * sum_x) / determinant } else { sum / weight }
}

#[cfg(test)]
mod tests {
    use super::*;
    use approx::assert_abs_diff_eq;
    use proptest::prelude::*;

    #[test]
    fn plenty_of_samples_means_no_smoothing() {
        let supports = Smoothing::default().supports(&[512; 300]);
        assert!(supports.iter().enumerate().all(|(i, s)| *s == (i..=i)));
    }

    #[test]
    fn width_follows_samples_and_distance() {
        let supports =
            Smoothing { min_samples: 90, exact_distances: 16, max_relative_width: 0.125 }.supports(&[10; 200]);
        assert_eq!(supports[16], 16..=16, "exact");
        assert_eq!(supports[17], 15..=19, "limited by the distance");
        assert_eq!(supports[100], 96..=104, "nine distances of ten samples");
        assert_eq!(supports[199], 191..=199, "at the end the neighbours lie on one side");
    }

    #[test]
    fn unmeasured_distances_support_nothing() {
        let mut counts = vec![1; 100];
        counts.extend([0; 50]);
        let supports = Smoothing::default().supports(&counts);
        assert_eq!(supports.len(), 100);
        assert_eq!(supports[99], 87..=99);
    }

    proptest! {
        #[test]
        fn lines_are_kept_whatever_the_counts(
            mut counts in prop::collection::vec(1_u64..40, 1..400), a in -20.0..20.0_f64, b in -0.1..0.1_f64,
        ) {
            counts.sort_unstable_by(|x, y| y.cmp(x));
            let value = |i: usize| a + b * i as f64;
            let sums: Vec<f64> = counts.iter().enumerate().map(|(i, &n)| n as f64 * value(i)).collect();
            for (i, support) in Smoothing::default().supports(&counts).into_iter().enumerate() {
                assert_abs_diff_eq!(fit_at(i, support, &counts, &sums), value(i), epsilon = 1e-9);
            }
        }
    }
}
