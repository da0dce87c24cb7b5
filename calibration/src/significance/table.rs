//! The significance table: what it says and what it may be used for.

use super::Smoothing;
use crate::identity::{ModelIdentity, ModelMismatch};
use serde::{Deserialize, Serialize};

/// Where a table comes from: what it takes to make it again.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Provenance {
    /// Model that was run.
    pub model: ModelIdentity,
    /// SHA-256 of the calibration text, hexadecimal.
    pub text_sha256: String,
    /// Tokens per window.
    pub window_tokens: usize,
    /// Seed of [`choose_windows`](crate::windows::choose_windows).
    pub seed: u64,
    /// How the rows were smoothed.
    pub smoothing: Smoothing,
    /// Name and version of the program that made the table.
    pub tool: String,
}

/// Expected scores by layer and distance. All are finite.
#[derive(Debug, Clone, PartialEq)]
pub struct SignificanceTable {
    /// How messages call it.
    pub(super) name: String,
    pub(super) counts: Vec<u64>,
    pub(super) bias: Vec<f32>,
    pub(super) deviation: Vec<f32>,
    pub(super) provenance: Provenance,
}

/// Why a table cannot be used for a model or a plan.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum MismatchError {
    /// Made for another model or another rotary scaling.
    #[error(transparent)]
    Model(#[from] ModelMismatch),
    /// Too few layers or distances.
    #[error("{table} has {found} {what}, {expected} are needed")]
    Size {
        /// The table.
        table: String,
        /// Layers or distances.
        what: &'static str,
        /// How many there are.
        found: usize,
        /// How many are needed.
        expected: usize,
    },
}

impl SignificanceTable {
    pub(super) fn from_estimate(counts: Vec<u64>, bias: Vec<f32>, deviation: Vec<f32>, provenance: Provenance) -> Self {
        Self { name: "the significance table".into(), counts, bias, deviation, provenance }
    }

    /// Expected score of layer `layer` by distance: `num_distances` finite numbers.
    ///
    /// # Panics
    ///
    /// There is no such layer; see [`Self::covers`].
    pub fn bias(&self, layer: usize) -> &[f32] {
        let n = self.num_distances();
        &self.bias[layer * n..(layer + 1) * n]
    }

    /// Root mean square difference between the scores measured in layer `layer` and their expectation: the scale on which
    /// differences in significance are to be judged. An entry's own standard error is about this over the square root of
    /// the samples behind it.
    ///
    /// # Panics
    ///
    /// There is no such layer.
    pub fn deviation(&self, layer: usize) -> f32 {
        self.deviation[layer]
    }

    /// Number of layers.
    pub fn num_layers(&self) -> usize {
        self.deviation.len()
    }

    /// Number of distances, from 0 on.
    pub fn num_distances(&self) -> usize {
        self.counts.len()
    }

    /// Samples per distance.
    pub fn counts(&self) -> &[u64] {
        &self.counts
    }

    /// Windows measured: each has one sample at distance 0.
    pub fn windows(&self) -> u64 {
        self.counts[0]
    }

    /// Largest distance that was measured; entries beyond repeat its value.
    pub fn measured_distance(&self) -> usize {
        self.counts.partition_point(|&n| n > 0) - 1
    }

    /// Where the table comes from.
    pub fn provenance(&self) -> &Provenance {
        &self.provenance
    }

    /// Checks that the table was made for `model`.
    ///
    /// # Errors
    ///
    /// It was made for another checkpoint or another rotary embedding.
    pub fn check_matches(&self, model: &ModelIdentity) -> Result<(), MismatchError> {
        Ok(self.provenance.model.check(&self.name, model)?)
    }

    /// Checks that there are entries for `num_layers` layers and distances `0 ..= max_distance`.
    ///
    /// # Errors
    ///
    /// There are fewer.
    pub fn covers(&self, num_layers: usize, max_distance: usize) -> Result<(), MismatchError> {
        let sizes = [
            ("layers", self.num_layers(), num_layers),
            ("distances", self.num_distances(), max_distance.saturating_add(1)),
        ];
        match sizes.into_iter().find(|(_, found, expected)| found < expected) {
            None => Ok(()),
            Some((what, found, expected)) => {
                Err(MismatchError::Size { table: self.name.clone(), what, found, expected })
            }
        }
    }
}
