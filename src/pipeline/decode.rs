//! The decoder: feeds tokens behind a context, whichever method filled the cache.

use super::cache::Cache;
use super::state_precision::dequantized_layers;
use super::{ContextState, Engines, Injected, PipelineError, Scales};
use crate::tensor::Tensor;
use accordion_graphs::precision::KvCache;
use std::ops::Range;

pub use accordion_graphs::methods::plain::{DECODER, DECODER_KV_INT8};
pub use accordion_graphs::methods::step::DECODER_STEP;

/// Rows per call where many are read: enough for matrix products at full speed, few enough that activations stay small
/// however many there are.
pub const PREFILL_ROWS: usize = 2048;

/// Where the first token of a continuation is placed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Continuation {
    /// Behind the last prompt token: `last + 1`, as the authors' `forward` does.
    #[default]
    Next,
    /// On the last prompt token: `last`, as the authors' `generate` does.
    OffByOne,
}

/// A sequence that is being decoded.
pub struct Sequence {
    cache: Cache,
    next_position: i64,
    /// And what it counts in, where it is of 8-bit integers.
    injected: [Option<Named>; 2],
}

/// What is injected, with the names of the decoder's inputs for it, made once.
struct Named {
    injected: Injected,
    names: Vec<[String; 2]>,
}

impl Named {
    fn new(injected: Injected, suffix: &str) -> Self {
        let name = |l| ["key", "value"].map(|part| format!("injected.{l}.{part}{suffix}"));
        Self { names: (0..injected.layers.len()).map(name).collect(), injected }
    }
}

impl Sequence {
    /// An empty sequence for the decoder of `engines`, with room for `capacity` rows.
    ///
    /// # Errors
    ///
    /// The bundle's model is not supported.
    pub fn new(engines: &Engines<'_>, capacity: usize) -> Result<Self, PipelineError> {
        Ok(Self { cache: Cache::new(engines.bundle(), capacity)?, next_position: 0, injected: [None, None] })
    }

    /// The sequence whose rows `cache` holds, at positions from 0 on without gaps.
    pub(super) fn of_cache(cache: Cache) -> Self {
        Self { next_position: cache.len() as i64, cache, injected: [None, None] }
    }

    /// An empty sequence whose bottom layers attend to `injected`, with room for `capacity` rows.
    ///
    /// # Errors
    ///
    /// As [`Self::new`].
    pub fn attending_to(engines: &Engines<'_>, injected: Injected, capacity: usize) -> Result<Self, PipelineError> {
        Ok(Self { injected: [Some(Named::new(injected, "")), None], ..Self::new(engines, capacity)? })
    }

    /// A continuation of `state` with room for `extra` more rows, in the numbers that the bundle's decoder keeps. The state is
    /// copied, not changed.
    ///
    /// # Errors
    ///
    /// The state does not fit the bundle's model.
    pub fn continue_from(
        engines: &Engines<'_>,
        state: &ContextState,
        extra: usize,
        continuation: Continuation,
    ) -> Result<Self, PipelineError> {
        let bundle = engines.bundle();
        let state = state.in_numbers(bundle.manifest().kv_cache)?;
        let injected_scales = state.scales.as_ref().and_then(|scales| scales.injected.clone());
        Ok(Self {
            cache: Cache::copy_of(bundle, &state, extra)?,
            next_position: state.last_position + i64::from(continuation == Continuation::Next),
            injected: [
                state.injected.clone().map(|injected| Named::new(injected, "")),
                injected_scales.map(|scales| Named::new(scales, "_scale")),
            ],
        })
    }

    /// The sequence with its rows in the numbers that the bundle's decoder keeps behind a context, with room for `extra` more:
    /// what has been read so far becomes the context.
    ///
    /// # Errors
    ///
    /// As [`Self::continue_from`].
    pub fn decoding(self, engines: &Engines<'_>, extra: usize) -> Result<Self, PipelineError> {
        if self.cache.is_int8() || engines.bundle().manifest().kv_cache == KvCache::Fp32 {
            return Ok(self);
        }
        let state = self.into_state(Vec::new())?.into_numbers(KvCache::Int8)?;
        Self::continue_from(engines, &state, extra, Continuation::Next)
    }

    /// The name of the graph that it is fed to.
    pub fn graph(&self) -> &'static str {
        if self.cache.is_int8() { DECODER_KV_INT8 } else { DECODER }
    }

    /// The name of the graph that single tokens are fed to, as far as is known before one is.
    pub fn step_graph(&self, engines: &Engines<'_>) -> &'static str {
        if self.may_step(engines) { DECODER_STEP } else { self.graph() }
    }

    /// Rows in the cache.
    pub fn len(&self) -> usize {
        self.cache.len()
    }

    /// Whether no row is in the cache.
    pub fn is_empty(&self) -> bool {
        self.cache.len() == 0
    }

    /// Position id of the next token.
    pub fn next_position(&self) -> i64 {
        self.next_position
    }

    /// Feeds `ids` and returns the logits `[rows, V]` of the last `rows` of them.
    ///
    /// # Errors
    ///
    /// An id is outside the vocabulary, or the decoder fails.
    pub fn forward(&mut self, engines: &mut Engines<'_>, ids: &[u32], rows: usize) -> Result<Tensor, PipelineError> {
        Ok(self.forward_tapped(engines, ids, rows, &[])?.0)
    }

    /// As [`Self::forward`], also returning the decoder's values `taps`.
    ///
    /// # Errors
    ///
    /// As [`Self::forward`].
    pub fn forward_tapped(
        &mut self,
        engines: &mut Engines<'_>,
        ids: &[u32],
        rows: usize,
        taps: &[&str],
    ) -> Result<(Tensor, Vec<Tensor>), PipelineError> {
        let arch = engines.bundle().architecture();
        let new = ids.len();
        let input_ids = token_tensor(ids, arch.vocab_size())?;
        if let ([id], 1, []) = (ids, rows, taps)
            && let Some(logits) = self.step(engines, *id)?
        {
            return Ok((logits, Vec::new()));
        }
        let positions: Vec<i64> = (self.next_position..).take(new).collect();
        let positions = Tensor::from_i64([1, new], positions)?;
        let keep = Tensor::from_i64([1], vec![rows as i64])?;
        let engine = engines.get(self.graph(), taps)?;
        let mut inputs = vec![("input_ids", &input_ids), ("position_ids", &positions), ("num_logits_to_keep", &keep)];
        inputs.extend(injected_inputs(&self.injected, new));
        let mut outputs = vec!["logits"];
        outputs.extend(taps);
        let mut results = self.cache.run(engine, new, &inputs, &outputs, &[])?;
        self.next_position += new as i64;
        let tapped = results.split_off(1);
        Ok((of_single(results)?, tapped))
    }

    /// Whether single tokens can be fed to the graph [`DECODER_STEP`].
    fn may_step(&self, engines: &Engines<'_>) -> bool {
        self.cache.may_step() && engines.may_step(DECODER_STEP)
    }

    /// Feeds `id` to an engine that keeps the rows so far, and returns its logits `[1, V]`; none if there is no such engine.
    fn step(&mut self, engines: &mut Engines<'_>, id: u32) -> Result<Option<Tensor>, PipelineError> {
        if !self.may_step(engines) {
            return Ok(None);
        }
        let engine = engines.get(DECODER_STEP, &[])?;
        let fixed: Vec<(&str, &Tensor)> = injected_inputs(&self.injected, 1).collect();
        let results = self.cache.step(engine, [i64::from(id), self.next_position], &fixed)?;
        self.next_position += i64::from(results.is_some());
        results.map(of_single).transpose()
    }

    /// Feeds all of `ids` in pieces of about [`PREFILL_ROWS`] and returns the logits `[V]` of the last, none where there are
    /// no ids. `on_progress` is told the ids done.
    ///
    /// # Errors
    ///
    /// As [`Self::forward`].
    pub fn read(
        &mut self,
        engines: &mut Engines<'_>,
        ids: &[u32],
        mut on_progress: impl FnMut(usize),
    ) -> Result<Vec<f32>, PipelineError> {
        let mut logits = Vec::new();
        for piece in pieces(ids.len()) {
            let done = piece.end;
            logits = self.forward(engines, &ids[piece], 1)?.to_f32();
            on_progress(done);
        }
        Ok(logits)
    }

    /// The rows so far as a state that other sequences can continue from; `logits` are those of the last row.
    ///
    /// # Errors
    ///
    /// Never for a sequence that was fed.
    pub fn into_state(self, logits: Vec<f32>) -> Result<ContextState, PipelineError> {
        let position_ids = (self.next_position - self.len() as i64..self.next_position).collect();
        let (cache, scales) = self.cache.into_tensors()?;
        let [injected, injected_scales] = self.injected.map(|named| named.map(|named| named.injected));
        let scales = scales.map(|cache| Scales { cache, injected: injected_scales });
        Ok(ContextState { cache, position_ids, last_position: self.next_position - 1, logits, injected, scales })
    }

    /// The keys and values so far, `[1, G, length, d]` per layer, as the numbers they stand for.
    ///
    /// # Errors
    ///
    /// Never for a sequence that was fed.
    pub fn cache(&self) -> Result<Vec<[Tensor; 2]>, PipelineError> {
        let (rows, scales) = self.cache.tensors()?;
        Ok(match scales {
            None => rows,
            Some(scales) => dequantized_layers(&rows, &scales)?,
        })
    }
}

/// What is injected, as inputs of the decoder for a call of `new` tokens.
fn injected_inputs(injected: &[Option<Named>; 2], new: usize) -> impl Iterator<Item = (&str, &Tensor)> {
    let layers = injected.iter().flatten().flat_map(|Named { injected, names }| injected.layers.iter().zip(names));
    layers.flat_map(move |(layer, [key_name, value_name])| {
        let key = if new == 1 { layer.single_key.as_ref().unwrap_or(&layer.key) } else { &layer.key };
        [(key_name.as_str(), key), (value_name.as_str(), &layer.value)]
    })
}

/// The first of `results`, `[1, rows, V]`, as `[rows, V]` on the host.
fn of_single(mut results: Vec<Tensor>) -> Result<Tensor, PipelineError> {
    let logits = results.swap_remove(0).on_host()?;
    Ok(logits.rows(0..1).reshaped(&logits.shape()[1..])?)
}

/// Token ids as an input `[1, ids]`.
pub(super) fn token_tensor(ids: &[u32], vocab_size: usize) -> Result<Tensor, PipelineError> {
    if let Some(&id) = ids.iter().find(|&&id| id as usize >= vocab_size) {
        return Err(PipelineError::TokenId { id, vocab_size });
    }
    Ok(Tensor::from_i64([1, ids.len()], ids.iter().map(|&id| i64::from(id)).collect())?)
}

/// A text of `length` tokens, piece by piece. None is a single token unless that is all: SharedLLM as released computes
/// something else in a call of one.
fn pieces(length: usize) -> impl Iterator<Item = Range<usize>> {
    let over = usize::from(length > PREFILL_ROWS && length % PREFILL_ROWS == 1);
    let whole = length - over;
    (0..whole).step_by(PREFILL_ROWS).map(move |start| {
        let end = start + PREFILL_ROWS;
        start..if end >= whole { length } else { end }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_piece_is_a_single_token_unless_that_is_all() {
        let lengths = |length| pieces(length).map(|piece| piece.len()).collect::<Vec<_>>();
        assert_eq!(lengths(1), [1]);
        assert_eq!(lengths(PREFILL_ROWS), [PREFILL_ROWS]);
        assert_eq!(lengths(PREFILL_ROWS + 1), [PREFILL_ROWS + 1]);
        assert_eq!(lengths(PREFILL_ROWS + 2), [PREFILL_ROWS, 2]);
        assert_eq!(lengths(2 * PREFILL_ROWS + 1), [PREFILL_ROWS, PREFILL_ROWS + 1]);
        assert_eq!(pieces(5000).flatten().collect::<Vec<_>>(), (0..5000).collect::<Vec<_>>());
    }
}
