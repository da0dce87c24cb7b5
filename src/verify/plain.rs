//! The plain decoder on either side: `ids` from position 0 on, a chunk of rows at a time, and tokens behind them, as
//! `teacher.`: every layer, the logits of all rows, the cache. Where `ids` take more than one chunk, taps are called
//! `rows.<first>.` and their name.

use super::error::VerifyError;
use super::judge::{Detail, Findings};
use super::lockstep::against_reference;
use super::parts::Parts;
use super::sides::{Decoder, EngineRows, ReferenceRows};
use crate::pipeline::Engines;
use crate::pipeline::decode::Sequence;
use crate::reference::decode::Continuation;
use crate::reference::transformer::Transformer;
use accordion_graphs::precision::KvCache;

/// The side of `engines`. `on_progress` hears how many tokens have been read.
///
/// # Errors
///
/// The decoder cannot be run, or `parts` stops it.
pub fn engine_parts(
    engines: &mut Engines<'_>,
    [ids, teacher]: [&[u32]; 2],
    parts: &mut dyn Parts,
    on_progress: &mut dyn FnMut(usize),
) -> Result<(), VerifyError> {
    let mut sequence = Sequence::new(engines, ids.len() + teacher.len())?;
    let mut rows = EngineRows { engines, sequence: &mut sequence };
    rows.read(ids, "", parts, on_progress)?;
    let mut sequence = sequence.decoding(engines, teacher.len())?;
    let mut rows = EngineRows { engines, sequence: &mut sequence };
    rows.read(teacher, "teacher.", parts, on_progress)?;
    rows.end(parts)
}

/// The side of `reference`, whose cache holds what `kv_cache` says behind `ids`.
///
/// # Errors
///
/// The reference cannot be run, or `parts` stops it.
pub fn reference_parts(
    reference: &dyn Transformer,
    [ids, teacher]: [&[u32]; 2],
    kv_cache: KvCache,
    parts: &mut dyn Parts,
) -> Result<(), VerifyError> {
    let mut rows = Decoder { model: reference, continuation: Continuation::after(reference.empty_cache()) };
    rows.read(ids, "", parts)?;
    rows = rows.keeping(kv_cache);
    rows.read(teacher, "teacher.", parts)?;
    rows.end(parts)
}

/// Compares the decoder of `engines` with `reference` on `ids` and on `teacher` behind them.
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
    let kv_cache = engines.bundle().manifest().kv_cache;
    let expected = Box::new(move |parts: &mut dyn Parts| reference_parts(reference, [ids, teacher], kv_cache, parts));
    against_reference(engines, detail, expected, |engines, parts| {
        engine_parts(engines, [ids, teacher], parts, on_progress)
    })
}
