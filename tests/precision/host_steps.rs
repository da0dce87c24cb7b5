//! An engine that decodes step by step as one on a GPU may, on the host: caches of fixed room that it writes rows into.

use accordion::pipeline::decode::DECODER_STEP;
use accordion::runtime::steps::{MaybeSteps, StepCall, Steps};
use accordion::runtime::{Engine, EngineError, InPlace, Loader};
use accordion::tensor::Tensor;
use std::sync::{Arc, Mutex};

/// What happened.
#[derive(Debug, Default)]
pub(super) struct Log {
    /// The room of every cache that was asked for.
    pub(super) capacities: Vec<usize>,
    /// Steps that were run.
    pub(super) steps: usize,
    /// How often rows were taken back.
    pub(super) taken: usize,
    /// How often the graph was loaded.
    pub(super) loaded: usize,
}

/// What the engine of the graph does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Manner {
    /// It keeps caches.
    Keeps,
    /// It is asked, and does not.
    Refuses,
    /// It fails at that step, counted from 0.
    FailsAt(usize),
    /// As if its graph took one row more for a valid one.
    SeesTooMuch,
    /// It writes every row one place behind where it belongs.
    AppendsTooFar,
}

/// A loader whose engine of [`DECODER_STEP`] has steps.
pub(super) struct Stepping<L> {
    pub(super) loader: L,
    pub(super) manner: Manner,
    pub(super) log: Arc<Mutex<Log>>,
}

impl<L: Loader> Loader for Stepping<L> {
    fn load(&self, name: &str, bytes: &[u8], weights: &[String]) -> Result<Box<dyn Engine>, EngineError> {
        let engine = self.loader.load(name, bytes, weights)?;
        if name != DECODER_STEP {
            return Ok(engine);
        }
        self.log.lock().unwrap().loaded += 1;
        let engine = Arc::new(Mutex::new(engine));
        Ok(Box::new(SteppingEngine { engine, manner: self.manner, log: Arc::clone(&self.log) }))
    }

    fn steps(&self, name: &str) -> bool {
        name == DECODER_STEP
    }

    fn name(&self) -> &'static str {
        self.loader.name()
    }
}

struct SteppingEngine {
    engine: Arc<Mutex<Box<dyn Engine>>>,
    manner: Manner,
    log: Arc<Mutex<Log>>,
}

impl Engine for SteppingEngine {
    fn run(
        &mut self,
        inputs: &[(&str, &Tensor)],
        in_place: &mut [InPlace<'_>],
        outputs: &[&str],
    ) -> Result<Vec<Tensor>, EngineError> {
        self.engine.lock().unwrap().run(inputs, in_place, outputs)
    }

    fn steps(&mut self, call: &StepCall<'_>) -> MaybeSteps {
        self.log.lock().unwrap().capacities.push(call.capacity);
        if self.manner == Manner::Refuses {
            return Ok(None);
        }
        let owned = |name: &&str| (*name).to_owned();
        let caches =
            call.caches.iter().map(|cache| HostCache::new(cache.input, cache.output, cache.rows, call.capacity));
        Ok(Some(Box::new(HostSteps {
            engine: Arc::clone(&self.engine),
            manner: self.manner,
            log: Arc::clone(&self.log),
            changing: call.changing.iter().map(owned).collect(),
            length_at: call.changing.iter().position(|name| *name == call.length).unwrap(),
            fixed: call.fixed.iter().map(|(name, tensor)| ((*name).to_owned(), (*tensor).clone())).collect(),
            caches: caches.collect(),
            outputs: call.outputs.iter().map(owned).collect(),
        })))
    }
}

/// Rows with room behind them, `[batch, groups, capacity, width]`, zeros where nothing was written.
struct HostCache {
    input: String,
    output: String,
    shape: [usize; 4],
    numbers: Vec<f32>,
}

impl HostCache {
    fn new(input: &str, output: &str, rows: &Tensor, capacity: usize) -> Self {
        let &[batch, groups, length, width] = rows.shape() else { panic!("{input}: {rows:?}") };
        let shape = [batch, groups, capacity, width];
        let mut cache = Self {
            input: input.to_owned(),
            output: output.to_owned(),
            shape,
            numbers: vec![0.0; shape.iter().product()],
        };
        cache.write(0, &rows.to_f32(), length);
        cache
    }

    /// Writes `count` rows of every group behind `length`.
    fn write(&mut self, length: usize, rows: &[f32], count: usize) {
        let [_, _, capacity, width] = self.shape;
        assert!(length + count <= capacity, "{}: {count} rows behind {length} of {capacity}", self.input);
        for (to, from) in self.numbers.chunks_mut(capacity * width).zip(rows.chunks(count.max(1) * width)) {
            to[length * width..(length + count) * width].copy_from_slice(from);
        }
    }

    fn tensor(&self) -> Tensor {
        Tensor::from_f32(self.shape, self.numbers.clone()).unwrap()
    }

    fn rows(&self, length: usize) -> Tensor {
        let [batch, groups, capacity, width] = self.shape;
        let heads = self.numbers.chunks(capacity * width);
        let rows = heads.flat_map(|head| &head[..length * width]).copied().collect();
        Tensor::from_f32([batch, groups, length, width], rows).unwrap()
    }
}

struct HostSteps {
    engine: Arc<Mutex<Box<dyn Engine>>>,
    manner: Manner,
    log: Arc<Mutex<Log>>,
    changing: Vec<String>,
    length_at: usize,
    fixed: Vec<(String, Tensor)>,
    caches: Vec<HostCache>,
    outputs: Vec<String>,
}

impl HostSteps {
    /// The value of the changing input `name`: all but the length are `[batch, 1]`, for a batch of one.
    fn changing(&self, place: usize, value: i64) -> Tensor {
        let seen = i64::from(place == self.length_at && self.manner == Manner::SeesTooMuch);
        let shape: &[usize] = if place == self.length_at { &[1] } else { &[1, 1] };
        Tensor::from_i64(shape, vec![value + seen]).unwrap()
    }
}

impl Steps for HostSteps {
    fn step(&mut self, values: &[i64]) -> Result<Vec<Tensor>, EngineError> {
        let mut log = self.log.lock().unwrap();
        if self.manner == Manner::FailsAt(log.steps) {
            return Err(EngineError::Runtime { graph: DECODER_STEP.to_owned(), message: "broken".to_owned() });
        }
        log.steps += 1;
        let changing: Vec<Tensor> = (0..).zip(values).map(|(place, &value)| self.changing(place, value)).collect();
        let caches: Vec<Tensor> = self.caches.iter().map(HostCache::tensor).collect();
        let mut inputs: Vec<(&str, &Tensor)> = self.changing.iter().map(String::as_str).zip(&changing).collect();
        inputs.extend(self.fixed.iter().map(|(name, tensor)| (name.as_str(), tensor)));
        inputs.extend(self.caches.iter().map(|cache| cache.input.as_str()).zip(&caches));
        let rows = self.caches.iter().map(|cache| cache.output.as_str());
        let outputs: Vec<&str> = self.outputs.iter().map(String::as_str).chain(rows).collect();
        let mut results = self.engine.lock().unwrap().run(&inputs, &mut [], &outputs)?;
        let length = usize::try_from(values[self.length_at]).unwrap();
        let behind = length + usize::from(self.manner == Manner::AppendsTooFar);
        for (cache, row) in self.caches.iter_mut().zip(results.split_off(self.outputs.len())) {
            assert_eq!(row.shape(), [cache.shape[0], cache.shape[1], 1, cache.shape[3]]);
            cache.write(behind, &row.to_f32(), 1);
        }
        Ok(results)
    }

    fn rows(&self, length: usize) -> Result<Vec<Tensor>, EngineError> {
        self.log.lock().unwrap().taken += 1;
        Ok(self.caches.iter().map(|cache| cache.rows(length)).collect())
    }
}
