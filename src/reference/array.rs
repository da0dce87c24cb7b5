//! Between `ndarray` and the tensors that leave the reference as taps.

use super::Result;
use crate::taps::TapSink;
use crate::tensor::{Tensor, TensorError};
use accordion_graphs::dtype::DType;
use ndarray::{Array2, Array3, ArrayBase, Data, Dimension};
use std::sync::Arc;

/// The elements of `array` as a tensor of the same shape.
///
/// # Errors
///
/// The byte count of the shape overflows.
pub fn to_tensor<S: Data<Elem = f32>, D: Dimension>(array: &ArrayBase<S, D>) -> Result<Tensor, TensorError> {
    Tensor::from_f32(array.shape(), array.iter().copied().collect())
}

/// `[L, heads * d]` as `[heads, L, d]`.
pub(super) fn split_heads(x: &Array2<f32>, head_dim: usize) -> Array3<f32> {
    let (rows, width) = x.dim();
    Array3::from_shape_fn((width / head_dim, rows, head_dim), |(head, row, i)| x[[row, head * head_dim + i]])
}

/// A tap sink together with the scope that its names start with.
pub struct Scope<'a> {
    sink: &'a mut dyn TapSink,
    path: String,
}

impl<'a> Scope<'a> {
    pub(super) fn new(sink: &'a mut dyn TapSink, path: impl Into<String>) -> Self {
        Self { sink, path: path.into() }
    }

    /// The scope `name` inside this one; `name` ends with the dot.
    pub(super) fn within(&mut self, name: &str) -> Scope<'_> {
        Scope { path: format!("{}{name}", self.path), sink: &mut *self.sink }
    }

    pub(super) fn tap<S: Data<Elem = f32>, D: Dimension>(&mut self, name: &str, value: &ArrayBase<S, D>) -> Result<()> {
        self.tap_with(name, || to_tensor(value))
    }

    /// Taps `value [heads, rows, d]` as `[rows, heads * d]`.
    pub(super) fn tap_rows(&mut self, name: &str, value: &Array3<f32>) -> Result<()> {
        let (heads, rows, width) = value.dim();
        self.tap_with(name, || {
            let by_row = value.view().permuted_axes([1, 0, 2]);
            Tensor::from_f32([rows, heads * width], by_row.iter().copied().collect())
        })
    }

    pub(super) fn tap_integers(&mut self, name: &str, values: impl ExactSizeIterator<Item = i64>) -> Result<()> {
        self.tap_with(name, || Tensor::from_i64([values.len()], values.collect()))
    }

    pub(super) fn tap_flags(&mut self, name: &str, values: &[bool]) -> Result<()> {
        self.tap_with(name, || {
            let bytes: Vec<u8> = values.iter().map(|&v| u8::from(v)).collect();
            Tensor::from_storage(DType::Bool, [values.len()], Arc::new(bytes), 0)
        })
    }

    /// Taps rows of the same length as `[rows, length]`.
    pub(super) fn tap_ids(&mut self, name: &str, rows: &[&[u32]]) -> Result<()> {
        let length = rows.first().map_or(0, |row| row.len());
        self.tap_with(name, || {
            Tensor::from_i64([rows.len(), length], rows.iter().copied().flatten().map(|&id| i64::from(id)).collect())
        })
    }

    fn tap_with(&mut self, name: &str, value: impl FnOnce() -> Result<Tensor, TensorError>) -> Result<()> {
        let name = format!("{}{name}", self.path);
        if self.sink.wants(&name) {
            self.sink.record(&name, value()?);
        }
        Ok(())
    }
}
