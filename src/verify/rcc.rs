//! An RCC bundle on either side, segment by segment: everything the graphs compute of each, as `segments.<s>.` and the tap's
//! name, then the decoder over the prompt and the teacher's tokens, as `prompt.` and `teacher.`, and the cache.
//!
//! What reaches no token (the encoder's last states and the last map) the graphs do not compute. The engine runs one segment
//! at a time, as the reference does.

use super::error::VerifyError;
use super::judge::{Detail, Findings};
use super::lockstep::against_reference;
use super::parts::{Parts, Shared};
use super::sides::{Decoder, EngineRows, ReferenceRows};
use crate::pipeline::Engines;
use crate::pipeline::rcc::read_slots;
use crate::reference::decode::Continuation;
use crate::reference::rcc::Rcc;
use crate::taps::TapSink;
use crate::tensor::Tensor;
use accordion_graphs::plan::rcc::RccPlan;
use accordion_graphs::precision::KvCache;

/// What both sides are given.
#[derive(Debug, Clone, Copy)]
pub struct RccInput<'a> {
    /// Segments and slots.
    pub plan: &'a RccPlan,
    /// Token ids of prefix and context, which are compressed together \[N\].
    pub text: &'a [u32],
    /// Token ids that the decoder reads behind the slots \[P\].
    pub prompt: &'a [u32],
    /// Token ids fed to both sides behind the prompt, whatever they would have generated themselves.
    pub teacher: &'a [u32],
}

/// The side of `engines`. `on_progress` hears how many segments have been read.
///
/// # Errors
///
/// A graph cannot be run, or `parts` stops it.
pub fn engine_parts(
    engines: &mut Engines<'_>,
    input: &RccInput<'_>,
    parts: &mut dyn Parts,
    on_progress: &mut dyn FnMut(usize),
) -> Result<(), VerifyError> {
    let shared = Shared::new(parts);
    let mut sequence = {
        let mut on_batch = |done: usize| {
            shared.end_part(&segment(done - 1));
            on_progress(done);
        };
        read_slots(engines, input.plan, input.text, 1, &mut EngineTaps(&shared), &mut on_batch)?
    };
    let parts = shared.finish()?;
    EngineRows { engines, sequence: &mut sequence }.read(input.prompt, "prompt.", parts, &mut |_| {})?;
    let mut sequence = sequence.decoding(engines, input.teacher.len())?;
    let mut rows = EngineRows { engines, sequence: &mut sequence };
    rows.read(input.teacher, "teacher.", parts, &mut |_| {})?;
    rows.end(parts)
}

/// The side of `reference`, whose cache holds what `kv_cache` says behind the prompt.
///
/// # Errors
///
/// The reference cannot be run, or `parts` stops it.
pub fn reference_parts(
    reference: &Rcc,
    input: &RccInput<'_>,
    kv_cache: KvCache,
    parts: &mut dyn Parts,
) -> Result<(), VerifyError> {
    let mut cache = reference.decoder().empty_cache();
    for index in 0..input.plan.segments {
        let scope = segment(index);
        let mut taps = Within { parts, scope: &scope };
        let maps = reference.encode(&input.plan.segment(input.text, index), &mut taps)?;
        reference.fill(&maps, &mut cache, &mut taps)?;
        parts.end_part(&scope)?;
    }
    let mut rows = Decoder { model: reference.decoder(), continuation: Continuation::after(cache) };
    rows.read(input.prompt, "prompt.", parts)?;
    rows = rows.keeping(kv_cache);
    rows.read(input.teacher, "teacher.", parts)?;
    rows.end(parts)
}

/// Compares `engines` with `reference` on `input`. `on_progress` hears how many segments have been read.
///
/// # Errors
///
/// A side cannot be run.
pub fn compare_rcc(
    engines: &mut Engines<'_>,
    reference: &Rcc,
    input: &RccInput<'_>,
    detail: Detail,
    on_progress: &mut dyn FnMut(usize),
) -> Result<Findings, VerifyError> {
    let kv_cache = engines.bundle().manifest().kv_cache;
    let expected = Box::new(move |parts: &mut dyn Parts| reference_parts(reference, input, kv_cache, parts));
    against_reference(engines, detail, expected, |engines, parts| engine_parts(engines, input, parts, on_progress))
}

fn segment(index: usize) -> String {
    format!("segments.{index}")
}

/// The reference's taps inside a segment.
struct Within<'a> {
    parts: &'a mut dyn Parts,
    scope: &'a str,
}

impl TapSink for Within<'_> {
    fn wants(&self, name: &str) -> bool {
        self.parts.wants(&format!("{}.{name}", self.scope))
    }

    fn record(&mut self, name: &str, value: Tensor) {
        self.parts.record(&format!("{}.{name}", self.scope), value);
    }
}

/// The engine's taps, without an axis of segments, as the reference has them.
struct EngineTaps<'s, 'p>(&'s Shared<'p>);

impl TapSink for EngineTaps<'_, '_> {
    fn wants(&self, name: &str) -> bool {
        // All maps at once; they are taps one by one too.
        name.rsplit('.').next() != Some("maps") && self.0.wants(name)
    }

    fn record(&mut self, name: &str, value: Tensor) {
        let one = match value.shape() {
            [1, shape @ ..] if shape.len() > 1 => value.reshaped(shape),
            _ => Ok(value.clone()),
        };
        self.0.note(one.map(|one| self.0.record(name, one)));
    }
}
