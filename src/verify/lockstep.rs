//! Two sides in step: as soon as one has computed a part, the other computes the same one, and every tap is judged and
//! dropped. A comparison of any size needs the memory of one part of each side.
//!
//! The expected side runs in a thread of its own and only while it is waited for: the sides never run at once, so that the time of
//! each is its own.

use super::error::VerifyError;
use super::judge::{Detail, Findings, Judge};
use super::parts::{Lineage, Part, Parts, computed_order};
use super::quantized::bounds_of;
use super::recording::Recording;
use super::verdict::{Bounds, BoundsOf, TapResult};
use crate::bundle::Bundle;
use crate::pipeline::Engines;
use crate::taps::TapSink;
use crate::tensor::Tensor;
use accordion_graphs::dtype::DType;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::ops::AddAssign;
use std::rc::Rc;
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::thread;
use std::time::Instant;

/// A side: walks through what it computes.
pub type Walk<'a> = Box<dyn FnOnce(&mut dyn Parts) -> Result<(), VerifyError> + Send + 'a>;

/// What the actual side is held against.
pub enum Expected<'a> {
    /// Another side, which is computed at the same time.
    Computed(Walk<'a>),
    /// A file, and what its names begin with: of the sample.
    Recorded(&'a Recording, &'a str),
}

/// Which taps are compared, and how closely.
pub struct Terms {
    /// Which.
    pub detail: Detail,
    /// How closely.
    pub bounds: Rc<BoundsOf>,
}

impl Terms {
    /// The bounds for a trained model where the less precise side computes in `dtype`.
    pub fn new(detail: Detail, dtype: DType) -> Self {
        Self { detail, bounds: Rc::new(move |_, kind| Bounds::new(kind, dtype)) }
    }

    /// The bounds for `bundle`, in whatever precision.
    pub fn of(detail: Detail, bundle: &Bundle) -> Self {
        Self { detail, bounds: Rc::new(bounds_of(bundle)) }
    }
}

/// What a comparison took.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Cost {
    /// Seconds of the actual side.
    pub actual_seconds: f64,
    /// Seconds of the expected side; reading, where it was recorded.
    pub expected_seconds: f64,
    /// Seconds of comparing.
    pub compare_seconds: f64,
}

impl AddAssign for Cost {
    fn add_assign(&mut self, other: Self) {
        self.actual_seconds += other.actual_seconds;
        self.expected_seconds += other.expected_seconds;
        self.compare_seconds += other.compare_seconds;
    }
}

/// Compares what `actual` computes with what is `expected`, in the order in which the expected side computes its parts.
///
/// A choice that falls otherwise is told once; what follows from it is counted as not comparable.
///
/// # Errors
///
/// A side cannot be run.
pub fn compare(
    terms: &Terms,
    expected: Expected<'_>,
    actual: impl FnOnce(&mut dyn Parts) -> Result<(), VerifyError>,
) -> Result<(Findings, Cost), VerifyError> {
    let began = Instant::now();
    thread::scope(|scope| {
        let (feed, worker) = match expected {
            Expected::Recorded(recording, sample) => (Feed::Recorded(recording, sample), None),
            Expected::Computed(walk) => {
                let (ask, asked) = channel();
                let (give, given) = sync_channel(0);
                let detail = terms.detail;
                let worker = scope.spawn(move || {
                    let mut sink = Delivered { detail, part: Part::new(), asked, give };
                    sink.wait()?;
                    walk(&mut sink)
                });
                (Feed::Computed { ask, given, held: None, done: false }, Some(worker))
            }
        };
        let mut lockstep = Lockstep::new(terms, feed);
        let walked = actual(&mut lockstep).and_then(|()| lockstep.rest());
        let Lockstep { feed, judge, mut cost, .. } = lockstep;
        // Without its channels the worker stops where it is.
        drop(feed);
        let expected = worker.map_or(Ok(()), |worker| worker.join().unwrap_or(Err(VerifyError::Stopped)));
        match (walked, expected) {
            // The reason lies on the other side.
            (Err(VerifyError::Stopped) | Ok(()), Err(error)) | (Err(error), _) => return Err(error),
            (Ok(()), Ok(())) => {}
        }
        cost.actual_seconds = began.elapsed().as_secs_f64() - cost.expected_seconds - cost.compare_seconds;
        Ok((judge.into_findings(), cost))
    })
}

/// Compares what `actual` makes `engines` compute with what the reference does, at the bounds for the engines' bundle.
///
/// # Errors
///
/// A side cannot be run.
pub fn against_reference<'b>(
    engines: &mut Engines<'b>,
    detail: Detail,
    reference: Walk<'_>,
    actual: impl FnOnce(&mut Engines<'b>, &mut dyn Parts) -> Result<(), VerifyError>,
) -> Result<Findings, VerifyError> {
    let terms = Terms::of(detail, engines.bundle());
    Ok(compare(&terms, Expected::Computed(reference), |parts| actual(engines, parts))?.0)
}

/// The expected side's sink: hands over a part, and waits until it is asked for the next one.
struct Delivered {
    detail: Detail,
    part: Part,
    asked: Receiver<()>,
    give: SyncSender<(String, Part)>,
}

impl Delivered {
    fn wait(&self) -> Result<(), VerifyError> {
        self.asked.recv().map_err(|_| VerifyError::Stopped)
    }
}

impl TapSink for Delivered {
    fn wants(&self, name: &str) -> bool {
        self.detail.includes(name)
    }

    fn record(&mut self, name: &str, value: Tensor) {
        self.part.insert(name.to_owned(), value);
    }
}

impl Parts for Delivered {
    fn end_part(&mut self, name: &str) -> Result<(), VerifyError> {
        let part = std::mem::take(&mut self.part);
        self.give.send((name.to_owned(), part)).map_err(|_| VerifyError::Stopped)?;
        self.wait()
    }
}

/// Where expected parts come from.
enum Feed<'a> {
    Computed {
        ask: Sender<()>,
        given: Receiver<(String, Part)>,
        /// A part that the actual side has not computed yet.
        held: Option<(String, Part)>,
        done: bool,
    },
    Recorded(&'a Recording, &'a str),
}

/// The actual side's sink.
struct Lockstep<'a> {
    detail: Detail,
    feed: Feed<'a>,
    part: Part,
    /// Parts that the expected side has not computed yet.
    ahead: BTreeMap<String, Part>,
    lineage: Lineage,
    judge: Judge,
    cost: Cost,
}

impl<'a> Lockstep<'a> {
    fn new(terms: &'a Terms, feed: Feed<'a>) -> Self {
        Self {
            detail: terms.detail,
            feed,
            part: Part::new(),
            ahead: BTreeMap::new(),
            lineage: Lineage::default(),
            judge: Judge::new(Rc::clone(&terms.bounds)),
            cost: Cost::default(),
        }
    }

    /// The next expected part, unless there is none any more.
    fn next(&mut self) -> Option<(String, Part)> {
        let Feed::Computed { ask, given, held, done } = &mut self.feed else { return None };
        if let Some(part) = held.take() {
            return Some(part);
        }
        if *done {
            return None;
        }
        let began = Instant::now();
        // An end of the other side shows in what it gives.
        let _ = ask.send(());
        let part = given.recv().ok();
        *done = part.is_none();
        self.cost.expected_seconds += began.elapsed().as_secs_f64();
        part
    }

    /// Judges the parts that both sides have computed, in the expected order.
    fn catch_up(&mut self) -> Result<(), VerifyError> {
        while !self.ahead.is_empty() {
            let (name, expected) = self.next().ok_or(VerifyError::Stopped)?;
            let Some(actual) = self.ahead.remove(&name) else {
                if let Feed::Computed { held, .. } = &mut self.feed {
                    *held = Some((name, expected));
                }
                break;
            };
            self.judge(&name, &actual, &expected);
        }
        Ok(())
    }

    fn judge(&mut self, name: &str, actual: &Part, expected: &Part) {
        let began = Instant::now();
        self.judge.begin(self.lineage.diverged_before(name));
        let all: BTreeSet<&String> = actual.keys().chain(expected.keys()).collect();
        for tap in computed_order(all) {
            match (actual.get(tap), expected.get(tap)) {
                (Some(actual), Some(expected)) if !self.judge.diverged() => self.judge.compare(tap, actual, expected),
                (Some(_), Some(_)) => self.judge.leave_out(1),
                _ => self.judge.note_one_sided(),
            }
        }
        self.lineage.note(name, self.judge.diverged());
        self.cost.compare_seconds += began.elapsed().as_secs_f64();
    }

    /// Judges what the recording has of `actual`.
    fn judge_recorded(&mut self, name: &str, actual: &Part) -> Result<(), VerifyError> {
        let Feed::Recorded(recording, sample) = self.feed else { return Ok(()) };
        let began = Instant::now();
        let mut expected = Part::new();
        for (tap, value) in actual {
            if let Some(recorded) = recording.tap(sample, tap, value)? {
                expected.insert(tap.clone(), recorded);
            }
        }
        self.cost.expected_seconds += began.elapsed().as_secs_f64();
        self.judge(name, actual, &expected);
        Ok(())
    }

    /// Ends the comparison: what one side alone has computed is compared with nothing.
    fn rest(&mut self) -> Result<(), VerifyError> {
        if let Feed::Recorded(recording, sample) = self.feed {
            for (tap, shape) in recording.untouched(sample) {
                if self.detail.includes(&tap) {
                    // Somebody recorded it to be compared.
                    self.judge.tell(TapResult::missing(&tap, &shape, "the actual side"));
                }
            }
            return Ok(());
        }
        self.catch_up()?;
        // Lets the expected side come to its end.
        if self.next().is_some() || !self.ahead.is_empty() {
            return Err(VerifyError::Stopped);
        }
        Ok(())
    }
}

impl TapSink for Lockstep<'_> {
    fn wants(&self, name: &str) -> bool {
        self.detail.includes(name)
    }

    fn record(&mut self, name: &str, value: Tensor) {
        self.part.insert(name.to_owned(), value);
    }
}

impl Parts for Lockstep<'_> {
    fn end_part(&mut self, name: &str) -> Result<(), VerifyError> {
        let part = std::mem::take(&mut self.part);
        if matches!(self.feed, Feed::Recorded(..)) {
            return self.judge_recorded(name, &part);
        }
        self.ahead.insert(name.to_owned(), part);
        self.catch_up()
    }
}
