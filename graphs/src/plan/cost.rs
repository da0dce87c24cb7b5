//! Floating-point operation counts, for floors and rooflines.

use crate::architecture::{Architecture, Mamba};
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
        Self::layer_after(arch, 0, tokens, mlp_tokens)
    }

    /// As [`Self::layer`], for rows that all see `past` earlier ones besides.
    pub fn layer_after(arch: &Architecture, past: usize, tokens: usize, mlp_tokens: usize) -> Self {
        let [projections, mlp] = arch.layer_matrix_elements();
        let [past, rows] = [past, tokens].map(|n| n as u64);
        let pairs = past * rows + rows * (rows + 1) / 2;
        Self {
            linear: 2 * (projections * rows + mlp * mlp_tokens as u64),
            attention: 4 * (arch.num_heads() * arch.head_dim()) as u64 * pairs,
        }
    }

    /// The keys and values of one decoder layer for `tokens` rows.
    pub fn keys_values(arch: &Architecture, tokens: usize) -> Self {
        Self::linear_map(arch.hidden_size(), 2 * arch.num_kv_heads() * arch.head_dim(), tokens)
    }

    /// `rows` rows through a linear map.
    pub fn linear_map(from: usize, to: usize, rows: usize) -> Self {
        Self { linear: 2 * from as u64 * to as u64 * rows as u64, attention: 0 }
    }

    /// One block of a Mamba model over `tokens` rows. Its convolution and its recurrence are not matrix products and are
    /// left out: they are about a hundredth of it.
    pub fn mamba_block(arch: &Mamba, tokens: usize) -> Self {
        let [hidden, inner] = [arch.hidden_size, arch.intermediate_size];
        let map = |from, to| Self::linear_map(from, to, tokens);
        map(hidden, 2 * inner)
            + map(inner, arch.time_step_rank + 2 * arch.state_size)
            + map(arch.time_step_rank, inner)
            + map(inner, hidden)
    }

    /// The output projection of `rows` rows.
    pub fn lm_head(arch: &Architecture, rows: usize) -> Self {
        Self::linear_map(arch.hidden_size(), arch.vocab_size(), rows)
    }

    /// Plain causal prefill of `tokens` tokens, logits of the last one only.
    pub fn plain_prefill(arch: &Architecture, tokens: usize) -> Self {
        Self::layer(arch, tokens, tokens).times(arch.num_layers()) + Self::lm_head(arch, 1)
    }

    /// The same `count` times.
    #[must_use]
    pub fn times(self, count: usize) -> Self {
        Self { linear: self.linear * count as u64, attention: self.attention * count as u64 }
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
