//! Floating-point operation counts, for floors and rooflines.

use crate::architecture::Architecture;
use serde::Serialize;
use std::ops::{Add, AddAssign};

/// Floating-point operations (a multiply-add is two), split by the kind of kernel that performs them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct OperationCount {
    /// In matrix products with weights.
    pub linear: u64,
    /// In attention, counting only the part of the score matrix that the mask leaves.
    pub attention: u64,
}

impl OperationCount {
    /// One decoder layer over `tokens` rows that attend causally to each other, `mlp_tokens` of which go on to the MLP.
    pub fn layer(arch: &Architecture, tokens: usize, mlp_tokens: usize) -> Self {
        let [projections, mlp] = arch.layer_matrix_elements();
        let pairs = tokens as u64 * (tokens as u64 + 1) / 2;
        Self {
            linear: 2 * (projections * tokens as u64 + mlp * mlp_tokens as u64),
            attention: 4 * (arch.num_heads() * arch.head_dim()) as u64 * pairs,
        }
    }

    /// The output projection of `rows` rows.
    pub fn lm_head(arch: &Architecture, rows: usize) -> Self {
        Self { linear: 2 * (arch.hidden_size() * arch.vocab_size() * rows) as u64, attention: 0 }
    }

    /// Plain causal prefill of `tokens` tokens, logits of the last one only.
    pub fn plain_prefill(arch: &Architecture, tokens: usize) -> Self {
        let one = Self::layer(arch, tokens, tokens);
        let all =
            Self { linear: one.linear * arch.num_layers() as u64, attention: one.attention * arch.num_layers() as u64 };
        all + Self::lm_head(arch, 1)
    }

    /// As often as `count` says.
    #[must_use]
    pub fn times(self, count: u64) -> Self {
        Self { linear: self.linear * count, attention: self.attention * count }
    }

    /// All operations.
    pub fn total(&self) -> u64 {
        self.linear + self.attention
    }
}

impl Add for OperationCount {
    type Output = Self;
    fn add(self, other: Self) -> Self {
        Self { linear: self.linear + other.linear, attention: self.attention + other.attention }
    }
}

impl AddAssign for OperationCount {
    fn add_assign(&mut self, other: Self) {
        *self = *self + other;
    }
}
