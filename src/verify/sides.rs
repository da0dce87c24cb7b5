//! Rows on either side: tokens through the engine's decoder, or through the reference.

use super::error::VerifyError;
use super::parts::{Parts, RESULT};
use crate::pipeline::Engines;
use crate::pipeline::decode::Sequence;
use crate::reference::cache::Cache;
use crate::reference::decode::Continuation;
use crate::reference::sharedllm::{RunningText, SharedLlm};
use crate::reference::transformer::Transformer;
use crate::reference::{ReferenceError, to_tensor};
use crate::taps::TapSink;
use crate::tensor::{Tensor, TensorError};
use accordion_graphs::onnx::ValueInfo;
use accordion_graphs::precision::KvCache;
use ndarray::Array2;

/// Rows that are compared at a time: their logits over a large vocabulary take a hundred megabytes on each side.
const ROWS: usize = 512;

/// Pieces of `ids` and what the names of their taps begin with: `prefix`, and `rows.<first>.` where it takes more than one.
/// Parts are called as their taps begin.
fn pieces<'i>(ids: &'i [u32], first: usize, prefix: &'i str) -> impl Iterator<Item = (&'i [u32], String)> + 'i {
    ids.chunks(ROWS).enumerate().map(move |(piece, chunk)| {
        let rows = if ids.len() > ROWS { format!("rows.{}.", first + piece * ROWS) } else { String::new() };
        (chunk, format!("{prefix}{rows}"))
    })
}

/// The engine's side of a sequence.
pub(super) struct EngineRows<'a, 'b> {
    pub(super) engines: &'a mut Engines<'b>,
    pub(super) sequence: &'a mut Sequence,
}

impl EngineRows<'_, '_> {
    /// Feeds `ids`: the taps of every layer, and the logits of all rows. `on_progress` hears how many rows the sequence has.
    pub(super) fn read(
        &mut self,
        ids: &[u32],
        prefix: &str,
        parts: &mut dyn Parts,
        on_progress: &mut dyn FnMut(usize),
    ) -> Result<(), VerifyError> {
        let all = &self.engines.signature(self.sequence.graph())?.taps;
        for (chunk, prefix) in pieces(ids, self.sequence.len(), prefix) {
            let wanted = |tap: &str| in_layers(tap) && parts.wants(&format!("{prefix}{tap}"));
            let taps: Vec<(&String, &ValueInfo)> = all.iter().filter(|(tap, _)| wanted(tap)).collect();
            let values: Vec<&str> = taps.iter().map(|(_, value)| value.name.as_str()).collect();
            let (logits, tapped) = self.sequence.forward_tapped(self.engines, chunk, chunk.len(), &values)?;
            for ((tap, info), value) in taps.iter().zip(tapped) {
                parts.record(&format!("{prefix}{tap}"), single(info, &value)?);
            }
            parts.record(&format!("{prefix}logits"), logits);
            parts.end_part(&prefix)?;
            on_progress(self.sequence.len());
        }
        Ok(())
    }

    /// The keys and values of all rows.
    pub(super) fn end(&self, parts: &mut dyn Parts) -> Result<(), VerifyError> {
        for (layer, both) in self.sequence.cache()?.iter().enumerate() {
            for (part, found) in ["k", "v"].iter().zip(both) {
                parts.record(&format!("cache.{part}.{layer}"), found.reshaped(&found.shape()[1..])?);
            }
        }
        parts.end_part(RESULT)
    }
}

/// The reference's side of a sequence.
pub(super) trait ReferenceRows {
    /// Feeds `ids` and returns the logits of all of them, `[ids, V]`.
    fn feed(&mut self, ids: &[u32], taps: &mut dyn TapSink) -> Result<Array2<f32>, ReferenceError>;

    /// Keys and values of all that was fed.
    fn cache(&self) -> &Cache;

    /// As [`EngineRows::read`].
    fn read(&mut self, ids: &[u32], prefix: &str, parts: &mut dyn Parts) -> Result<(), VerifyError> {
        for (chunk, prefix) in pieces(ids, self.cache().rows(), prefix) {
            let logits = self.feed(chunk, &mut Layers { parts, prefix: &prefix })?;
            parts.record(&format!("{prefix}logits"), to_tensor(&logits)?);
            parts.end_part(&prefix)?;
        }
        Ok(())
    }

    /// As [`EngineRows::end`].
    fn end(&self, parts: &mut dyn Parts) -> Result<(), VerifyError> {
        for (layer, kv) in self.cache().layers.iter().enumerate() {
            for (part, rows) in [("k", &kv.k), ("v", &kv.v)] {
                parts.record(&format!("cache.{part}.{layer}"), to_tensor(rows)?);
            }
        }
        parts.end_part(RESULT)
    }
}

/// A decoder that reads on.
pub(super) struct Decoder<'a> {
    pub(super) model: &'a dyn Transformer,
    pub(super) continuation: Continuation,
}

impl Decoder<'_> {
    /// The same, with a cache that holds what `kv_cache` says from here on.
    pub(super) fn keeping(self, kv_cache: KvCache) -> Self {
        match kv_cache {
            KvCache::Fp32 => self,
            KvCache::Int8 => Self { continuation: self.continuation.rounded(), ..self },
        }
    }
}

impl ReferenceRows for Decoder<'_> {
    fn feed(&mut self, ids: &[u32], taps: &mut dyn TapSink) -> Result<Array2<f32>, ReferenceError> {
        self.continuation.feed(self.model, ids, taps)
    }

    fn cache(&self) -> &Cache {
        &self.continuation.cache
    }
}

/// A running text that attends to a context.
#[derive(Clone)]
pub(super) struct Running<'a> {
    pub(super) model: &'a SharedLlm,
    pub(super) text: RunningText<'a>,
}

impl ReferenceRows for Running<'_> {
    fn feed(&mut self, ids: &[u32], taps: &mut dyn TapSink) -> Result<Array2<f32>, ReferenceError> {
        self.text.feed(self.model, ids, taps)
    }

    fn cache(&self) -> &Cache {
        &self.text.cache
    }
}

/// Whether a tap belongs to a layer; what is around the layers shows in the logits.
fn in_layers(tap: &str) -> bool {
    tap.starts_with("layers.")
}

/// The reference's taps inside its layers.
struct Layers<'a> {
    parts: &'a mut dyn Parts,
    prefix: &'a str,
}

impl TapSink for Layers<'_> {
    fn wants(&self, name: &str) -> bool {
        in_layers(name) && self.parts.wants(&format!("{}{name}", self.prefix))
    }

    fn record(&mut self, name: &str, value: Tensor) {
        self.parts.record(&format!("{}{name}", self.prefix), value);
    }
}

/// A tap of a batch of one, without the batch axis where it has one.
pub(super) fn single(info: &ValueInfo, value: &Tensor) -> Result<Tensor, TensorError> {
    let batched = info.shape.first().is_some_and(|dim| dim == "batch");
    if batched { value.reshaped(&value.shape()[1..]) } else { Ok(value.clone()) }
}
