//! How much a linear layer loses when it alone is quantized: the measure by which layers are kept as they are.
//!
//! The rows that decide are few. In many models the first token of a text has a few channels that are thousands of times
//! larger than all others, and is attended to by every other token: its errors are everybody's, and an average over rows does
//! not show them. What counts here is the row that comes out worst.

use crate::quantize::{INT8_MAX, QuantizeError, quantize_rows_int8};
use crate::ranges::Site;
use crate::smoothquant::{kept_rows, product};
use ndarray::Axis;

/// How activations are rounded to 8 bits.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Rounding {
    /// All rows to multiples of one number, clipped at this magnitude.
    PerTensor(f32),
    /// Each row to multiples of the 127th part of its largest magnitude.
    PerRow,
}

/// The largest squared error of a row that `site` kept, relative to the square of the row as it should be, after `matrix`
/// `[out, channels]` and the rows are quantized: rows multiplied by `factors` first, columns of the matrix divided by them.
///
/// # Errors
///
/// The matrix is not of rows of as many columns as the site has channels, or not finite.
pub fn worst_row(
    site: &Site,
    matrix: &[f32],
    factors: Option<&[f32]>,
    rounding: Rounding,
) -> Result<f64, QuantizeError> {
    let columns = site.channels();
    let x = kept_rows(site);
    let expected = product(&x, matrix, columns)?;
    let ones = vec![1.0; columns];
    let factors = factors.unwrap_or(&ones);
    let divided: Vec<f32> = matrix.iter().zip(factors.iter().cycle()).map(|(w, factor)| w / factor).collect();
    let (integers, scales) = quantize_rows_int8(&divided, columns)?;
    let integers: Vec<f32> = integers.into_iter().map(f32::from).collect();
    let mut rounded: Vec<f32> = x.iter().zip(factors.iter().cycle()).map(|(x, factor)| x * factor).collect();
    for row in rounded.chunks_exact_mut(columns) {
        let largest = match rounding {
            Rounding::PerTensor(threshold) => threshold,
            Rounding::PerRow => row.iter().fold(0.0, |max, x| x.abs().max(max)),
        };
        if largest > 0.0 {
            let scale = largest / INT8_MAX;
            for x in row {
                *x = (*x / scale).round_ties_even().clamp(-INT8_MAX, INT8_MAX) * scale;
            }
        }
    }
    let mut found = product(&rounded, &integers, columns)?;
    for (mut column, scale) in found.axis_iter_mut(Axis(1)).zip(scales) {
        column *= scale;
    }
    found -= &expected;
    let errors = found.rows().into_iter().zip(expected.rows()).map(|(error, expected)| {
        let [error, whole] = [error, expected].map(|row| row.iter().map(|&y| f64::from(y).powi(2)).sum::<f64>());
        if whole > 0.0 { error / whole } else { 0.0 }
    });
    Ok(errors.fold(0.0, f64::max))
}
