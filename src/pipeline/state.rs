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
    /// Logits `[V]` that predict the first token of the continuation; none where no prompt was read behind the context.
    pub logits: Vec<f32>,
    /// What the bottom layers attend to besides the cache.
    pub injected: Option<Injected>,
    /// What entries count in, where keys and values are 8-bit integers.
    pub scales: Option<Scales>,
}

/// What the entries of keys and values count in: per tensor of the state one of `[1, G, 1, d]`, in the same places.
#[derive(Debug, Clone)]
pub struct Scales {
    /// Of every layer of the cache.
    pub cache: Vec<[Tensor; 2]>,
    /// Of what is injected.
    pub injected: Option<Injected>,
}

/// Keys and values of a compressed context that the decoder's bottom layers attend to by cross attention. They are read,
/// never appended to.
#[derive(Debug, Clone)]
pub struct Injected {
    /// One per injected layer, from the bottom.
    pub layers: Vec<InjectedLayer>,
}

/// The injected keys and values of one layer, `[1, G, rows, d]`.
#[derive(Debug, Clone)]
pub struct InjectedLayer {
    /// Keys, rotated against queries that are not rotated.
    pub key: Tensor,
    /// The same for calls of a single token, where these rotate by another angle.
    pub single_key: Option<Tensor>,
    /// Values.
    pub value: Tensor,
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

    /// Tokens of which something is kept: the rows in the cache, and the injected ones.
    pub fn tokens_kept(&self) -> usize {
        let injected = self.injected.iter().filter_map(|injected| injected.layers.first());
        self.len() + injected.map(|layer| layer.key.shape().get(2).copied().unwrap_or(0)).sum::<usize>()
    }

    /// Bytes of keys and values, injected ones and what they count in included.
    pub fn cache_bytes(&self) -> u64 {
        let scales = self.scales.iter().map(|scales| (&scales.cache, &scales.injected));
        let parts = std::iter::once((&self.cache, &self.injected)).chain(scales);
        parts.map(|(cache, injected)| cache_bytes(cache, injected.as_ref())).sum()
    }
}

fn cache_bytes(cache: &[[Tensor; 2]], injected: Option<&Injected>) -> u64 {
    let injected = injected.into_iter().flat_map(|injected| &injected.layers);
    let injected = injected.flat_map(|layer| [Some(&layer.key), layer.single_key.as_ref(), Some(&layer.value)]);
    cache.iter().flatten().chain(injected.flatten()).map(|tensor| tensor.byte_len() as u64).sum()
}
