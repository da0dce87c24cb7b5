//! Whether a bundle's record of its quantized matrices, and what these count in units of, can be what an export wrote.

use super::error::{MAX_BLOCK, MIN_BLOCK};
use super::{PrecisionError, Quantization};
use crate::checkpoint::{NamedShape, WeightMaps};
use accordion_graphs::precision::{MatrixForm, MatrixPart};
use std::collections::BTreeMap;

/// Checks that the forms fit the tensors of the model.
///
/// # Errors
///
/// Names the first matrix that is none of the model's or cannot be in its form.
pub(crate) fn check_forms(quantization: &Quantization, tensors: &[NamedShape]) -> Result<(), PrecisionError> {
    let matrices = tensors.iter().filter_map(|(name, shape)| match shape[..] {
        [_, inner] => Some((name.as_str(), inner)),
        _ => None,
    });
    let rows: BTreeMap<&str, usize> = matrices.collect();
    for (name, &form) in &quantization.matrices {
        let wrong = |problem: String| Err(PrecisionError::Form { name: name.clone(), problem });
        let Some(&inner) = rows.get(name.as_str()) else {
            return wrong("is no matrix of the model".to_owned());
        };
        if let MatrixForm::Block { bits, block } = form {
            if bits != 8 && bits != 4 {
                return wrong(format!("has entries of {bits} bits, expected 8 or 4"));
            }
            if !(MIN_BLOCK..=MAX_BLOCK).contains(&block) || !block.is_power_of_two() || !inner.is_multiple_of(block) {
                return wrong(format!(
                    "is in blocks of {block}, expected a power of two from {MIN_BLOCK} to {MAX_BLOCK} that divides its rows \
                     of {inner}"
                ));
            }
        }
    }
    Ok(())
}

/// Checks the scales of rows, of activations and of columns, all of which are positive. Those of blocks, which may be negative
/// and are a sizeable part of a model, are only read when they are used; that they are finite, `accordion verify` checks.
///
/// # Errors
///
/// Names the first tensor that has another one.
pub(crate) fn check_scales(maps: &WeightMaps, quantization: &Quantization) -> Result<(), PrecisionError> {
    for (name, &form) in &quantization.matrices {
        let parts = match form {
            MatrixForm::Int8 { smoothed: true } => {
                &[MatrixPart::Scale, MatrixPart::InputScale, MatrixPart::Smoothing][..]
            }
            MatrixForm::Int8 { smoothed: false } | MatrixForm::Fp8 => &[MatrixPart::Scale, MatrixPart::InputScale],
            MatrixForm::Int8PerToken { smoothed: true } => &[MatrixPart::Scale, MatrixPart::Smoothing],
            MatrixForm::Int8PerToken { smoothed: false } => &[MatrixPart::Scale],
            MatrixForm::Block { .. } => &[],
        };
        for &part in parts {
            let name = form.part_name(name, part);
            let numbers = maps.tensor(&name).map_err(Box::new)?.to_f32();
            if let Some(at) = numbers.iter().position(|scale| !scale.is_normal() || *scale < 0.0) {
                return Err(PrecisionError::Scale { name, at, found: numbers[at] });
            }
        }
    }
    Ok(())
}
