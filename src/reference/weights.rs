//! Weights by name, and the small modules that are made of them.

use super::quantize::{Rounding, Weight};
use super::{ReferenceError, Result};
use crate::tensor::Tensor;
use ndarray::{Array, Array1, Array2, Axis, Dimension, IntoDimension};

/// Finds a weight by its name.
type Source<'s> = dyn Fn(&str) -> Result<Weight> + 's;

/// Weights by name, checked against the shapes that the architecture gives them.
pub(super) struct Weights<'s> {
    source: Box<Source<'s>>,
}

impl<'s> Weights<'s> {
    pub(super) fn new<W, E>(source: impl Fn(&str) -> std::result::Result<W, E> + 's) -> Self
    where
        W: Into<Weight>,
        E: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        let source = move |name: &str| {
            let found = source(name).map(Into::into);
            found.map_err(|error| ReferenceError::Weight { name: name.to_owned(), source: error.into() })
        };
        Self { source: Box::new(source) }
    }

    pub(super) fn array<D: IntoDimension>(&self, name: &str, shape: D) -> Result<Array<f32, D::Dim>> {
        array(name, &(self.source)(name)?.tensor, shape)
    }

    pub(super) fn linear(&self, name: &str, rows: usize, columns: usize, bias: bool) -> Result<Linear> {
        let matrix = self.matrix(&format!("{name}.weight"), [rows, columns])?;
        Ok(Linear { bias: if bias { Some(self.array(&format!("{name}.bias"), [rows])?) } else { None }, ..matrix })
    }

    /// The linear layer of the matrix `name` alone.
    pub(super) fn matrix(&self, name: &str, [rows, columns]: [usize; 2]) -> Result<Linear> {
        Linear::of_matrix(name, (self.source)(name)?, [rows, columns])
    }

    pub(super) fn layer_norm(&self, name: &str, width: usize, eps: f64) -> Result<LayerNorm> {
        Ok(LayerNorm {
            weight: self.array(&format!("{name}.weight"), [width])?,
            bias: self.array(&format!("{name}.bias"), [width])?,
            eps: eps as f32,
        })
    }
}

fn array<D: IntoDimension>(name: &str, tensor: &Tensor, shape: D) -> Result<Array<f32, D::Dim>> {
    let shape = shape.into_dimension();
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

/// `x W^T + b`, `W [out, in]`, where the matrix is quantized of rounded rows `x`.
pub struct Linear {
    weight: Array2<f32>,
    bias: Option<Array1<f32>>,
    rounding: Option<Rounding>,
}

impl Linear {
    /// A linear layer by itself: its matrix, called `name`, and its bias.
    ///
    /// # Errors
    ///
    /// The matrix has not two dimensions, the bias is not as long as it has rows, or the rounding does not fit it.
    pub fn new(name: &str, matrix: Weight, bias: Option<&Tensor>) -> Result<Self> {
        let (rows, columns) = match matrix.tensor.shape() {
            &[rows, columns] => (rows, columns),
            shape => (shape.iter().product(), 1),
        };
        let bias = bias.map(|bias| array(&format!("bias of {name}"), bias, [rows])).transpose()?;
        Ok(Self { bias, ..Self::of_matrix(name, matrix, [rows, columns])? })
    }

    fn of_matrix(name: &str, Weight { tensor, rounding }: Weight, [rows, columns]: [usize; 2]) -> Result<Self> {
        if let Some(rounding) = &rounding {
            rounding.check(name, columns)?;
        }
        Ok(Self { weight: array(name, &tensor, [rows, columns])?, bias: None, rounding })
    }

    /// The product of `x [L, in]`, `[L, out]`.
    pub fn apply(&self, x: &Array2<f32>) -> Array2<f32> {
        let y = match &self.rounding {
            Some(rounding) => rounding.apply(x).dot(&self.weight.t()),
            None => x.dot(&self.weight.t()),
        };
        match &self.bias {
            Some(bias) => y + bias,
            None => y,
        }
    }

    /// How far the product of a computation that rounds another way what lies between two numbers may be from
    /// [`Linear::apply`], `[L, out]`.
    pub fn leeway(&self, x: &Array2<f32>) -> Array2<f32> {
        match &self.rounding {
            Some(rounding) => rounding.leeway(x).dot(&self.weight.mapv(f32::abs).t()),
            None => Array2::zeros((x.nrows(), self.weight.nrows())),
        }
    }

    /// The rows of the matrix that `ids` name, `[L, in]`.
    ///
    /// # Errors
    ///
    /// An id is outside the vocabulary.
    pub(super) fn rows(&self, ids: &[u32]) -> Result<Array2<f32>> {
        embed(&self.weight, ids)
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
