//! Student's t distribution, for confidence intervals of means of few samples.

use std::f64::consts::FRAC_PI_2;

/// The probability that a value of `freedom` degrees of freedom lies between `-t` and `t`, where `angle` is
/// `atan(t / sqrt(freedom))`: the finite sums for whole degrees of freedom, Abramowitz and Stegun 26.7.3 and 26.7.4.
fn between(angle: f64, freedom: usize) -> f64 {
    let (sin, cos) = angle.sin_cos();
    let odd = freedom % 2;
    let (mut term, mut sum) = (if odd == 1 { cos } else { 1.0 }, 0.0);
    let mut power = odd;
    while power + 2 <= freedom {
        sum += term;
        let next = (power + 1) as f64;
        term *= cos * cos * next / (next + 1.0);
        power += 2;
    }
    if odd == 1 { (angle + sin * sum) / FRAC_PI_2 } else { sin * sum }
}

/// The `t` that a value of `freedom` (at least 1) degrees of freedom stays below, in magnitude, with probability
/// `confidence`.
pub(super) fn quantile(confidence: f64, freedom: usize) -> f64 {
    let freedom = freedom.max(1);
    let (mut low, mut high) = (0.0, FRAC_PI_2);
    // Each step halves the interval: these exhaust the precision of the number.
    for _ in 0..60 {
        let middle = f64::midpoint(low, high);
        if between(middle, freedom) < confidence { low = middle } else { high = middle }
    }
    low.tan() * (freedom as f64).sqrt()
}

#[cfg(test)]
mod tests {
    use super::*;
    use approx::assert_relative_eq;

    #[test]
    fn quantiles_are_those_of_the_tables() {
        for (confidence, freedom, expected) in [
            (0.95, 1, 12.7062),
            (0.95, 2, 4.3027),
            (0.95, 3, 3.1824),
            (0.95, 9, 2.2622),
            (0.95, 30, 2.0423),
            (0.95, 100, 1.9840),
            (0.99, 3, 5.8409),
            (0.99, 9, 3.2498),
            (0.99, 10, 3.1693),
        ] {
            assert_relative_eq!(quantile(confidence, freedom), expected, max_relative = 2e-5);
        }
    }
}
