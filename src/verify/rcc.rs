//! An RCC bundle against the reference, segment by segment: as soon as the engine has put a segment's slots into its cache,
//! the reference does the same, and every tap is judged and dropped.

use super::error::VerifyError;
use super::judge::{Detail, Findings, Judge};
use super::quantized::bounds_of;
use super::sides::{BothSides, Decoder};
use crate::pipeline::Engines;
use crate::pipeline::rcc::read_slots;
use crate::reference::cache::Cache;
use crate::reference::decode::Continuation;
use crate::reference::rcc::Rcc;
use crate::taps::TapSink;
use crate::tensor::Tensor;
use accordion_graphs::plan::rcc::RccPlan;
use std::cell::RefCell;

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

/// Compares `engines` with `reference` on `input`: everything the graphs compute of each segment, as `segments.<s>.` and
/// the tap's name, then the decoder over the prompt and the teacher's tokens, as `prompt.` and `teacher.`, and the cache.
/// What reaches no token (the encoder's last states and the last map) the graphs do not compute. The engine runs one segment
/// at a time, as the reference does. `on_progress` hears how many segments have been compared.
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
    let lockstep = RefCell::new(Lockstep {
        input: *input,
        reference,
        cache: reference.decoder().empty_cache(),
        judge: Judge::new(detail, bounds_of(engines.bundle())),
        error: None,
    });
    let mut sequence = {
        let mut on_batch = |done: usize| {
            lockstep.borrow_mut().segment(done - 1);
            on_progress(done);
        };
        read_slots(engines, input.plan, input.text, 1, &mut EngineTaps(&lockstep), &mut on_batch)?
    };
    let Lockstep { cache, mut judge, error, .. } = lockstep.into_inner();
    if let Some(error) = error {
        return Err(error);
    }
    let mut reference = Decoder { model: reference.decoder(), continuation: Continuation::after(cache) };
    let mut rows = BothSides { engines, sequence: &mut sequence, reference: &mut reference };
    for (prefix, ids) in [("prompt.", input.prompt), ("teacher.", input.teacher)] {
        rows.compare(&mut judge, ids, prefix, &mut |_| {})?;
    }
    rows.compare_caches(&mut judge)?;
    Ok(judge.into_findings())
}

/// The engine's taps, on their way to the judge.
struct EngineTaps<'c, 'a>(&'c RefCell<Lockstep<'a>>);

/// The reference, one segment behind the engine.
struct Lockstep<'a> {
    input: RccInput<'a>,
    reference: &'a Rcc,
    cache: Cache,
    judge: Judge,
    /// The engine cannot be stopped from inside: what went wrong waits here.
    error: Option<VerifyError>,
}

impl Lockstep<'_> {
    /// The engine has run segment `index`: the reference follows.
    fn segment(&mut self, index: usize) {
        if self.error.is_some() {
            return;
        }
        let RccInput { plan, text, .. } = self.input;
        self.judge.prefix = format!("segments.{index}.");
        self.judge.begin(false);
        let mut taps = self.judge.offered();
        let maps = self.reference.encode(&plan.segment(text, index), &mut taps);
        let filled = maps.and_then(|maps| self.reference.fill(&maps, &mut self.cache, &mut taps));
        self.error = filled.err().map(Into::into);
        self.judge.end("");
        self.judge.prefix.clear();
    }
}

/// The name of a tap inside its segment.
fn within_segment(name: &str) -> &str {
    name.splitn(3, '.').nth(2).unwrap_or(name)
}

impl TapSink for EngineTaps<'_, '_> {
    fn wants(&self, name: &str) -> bool {
        let lockstep = self.0.borrow();
        lockstep.error.is_none() && lockstep.judge.expects(within_segment(name))
    }

    fn record(&mut self, name: &str, value: Tensor) {
        let mut lockstep = self.0.borrow_mut();
        let tap = within_segment(name);
        // The reference has every map by itself, and no axis of segments.
        let (rows, shape) = match value.shape() {
            [rows, shape @ ..] => (*rows, shape.to_vec()),
            [] => (1, Vec::new()),
        };
        let offered = if tap == "maps" {
            (0..rows).try_for_each(|map| {
                let value = value.rows(map..map + 1).reshaped(shape.clone())?;
                lockstep.judge.offer(&format!("maps.{map}"), value);
                Ok(())
            })
        } else if rows == 1 && shape.len() > 1 {
            value.reshaped(shape).map(|value| lockstep.judge.offer(tap, value))
        } else {
            lockstep.judge.offer(tap, value);
            Ok(())
        };
        if let Err(error) = offered {
            lockstep.error = Some(VerifyError::Tensor(error));
        }
    }
}
