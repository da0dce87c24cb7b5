//! Linear layers over integers and 8-bit floats, computed with real numbers: what an activation is rounded to, and how far
//! another computation may round it otherwise.
//!
//! After Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference", 2018
//! (simulated quantization), symmetric, without zero points; the factors are the reciprocals of those of Xiao et al.,
//! "SmoothQuant", 2023.

use super::{ReferenceError, Result};
use crate::tensor::Tensor;
use ndarray::{Array1, Array2, ArrayViewMut1};

/// A tensor of the model and, if it is a matrix of linear layers, what becomes of the rows that are multiplied by it.
#[derive(Debug, Clone)]
pub struct Weight {
    /// Its numbers, of any float type; of a quantized matrix those that its entries stand for.
    pub tensor: Tensor,
    /// What rows are rounded to first; `None` where they stay as they are.
    pub rounding: Option<Rounding>,
}

impl From<Tensor> for Weight {
    fn from(tensor: Tensor) -> Self {
        Self { tensor, rounding: None }
    }
}

/// What rows become before a matrix multiplies them.
#[derive(Debug, Clone, PartialEq)]
pub struct Rounding {
    /// What every column is multiplied by first.
    pub factors: Option<Vec<f32>>,
    /// What the products are rounded to.
    pub numbers: Numbers,
}

/// Numbers that can be told apart.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Numbers {
    /// Multiples of this, from -128 to 127 times.
    Int8(f32),
    /// Multiples of the 127th part of the row's largest magnitude.
    Int8PerRow,
    /// Floats of 4 bits of exponent and 3 of mantissa up to 448, times this.
    Float8(f32),
}

/// How far two computations in single precision may see the same activation, as a share of it: a few roundings.
const FLOAT_ROUNDING: f32 = 4.0 * f32::EPSILON;

/// The largest 8-bit float with 3 bits of mantissa, and the exponent of the smallest that has all of them.
const LARGEST_FLOAT8: f32 = 448.0;
const SMALLEST_EXPONENT: i32 = -6;
const MANTISSA_BITS: i32 = 3;

impl Rounding {
    /// Checks the rounding of rows of `columns` entries, which the matrix called `name` multiplies.
    pub(super) fn check(&self, name: &str, columns: usize) -> Result<()> {
        let wrong = |what, found: String| Err(ReferenceError::Rounding { name: name.to_owned(), what, found });
        match &self.factors {
            Some(factors) if factors.len() != columns => return wrong("factors", format!("{} of them", factors.len())),
            Some(factors) => {
                if let Some(factor) = factors.iter().find(|factor| !usable(**factor)) {
                    return wrong("factors", format!("{factor} among them"));
                }
            }
            None => {}
        }
        match self.numbers {
            Numbers::Int8(scale) | Numbers::Float8(scale) if !usable(scale) => wrong("scale", scale.to_string()),
            _ => Ok(()),
        }
    }

    /// The rows `x [L, in]` as the matrix meets them.
    pub fn apply(&self, x: &Array2<f32>) -> Array2<f32> {
        let mut rows = self.scaled(x);
        for mut row in rows.rows_mut() {
            let unit = self.numbers.unit(&row);
            row.mapv_inplace(|x| self.numbers.nearest(x / unit) * unit);
        }
        rows
    }

    /// How far [`Rounding::apply`] of a computation that sees every number only to a few units in its last place may be from
    /// that of another one, `[L, in]`: zero but where a number lies between two that it could be rounded to.
    pub fn leeway(&self, x: &Array2<f32>) -> Array2<f32> {
        let mut rows = self.scaled(x);
        for mut row in rows.rows_mut() {
            let unit = self.numbers.unit(&row);
            row.mapv_inplace(|x| {
                let at = |share: f32| self.numbers.nearest(x / unit * share);
                (at(1.0 + FLOAT_ROUNDING) - at(1.0 - FLOAT_ROUNDING)).abs() * unit
            });
        }
        rows
    }

    fn scaled(&self, x: &Array2<f32>) -> Array2<f32> {
        match &self.factors {
            Some(factors) => x * &Array1::from_vec(factors.clone()),
            None => x.clone(),
        }
    }
}

/// Whether something can be counted in units of `x`.
fn usable(x: f32) -> bool {
    x.is_finite() && x > 0.0
}

impl Numbers {
    /// What the entries of `row` count in units of.
    fn unit(self, row: &ArrayViewMut1<'_, f32>) -> f32 {
        match self {
            Self::Int8(scale) | Self::Float8(scale) => scale,
            // A row of zeros stays one.
            Self::Int8PerRow => (row.fold(0.0_f32, |most, x| most.max(x.abs())) / 127.0).max(f32::MIN_POSITIVE),
        }
    }

    /// The nearest of the numbers, in units; the even one of two that are equally near.
    fn nearest(self, x: f32) -> f32 {
        match self {
            Self::Int8(_) | Self::Int8PerRow => x.round_ties_even().clamp(-128.0, 127.0),
            Self::Float8(_) => {
                let x = x.clamp(-LARGEST_FLOAT8, LARGEST_FLOAT8);
                let exponent = (x.to_bits() >> 23 & 0xFF).cast_signed() - 127;
                let step = 2_f32.powi(exponent.max(SMALLEST_EXPONENT) - MANTISSA_BITS);
                (x / step).round_ties_even() * step
            }
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::float_cmp)]
    use super::*;
    use ndarray::array;

    fn rounding(numbers: Numbers) -> Rounding {
        Rounding { factors: None, numbers }
    }

    #[test]
    fn integers_are_rounded_to_even_and_clipped() {
        let x = array![[0.25, 0.75, -0.25, -0.75, 0.76, 100.0, -100.0, 0.0]];
        let expected = array![[0.0, 1.0, 0.0, -1.0, 1.0, 63.5, -64.0, 0.0]];
        assert_eq!(rounding(Numbers::Int8(0.5)).apply(&x), expected);
    }

    #[test]
    fn a_row_s_largest_number_is_exact_and_zeros_stay() {
        let x = array![[254.0, 3.0, -5.0, 1.5], [0.0, 0.0, 0.0, 0.0], [-1.27, 0.014, 0.0, 0.0]];
        let found = rounding(Numbers::Int8PerRow).apply(&x);
        assert_eq!(found.row(0), array![254.0, 4.0, -4.0, 2.0]);
        assert_eq!(found.row(1), array![0.0, 0.0, 0.0, 0.0]);
        assert!((found[[2, 1]] - 0.01).abs() < 1e-7 && (found[[2, 0]] + 1.27).abs() < 1e-6);
    }

    #[test]
    fn floats_have_four_significant_bits_and_an_end() {
        // Ties go to even mantissas; the smallest numbers lie 2^-9 apart.
        let tiny = 2_f32.powi(-9);
        let x = array![[1.0, 1.0625, 1.1875, 17.0, 19.0, 460.0, 1e9, -1e9, 0.4 * tiny, 0.5 * tiny, 1.5 * tiny]];
        let expected = array![[1.0, 1.0, 1.25, 16.0, 20.0, 448.0, 448.0, -448.0, 0.0, 0.0, 2.0 * tiny]];
        assert_eq!(rounding(Numbers::Float8(1.0)).apply(&x), expected);
        assert_eq!(rounding(Numbers::Float8(0.5)).apply(&(&x * 0.5)), expected * 0.5);
        assert!(rounding(Numbers::Float8(1.0)).apply(&array![[f32::NAN]])[[0, 0]].is_nan());
    }

    #[test]
    fn every_float8_is_its_own_nearest() {
        for exponent in -6..=8 {
            for mantissa in 0..16_u8 {
                let value = f32::from(mantissa) * 2_f32.powi(exponent - 3);
                if value <= LARGEST_FLOAT8 {
                    assert_eq!([value, -value].map(|x| Numbers::Float8(1.0).nearest(x)), [value, -value]);
                }
            }
        }
    }

    #[test]
    fn factors_come_before_rounding() {
        let smoothed = Rounding { factors: Some(vec![2.0, 0.5]), numbers: Numbers::Int8(1.0) };
        assert_eq!(smoothed.apply(&array![[3.3, 3.3]]), array![[7.0, 2.0]]);
        // The row's scale is that of the products.
        let smoothed = Rounding { factors: Some(vec![127.0, 1.0]), numbers: Numbers::Int8PerRow };
        assert_eq!(smoothed.apply(&array![[1.0, 1.4]]), array![[127.0, 1.0]]);
    }

    #[test]
    fn only_numbers_at_the_edge_have_leeway() {
        let x = array![[0.5, 0.5 * (1.0 + 2.0 * f32::EPSILON), 0.500_01, 1.0, 1.499_999_9]];
        assert_eq!(rounding(Numbers::Int8(1.0)).leeway(&x), array![[1.0, 1.0, 0.0, 0.0, 1.0]]);
    }

    #[test]
    fn what_nothing_can_count_in_is_refused() {
        for scale in [0.0, -1.0, f32::NAN, f32::INFINITY] {
            let error = rounding(Numbers::Int8(scale)).check("m", 2).unwrap_err().to_string();
            assert_eq!(error, format!("the scale of what `m` multiplies cannot be used: {scale}"));
            assert!(rounding(Numbers::Float8(scale)).check("m", 2).is_err());
            let factors = Rounding { factors: Some(vec![1.0, scale]), numbers: Numbers::Int8PerRow };
            assert!(factors.check("m", 2).is_err());
        }
        let few = Rounding { factors: Some(vec![1.0]), numbers: Numbers::Int8PerRow };
        assert!(few.check("m", 2).is_err() && few.check("m", 1).is_ok());
    }
}
