//! Keys and values of a stored context in 8 bits: every channel of every head counts in units of its own, because keys have
//! channels that are large in all rows.

use crate::tensor::{Tensor, TensorError};
use accordion_graphs::dtype::DType;
use serde::{Deserialize, Serialize};
use std::sync::Arc;

/// Numbers that a context state is stored in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum StatePrecision {
    /// As the graphs gave them.
    #[default]
    Fp32,
    /// A quarter of that: keys and values rounded to multiples of the 127th part of their channel's largest magnitude.
    Int8,
}

/// The largest magnitude of an 8-bit number here: -128 is left out, so that the numbers are symmetric.
const LEVELS: f32 = 127.0;

/// Keys or values `x [1, G, rows, d]` as int8 of the same shape, and what they count in, f32 `[1, G, 1, d]`.
pub(super) fn quantized(x: &Tensor) -> Result<[Tensor; 2], TensorError> {
    let (numbers, shape) = (x.as_f32()?, x.shape());
    let (plane, width) = plane_and_width(shape);
    let mut entries = vec![0_i8; numbers.len()];
    let heads: usize = shape.iter().rev().skip(2).product();
    let mut scales = Vec::with_capacity(heads * width);
    for head in 0..heads {
        let plane = head * plane..(head + 1) * plane;
        let (numbers, entries) = (&numbers[plane.clone()], &mut entries[plane]);
        let mut scale = vec![0.0_f32; width];
        for row in numbers.chunks_exact(width) {
            scale.iter_mut().zip(row).for_each(|(scale, x)| *scale = scale.max(x.abs()));
        }
        // A channel of zeros counts in anything.
        for scale in &mut scale {
            *scale = if *scale > 0.0 { *scale / LEVELS } else { 1.0 };
        }
        for (row, entries) in numbers.chunks_exact(width).zip(entries.chunks_exact_mut(width)) {
            for ((entry, x), scale) in entries.iter_mut().zip(row).zip(&scale) {
                *entry = (x / scale).round_ties_even().clamp(-LEVELS, LEVELS) as i8;
            }
        }
        scales.extend(scale);
    }
    let mut scale_shape = shape.to_vec();
    if let Some(rows) = scale_shape.iter_mut().rev().nth(1) {
        *rows = 1;
    }
    Ok([Tensor::from_storage(DType::I8, shape, Arc::new(entries), 0)?, Tensor::from_f32(scale_shape, scales)?])
}

/// What the result of [`quantized`] stands for.
pub(super) fn dequantized(entries: &Tensor, scales: &Tensor) -> Result<Tensor, TensorError> {
    let (plane, width) = plane_and_width(entries.shape());
    let mut numbers = entries.to_f32();
    for (plane, scale) in numbers.chunks_exact_mut(plane.max(width)).zip(scales.as_f32()?.chunks_exact(width)) {
        for row in plane.chunks_exact_mut(width) {
            row.iter_mut().zip(scale).for_each(|(x, scale)| *x *= scale);
        }
    }
    Tensor::from_f32(entries.shape(), numbers)
}

/// Numbers of one head, and of one of its rows.
fn plane_and_width(shape: &[usize]) -> (usize, usize) {
    let width = shape.last().copied().unwrap_or(1).max(1);
    (shape.iter().rev().take(2).product(), width)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn every_channel_of_every_head_has_a_scale_of_its_own() {
        let shape = [1, 2, 3, 2];
        // Head by head, row by row: channels of very different sizes, and one of zeros.
        let numbers = vec![100.0, 0.01, -50.0, 0.02, 25.0, -0.03, 1.0, 0.0, 2.0, 0.0, -4.0, 0.0];
        let [entries, scales] = quantized(&Tensor::from_f32(shape, numbers.clone()).unwrap()).unwrap();
        assert_eq!((entries.dtype(), entries.shape(), scales.shape()), (DType::I8, &shape[..], &[1, 2, 1, 2][..]));
        assert_eq!(scales.as_f32().unwrap(), [100.0 / 127.0, 0.03 / 127.0, 4.0 / 127.0, 1.0]);
        let back = dequantized(&entries, &scales).unwrap();
        for (i, (found, expected)) in back.as_f32().unwrap().iter().zip(&numbers).enumerate() {
            let step = scales.as_f32().unwrap()[i / 6 * 2 + i % 2];
            assert!((found - expected).abs() <= step * 0.5001, "{i}: {found}, {expected}");
        }
        assert_eq!(back.as_f32().unwrap()[0].to_bits(), 100.0_f32.to_bits());
    }

    #[test]
    fn nothing_stays_nothing() {
        let [entries, scales] = quantized(&Tensor::from_f32([1, 2, 0, 4], Vec::new()).unwrap()).unwrap();
        assert_eq!(dequantized(&entries, &scales).unwrap().shape(), [1, 2, 0, 4]);
    }
}
