//! From what was observed to the magnitude at which a quantizer clips.

use super::histogram::{BINS, Histogram};
use crate::quantize::INT8_MAX;
use std::fmt;
use std::str::FromStr;

/// How the clipping value of a tensor is chosen.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Calibrator {
    /// The largest magnitude: nothing is clipped.
    MinMax,
    /// The mean over windows of the largest magnitude in each.
    Average,
    /// The magnitude that this percentage of values does not exceed, above 0 and up to 100.
    Percentile(f64),
    /// That which loses the least information (Migacz, "8-bit inference with TensorRT", GTC 2017).
    Entropy,
    /// That with the smallest expected squared error of 8-bit integers.
    Mse,
}

impl fmt::Display for Calibrator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::MinMax => f.write_str("minmax"),
            Self::Average => f.write_str("average"),
            Self::Percentile(percent) => write!(f, "percentile={percent}"),
            Self::Entropy => f.write_str("entropy"),
            Self::Mse => f.write_str("mse"),
        }
    }
}

/// A word that is not a calibrator.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "'{found}' is not a calibrator: expected minmax, average, percentile=P with P above 0 and up to 100, entropy or mse"
)]
pub struct CalibratorError {
    /// The word.
    found: String,
}

impl FromStr for Calibrator {
    type Err = CalibratorError;

    fn from_str(word: &str) -> Result<Self, CalibratorError> {
        let percentile = || {
            let percent = word.strip_prefix("percentile=")?.parse().ok()?;
            (percent > 0.0 && percent <= 100.0).then_some(Self::Percentile(percent))
        };
        match word {
            "minmax" => Some(Self::MinMax),
            "average" => Some(Self::Average),
            "entropy" => Some(Self::Entropy),
            "mse" => Some(Self::Mse),
            _ => percentile(),
        }
        .ok_or_else(|| CalibratorError { found: word.to_owned() })
    }
}

/// What a calibrator looks at. At least one value was counted, and the largest is not zero.
pub(super) struct Distribution<'a> {
    /// The largest magnitude.
    pub(super) absmax: f32,
    /// The mean over windows of the largest magnitude in each.
    pub(super) average: f32,
    /// All magnitudes.
    pub(super) histogram: &'a Histogram,
}

impl Calibrator {
    /// The clipping value: above 0, and not above the largest magnitude.
    pub(super) fn threshold(self, of: &Distribution<'_>) -> f32 {
        let bins = match self {
            Self::MinMax => return of.absmax,
            // The mean of what is almost zero may be zero.
            Self::Average => return if of.average > 0.0 { of.average.min(of.absmax) } else { of.absmax },
            Self::Percentile(percent) => percentile(of.histogram.counts(), percent),
            Self::Entropy => least_divergence(of.histogram.counts()),
            Self::Mse => least_squared_error(of.histogram.counts()),
        };
        ((bins * of.histogram.width()) as f32).min(of.absmax)
    }
}

/// The place in bins that `percent` of the counts lie below, which are spread evenly inside a bin.
fn percentile(counts: &[u64], percent: f64) -> f64 {
    let total: f64 = counts.iter().map(|&n| n as f64).sum();
    let rank = total * percent / 100.0;
    let mut below = 0.0;
    for (bin, n) in counts.iter().map(|&n| n as f64).enumerate() {
        if n > 0.0 && below + n >= rank {
            return bin as f64 + (rank - below) / n;
        }
        below += n;
    }
    counts.len() as f64
}

/// Levels of a quantized magnitude.
const LEVELS: usize = 128;

/// The number of bins to keep for which the distribution that saturates at their end differs least, in Kullback-Leibler
/// divergence, from itself in [`LEVELS`] levels.
///
/// The levels divide the kept bins evenly. The counts of a level are spread over those of its bins that have any; what is
/// beyond the end counts in the last bin of the distribution, and not in the levels.
fn least_divergence(counts: &[u64]) -> f64 {
    // Sums over the bins before each, so that a level takes two subtractions.
    let mut sums = vec![(0.0_f64, 0.0_f64)];
    // Of n ln n.
    let mut logs = vec![0.0];
    let mut end = 0;
    for (bin, n) in counts.iter().map(|&n| n as f64).enumerate() {
        let (mass, used) = sums[bin];
        sums.push((mass + n, used + f64::from(n > 0.0)));
        logs.push(logs[bin] + if n > 0.0 { n * n.ln() } else { 0.0 });
        if n > 0.0 {
            end = bin + 1;
        }
    }
    let total = sums[counts.len()].0;
    let divergence = |kept: usize| {
        let last = counts[kept - 1] as f64;
        if last == 0.0 {
            // The levels have nothing where all that is clipped goes.
            return f64::INFINITY;
        }
        let mass = sums[kept].0;
        let saturated = last + total - mass;
        // Sums of p ln p and of p ln q with p over the total and q over the mass still to be divided by.
        let own = logs[kept - 1] + saturated * saturated.ln();
        let levels = (0..LEVELS).map(|level| {
            let (from, to) = (level * kept / LEVELS, (level + 1) * kept / LEVELS);
            let ((mass, used), (mass_to, used_to)) = (sums[from], sums[to]);
            let (mass, used) = (mass_to - mass, used_to - used);
            let clipped = if to == kept { total - sums[kept].0 } else { 0.0 };
            if mass > 0.0 { (mass + clipped) * (mass / used).ln() } else { 0.0 }
        });
        (own - levels.sum::<f64>()) / total - (total / mass).ln()
    };
    // From the widest on, so that of equally good ones the one that clips least wins.
    let candidates = (LEVELS..=end).rev().map(|kept| (kept, divergence(kept)));
    let best = candidates.reduce(|best, next| if next.1 < best.1 { next } else { best });
    best.map_or(end, |(kept, _)| kept) as f64
}

/// Every how many bins a clipping value is tried: a 128th of the range at most, which changes the error by little.
const MSE_STEP: usize = 8;

/// The clipping value in bins at which 8-bit integers have the smallest squared error, if values are spread evenly inside a
/// bin.
fn least_squared_error(counts: &[u64]) -> f64 {
    let end = counts.iter().rposition(|&n| n > 0).map_or(1, |bin| bin + 1);
    let error = |clip: f64| {
        let step = clip / f64::from(INT8_MAX);
        // The integral of the squared error of rounding from 0 on, in steps: a twelfth for every whole one.
        let rounding = |x: f64| {
            let whole = (x / step).round();
            (whole / 12.0 + (x / step - whole).powi(3) / 3.0) * step.powi(3)
        };
        let clipping = |x: f64| (x - clip).powi(3) / 3.0;
        let mut before = 0.0;
        let mut sum = 0.0;
        for (bin, &n) in counts[..end].iter().enumerate() {
            let upper = (bin + 1) as f64;
            let integral = if upper <= clip { rounding(upper) } else { rounding(clip) + clipping(upper) };
            sum += n as f64 * (integral - before);
            before = integral;
        }
        sum
    };
    let candidates = (1..=end.div_ceil(MSE_STEP)).rev().map(|i| ((i * MSE_STEP).min(end)) as f64);
    let best =
        candidates.map(|clip| (clip, error(clip))).reduce(|best, next| if next.1 < best.1 { next } else { best });
    best.map_or(BINS as f64, |(clip, _)| clip)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use rand_chacha::ChaCha8Rng;
    use rand_chacha::rand_core::{RngCore, SeedableRng};

    const ALL: [Calibrator; 5] =
        [Calibrator::MinMax, Calibrator::Average, Calibrator::Percentile(99.9), Calibrator::Entropy, Calibrator::Mse];

    /// Magnitudes of a normal distribution (Box and Muller).
    fn normal(count: usize) -> Vec<f32> {
        let mut rng = ChaCha8Rng::seed_from_u64(7);
        let mut uniform = || (f64::from(rng.next_u32()) + 1.0) / 4_294_967_297.0;
        let mut one = || (-2.0 * uniform().ln()).sqrt() * (std::f64::consts::TAU * uniform()).cos();
        (0..count).map(|_| one() as f32).collect()
    }

    fn threshold(calibrator: Calibrator, values: &[f32]) -> f32 {
        let absmax = values.iter().fold(0.0, |max: f32, x| max.max(x.abs()));
        let mut histogram = Histogram::default();
        histogram.count(values, absmax);
        calibrator.threshold(&Distribution { absmax, average: 0.75 * absmax, histogram: &histogram })
    }

    /// The mean squared error of 8-bit integers that clip at `clip`, value by value.
    fn squared_error(values: &[f32], clip: f32) -> f64 {
        let scale = clip / 127.0;
        let errors = values.iter().map(|x| f64::from((x / scale).round().clamp(-127.0, 127.0) * scale - x));
        errors.map(|e| e * e).sum::<f64>() / values.len() as f64
    }

    #[test]
    fn words_and_back() {
        for calibrator in ALL {
            assert_eq!(calibrator.to_string().parse(), Ok(calibrator));
        }
        for word in ["", "Mse", "percentile", "percentile=", "percentile=0", "percentile=100.1", "percentile=NaN"] {
            let message = word.parse::<Calibrator>().unwrap_err().to_string();
            assert!(message.starts_with(&format!("'{word}' is not a calibrator")), "{message}");
        }
    }

    #[test]
    fn a_clipping_value_is_inside_the_range() {
        for values in [vec![1e-30], vec![f32::from_bits(1)], vec![f32::MAX; 3], vec![0.0, 0.0, 5.0], normal(1000)] {
            let absmax = threshold(Calibrator::MinMax, &values);
            for calibrator in ALL {
                let found = threshold(calibrator, &values);
                assert!(found > 0.0 && found <= absmax, "{calibrator} of {values:?}: {found}");
            }
        }
    }

    #[test]
    fn percentiles_of_an_even_distribution_are_its_places() {
        let values: Vec<f32> = (0..100_000).map(|i| i as f32 / 100_000.0).collect();
        for percent in [0.1, 10.0, 50.0, 99.0, 99.99, 100.0] {
            let found = f64::from(threshold(Calibrator::Percentile(percent), &values));
            assert!((found - percent / 100.0).abs() < 2e-5, "{percent}: {found}");
        }
    }

    #[test]
    fn mse_is_the_best_of_all_clipping_values() {
        // One is so far away that clipping it pays.
        let values: Vec<f32> = (0..200_000).map(|i| i as f32 / 200_000.0).chain([4.0]).collect();
        let largest = threshold(Calibrator::MinMax, &values);
        let found = threshold(Calibrator::Mse, &values);
        let best = (1..=200).map(|i| squared_error(&values, largest * i as f32 / 200.0)).fold(f64::INFINITY, f64::min);
        assert!(squared_error(&values, found) < 1.01 * best);
        assert!(squared_error(&values, largest) > 1.2 * best, "the case does not ask for clipping");
    }

    /// The divergence as it is published, step by step.
    fn divergence(counts: &[u64], kept: usize) -> f64 {
        let mut p: Vec<f64> = counts[..kept].iter().map(|&n| n as f64).collect();
        let mut q = vec![0.0; kept];
        for level in 0..LEVELS {
            let bins = level * kept / LEVELS..(level + 1) * kept / LEVELS;
            let used = p[bins.clone()].iter().filter(|&&n| n > 0.0).count() as f64;
            let mean = p[bins.clone()].iter().sum::<f64>() / used;
            for bin in bins.filter(|&bin| p[bin] > 0.0) {
                q[bin] = mean;
            }
        }
        p[kept - 1] += counts[kept..].iter().sum::<u64>() as f64;
        let (p_sum, q_sum): (f64, f64) = (p.iter().sum(), q.iter().sum());
        let terms = p.iter().zip(&q).filter(|(p, _)| **p > 0.0);
        terms.map(|(p, q)| p / p_sum * (p / p_sum / (q / q_sum)).ln()).sum()
    }

    #[test]
    fn entropy_is_the_least_divergence() {
        let mut values = normal(5_000);
        values.extend([9.0, 11.0, 20.0]);
        let mut histogram = Histogram::default();
        histogram.count(&values, 20.0);
        let counts = histogram.counts();
        let found = least_divergence(counts) as usize;
        let all = (LEVELS..=BINS).filter(|&kept| counts[kept - 1] > 0).map(|kept| divergence(counts, kept));
        let least = all.fold(f64::INFINITY, f64::min);
        assert!((divergence(counts, found) - least).abs() < 1e-9, "{found}");
        let clip = threshold(Calibrator::Entropy, &values);
        assert!((2.0..9.0).contains(&clip), "{clip}");
    }
}
