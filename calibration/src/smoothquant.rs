//! `SmoothQuant` (Xiao et al., "`SmoothQuant`: Accurate and Efficient Post-Training Quantization for Large Language Models",
//! ICML 2023): channels of activations that are hard to quantize are made smaller, and the columns of the weights larger.
//!
//! With `s_j = max|x_j|^alpha / max|w_j|^(1 - alpha)` over channels `j`, `(x / s) (W s)^T = x W^T`. Activations have one scale
//! for all, so that a few large channels leave few levels for the others; weights have a scale for every row. This module
//! speaks of factors, `1 / s`: activations are multiplied by them and weights divided.

use crate::quantize::{INT8_MAX, QuantizeError, quantize_rows_int8};
use crate::ranges::{Calibrator, Site};
use ndarray::{Array2, ArrayView1, ArrayView2, Axis};
use std::sync::Mutex;
use std::thread;

/// Exponents that are tried.
const ALPHAS: [f64; 11] = [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0];

/// Factors are not beyond this or below its inverse, so that a channel that is almost never used does not become one with
/// weights beyond all others.
const LARGEST_FACTOR: f64 = 1e5;

/// Rows of a matrix that are quantized at a time: what is copied stays in the processor's cache.
const ROWS: usize = 128;

/// What is done to the input of linear layers before it is quantized to 8 bits.
#[derive(Debug, Clone, PartialEq)]
pub struct Smoothed {
    /// The exponent, none where nothing is better than any.
    pub alpha: Option<f64>,
    /// What channels are multiplied by: all 1 where there is no exponent.
    pub factors: Vec<f32>,
    /// The magnitude at which the quantizer of the smoothed input clips.
    pub threshold: f32,
    /// Squared error of the layers' outputs over the rows that the site kept, relative to the square of the outputs: the sum over layers.
    pub error: f64,
    /// The same without smoothing.
    pub unsmoothed_error: f64,
}

/// The factors of activations whose channels have the largest magnitudes `x`, and whose weights have in their columns the
/// largest magnitudes `w`. A channel that is zero on one side keeps the factor 1.
///
/// # Panics
///
/// The two are not of equal length.
pub fn factors(x: &[f32], w: &[f32], alpha: f64) -> Vec<f32> {
    assert_eq!(x.len(), w.len(), "channels of activations and of weights");
    let factor = |(&x, &w): (&f32, &f32)| {
        if x > 0.0 && w > 0.0 {
            let factor = f64::from(w).powf(1.0 - alpha) / f64::from(x).powf(alpha);
            factor.clamp(LARGEST_FACTOR.recip(), LARGEST_FACTOR) as f32
        } else {
            1.0
        }
    };
    x.iter().zip(w).map(factor).collect()
}

/// The largest magnitude in each column of `matrices`, which are `[out, columns]`.
pub fn column_absmax(matrices: &[&[f32]], columns: usize) -> Vec<f32> {
    let mut largest = vec![0.0_f32; columns];
    for row in matrices.iter().flat_map(|matrix| matrix.chunks_exact(columns)) {
        largest.iter_mut().zip(row).for_each(|(max, w)| *max = max.max(w.abs()));
    }
    largest
}

/// The exponent, or none, with which the sample and the extreme rows of `site`, [weighted](Site::row_weights), come out best
/// of the layers with the given `matrices`
/// (`[out, channels]` each: all that are multiplied by these rows), if both are quantized to 8 bits: activations with one
/// scale that `calibrator` finds, weights with a scale for every row.
///
/// # Errors
///
/// A matrix is not of rows of as many columns as the site has channels, or not finite.
pub fn search(site: &Site, matrices: &[&[f32]], calibrator: Calibrator) -> Result<Smoothed, QuantizeError> {
    let columns = site.channels();
    let largest_w = column_absmax(matrices, columns);
    let largest_x = site.channel_absmax();
    let unsmoothed = Candidate::new(site, None, vec![1.0; columns], site.threshold(calibrator));
    let smoothed = ALPHAS.map(|alpha| {
        let factors = factors(&largest_x, &largest_w, alpha);
        let threshold = site.smoothed_threshold(&factors, calibrator);
        Candidate::new(site, Some(alpha), factors, threshold)
    });
    let candidates: Vec<Candidate> = [unsmoothed].into_iter().chain(smoothed).collect();

    let mut errors = vec![0.0_f64; candidates.len()];
    for matrix in matrices {
        let (squares, of_candidates) = squared_errors(site, matrix, &candidates)?;
        for (sum, error) in errors.iter_mut().zip(of_candidates) {
            *sum += if squares > 0.0 { error / squares } else { 0.0 };
        }
    }
    let unsmoothed_error = errors[0];
    let best = candidates.into_iter().zip(errors).reduce(|best, next| if next.1 < best.1 { next } else { best });
    let (Candidate { alpha, factors, threshold, .. }, error) = best.unwrap_or_default();
    Ok(Smoothed { alpha, factors, threshold, error, unsmoothed_error })
}

/// One way to smooth.
#[derive(Default)]
struct Candidate {
    alpha: Option<f64>,
    factors: Vec<f32>,
    threshold: f32,
    /// The rows: smoothed and rounded to multiples of the scale.
    rows: Vec<f32>,
}

impl Candidate {
    fn new(site: &Site, alpha: Option<f64>, factors: Vec<f32>, threshold: f32) -> Self {
        let scale = threshold / INT8_MAX;
        let quantized = |(x, f): (&f32, &f32)| (x * f / scale).round_ties_even().clamp(-INT8_MAX, INT8_MAX) * scale;
        let rows = kept_rows(site).iter().zip(factors.iter().cycle()).map(quantized).collect();
        Self { alpha, factors, threshold, rows }
    }
}

/// The rows of a site that errors are measured with.
pub(crate) fn kept_rows(site: &Site) -> Vec<f32> {
    [site.sample(), site.extremes()].concat()
}

/// The squares of the outputs of a site's rows with `matrix`, and of the errors that each candidate makes.
fn squared_errors(site: &Site, matrix: &[f32], candidates: &[Candidate]) -> Result<(f64, Vec<f64>), QuantizeError> {
    let columns = site.channels();
    let (whole, found) = (matrix.len() / columns, matrix.len());
    if found == 0 || whole * columns != found {
        return Err(QuantizeError::Shape { elements: found, columns, block: columns });
    }
    let x = kept_rows(site);
    let (of_sample, of_extremes) = site.row_weights();
    let mut weights = vec![of_sample as f64; site.sample().len() / columns];
    weights.resize(x.len() / columns, of_extremes as f64);
    let parts: Vec<&[f32]> = matrix.chunks(ROWS * columns).collect();
    let results = Mutex::new(vec![Ok((0.0, Vec::new())); parts.len()]);
    let next = Mutex::new(parts.iter().enumerate());
    let step = || {
        while let Some((at, part)) = next.lock().ok().and_then(|mut next| next.next()) {
            let result = part_errors(&x, &weights, part, columns, candidates).map_err(|error| match error {
                QuantizeError::NotFinite { row, column, value } => {
                    QuantizeError::NotFinite { row: row + at * ROWS, column, value }
                }
                other => other,
            });
            if let Ok(mut results) = results.lock() {
                results[at] = result;
            }
        }
    };
    thread::scope(|scope| {
        (1..thread::available_parallelism().map_or(1, usize::from)).for_each(|_| drop(scope.spawn(step)));
        step();
    });
    // Added in the order of the rows, whichever thread was first.
    let mut sums = (0.0, vec![0.0; candidates.len()]);
    for part in results.into_inner().unwrap_or_default() {
        let (squares, errors) = part?;
        sums.0 += squares;
        sums.1.iter_mut().zip(errors).for_each(|(sum, error)| *sum += error);
    }
    Ok(sums)
}

/// [`squared_errors`] of the rows `x` and some rows of a matrix.
fn part_errors(
    x: &[f32],
    weights: &[f64],
    part: &[f32],
    columns: usize,
    candidates: &[Candidate],
) -> Result<(f64, Vec<f64>), QuantizeError> {
    let expected = product(x, part, columns)?;
    let squares = weighted(&expected, weights);
    let mut smoothed = part.to_vec();
    let mut errors = Vec::with_capacity(candidates.len());
    for candidate in candidates {
        for (row, original) in smoothed.chunks_exact_mut(columns).zip(part.chunks_exact(columns)) {
            for ((w, original), factor) in row.iter_mut().zip(original).zip(&candidate.factors) {
                *w = original / factor;
            }
        }
        let (integers, scales) = quantize_rows_int8(&smoothed, columns)?;
        smoothed.iter_mut().zip(&integers).for_each(|(w, &q)| *w = f32::from(q));
        let mut found = product(&candidate.rows, &smoothed, columns)?;
        for (mut column, scale) in found.axis_iter_mut(Axis(1)).zip(scales) {
            column *= scale;
        }
        found -= &expected;
        errors.push(weighted(&found, weights));
    }
    Ok((squares, errors))
}

/// The sum of the squares of all rows, each as often as it counts.
fn weighted(rows: &Array2<f32>, weights: &[f64]) -> f64 {
    let squares = |row: ArrayView1<'_, f32>| row.iter().map(|&y| f64::from(y).powi(2)).sum::<f64>();
    rows.rows().into_iter().zip(weights).map(|(row, weight)| squares(row) * weight).sum()
}

/// `x w^T` of rows of `columns`.
pub(crate) fn product(x: &[f32], w: &[f32], columns: usize) -> Result<Array2<f32>, QuantizeError> {
    Ok(rows(x, columns)?.dot(&rows(w, columns)?.t()))
}

fn rows(values: &[f32], columns: usize) -> Result<ArrayView2<'_, f32>, QuantizeError> {
    let shape = QuantizeError::Shape { elements: values.len(), columns, block: columns };
    ArrayView2::from_shape((values.len() / columns, columns), values).map_err(|_| shape)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::ranges::{ModelIdentity, Observation, RangeEstimator, RangeTable, SiteLayout};
    use rand_chacha::ChaCha8Rng;
    use rand_chacha::rand_core::{RngCore, SeedableRng};

    const CHANNELS: usize = 48;

    fn noise(seed: u64, count: usize) -> Vec<f32> {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        (0..count).map(|_| rng.next_u32() as f32 / 2_f32.powi(31) - 1.0).collect()
    }

    /// A site whose channel 5 is as many times as large as the others.
    fn table(times: f32) -> RangeTable {
        let mut rows = noise(1, 200 * CHANNELS);
        rows.iter_mut().skip(5).step_by(CHANNELS).for_each(|x| *x *= times);
        let layout = SiteLayout { weights: vec!["w".into()], channels: CHANNELS };
        let mut estimator = RangeEstimator::new(vec![layout], vec![]).unwrap();
        estimator.begin_window("text", 0).unwrap();
        estimator.observe(&[Observation::Rows(0, &rows)]).unwrap();
        let model = ModelIdentity { fingerprint: String::new(), rope: String::new() };
        estimator.finish(model, String::new(), 200, String::new()).unwrap()
    }

    #[test]
    fn factors_are_the_papers() {
        assert_eq!(factors(&[4.0, 1.0], &[1.0, 9.0], 0.5), [0.5, 3.0]);
        assert_eq!(factors(&[4.0, 0.5], &[3.0, 9.0], 1.0), [0.25, 2.0]);
        assert_eq!(factors(&[4.0, 0.5], &[3.0, 9.0], 0.0), [3.0, 9.0]);
        assert_eq!(factors(&[0.0, 2.0], &[3.0, 0.0], 0.5), [1.0, 1.0]);
        assert_eq!(factors(&[1e30], &[1e-30], 0.5), [1e-5]);
        assert_eq!(column_absmax(&[&[1.0, -2.0, 0.5, 1.0], &[-3.0, 0.0]], 2), [3.0, 2.0]);
    }

    #[test]
    fn an_outlier_channel_is_smoothed_away() {
        let table = table(100.0);
        let matrices = [noise(2, 200 * CHANNELS), noise(3, 7 * CHANNELS)];
        let matrices = [&matrices[0][..], &matrices[1][..]];
        let found = search(&table.sites()[0], &matrices, Calibrator::MinMax).unwrap();
        assert!(found.alpha.is_some_and(|alpha| alpha > 0.1), "{found:?}");
        assert!(found.factors[5] < 0.5 * found.factors[4]);
        assert!(found.error < 0.1 * found.unsmoothed_error, "{} of {}", found.error, found.unsmoothed_error);
        // What is claimed is what comes out.
        let site = &table.sites()[0];
        let again = Candidate::new(site, found.alpha, found.factors.clone(), found.threshold);
        let errors = matrices.map(|matrix| {
            let (squares, errors) = squared_errors(site, matrix, std::slice::from_ref(&again)).unwrap();
            errors[0] / squares
        });
        assert!((errors.iter().sum::<f64>() - found.error).abs() < 1e-12);
    }

    /// The error of one output, number by number.
    #[test]
    fn errors_are_those_of_integers() {
        let table = table(3.0);
        let site = &table.sites()[0];
        let matrix = noise(4, 2 * ROWS * CHANNELS);
        let factors: Vec<f32> = (0..CHANNELS).map(|i| 0.5 + i as f32 / 20.0).collect();
        let candidate = Candidate::new(site, None, factors.clone(), 1.5);
        let (_, errors) = squared_errors(site, &matrix, &[candidate]).unwrap();
        let mut expected = 0.0;
        for row in matrix.chunks(CHANNELS) {
            let divided: Vec<f32> = row.iter().zip(&factors).map(|(w, f)| w / f).collect();
            let w_scale = divided.iter().fold(0.0, |max: f32, w| max.max(w.abs())) / 127.0;
            let (of_sample, of_extremes) = site.row_weights();
            let sample = site.sample().chunks(CHANNELS).map(|row| (row, of_sample));
            for (x, weight) in sample.chain(site.extremes().chunks(CHANNELS).map(|row| (row, of_extremes))) {
                let exact: f64 = x.iter().zip(row).map(|(x, w)| f64::from(x * w)).sum();
                let integers = x.iter().zip(&factors).zip(&divided).map(|((x, f), w)| {
                    let x = (f64::from(x * f) * 127.0 / 1.5).round().clamp(-127.0, 127.0);
                    x * f64::from(w / w_scale).round()
                });
                let found = integers.sum::<f64>() * f64::from(w_scale) * 1.5 / 127.0;
                expected += weight as f64 * (found - exact).powi(2);
            }
        }
        assert!((errors[0] - expected).abs() < 0.01 * expected, "{} instead of {expected}", errors[0]);
    }

    #[test]
    fn bad_matrices_are_named() {
        let table = table(1.0);
        let mut matrix = noise(2, 2 * ROWS * CHANNELS);
        matrix[(ROWS + 3) * CHANNELS + 7] = f32::NAN;
        let error = search(&table.sites()[0], &[&matrix], Calibrator::MinMax).unwrap_err();
        assert!(matches!(error, QuantizeError::NotFinite { row, column: 7, .. } if row == ROWS + 3), "{error}");
        let error = search(&table.sites()[0], &[&matrix[1..]], Calibrator::MinMax).unwrap_err();
        assert!(matches!(error, QuantizeError::Shape { .. }), "{error}");
    }
}
