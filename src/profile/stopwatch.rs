//! Time per graph, without the runtime's own records: a loader whose engines time their runs. It costs two readings of
//! the clock for every run of a graph.

use crate::cuda::{CudaError, Meter};
use crate::runtime::steps::{MaybeSteps, StepCall, Steps};
use crate::runtime::{Engine, EngineError, InPlace, Loader};
use crate::tensor::Tensor;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Adds up what the graphs of the loaders that it watches take. Clones share one record.
#[derive(Debug, Clone, Default)]
pub struct Stopwatch(Arc<Mutex<State>>);

#[derive(Debug, Default)]
struct State {
    record: Record,
    /// Of the device of the loader that was watched last, if it has one.
    meter: Option<Arc<Meter>>,
}

/// Times since a stopwatch was last read.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Record {
    /// Spent loading graphs.
    pub loading: Duration,
    /// Runs of each graph.
    pub graphs: BTreeMap<String, GraphTime>,
    /// Spent by the host waiting for the device, copying included; not known where engines have none.
    pub waiting: Option<Duration>,
}

/// All runs of a graph.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct GraphTime {
    /// How many.
    pub calls: usize,
    /// The host's time: where engines have a device, that of putting the work on its stream, without waiting for it.
    pub host: Duration,
    /// The device's time, where engines have one.
    pub device: Option<Duration>,
}

impl Record {
    /// The host's time in runs of graphs.
    pub fn running(&self) -> Duration {
        self.graphs.values().map(|graph| graph.host).sum()
    }

    /// The device's time in runs of graphs; `None` where there were none on a device.
    pub fn computing(&self) -> Option<Duration> {
        self.graphs.values().map(|graph| graph.device).sum()
    }
}

impl Stopwatch {
    /// `loader`, with its graphs being timed.
    pub fn watch<'a>(&self, loader: impl Loader + 'a) -> Box<dyn Loader + 'a> {
        let meter = loader.meter();
        if let Some(meter) = &meter {
            meter.start();
        }
        self.state().meter = meter;
        Box::new(TimedLoader { loader, stopwatch: self.clone() })
    }

    /// What was added up, and starts over. Where engines have a device, this waits for it.
    ///
    /// # Errors
    ///
    /// What was under way on the device has failed.
    pub fn take(&self) -> Result<Record, CudaError> {
        let mut state = self.state();
        let mut record = std::mem::take(&mut state.record);
        if let Some(meter) = &state.meter {
            let times = meter.take()?;
            for (name, (_, time)) in times.work {
                record.graphs.entry(name).or_default().device = Some(time);
            }
            record.waiting = Some(times.waiting);
        }
        Ok(record)
    }

    /// Bytes that the engines' device has given since their loader was made, as [`Meter::used_bytes`]; `None` where they have
    /// no device.
    ///
    /// # Errors
    ///
    /// The driver does not say.
    pub fn device_bytes(&self) -> Result<Option<u64>, CudaError> {
        self.state().meter.as_ref().map(|meter| meter.used_bytes()).transpose()
    }

    fn waited(&self) -> Duration {
        let meter = self.state().meter.clone();
        meter.map_or(Duration::ZERO, |meter| meter.waited())
    }

    fn add(&self, add: impl FnOnce(&mut Record)) {
        add(&mut self.state().record);
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A run begins.
    fn begin(&self) -> Begun {
        let waited = self.waited();
        Begun { start: Instant::now(), waited }
    }

    /// Counts a run of `graph` that began so.
    fn end(&self, graph: &str, begun: &Begun) {
        let took = begun.start.elapsed();
        // A step waits for its results by itself.
        let took = took.saturating_sub(self.waited().saturating_sub(begun.waited));
        self.add(|record| {
            // Looked up first: a name is copied once.
            let time = match record.graphs.get_mut(graph) {
                Some(time) => time,
                None => record.graphs.entry(graph.to_owned()).or_default(),
            };
            time.calls += 1;
            time.host += took;
        });
    }
}

/// When a run began, and how long the host had waited for the device until then.
struct Begun {
    start: Instant,
    waited: Duration,
}

struct TimedLoader<L> {
    loader: L,
    stopwatch: Stopwatch,
}

impl<L: Loader> Loader for TimedLoader<L> {
    fn load(&self, name: &str, bytes: &[u8], weights: &[String]) -> Result<Box<dyn Engine>, EngineError> {
        let start = Instant::now();
        let engine = self.loader.load(name, bytes, weights)?;
        let took = start.elapsed();
        self.stopwatch.add(|record| record.loading += took);
        Ok(Box::new(TimedEngine { engine, graph: name.to_owned(), stopwatch: self.stopwatch.clone() }))
    }

    fn steps(&self, name: &str) -> bool {
        self.loader.steps(name)
    }

    fn name(&self) -> &'static str {
        self.loader.name()
    }

    fn record_steps(&self, on: bool) {
        self.loader.record_steps(on);
    }

    fn meter(&self) -> Option<Arc<Meter>> {
        self.loader.meter()
    }
}

struct TimedEngine {
    engine: Box<dyn Engine>,
    graph: String,
    stopwatch: Stopwatch,
}

impl Engine for TimedEngine {
    fn run(
        &mut self,
        inputs: &[(&str, &Tensor)],
        in_place: &mut [InPlace<'_>],
        outputs: &[&str],
    ) -> Result<Vec<Tensor>, EngineError> {
        let begun = self.stopwatch.begin();
        let results = self.engine.run(inputs, in_place, outputs)?;
        self.stopwatch.end(&self.graph, &begun);
        Ok(results)
    }

    fn steps(&mut self, call: &StepCall<'_>) -> MaybeSteps {
        let steps = self.engine.steps(call)?;
        let timed = |steps| TimedSteps { steps, graph: self.graph.clone(), stopwatch: self.stopwatch.clone() };
        Ok(steps.map(|steps| Box::new(timed(steps)) as Box<dyn Steps>))
    }
}

struct TimedSteps {
    steps: Box<dyn Steps>,
    graph: String,
    stopwatch: Stopwatch,
}

impl Steps for TimedSteps {
    fn step(&mut self, values: &[i64]) -> Result<Vec<Tensor>, EngineError> {
        let begun = self.stopwatch.begin();
        let results = self.steps.step(values)?;
        self.stopwatch.end(&self.graph, &begun);
        Ok(results)
    }

    fn rows(&self, length: usize) -> Result<Vec<Tensor>, EngineError> {
        self.steps.rows(length)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    /// An engine that does nothing, or fails.
    struct Idle(bool);

    impl Loader for Idle {
        fn load(&self, _: &str, _: &[u8], _: &[String]) -> Result<Box<dyn Engine>, EngineError> {
            Ok(Box::new(Self(self.0)))
        }

        fn steps(&self, name: &str) -> bool {
            name == "step"
        }

        fn name(&self) -> &'static str {
            "idle"
        }
    }

    impl Engine for Idle {
        fn run(
            &mut self,
            _: &[(&str, &Tensor)],
            _: &mut [InPlace<'_>],
            _: &[&str],
        ) -> Result<Vec<Tensor>, EngineError> {
            let failed = || EngineError::Runtime { graph: "idle".into(), message: "broken".into() };
            if self.0 { Ok(Vec::new()) } else { Err(failed()) }
        }

        fn steps(&mut self, _: &StepCall<'_>) -> MaybeSteps {
            Ok(self.0.then(|| Box::new(IdleSteps) as Box<dyn Steps>))
        }
    }

    /// Steps that do nothing, until the third.
    struct IdleSteps;

    impl Steps for IdleSteps {
        fn step(&mut self, values: &[i64]) -> Result<Vec<Tensor>, EngineError> {
            let failed = || EngineError::Runtime { graph: "idle".into(), message: "broken".into() };
            if values == [2] { Err(failed()) } else { Ok(Vec::new()) }
        }

        fn rows(&self, length: usize) -> Result<Vec<Tensor>, EngineError> {
            Ok(vec![Tensor::from_f32([length], vec![0.0; length]).unwrap()])
        }
    }

    #[test]
    fn every_step_is_counted_under_its_graph() {
        let stopwatch = Stopwatch::default();
        let loader = stopwatch.watch(Idle(true));
        assert!(loader.steps("step") && !loader.steps("leaf"));
        let mut engine = loader.load("step", &[], &[]).unwrap();
        let call =
            StepCall { changing: &["length"], length: "length", fixed: &[], caches: &[], capacity: 3, outputs: &[] };
        let mut steps = engine.steps(&call).unwrap().unwrap();
        assert!((0..2).all(|length| steps.step(&[length]).is_ok()) && steps.step(&[2]).is_err());
        assert_eq!(steps.rows(2).unwrap()[0].shape(), [2]);
        let record = stopwatch.take().unwrap();
        let calls: Vec<_> = record.graphs.iter().map(|(name, time)| (name.as_str(), time.calls)).collect();
        assert_eq!(calls, [("step", 2)]);
        // One that has no use for steps has none with a stopwatch either.
        assert!(stopwatch.watch(Idle(false)).load("step", &[], &[]).unwrap().steps(&call).unwrap().is_none());
    }

    #[test]
    fn every_run_is_counted_once_under_its_graph() {
        let stopwatch = Stopwatch::default();
        let loader = stopwatch.watch(Idle(true));
        let mut engines = ["leaf", "head"].map(|name| loader.load(name, &[], &[]).unwrap());
        for times in [3, 1] {
            for _ in 0..times {
                engines[0].run(&[], &mut [], &[]).unwrap();
            }
            engines[1].run(&[], &mut [], &[]).unwrap();
            let record = stopwatch.take().unwrap();
            let calls: Vec<_> = record.graphs.iter().map(|(name, time)| (name.as_str(), time.calls)).collect();
            assert_eq!(calls, [("head", 1), ("leaf", times)]);
            assert_eq!(record.running(), record.graphs["head"].host + record.graphs["leaf"].host);
            assert_eq!((record.computing(), record.waiting), (None, None));
        }
        assert_eq!((loader.name(), stopwatch.take().unwrap()), ("idle", Record::default()));
    }

    #[test]
    fn a_run_that_failed_is_not_counted() {
        let stopwatch = Stopwatch::default();
        let mut engine = stopwatch.watch(Idle(false)).load("leaf", &[], &[]).unwrap();
        assert!(engine.run(&[], &mut [], &[]).is_err());
        assert!(stopwatch.take().unwrap().graphs.is_empty());
    }
}
