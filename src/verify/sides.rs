//! A sequence on both sides: tokens through the engine's decoder and through the reference.

use super::error::VerifyError;
use super::judge::Judge;
use crate::pipeline::Engines;
use crate::pipeline::decode::{DECODER, Sequence};
use crate::reference::cache::Cache;
use crate::reference::decode::Continuation;
use crate::reference::sharedllm::{RunningText, SharedLlm};
use crate::reference::transformer::Transformer;
use crate::reference::{ReferenceError, to_tensor};
use crate::taps::TapSink;
use crate::tensor::{Tensor, TensorError};
use accordion_graphs::onnx::ValueInfo;
use ndarray::Array2;

/// Rows that are compared at a time: their logits over a large vocabulary take a hundred megabytes on each side.
const ROWS: usize = 512;

/// The reference's side of a sequence.
pub(super) trait Reference {
    /// Feeds `ids` and returns the logits of all of them, `[ids, V]`.
    fn feed(&mut self, ids: &[u32], taps: &mut dyn TapSink) -> Result<Array2<f32>, ReferenceError>;

    /// Keys and values of all that was fed.
    fn cache(&self) -> &Cache;
}

/// A decoder that reads on.
pub(super) struct Decoder<'a> {
    pub(super) model: &'a dyn Transformer,
    pub(super) continuation: Continuation,
}

impl Reference for Decoder<'_> {
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

impl Reference for Running<'_> {
    fn feed(&mut self, ids: &[u32], taps: &mut dyn TapSink) -> Result<Array2<f32>, ReferenceError> {
        self.text.feed(self.model, ids, taps)
    }

    fn cache(&self) -> &Cache {
        &self.text.cache
    }
}

/// A sequence on both sides: the engine's, and the reference's of the same rows.
pub(super) struct BothSides<'a, 'b> {
    pub(super) engines: &'a mut Engines<'b>,
    pub(super) sequence: &'a mut Sequence,
    pub(super) reference: &'a mut dyn Reference,
}

impl BothSides<'_, '_> {
    /// Feeds `ids` to both sides and compares every layer, and the logits of all rows. Results are called `prefix` and the
    /// tap's name, with `rows.<first>.` between them where it takes more than one chunk. `on_progress` hears how many rows
    /// the sequence has.
    pub(super) fn compare(
        &mut self,
        judge: &mut Judge,
        ids: &[u32],
        prefix: &str,
        on_progress: &mut dyn FnMut(usize),
    ) -> Result<(), VerifyError> {
        let taps = &self.engines.signature(DECODER)?.taps;
        let taps: Vec<(&String, &ValueInfo)> =
            taps.iter().filter(|(tap, _)| in_layers(tap) && judge.expects(tap)).collect();
        let values: Vec<&str> = taps.iter().map(|(_, value)| value.name.as_str()).collect();
        for chunk in ids.chunks(ROWS) {
            let first = self.sequence.len();
            let rows = if ids.len() > ROWS { format!("rows.{first}.") } else { String::new() };
            judge.prefix = format!("{prefix}{rows}");
            let (logits, tapped) = self.sequence.forward_tapped(self.engines, chunk, chunk.len(), &values)?;
            for ((tap, info), value) in taps.iter().zip(tapped) {
                judge.offer(tap, single(info, &value)?);
            }
            judge.begin(false);
            let expected = self.reference.feed(chunk, &mut Layers(judge))?;
            judge.end("");
            judge.compare("logits", &logits, &to_tensor(&expected)?);
            on_progress(self.sequence.len());
        }
        judge.prefix.clear();
        Ok(())
    }

    /// Compares the keys and values of all rows.
    pub(super) fn compare_caches(&self, judge: &mut Judge) -> Result<(), VerifyError> {
        for (layer, (found, expected)) in self.sequence.cache()?.iter().zip(&self.reference.cache().layers).enumerate()
        {
            for (part, found, expected) in [("k", &found[0], &expected.k), ("v", &found[1], &expected.v)] {
                let found = found.reshaped(&found.shape()[1..])?;
                judge.compare(&format!("cache.{part}.{layer}"), &found, &to_tensor(expected)?);
            }
        }
        Ok(())
    }
}

/// Whether a tap belongs to a layer; what is around the layers shows in the logits.
fn in_layers(tap: &str) -> bool {
    tap.starts_with("layers.")
}

/// The reference's taps inside its layers.
struct Layers<'a>(&'a mut Judge);

impl TapSink for Layers<'_> {
    fn wants(&self, name: &str) -> bool {
        in_layers(name) && self.0.wants(name)
    }

    fn record(&mut self, name: &str, value: Tensor) {
        self.0.record(name, value);
    }
}

/// A tap of a batch of one, without the batch axis where it has one.
fn single(info: &ValueInfo, value: &Tensor) -> Result<Tensor, TensorError> {
    let batched = info.shape.first().is_some_and(|dim| dim == "batch");
    if batched { value.reshaped(&value.shape()[1..]) } else { Ok(value.clone()) }
}
