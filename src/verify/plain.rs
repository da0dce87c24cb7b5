//! The plain decoder against the reference, a chunk of rows at a time.

use super::error::VerifyError;
use super::judge::{Detail, Findings, Judge};
use super::verdict::Bounds;
use crate::pipeline::Engines;
use crate::pipeline::decode::{DECODER, Sequence};
use crate::reference::cache::Cache;
use crate::reference::llama::Llama;
use crate::reference::transformer::Transformer;
use crate::reference::{plain, to_tensor};
use crate::tensor::{Tensor, TensorError};
use accordion_graphs::dtype::DType;
use accordion_graphs::onnx::ValueInfo;

/// Rows that are compared at a time: their logits over a large vocabulary take a hundred megabytes on each side.
const ROWS: usize = 512;

/// Compares the decoder of `engines` with `reference` on `ids`, from position 0 on: every layer, the logits of all rows, the
/// cache. Where `ids` take more than one chunk, taps are called `rows.<first>.` and their name. `on_progress` hears how many
/// tokens have been compared.
///
/// # Errors
///
/// A side cannot be run.
pub fn compare_plain(
    engines: &mut Engines<'_>,
    reference: &Llama,
    ids: &[u32],
    detail: Detail,
    on_progress: &mut dyn FnMut(usize),
) -> Result<Findings, VerifyError> {
    let mut judge = Judge::new(detail, |kind| Bounds::new(kind, DType::F32));
    let mut sequence = Sequence::new(engines, ids.len())?;
    let mut cache = reference.empty_cache();
    let mut rows = BothSides { engines, sequence: &mut sequence, reference, cache: &mut cache };
    rows.compare(&mut judge, ids, "", on_progress)?;
    rows.compare_caches(&mut judge)?;
    Ok(judge.into_findings())
}

/// A sequence on both sides: the engine's, and the reference's cache of the same rows, at positions without gaps.
pub(super) struct BothSides<'a, 'b> {
    pub(super) engines: &'a mut Engines<'b>,
    pub(super) sequence: &'a mut Sequence,
    pub(super) reference: &'a dyn Transformer,
    pub(super) cache: &'a mut Cache,
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
            taps.iter().filter(|(tap, _)| tap.starts_with("layers.") && judge.expects(tap)).collect();
        let values: Vec<&str> = taps.iter().map(|(_, value)| value.name.as_str()).collect();
        for chunk in ids.chunks(ROWS) {
            let first = self.sequence.len();
            let rows = if ids.len() > ROWS { format!("rows.{first}.") } else { String::new() };
            judge.prefix = format!("{prefix}{rows}");
            let (logits, tapped) = self.sequence.forward_tapped(self.engines, chunk, chunk.len(), &values)?;
            for ((tap, info), value) in taps.iter().zip(tapped) {
                judge.offer(tap, single(info, &value)?);
            }
            let positions: Vec<i64> = (first as i64..).take(chunk.len()).collect();
            judge.begin(false);
            let hidden = plain::forward(self.reference, chunk, &positions, self.cache, judge)?;
            judge.end("");
            judge.compare("logits", &logits, &to_tensor(&self.reference.logits(&hidden))?);
            on_progress(self.sequence.len());
        }
        judge.prefix.clear();
        Ok(())
    }

    /// Compares the keys and values of all rows.
    pub(super) fn compare_caches(&self, judge: &mut Judge) -> Result<(), VerifyError> {
        for (layer, (found, expected)) in self.sequence.cache()?.iter().zip(&self.cache.layers).enumerate() {
            for (part, found, expected) in [("k", &found[0], &expected.k), ("v", &found[1], &expected.v)] {
                let found = found.reshaped(&found.shape()[1..])?;
                judge.compare(&format!("cache.{part}.{layer}"), &found, &to_tensor(expected)?);
            }
        }
        Ok(())
    }
}

/// A tap of a batch of one, without the batch axis where it has one.
fn single(info: &ValueInfo, value: &Tensor) -> Result<Tensor, TensorError> {
    let batched = info.shape.first().is_some_and(|dim| dim == "batch");
    if batched { value.reshaped(&value.shape()[1..]) } else { Ok(value.clone()) }
}
