//! The plain decoder against the reference.

use super::error::VerifyError;
use super::judge::{Detail, Findings, Judge};
use super::quantized::bounds_of;
use super::sides::{BothSides, Decoder};
use crate::pipeline::Engines;
use crate::pipeline::decode::Sequence;
use crate::reference::decode::Continuation;
use crate::reference::transformer::Transformer;

/// Compares the decoder of `engines` with `reference` on `ids` from position 0 on, a chunk of rows at a time, and on `teacher`
/// behind them, as `teacher.`: every layer, the logits of all rows, the cache. Where `ids` take more than one chunk, taps are
/// called `rows.<first>.` and their name. `on_progress` hears how many tokens have been compared.
///
/// # Errors
///
/// A side cannot be run.
pub fn compare_plain(
    engines: &mut Engines<'_>,
    reference: &dyn Transformer,
    ids: &[u32],
    teacher: &[u32],
    detail: Detail,
    on_progress: &mut dyn FnMut(usize),
) -> Result<Findings, VerifyError> {
    let mut judge = Judge::new(detail, bounds_of(engines.bundle()));
    let mut sequence = Sequence::new(engines, ids.len() + teacher.len())?;
    let mut reference = Decoder { model: reference, continuation: Continuation::after(reference.empty_cache()) };
    let mut rows = BothSides { engines, sequence: &mut sequence, reference: &mut reference };
    rows.compare(&mut judge, ids, "", on_progress)?;
    rows.compare(&mut judge, teacher, "teacher.", on_progress)?;
    rows.compare_caches(&mut judge)?;
    Ok(judge.into_findings())
}
