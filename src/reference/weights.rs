//! Weights by name, and the small modules that are made of them.

use super::{ReferenceError, Result};
use crate::tensor::Tensor;
use ndarray::{Array, Array1, Array2, Axis, Dimension, IntoDimension};

/// Weights by name, checked against the shapes that the architecture gives them.
pub(super) struct Weights<F> {
    source: F,
}

impl<F, E> Weights<F>
where
    F: Fn(&str) -> std::result::Result<Tensor, E>,
    E: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    pub(super) fn new(source: F) -> Self {
        Self { source }
    }

    pub(super) fn array<D: IntoDimension>(&self, name: &str, shape: D) -> Result<Array<f32, D::Dim>> {
        let shape = shape.into_dimension();
        let tensor =
            (self.source)(name).map_err(|e| ReferenceError::Weight { name: name.to_owned(), source: e.into() })?;
        let mismatch = ReferenceError::WeightShape {
            name: name.to_owned(),
            found: tensor.shape().to_vec(),
            expected: shape.slice().to_vec(),
        };
        if tensor.shape() != shape.slice() {
            return Err(mismatch);
        }
        Array::from_shape_vec(shape, tensor.to_f32()).map_err(|_| mismatch)
    }

    pub(super) fn linear(&self, name: &str, rows: usize, columns: usize, bias: bool) -> Result<Linear> {
        Ok(Linear {
            weight: self.array(&format!("{name}.weight"), [rows, columns])?,
            bias: if bias { Some(self.array(&format!("{name}.bias"), [rows])?) } else { None },
        })
    }

    pub(super) fn layer_norm(&self, name: &str, width: usize, eps: f64) -> Result<LayerNorm> {
        Ok(LayerNorm {
            weight: self.array(&format!("{name}.weight"), [width])?,
            bias: self.array(&format!("{name}.bias"), [width])?,
            eps: eps as f32,
        })
    }
}

/// `x W^T + b`, `W [out, in]`.
pub(super) struct Linear {
    weight: Array2<f32>,
    bias: Option<Array1<f32>>,
}

impl Linear {
    pub(super) fn apply(&self, x: &Array2<f32>) -> Array2<f32> {
        let y = x.dot(&self.weight.t());
        match &self.bias {
            Some(bias) => y + bias,
            None => y,
        }
    }
}

/// `(x - mean(x)) / sqrt(var(x) + eps) * weight + bias`, row by row.
pub(super) struct LayerNorm {
    weight: Array1<f32>,
    bias: Array1<f32>,
    eps: f32,
}

impl LayerNorm {
    pub(super) fn apply(&self, x: &Array2<f32>) -> Array2<f32> {
        let mut normed = x.clone();
        for mut row in normed.rows_mut() {
            row -= row.sum() / row.len() as f32;
            let variance = row.dot(&row) / row.len() as f32;
            row /= (variance + self.eps).sqrt();
        }
        normed * &self.weight + &self.bias
    }
}

/// `x / sqrt(mean(x^2) + eps) * weight`, row by row.
pub(super) fn rms_norm(x: &Array2<f32>, weight: &Array1<f32>, eps: f32) -> Array2<f32> {
    let mut normed = x.clone();
    for mut row in normed.rows_mut() {
        let mean_square = row.dot(&row) / row.len() as f32;
        row /= (mean_square + eps).sqrt();
    }
    normed * weight
}

/// The rows of the embedding `table [vocab, D]` that `ids` name, `[L, D]`.
///
/// # Errors
///
/// An id is outside the vocabulary.
pub(super) fn embed(table: &Array2<f32>, ids: &[u32]) -> Result<Array2<f32>> {
    let vocab_size = table.nrows();
    if let Some(&id) = ids.iter().find(|&&id| id as usize >= vocab_size) {
        return Err(ReferenceError::TokenId { id, vocab_size });
    }
    let rows: Vec<usize> = ids.iter().map(|&id| id as usize).collect();
    Ok(table.select(Axis(0), &rows))
}

/// `x * sigmoid(x)`.
pub(super) fn silu(x: f32) -> f32 {
    x / (1.0 + (-x).exp())
}
