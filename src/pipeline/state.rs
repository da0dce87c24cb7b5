//! What compressing a context yields.

use crate::tensor::Tensor;

/// A compressed (or plainly read) context: everything that decoding needs, whichever method made it. It is never
/// changed by decoding; any number of continuations can start from it.
#[derive(Debug, Clone)]
pub struct ContextState {
    /// Keys and values of every layer, `[1, G, L, d]`, keys rotated.
    pub cache: Vec<[Tensor; 2]>,
    /// Position ids of the `L` cached rows.
    pub position_ids: Vec<i64>,
    /// Position of the last prompt token: a continuation starts behind it.
    pub last_position: i64,
    /// Logits `[V]` that predict the first token of the continuation.
    pub logits: Vec<f32>,
}

impl ContextState {
    /// Rows in the cache: the tokens that were kept.
    pub fn len(&self) -> usize {
        self.position_ids.len()
    }

    /// Whether nothing was kept.
    pub fn is_empty(&self) -> bool {
        self.position_ids.is_empty()
    }

    /// Bytes of keys and values.
    pub fn cache_bytes(&self) -> u64 {
        self.cache.iter().flatten().map(|t| t.bytes().len() as u64).sum()
    }
}
