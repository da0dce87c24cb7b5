//! Keys and values of the layers that have run.

use ndarray::{Array2, Array3, Axis, Zip, concatenate};

/// The most units that a rounded number counts, and what is rounded to more.
const LEVELS: f32 = 127.0;
const BEYOND: f32 = 127.5;
/// By how much a unit grows at least.
const GROWTH: f32 = 1.25;

/// Keys (after rotation) and values of one layer, both `[G, rows, d]`.
#[derive(Debug, Clone, PartialEq)]
pub struct KeyValue {
    /// Keys after rotation.
    pub k: Array3<f32>,
    /// Values.
    pub v: Array3<f32>,
    /// What keys and values are multiples of, `[G, d]` each, where they are rounded to 8-bit integers.
    units: Option<[Array2<f32>; 2]>,
}

impl KeyValue {
    /// Rows as they are.
    pub fn new(k: Array3<f32>, v: Array3<f32>) -> Self {
        Self { k, v, units: None }
    }

    /// What is left of the rows if they are kept as 8-bit integers, each channel of each head in units of the 127th part of its
    /// largest magnitude; rows that are appended are rounded too.
    #[must_use]
    pub fn rounded(&self) -> Self {
        let units = [&self.k, &self.v].map(|x| {
            let largest = x.fold_axis(Axis(1), 0.0_f32, |&largest, x| largest.max(x.abs()));
            // Where there is nothing yet, the first number decides.
            largest.mapv(|largest| (largest / LEVELS).max(2.0_f32.powi(-63)))
        });
        let [k, v] = [(&self.k, &units[0]), (&self.v, &units[1])].map(|(x, unit)| multiples(x, unit));
        Self { k, v, units: Some(units) }
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.k.len_of(Axis(1))
    }

    /// The rows `keep`, in the order given.
    pub(super) fn select(&self, keep: &[usize]) -> Self {
        Self { k: self.k.select(Axis(1), keep), v: self.v.select(Axis(1), keep), units: self.units.clone() }
    }

    /// Appends the rows of `new`, which has as many heads of the same width. Where rows are kept as 8-bit integers and a new
    /// number is beyond 127 units, the unit of its channel grows, and the rows that are there are rounded to it.
    pub(super) fn append(&mut self, new: &Self) {
        let join = |old: &Array3<f32>, new: &Array3<f32>| {
            // Same heads and widths: both come from the projections of one model.
            concatenate![Axis(1), old.view(), new.view()]
        };
        let Some(units) = &mut self.units else {
            *self = Self::new(join(&self.k, &new.k), join(&self.v, &new.v));
            return;
        };
        for (x, new, unit) in [(&mut self.k, &new.k, 0), (&mut self.v, &new.v, 1)] {
            let largest = new.fold_axis(Axis(1), 0.0_f32, |&largest, x| largest.max(x.abs()));
            let before = units[unit].clone();
            Zip::from(&mut units[unit]).and(&largest).for_each(|unit, &largest| {
                if largest / *unit >= BEYOND {
                    *unit = (largest / LEVELS).max(*unit * GROWTH);
                }
            });
            let counts = (&*x / &before.view().insert_axis(Axis(1))).mapv(f32::round_ties_even);
            let old = counts * &before.insert_axis(Axis(1));
            *x = join(&multiples(&old, &units[unit]), &multiples(new, &units[unit]));
        }
    }
}

/// The multiples of `unit [G, d]` that are nearest to `x [G, rows, d]`, ties to even.
pub(super) fn multiples(x: &Array3<f32>, unit: &Array2<f32>) -> Array3<f32> {
    let unit = unit.view().insert_axis(Axis(1));
    (x / &unit).mapv(|x| x.round_ties_even().clamp(-LEVELS, LEVELS)) * unit
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
        Self { layers: vec![KeyValue::new(none.clone(), none); layers] }
    }

    /// Number of rows; 0 where no layer has run.
    pub fn rows(&self) -> usize {
        self.layers.first().map_or(0, KeyValue::rows)
    }

    /// Every layer as [`KeyValue::rounded`].
    #[must_use]
    pub fn rounded(&self) -> Self {
        Self { layers: self.layers.iter().map(KeyValue::rounded).collect() }
    }

    /// The rows `keep` of every layer.
    pub(super) fn select(&self, keep: &[usize]) -> Self {
        Self { layers: self.layers.iter().map(|layer| layer.select(keep)).collect() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ndarray::array;

    #[test]
    fn units_are_those_of_channels_and_grow_where_they_have_to() {
        let rows = array![[[127.0, 0.3, 0.0], [-1.4, -1.27, 0.0]], [[63.5, 0.0, 0.0], [0.2, 12.7, 0.0]]];
        let mut kept = KeyValue::new(rows.clone(), rows).rounded();
        assert_eq!(kept.k[[0, 0, 0]].to_bits(), 127.0_f32.to_bits());
        assert_eq!(kept.k[[0, 1, 0]].to_bits(), (-1.0_f32).to_bits());
        assert!((kept.k[[0, 0, 1]] - 0.3).abs() < 1e-6 && (kept.k[[1, 1, 0]] - 0.0).abs() < 1e-6);
        // Up to 127.5 units nothing changes; a little more grows by a quarter, and a channel of zeros takes what comes.
        let new = array![[[127.4, 1.3, -5.0]], [[0.0, 0.0, 0.0]]];
        kept.append(&KeyValue::new(new.clone(), new));
        assert_eq!(kept.rows(), 3);
        assert_eq!(kept.k[[0, 2, 0]].to_bits(), 127.0_f32.to_bits());
        let near = |found: f32, expected: f32| assert!((found - expected).abs() < 1e-5, "{found}, expected {expected}");
        near(kept.v[[0, 2, 1]], 104.0 * 0.0125);
        near(kept.v[[0, 1, 1]], -102.0 * 0.0125);
        near(kept.v[[0, 2, 2]], -5.0);
    }
}
