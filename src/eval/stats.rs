//! Confidence intervals. All of them are at 95 %.

use serde::{Deserialize, Serialize};

/// The 97.5th percentile of the normal distribution.
const Z: f64 = 1.959_963_984_540_054;

/// The 97.5th percentile of Student's t distribution for 1, 2, ... degrees of freedom.
const T: [f64; 30] = [
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120,
    2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
];

/// A range that holds the true value in 95 of 100 repetitions.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Interval {
    /// Lower end.
    pub low: f64,
    /// Upper end.
    pub high: f64,
}

/// A mean over independent samples.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Mean {
    /// Samples.
    pub n: usize,
    /// Arithmetic mean.
    pub mean: f64,
    /// Student's interval; a single sample has none.
    pub interval: Option<Interval>,
}

/// Wilson's score interval of the share `hits` of `n` tries (Wilson, 1927). Unlike the normal approximation it stays within
/// 0 and 1, and says something where all or none were hit. `None` without a try.
pub fn wilson(hits: usize, n: usize) -> Option<Interval> {
    if n == 0 {
        return None;
    }
    let (share, n) = (hits as f64 / n as f64, n as f64);
    let z2 = Z * Z;
    let centre = (share + z2 / (2.0 * n)) / (1.0 + z2 / n);
    let half = Z / (1.0 + z2 / n) * (share * (1.0 - share) / n + z2 / (4.0 * n * n)).sqrt();
    Some(Interval { low: (centre - half).max(0.0), high: (centre + half).min(1.0) })
}

/// Mean of `samples`; `None` if there are none.
pub fn mean(samples: &[f64]) -> Option<Mean> {
    let n = samples.len();
    if n == 0 {
        return None;
    }
    let mean = samples.iter().sum::<f64>() / n as f64;
    let interval = (n > 1).then(|| {
        let variance = samples.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / (n - 1) as f64;
        let half = T.get(n - 2).copied().unwrap_or(Z) * (variance / n as f64).sqrt();
        Interval { low: mean - half, high: mean + half }
    });
    Some(Mean { n, mean, interval })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use approx::assert_relative_eq;

    #[test]
    fn wilson_by_hand() {
        // The textbook's 95 % intervals of 0/10, 10/10 and 5/10.
        for (hits, low, high) in [(0, 0.0, 0.2775), (10, 0.7225, 1.0), (5, 0.2366, 0.7634)] {
            let interval = wilson(hits, 10).unwrap();
            assert_relative_eq!(interval.low, low, epsilon = 1e-4);
            assert_relative_eq!(interval.high, high, epsilon = 1e-4);
        }
        assert_eq!(wilson(0, 0), None);
    }

    #[test]
    fn means_by_hand() {
        // Deviation of 1, 2, 3 is 1: half of the interval is 4.303 / sqrt(3).
        let mean = mean(&[1.0, 2.0, 3.0]).unwrap();
        assert_relative_eq!(mean.mean, 2.0);
        let interval = mean.interval.unwrap();
        assert_relative_eq!(interval.high - 2.0, 4.303 / 3.0_f64.sqrt(), epsilon = 1e-12);
        assert_relative_eq!(2.0 - interval.low, 4.303 / 3.0_f64.sqrt(), epsilon = 1e-12);
    }

    #[test]
    fn one_sample_has_no_interval_and_many_are_normal() {
        assert_eq!(mean(&[4.0]), Some(Mean { n: 1, mean: 4.0, interval: None }));
        assert_eq!(mean(&[]), None);
        let many: Vec<f64> = (0..100).map(|i| f64::from(i % 2)).collect();
        let interval = mean(&many).unwrap().interval.unwrap();
        assert_relative_eq!(interval.high - 0.5, Z * (0.25 / 99.0_f64).sqrt(), epsilon = 1e-12);
    }
}
