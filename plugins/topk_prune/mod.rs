//! Keeps the most significant tokens of a context: `ai.accordion::TopKPrune` on the CPU. See `contract.md`.

mod cpu;
mod operator;
mod rows;
#[cfg(test)]
mod tests;

pub use cpu::prune;
pub use operator::TopKPrune;

use crate::parallel::ParallelError;

/// The lengths of one call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lengths {
    /// Sequences, B.
    pub batch: usize,
    /// Query heads, H.
    pub heads: usize,
    /// Key heads, G; divides H.
    pub kv_heads: usize,
    /// Elements per head, d.
    pub head_dim: usize,
    /// Tokens before, L.
    pub length: usize,
    /// Elements per hidden state, D.
    pub hidden: usize,
    /// Layers in the cache, n.
    pub layers: usize,
    /// Tokens after, K.
    pub keep: usize,
    /// Tokens at the start that are always kept.
    pub prefix: usize,
    /// Tokens at the end that are always kept.
    pub suffix: usize,
}

/// What pruning reads.
#[derive(Debug, Clone, Copy)]
pub struct Inputs<'a> {
    /// Queries of the last token, `[B, H, d]`.
    pub query_last: &'a [f32],
    /// Keys of the layer that prunes, `[B, G, L, d]`.
    pub key: &'a [f32],
    /// Expected score by distance to the last token.
    pub bias: &'a [f32],
    /// `[B, L]`.
    pub position_ids: &'a [i64],
    /// `[B, L, D]`.
    pub hidden: &'a [f32],
    /// Keys and values of all layers so far, `[B, n, 2, G, L, d]`.
    pub kv: &'a [f32],
    /// Factor of the logits; usually `1 / sqrt(d)`.
    pub scale: f32,
}

/// What pruning writes.
#[derive(Debug)]
pub struct Outputs<'a> {
    /// Survivors, ascending, `[B, K]`.
    pub keep_idx: &'a mut [i64],
    /// `[B, K, D]`.
    pub kept_hidden: &'a mut [f32],
    /// `[B, K]`.
    pub kept_position_ids: &'a mut [i64],
    /// `[B, n, 2, G, K, d]`.
    pub kept_kv: &'a mut [f32],
    /// `[B, L]`.
    pub scores: &'a mut [f32],
    /// Logits of every head, `[B, H, L]`.
    pub metric: &'a mut [f32],
}

/// Why a call was refused.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PruneError {
    /// Lengths that do not belong together.
    #[error("{0}")]
    Lengths(String),
    /// A tensor has another number of elements than its shape.
    #[error("{tensor} has {found} elements, expected {expected}")]
    Size {
        /// Which one.
        tensor: &'static str,
        /// Its elements.
        found: usize,
        /// What the lengths ask for.
        expected: usize,
    },
    /// A token whose distance to the last one has no entry in the bias table.
    #[error(
        "sequence {batch}: token {row} is at position {position} and the last one at {last}, expected a distance of 0 to \
         {}, for which bias has entries",
        .entries.saturating_sub(1)
    )]
    Distance {
        /// Sequence.
        batch: usize,
        /// Token.
        row: usize,
        /// Its position.
        position: i64,
        /// The last token's position.
        last: i64,
        /// Entries of the bias table.
        entries: usize,
    },
    /// No threads.
    #[error(transparent)]
    Parallel(#[from] ParallelError),
}

impl Lengths {
    fn check(&self, inputs: &Inputs<'_>, outputs: &Outputs<'_>) -> Result<(), PruneError> {
        let Self { batch: b, heads: h, kv_heads: g, head_dim: d, length: l, hidden, layers: n, keep: k, .. } = *self;
        let refuse = |message: String| Err(PruneError::Lengths(message));
        if g == 0 || h == 0 || d == 0 || !h.is_multiple_of(g) {
            return refuse(format!(
                "{h} query heads, {g} key heads and head dimension {d}: expected a positive multiple of the key heads"
            ));
        }
        if k > l {
            return refuse(format!("keep is {k}, but there are {l} tokens"));
        }
        if self.prefix.checked_add(self.suffix).is_none_or(|affixes| affixes > k) {
            return refuse(format!(
                "keep is {k}, expected at least prefix_length {} plus suffix_length {}",
                self.prefix, self.suffix
            ));
        }
        let sizes: [(&'static str, usize, &[usize]); 11] = [
            ("query_last", inputs.query_last.len(), &[b, h, d]),
            ("key", inputs.key.len(), &[b, g, l, d]),
            ("position_ids", inputs.position_ids.len(), &[b, l]),
            ("hidden", inputs.hidden.len(), &[b, l, hidden]),
            ("kv", inputs.kv.len(), &[b, n, 2, g, l, d]),
            ("keep_idx", outputs.keep_idx.len(), &[b, k]),
            ("kept_hidden", outputs.kept_hidden.len(), &[b, k, hidden]),
            ("kept_position_ids", outputs.kept_position_ids.len(), &[b, k]),
            ("kept_kv", outputs.kept_kv.len(), &[b, n, 2, g, k, d]),
            ("scores", outputs.scores.len(), &[b, l]),
            ("metric", outputs.metric.len(), &[b, h, l]),
        ];
        for (tensor, found, dims) in sizes {
            let expected = dims.iter().try_fold(1usize, |n, &dim| n.checked_mul(dim));
            let expected = expected.ok_or_else(|| PruneError::Lengths(format!("{tensor} {dims:?} is too large")))?;
            if found != expected {
                return Err(PruneError::Size { tensor, found, expected });
            }
        }
        Ok(())
    }
}
