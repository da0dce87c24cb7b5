//! Symmetric quantizers of weight matrices.
//!
//! A matrix is row-major `[out, in]`. A quantized number `q` with the scale `s` stands for `q * s`; there are no zero
//! points.

use std::ops::Range;
use std::thread;

/// Largest quantized magnitude of a row or of activations: -128 is left out, so that the numbers are symmetric.
pub const INT8_MAX: f32 = 127.0;

/// Why a matrix cannot be quantized.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum QuantizeError {
    /// The elements are not whole rows, or a size is zero.
    #[error("{elements} elements are not rows of {columns} columns in blocks of {block}")]
    Shape {
        /// Number of elements.
        elements: usize,
        /// Columns of a row.
        columns: usize,
        /// Columns of a block.
        block: usize,
    },
    /// An element is NaN or infinite.
    #[error("row {row}, column {column} is {value}, which cannot be quantized")]
    NotFinite {
        /// Row.
        row: usize,
        /// Column.
        column: usize,
        /// The element.
        value: f32,
    },
}

/// Width of the integers of a block-wise quantized matrix.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bits {
    /// -8 to 7, two in a byte, the first in its lower half.
    Four,
    /// -127 to 127.
    Eight,
}

/// Which scales a runtime takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ScaleSign {
    /// Positive ones only, as TensorRT demands.
    Positive,
    /// Of either sign: the largest element of a block of 4-bit numbers can then always be -8 times its scale, which one
    /// level more than 7 makes finer.
    Either,
}

/// A matrix in blocks of a scale each.
#[derive(Debug, Clone, PartialEq)]
pub struct Blocks {
    /// The integers, row-major and packed without gaps as [`Bits`] says.
    pub packed: Vec<u8>,
    /// `[out, ceil(in / block)]`.
    pub scales: Vec<f32>,
}

/// The matrix `weight` as 8-bit integers `[out, in]`, and a positive scale for each row.
///
/// # Errors
///
/// The elements are not whole rows of `columns`, or one is not finite.
pub fn quantize_rows_int8(weight: &[f32], columns: usize) -> Result<(Vec<i8>, Vec<f32>), QuantizeError> {
    check(weight, columns, columns)?;
    let mut integers = vec![0_i8; weight.len()];
    let mut scales = vec![0.0_f32; weight.len() / columns];
    let rows = weight.chunks_exact(columns).zip(integers.chunks_exact_mut(columns));
    for ((row, integers), scale) in rows.zip(&mut scales) {
        *scale = scale_of(absmax(row), INT8_MAX);
        let inverse = 1.0 / *scale;
        for (q, w) in integers.iter_mut().zip(row) {
            *q = (w * inverse).round_ties_even().clamp(-INT8_MAX, INT8_MAX) as i8;
        }
    }
    Ok((integers, scales))
}

/// The matrix `weight` with a scale for every `block` consecutive columns of a row; the last block of a row may be shorter.
///
/// With 8 bits the largest magnitude of a block becomes 127. With 4 bits the scale is searched: of several places for the
/// largest magnitude, each with the scale that fits the resulting integers best (least squares), the one with the smallest
/// squared error.
///
/// # Errors
///
/// The elements are not whole rows of `columns`, or one is not finite.
pub fn quantize_blocks(
    weight: &[f32],
    columns: usize,
    bits: Bits,
    block: usize,
    sign: ScaleSign,
) -> Result<Blocks, QuantizeError> {
    check(weight, columns, block)?;
    let (rows, per_row) = (weight.len() / columns, columns.div_ceil(block));
    let mut integers = vec![0_i8; weight.len()];
    let mut scales = vec![0.0_f32; rows * per_row];
    let threads = thread::available_parallelism().map_or(1, usize::from);
    let share = rows.div_ceil(threads).max(1);
    thread::scope(|scope| {
        let shares = weight.chunks(share * columns).zip(integers.chunks_mut(share * columns));
        for ((weight, integers), scales) in shares.zip(scales.chunks_mut(share * per_row)) {
            scope.spawn(move || {
                let rows = weight.chunks_exact(columns).zip(integers.chunks_exact_mut(columns));
                for ((row, integers), scales) in rows.zip(scales.chunks_exact_mut(per_row)) {
                    for ((block, integers), scale) in row.chunks(block).zip(integers.chunks_mut(block)).zip(scales) {
                        *scale = match bits {
                            Bits::Eight => int8_block(block, integers),
                            Bits::Four => int4_block(block, integers, sign),
                        };
                    }
                }
            });
        }
    });
    let packed = match bits {
        Bits::Eight => integers.iter().map(|&q| q as u8).collect(),
        Bits::Four => integers
            .chunks(2)
            .map(|pair| (pair[0] as u8 & 15) | (pair.get(1).copied().unwrap_or(0) as u8) << 4)
            .collect(),
    };
    Ok(Blocks { packed, scales })
}

/// `weight` as 8-bit floats and their one positive scale: the largest magnitude becomes `max`, the largest finite number of
/// the format, which `encode` rounds to.
///
/// # Errors
///
/// There is no element, or one is not finite.
pub fn quantize_float8(weight: &[f32], max: f32, encode: fn(f32) -> u8) -> Result<(Vec<u8>, f32), QuantizeError> {
    check(weight, weight.len(), weight.len())?;
    let scale = scale_of(absmax(weight), max);
    Ok((weight.iter().map(|w| encode(w / scale)).collect(), scale))
}

fn check(weight: &[f32], columns: usize, block: usize) -> Result<(), QuantizeError> {
    if columns == 0 || block == 0 || weight.is_empty() || !weight.len().is_multiple_of(columns) {
        return Err(QuantizeError::Shape { elements: weight.len(), columns, block });
    }
    match weight.iter().position(|w| !w.is_finite()) {
        None => Ok(()),
        Some(i) => Err(QuantizeError::NotFinite { row: i / columns, column: i % columns, value: weight[i] }),
    }
}

fn absmax(values: &[f32]) -> f32 {
    values.iter().fold(0.0, |max: f32, w| max.max(w.abs()))
}

/// The scale with which `largest` becomes `levels`; 1 where all is zero, or so small that its scale has no inverse.
fn scale_of(largest: f32, levels: f32) -> f32 {
    let scale = largest / levels;
    if scale.recip().is_finite() { scale } else { 1.0 }
}

fn int8_block(block: &[f32], integers: &mut [i8]) -> f32 {
    let scale = scale_of(absmax(block), INT8_MAX);
    round(block, integers, scale, -127.0..127.0);
    scale
}

/// Where the largest magnitude of a block of 4-bit integers may go. Beyond the range it is clipped, which can pay where one
/// element stands alone.
const PLACES: [f32; 6] = [6.5, 7.0, 7.4, 7.8, 8.4, 9.2];

fn int4_block(block: &[f32], integers: &mut [i8], sign: ScaleSign) -> f32 {
    let range = -8.0..7.0;
    // The element whose magnitude is largest keeps its sign: with a scale of the other sign it is negative.
    let largest = block.iter().fold(0.0_f32, |max, &w| if w.abs() > max.abs() { w } else { max });
    let first = scale_of(largest.abs(), 7.0);
    let mut best = (f32::INFINITY, first);
    for place in PLACES {
        let magnitude = scale_of(largest.abs(), place);
        let negative = if largest > 0.0 { -magnitude } else { magnitude };
        let candidates = match sign {
            ScaleSign::Positive => &[magnitude][..],
            ScaleSign::Either => &[magnitude, negative],
        };
        for &scale in candidates {
            // Neither step can make it worse: the scale is the best for the integers, then these for the scale.
            round(block, integers, scale, range.clone());
            let fitted = fit(block, integers).filter(|f| f.is_sign_negative() == scale.is_sign_negative());
            let scale = fitted.unwrap_or(scale);
            round(block, integers, scale, range.clone());
            let error = squared_error(block, integers, scale);
            if error < best.0 {
                best = (error, scale);
            }
        }
    }
    round(block, integers, best.1, range);
    best.1
}

fn round(block: &[f32], integers: &mut [i8], scale: f32, range: Range<f32>) {
    let inverse = scale.recip();
    for (q, w) in integers.iter_mut().zip(block) {
        *q = (w * inverse).round_ties_even().clamp(range.start, range.end) as i8;
    }
}

/// The scale that leaves the smallest squared error, if it has an inverse.
fn fit(block: &[f32], integers: &[i8]) -> Option<f32> {
    let scale = sum(block, integers, |w, q| w * q) / sum(block, integers, |_, q| q * q);
    (scale.is_normal() && scale.recip().is_finite()).then_some(scale)
}

fn squared_error(block: &[f32], integers: &[i8], scale: f32) -> f32 {
    sum(block, integers, |w, q| (w - q * scale).powi(2))
}

/// Sums that do not wait for each other.
const LANES: usize = 8;

fn sum(block: &[f32], integers: &[i8], term: impl Fn(f32, f32) -> f32) -> f32 {
    let ((w, w_rest), (q, q_rest)) = (block.as_chunks::<LANES>(), integers.as_chunks::<LANES>());
    let mut lanes = [0.0; LANES];
    for (w, q) in w.iter().zip(q) {
        for ((lane, &w), &q) in lanes.iter_mut().zip(w).zip(q) {
            *lane += term(w, f32::from(q));
        }
    }
    let rest: f32 = w_rest.iter().zip(q_rest).map(|(&w, &q)| term(w, f32::from(q))).sum();
    lanes.iter().sum::<f32>() + rest
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;

    /// The numbers that blocks stand for.
    fn dequantized(blocks: &Blocks, elements: usize, columns: usize, bits: Bits, block: usize) -> Vec<f32> {
        let integers: Vec<i8> = match bits {
            Bits::Eight => blocks.packed.iter().map(|&b| b as i8).collect(),
            Bits::Four => {
                blocks.packed.iter().flat_map(|&b| [((b << 4) as i8) >> 4, b as i8 >> 4]).take(elements).collect()
            }
        };
        let per_row = columns.div_ceil(block);
        let scale = |i: usize| blocks.scales[i / columns * per_row + i % columns / block];
        integers.iter().enumerate().map(|(i, &q)| f32::from(q) * scale(i)).collect()
    }

    fn error(weight: &[f32], found: &[f32]) -> f64 {
        weight.iter().zip(found).map(|(a, b)| f64::from(a - b).powi(2)).sum()
    }

    #[test]
    fn rows_have_scales_of_their_own() {
        let (q, scales) = quantize_rows_int8(&[1.0, -0.5, 0.25, 0.0, 100.0, -127.0], 3).unwrap();
        assert_eq!(q, [127, -64, 32, 0, 100, -127]);
        assert_eq!(scales, [1.0 / 127.0, 1.0]);
    }

    #[test]
    fn a_row_of_zeros_or_of_almost_zeros_stays_zero() {
        for tiny in [0.0, f32::from_bits(1)] {
            assert_eq!(quantize_rows_int8(&[tiny, -tiny], 2).unwrap(), (vec![0, 0], vec![1.0]));
            for sign in [ScaleSign::Positive, ScaleSign::Either] {
                let blocks = quantize_blocks(&[tiny; 4], 4, Bits::Four, 2, sign).unwrap();
                assert_eq!((blocks.packed, blocks.scales.len()), (vec![0, 0], 2));
            }
        }
    }

    #[test]
    fn four_bits_are_packed_low_half_first_and_without_gaps() {
        // Rows of three: the second row begins in the upper half of a byte.
        let weight = [1.0, -2.0, 7.0, -7.0, 3.0, 5.0];
        let blocks = quantize_blocks(&weight, 3, Bits::Four, 32, ScaleSign::Positive).unwrap();
        assert_eq!(blocks.scales, [1.0, 1.0]);
        assert_eq!(blocks.packed, [0xE1, 0x97, 0x53]);
    }

    #[test]
    fn a_short_last_block_has_its_own_scale() {
        let weight = [127.0, 1.0, 2.0, 3.0, 254.0];
        let blocks = quantize_blocks(&weight, 5, Bits::Eight, 2, ScaleSign::Positive).unwrap();
        assert_eq!(blocks.scales, [1.0, 3.0 / 127.0, 2.0]);
        assert_eq!(blocks.packed, [127, 1, 85, 127, 127]);
    }

    #[test]
    fn the_largest_element_becomes_minus_eight_where_the_scale_may_be_negative() {
        let weight = [8.0, 7.0, -7.0, 1.0, -3.0, 5.0];
        let blocks = quantize_blocks(&weight, 6, Bits::Four, 6, ScaleSign::Either).unwrap();
        assert_eq!(blocks.scales, [-1.0]);
        assert_eq!(dequantized(&blocks, 6, 6, Bits::Four, 6), weight);
        let positive = quantize_blocks(&weight, 6, Bits::Four, 6, ScaleSign::Positive).unwrap();
        assert!(positive.scales[0] > 0.0);
        assert!(error(&weight, &dequantized(&positive, 6, 6, Bits::Four, 6)) > 0.1);
    }

    #[test]
    fn floats_use_the_whole_range_of_the_format() {
        let (bytes, scale) = quantize_float8(&[2.0, -1.0, 0.5], 448.0, |v| (v / 4.0).abs().round() as u8).unwrap();
        assert_eq!((bytes, scale), (vec![112, 56, 28], 1.0 / 224.0));
    }

    #[test]
    fn what_cannot_be_quantized_is_named() {
        let bad = [0.0, 1.0, 2.0, f32::NAN];
        let message = quantize_rows_int8(&bad, 2).unwrap_err().to_string();
        assert_eq!(message, "row 1, column 1 is NaN, which cannot be quantized");
        assert!(quantize_blocks(&[f32::INFINITY], 1, Bits::Four, 1, ScaleSign::Positive).is_err());
        assert!(quantize_float8(&[f32::NEG_INFINITY], 448.0, |_| 0).is_err());
        assert!(quantize_float8(&[], 448.0, |_| 0).is_err());
        for (columns, block) in [(3, 1), (0, 1), (2, 0)] {
            let shape = QuantizeError::Shape { elements: 4, columns, block };
            let weight = [0.0; 4];
            assert_eq!(quantize_blocks(&weight, columns, Bits::Eight, block, ScaleSign::Positive), Err(shape));
        }
    }

    proptest! {
        #[test]
        fn eight_bits_are_within_half_a_step(weight in prop::collection::vec(-1e3_f32..1e3, 24), block in 1_usize..9) {
            let blocks = quantize_blocks(&weight, 8, Bits::Eight, block, ScaleSign::Positive).unwrap();
            let found = dequantized(&blocks, 24, 8, Bits::Eight, block);
            for (i, (w, f)) in weight.iter().zip(&found).enumerate() {
                let step = blocks.scales[i / 8 * 8_usize.div_ceil(block) + i % 8 / block];
                prop_assert!((w - f).abs() <= step * 0.5001);
            }
        }

        #[test]
        fn the_searched_scale_beats_the_plain_one_and_either_sign_beats_one(
            weight in prop::collection::vec(-1.0_f32..1.0, 32),
        ) {
            let plain = absmax(&weight) / 7.0;
            let rounded: Vec<f32> = weight.iter().map(|w| (w / plain).round().clamp(-8.0, 7.0) * plain).collect();
            let of = |sign| {
                let blocks = quantize_blocks(&weight, 32, Bits::Four, 32, sign).unwrap();
                error(&weight, &dequantized(&blocks, 32, 32, Bits::Four, 32))
            };
            let (positive, either) = (of(ScaleSign::Positive), of(ScaleSign::Either));
            prop_assert!(positive <= error(&weight, &rounded) * 1.0001);
            prop_assert!(either <= positive * 1.0001);
        }
    }
}
