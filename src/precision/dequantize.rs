//! What quantized matrices stand for, and what happens to the activations that they are multiplied with.

use super::Quantization;
use crate::checkpoint::{CheckpointError, WeightMaps};
use crate::tensor::Tensor;
use accordion_graphs::precision::{MatrixForm, MatrixPart};

/// What becomes of the rows that a matrix is multiplied with.
#[derive(Debug, Clone, PartialEq)]
pub struct Activations {
    /// What every column is multiplied by first.
    pub smoothing: Option<Vec<f32>>,
    /// Into what numbers they are rounded then.
    pub scale: InputScale,
}

/// Numbers that activations are rounded to.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum InputScale {
    /// Multiples of this, from -128 to 127 times.
    Int8(f32),
    /// Multiples of the 127th part of a row's largest magnitude.
    Int8PerToken,
    /// 8-bit floats times this.
    Fp8(f32),
}

/// The tensor `name`: of a quantized matrix, the numbers that its parts stand for. What activations are multiplied by first
/// is not undone.
///
/// # Errors
///
/// The tensor or a part of it is not there.
pub fn weight(maps: &WeightMaps, quantization: &Quantization, name: &str) -> Result<Tensor, CheckpointError> {
    let Some(&form) = quantization.matrices.get(name) else {
        return maps.tensor(name);
    };
    let entries = maps.tensor(&form.part_name(name, MatrixPart::Entries))?;
    let scales = maps.tensor(&form.part_name(name, MatrixPart::Scale))?.to_f32();
    let mut numbers = entries.to_f32();
    // The scales are those of equally long pieces, one after the other.
    let piece = numbers.len() / scales.len().max(1);
    for (piece, scale) in numbers.chunks_mut(piece.max(1)).zip(&scales) {
        for x in piece {
            *x *= scale;
        }
    }
    Tensor::from_f32(entries.shape(), numbers)
        .map_err(|source| CheckpointError::Tensor { name: name.to_owned(), source })
}

/// What becomes of the rows that the matrix `name` is multiplied with; `None` where they stay as they are.
///
/// # Errors
///
/// A part of the matrix is not there.
pub fn activations(
    maps: &WeightMaps,
    quantization: &Quantization,
    name: &str,
) -> Result<Option<Activations>, CheckpointError> {
    let Some(&form) = quantization.matrices.get(name) else { return Ok(None) };
    let part = |part| maps.tensor(&form.part_name(name, part)).map(|tensor| tensor.to_f32());
    let smoothing = |smoothed: bool| smoothed.then(|| part(MatrixPart::Smoothing)).transpose();
    let input_scale = || part(MatrixPart::InputScale).map(|scale| scale.first().copied().unwrap_or(0.0));
    Ok(match form {
        MatrixForm::Int8 { smoothed } => {
            Some(Activations { smoothing: smoothing(smoothed)?, scale: InputScale::Int8(input_scale()?) })
        }
        MatrixForm::Int8PerToken { smoothed } => {
            Some(Activations { smoothing: smoothing(smoothed)?, scale: InputScale::Int8PerToken })
        }
        MatrixForm::Fp8 => Some(Activations { smoothing: None, scale: InputScale::Fp8(input_scale()?) }),
        MatrixForm::Block { .. } => None,
    })
}
