//! Keys and values of the layers that have run.

use ndarray::{Array3, Axis, concatenate};

/// Keys (after rotation) and values of one layer, both `[G, rows, d]`.
#[derive(Debug, Clone, PartialEq)]
pub struct KeyValue {
    /// Keys after rotation.
    pub k: Array3<f32>,
    /// Values.
    pub v: Array3<f32>,
}

impl KeyValue {
    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.k.len_of(Axis(1))
    }

    /// The rows `keep`, in the order given.
    pub(super) fn select(&self, keep: &[usize]) -> Self {
        Self { k: self.k.select(Axis(1), keep), v: self.v.select(Axis(1), keep) }
    }

    /// Appends the rows of `new`, which has as many heads of the same width.
    pub(super) fn append(&mut self, new: &Self) {
        let join = |old: &Array3<f32>, new: &Array3<f32>| {
            // Same heads and widths: both come from the projections of one model.
            concatenate![Axis(1), old.view(), new.view()]
        };
        *self = Self { k: join(&self.k, &new.k), v: join(&self.v, &new.v) };
    }
}

/// One [`KeyValue`] per layer that has run, from layer 0 on; all have the same number of rows.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Cache {
    /// The layers, from 0 on.
    pub layers: Vec<KeyValue>,
}

impl Cache {
    /// `layers` layers without any row, for keys and values `[heads, 0, head_dim]`.
    pub(super) fn empty(layers: usize, heads: usize, head_dim: usize) -> Self {
        let none = Array3::zeros((heads, 0, head_dim));
        Self { layers: vec![KeyValue { k: none.clone(), v: none }; layers] }
    }

    /// Number of rows; 0 where no layer has run.
    pub fn rows(&self) -> usize {
        self.layers.first().map_or(0, KeyValue::rows)
    }

    /// The rows `keep` of every layer.
    pub(super) fn select(&self, keep: &[usize]) -> Self {
        Self { layers: self.layers.iter().map(|layer| layer.select(keep)).collect() }
    }
}
