//! NaN and infinities in weights, found before they spread into every tap.

use super::compare::{FloatDifference, IntegerDifference, NonFinite, coordinates};
use super::error::VerifyError;
use super::verdict::{Difference, TapResult, Verdict};
use crate::checkpoint::WeightMaps;
use crate::tensor::Tensor;
use accordion_graphs::dtype::DType;

/// Looks at every floating-point number of `weights`: one failure, `weights.<tensor>`, per tensor with one that is not
/// finite, and one pass if there is none. `progress` hears how many of how many bytes have been read.
///
/// # Errors
///
/// A tensor cannot be read.
pub fn finite_weights(weights: &WeightMaps, mut progress: impl FnMut(u64, u64)) -> Result<Vec<TapResult>, VerifyError> {
    let total = weights.index().stored().map(|(_, weight)| weight.len).sum();
    let (mut failures, mut tensors, mut elements, mut done) = (Vec::new(), 0, 0, 0);
    for (name, weight) in weights.index().stored() {
        let tensor = weights.tensor(name).map_err(Box::new)?;
        let (found, first) = non_finite(&tensor);
        if let Some(first) = first {
            failures.push(failure(name, &tensor, found, first));
        }
        tensors += 1;
        elements += tensor.len();
        done += weight.len;
        progress(done, total);
    }
    if failures.is_empty() {
        let difference = Difference::Integer(IntegerDifference { elements, mismatches: 0, first: None });
        let reason = format!("all {elements} numbers of {tensors} tensors are finite");
        let (name, verdict) = ("weights".to_owned(), Verdict::Pass);
        failures.push(TapResult { name, shape: vec![elements], verdict, reason, bound_use: Some(0.0), difference });
    }
    Ok(failures)
}

fn failure(name: &str, tensor: &Tensor, found: NonFinite, first: usize) -> TapResult {
    let at = coordinates(first, tensor.shape());
    TapResult {
        name: format!("weights.{name}"),
        shape: tensor.shape().to_vec(),
        verdict: Verdict::Fail,
        reason: format!("{} NaN and {} infinite numbers in tensor {name}, first at {at:?}", found.nan, found.inf),
        bound_use: None,
        difference: Difference::Float(FloatDifference {
            elements: tensor.len(),
            actual_non_finite: found,
            ..FloatDifference::default()
        }),
    }
}

/// How many numbers of `tensor` are not finite, and which is the first. Integers all are.
fn non_finite(tensor: &Tensor) -> (NonFinite, Option<usize>) {
    /// `exponent` and `fraction` mask the bits of one number: an exponent of ones is infinite, or NaN if any bit of the
    /// fraction is set.
    fn scan<const N: usize>(bytes: &[u8], exponent: u32, fraction: u32) -> (NonFinite, Option<usize>) {
        let (mut found, mut first) = (NonFinite::default(), None);
        for (i, number) in bytes.as_chunks::<N>().0.iter().enumerate() {
            let mut word = [0; 4];
            word[..N].copy_from_slice(number);
            let bits = u32::from_le_bytes(word);
            if bits & exponent == exponent {
                first.get_or_insert(i);
                let nan = bits & fraction != 0;
                found.nan += usize::from(nan);
                found.inf += usize::from(!nan);
            }
        }
        (found, first)
    }
    match tensor.dtype() {
        DType::F32 => scan::<4>(tensor.bytes(), 0x7F80_0000, 0x007F_FFFF),
        DType::F16 => scan::<2>(tensor.bytes(), 0x7C00, 0x03FF),
        DType::Bf16 => scan::<2>(tensor.bytes(), 0x7F80, 0x007F),
        DType::F8E4m3 => scan::<1>(tensor.bytes(), 0x7F, 0x7F),
        DType::I64 | DType::I32 | DType::Bool | DType::U8 | DType::I8 | DType::I4 => (NonFinite::default(), None),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use half::{bf16, f16};
    use std::sync::Arc;

    #[test]
    fn every_float_type_shows_its_nan_and_infinities() {
        let values = [f32::MAX, f32::MIN_POSITIVE, f32::NAN, -1.0, f32::NEG_INFINITY, f32::INFINITY];
        let halves: Vec<f16> = values.iter().map(|&v| f16::from_f32(v.clamp(-6e4, 6e4))).collect();
        let halves = [&halves[..4], &[f16::NEG_INFINITY, f16::INFINITY]].concat();
        let brains: Vec<bf16> = values.iter().map(|&v| bf16::from_f32(v.clamp(-1e38, 1e38))).collect();
        let brains = [&brains[..4], &[bf16::NEG_INFINITY, bf16::INFINITY]].concat();
        for tensor in [
            Tensor::from_f32([6], values.to_vec()).unwrap(),
            Tensor::from_storage(DType::F16, [6], Arc::new(halves), 0).unwrap(),
            Tensor::from_storage(DType::Bf16, [6], Arc::new(brains), 0).unwrap(),
        ] {
            assert_eq!(non_finite(&tensor), (NonFinite { nan: 1, inf: 2 }, Some(2)), "{tensor:?}");
        }
        let integers = Tensor::from_i32([1], vec![0x7FC0_0000]).unwrap();
        assert_eq!(non_finite(&integers), (NonFinite::default(), None));
    }
}
