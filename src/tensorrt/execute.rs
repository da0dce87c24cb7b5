//! Running the engines of a bundle. What they give stays on the device until the host reads it, and goes from there into the
//! next call: caches and hidden states never travel.

use super::build::BuiltProfile;
use super::engines::{Engines, sha256};
use super::layers::LayerRecord;
use super::loaded::{Context, LoadedEngine, Port};
use super::memory::{Memory, OnDevice};
use super::ranges::widened_by;
use super::recording::Recording;
use super::select::{Given, Misfit, Place, choose};
use super::shim::{Observer, Shim};
use super::steps::Replay;
use super::{Flavour, TensorRtError};
use crate::bundle::{Bundle, Method};
use crate::cuda::{Device, Meter, Origin};
use crate::pipeline::decode::DECODER_STEP;
use crate::runtime::resident::Resident;
use crate::runtime::steps::{MaybeSteps, StepCall, Steps};
use crate::runtime::{Engine, EngineError, InPlace, Loader};
use crate::tensor::Tensor;
use accordion_graphs::dtype::DType;
use accordion_graphs::onnx::GraphSignature;
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, Weak};

/// How engines are loaded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExecutionOptions {
    /// The library with our plugins, if engines were built with it.
    pub plugins: Option<PathBuf>,
    /// Whether engines and plugins are loaded whose hash is not the recorded one.
    pub trusted: bool,
    /// Whether steps of a decoder may be recorded as CUDA graphs.
    pub cuda_graphs: bool,
    /// Where the kernel comes from that appends rows to caches. Without it caches grow, and there are no steps.
    pub kernels: Option<Origin>,
}

impl Default for ExecutionOptions {
    fn default() -> Self {
        Self { plugins: None, trusted: false, cuda_graphs: true, kernels: None }
    }
}

/// Loads the engines that were built of a bundle's graphs.
pub struct TensorRt<'b> {
    bundle: &'b Bundle,
    shim: Arc<Shim>,
    engines: Engines,
    memory: Arc<Memory>,
    trusted: bool,
    layers: Option<Arc<LayerRecord>>,
    recording: Arc<Recording>,
    /// Each is loaded once, however many ask for it.
    loaded: Mutex<HashMap<String, Weak<Mutex<Executable>>>>,
}

impl<'b> TensorRt<'b> {
    /// The engines of `bundle` that the version of `shim` built, on `device`.
    ///
    /// # Errors
    ///
    /// There are none, they are not of the bundle's graphs, or they need plugins that are not there or not the recorded ones.
    pub fn new(
        bundle: &'b Bundle,
        shim: Shim,
        device: Device,
        options: &ExecutionOptions,
    ) -> Result<Self, TensorRtError> {
        let (flavour, version) = (shim.toolkit().flavour, shim.version().to_string());
        let dir = Engines::dir(bundle, flavour, &version);
        if !dir.is_dir() {
            return Err(TensorRtError::NotBuilt { flavour, version, dir });
        }
        let engines = Engines::open(dir)?;
        engines.check_graphs(bundle)?;
        device.bind()?;
        load_plugins(&shim, &engines, options)?;
        let (memory, shim) = (Memory::new(device)?, Arc::new(shim));
        let recording = Arc::new(Recording::new(options.cuda_graphs, options.kernels.clone()));
        let (trusted, loaded) = (options.trusted, Mutex::default());
        Ok(Self { bundle, shim, engines, memory, trusted, layers: None, recording, loaded })
    }

    /// The same, which tells `hear`, once, what a user should know though it is no error: that something is slower than it might be.
    #[must_use]
    pub fn telling(self, hear: impl Fn(&str) + Send + Sync + 'static) -> Self {
        self.recording.tell(hear);
        self
    }

    /// The same, whose engines measure their layers and tell `record` of them. They wait for the work of every call, which
    /// makes them slower.
    #[must_use]
    pub fn measuring_layers(mut self, record: Arc<LayerRecord>) -> Self {
        self.layers = Some(record);
        self
    }

    /// What was built.
    pub fn engines(&self) -> &Engines {
        &self.engines
    }

    fn executable(&self, name: &str, model: &[u8]) -> Result<Executable, TensorRtError> {
        let refused = |message: String| TensorRtError::Graph { graph: name.to_owned(), message };
        if !model.starts_with(&self.bundle.graph(name)?) {
            return Err(refused(
                "an engine computes the graph of the bundle as it is, and no part or other form of it".into(),
            ));
        }
        let plan = self.engines.plan(name, self.trusted)?;
        self.memory.device().bind()?;
        let mut engine = LoadedEngine::open(Arc::clone(&self.shim), name, &plan, &Silent)?;
        if let Some(record) = &self.layers {
            engine.measure_layers(record)?;
        }
        let profiles = self.engines.record().engines.get(name).map(|entry| entry.profiles.clone()).unwrap_or_default();
        if engine.num_profiles() != profiles.len() {
            let (found, recorded) = (engine.num_profiles(), profiles.len());
            return Err(refused(format!("the engine has {found} optimization profiles, and {recorded} are recorded")));
        }
        Ok(Executable {
            engine,
            profiles,
            signature: self.bundle.signature(name).cloned().unwrap_or_default(),
            method: self.bundle.manifest().method.clone(),
            memory: Arc::clone(&self.memory),
            recording: Arc::clone(&self.recording),
        })
    }
}

/// Loads what engines were built with.
fn load_plugins(shim: &Shim, engines: &Engines, options: &ExecutionOptions) -> Result<(), TensorRtError> {
    let Some(expected) = &engines.record().plugins_sha256 else { return Ok(()) };
    let path = options.plugins.as_ref().ok_or(TensorRtError::NeedsPlugins)?;
    let found = sha256(&std::fs::read(path).map_err(TensorRtError::io(path))?);
    if found != *expected && !options.trusted {
        return Err(TensorRtError::Untrusted { path: path.clone(), found, expected: expected.clone() });
    }
    shim.load_plugins(&std::path::absolute(path).map_err(TensorRtError::io(path))?)
}

impl Loader for TensorRt<'_> {
    fn load(&self, name: &str, bytes: &[u8], _weights: &[String]) -> Result<Box<dyn Engine>, EngineError> {
        let mut loaded = self.loaded.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(shared) = loaded.get(name).and_then(Weak::upgrade) {
            return Ok(Box::new(Shared(shared)));
        }
        let executable = self.executable(name, bytes).map_err(|error| EngineError::Runtime {
            graph: name.to_owned(),
            message: match error {
                TensorRtError::Graph { message, .. } => message,
                error => error.to_string(),
            },
        })?;
        let shared = Arc::new(Mutex::new(executable));
        loaded.insert(name.to_owned(), Arc::downgrade(&shared));
        Ok(Box::new(Shared(shared)))
    }

    fn steps(&self, name: &str) -> bool {
        // The other graphs are not made for them.
        let built = self.engines.record().engines.contains_key(name);
        name == DECODER_STEP && built && self.recording.kernels(self.memory.device()).is_some()
    }

    fn name(&self) -> &'static str {
        self.shim.toolkit().flavour.word()
    }

    fn record_steps(&self, on: bool) {
        self.recording.switch(on);
    }

    fn meter(&self) -> Option<Arc<Meter>> {
        Some(Arc::clone(self.memory.meter()))
    }
}

/// Loads a plan and drops it again: whether it can be. There must be a driver.
///
/// # Errors
///
/// The library refuses it, and says why.
pub fn try_to_load(shim: Arc<Shim>, name: &str, plan: &[u8], observer: &dyn Observer) -> Result<(), TensorRtError> {
    LoadedEngine::open(shim, name, plan, observer).map(drop)
}

/// Hears nothing.
struct Silent;

impl Observer for Silent {
    fn log(&self, _severity: i32, _message: &str) {}

    fn progress(&self, _phase: &str, _step: usize, _steps: usize) -> bool {
        true
    }
}

/// An engine that several have.
struct Shared(Arc<Mutex<Executable>>);

impl Engine for Shared {
    fn run(
        &mut self,
        inputs: &[(&str, &Tensor)],
        in_place: &mut [InPlace<'_>],
        outputs: &[&str],
    ) -> Result<Vec<Tensor>, EngineError> {
        let mut executable = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let graph = executable.engine.name().to_owned();
        if !in_place.is_empty() {
            let message = "an engine updates nothing in place: export the bundle with --target portable".to_owned();
            return Err(EngineError::Runtime { graph, message });
        }
        executable.run(inputs, outputs).map_err(|error| error.of(graph))
    }

    fn steps(&mut self, call: &StepCall<'_>) -> MaybeSteps {
        let replay = Replay::new(&self.0, call).map_err(|error| {
            let executable = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            error.of(executable.engine.name().to_owned())
        })?;
        Ok(replay.map(|replay| Box::new(replay) as Box<dyn Steps>))
    }
}

/// Why a call could not be made.
pub(super) enum RunError {
    /// The graph has no such input.
    NoInput(String),
    /// Anything else.
    Failed(String),
}

impl RunError {
    /// As the error of graph `graph`.
    pub(super) fn of(self, graph: String) -> EngineError {
        match self {
            Self::NoInput(name) => EngineError::UnknownName { graph, kind: "input", name },
            Self::Failed(message) => EngineError::Runtime { graph, message },
        }
    }
}

impl<E: ToString> From<E> for RunError {
    fn from(error: E) -> Self {
        Self::Failed(error.to_string())
    }
}

/// An engine, and what has to be known to run it.
pub(super) struct Executable {
    pub(super) engine: LoadedEngine,
    profiles: Vec<BuiltProfile>,
    pub(super) signature: GraphSignature,
    method: Method,
    pub(super) memory: Arc<Memory>,
    pub(super) recording: Arc<Recording>,
}

impl Drop for Executable {
    fn drop(&mut self) {
        // Its work may still be on the stream. Work that has failed is not there any more.
        let _ = self.memory.device().wait();
    }
}

impl Executable {
    fn run(&mut self, inputs: &[(&str, &Tensor)], outputs: &[&str]) -> Result<Vec<Tensor>, RunError> {
        let ports = self.engine.ports();
        if let Some(name) = outputs.iter().find(|name| !ports.iter().any(|p| !p.is_input && p.name == **name)) {
            let missing = format!("the engine has no output '{name}': accordion build --taps makes taps outputs");
            return Err(missing.into());
        }
        let given = assigned(&ports, &self.signature, inputs)?;
        let asked = given.iter().map(|(port, tensor)| asked(port, tensor)).collect::<Result<Vec<_>, RunError>>()?;
        let profile = self.profile(&asked)?;
        let Self { engine, memory, .. } = self;
        memory.device().bind()?;
        let name = engine.name().to_owned();
        let context = engine.context(profile, memory.device().stream_pointer())?;
        let results = enqueue(context, (&name, &ports), &given, memory)?;
        let result = |name: &&str| {
            let found = results.iter().find(|(port, ..)| port.name == **name);
            found.map(|(.., tensor)| tensor.clone()).ok_or_else(|| format!("there is no output '{name}'").into())
        };
        outputs.iter().map(result).collect()
    }

    /// The optimization profile that serves a call.
    pub(super) fn profile(&self, asked: &[Given<'_>]) -> Result<usize, RunError> {
        let in_words = |misfit| in_words(&misfit, self.engine.name(), &self.signature, &self.method);
        Ok(choose(&self.profiles, asked).map_err(in_words)?)
    }
}

/// The tensors of all of an engine's inputs.
fn assigned<'e, 't>(
    ports: &'e [Port],
    signature: &GraphSignature,
    inputs: &[(&str, &'t Tensor)],
) -> Result<Vec<(&'e Port, &'t Tensor)>, RunError> {
    // An input that nothing in the graph uses may not be one of the engine.
    if let Some((name, _)) = inputs.iter().find(|(name, _)| !signature.inputs.iter().any(|input| input.name == *name)) {
        return Err(RunError::NoInput((*name).to_owned()));
    }
    let of_port = |port: &'e Port| {
        let (_, tensor) = inputs.iter().find(|(name, _)| *name == port.name).ok_or_else(|| missing(port))?;
        if tensor.dtype() != port.dtype {
            return Err(format!("input '{}' is {}, expected {}", port.name, tensor.dtype(), port.dtype).into());
        }
        Ok((port, *tensor))
    };
    ports.iter().filter(|port| port.is_input).map(of_port).collect()
}

pub(super) fn missing(port: &Port) -> RunError {
    format!("input '{}' is missing", port.name).into()
}

/// What decides whether a profile serves an input.
pub(super) fn asked<'a>(port: &'a Port, tensor: &'a Tensor) -> Result<Given<'a>, RunError> {
    let value = match (port.on_host, tensor.dtype()) {
        (true, DType::I64) => tensor.as_i64()?.first().copied(),
        (true, DType::I32) => tensor.as_i32()?.first().map(|&value| i64::from(value)),
        _ => None,
    };
    Ok(Given { name: &port.name, shape: tensor.shape(), value })
}

/// Puts a call on the stream, and returns all outputs.
fn enqueue<'e>(
    context: &mut Context,
    (graph, ports): (&str, &'e [Port]),
    given: &[(&Port, &Tensor)],
    memory: &Arc<Memory>,
) -> Result<Vec<(&'e Port, Tensor)>, RunError> {
    let mut placed = Vec::with_capacity(given.len());
    for (port, tensor) in given {
        context.set_shape(port, tensor.shape())?;
        let address = if port.on_host {
            tensor.bytes().as_ptr().expose_provenance() as u64
        } else {
            let input = memory.place(tensor)?;
            let address = input.address;
            placed.push(input);
            address
        };
        // SAFETY: the tensor, or what was made of it in its place, outlives `enqueue` below; buffers are freed behind the work.
        unsafe { context.set_address(port, address) }?;
    }
    context.infer_shapes()?;
    let mut outputs: Vec<(&Port, Vec<usize>, OnDevice)> = Vec::new();
    for port in ports.iter().filter(|port| !port.is_input) {
        let shape = context.shape(port)?;
        let bytes = port.dtype.bytes_of_shape(&shape);
        let bytes = bytes.ok_or_else(|| format!("output '{}' has shape {shape:?}", port.name))?;
        let output = memory.output(bytes)?;
        // SAFETY: as above.
        unsafe { context.set_address(port, output.address()) }?;
        outputs.push((port, shape, output));
    }
    memory.with_scratch(context.memory_bytes(), |scratch| {
        // SAFETY: as long as it says, and everything that uses it is on one stream.
        unsafe { context.set_memory(scratch) };
        memory.meter().around(graph, || context.enqueue())
    })???;
    drop(placed);
    let tensor = |(port, shape, output): (&'e Port, Vec<usize>, OnDevice)| {
        Ok((port, Resident::tensor(port.dtype, shape, output)?))
    };
    outputs.into_iter().map(tensor).collect()
}

/// A misfit, and what to do about it.
fn in_words(misfit: &Misfit, graph: &str, signature: &GraphSignature, method: &Method) -> String {
    let Misfit { input, place, found, allowed: [min, max] } = misfit;
    let range = if min == max { max.to_string() } else { format!("{min} to {max}") };
    let built = |what: String, name: &str| {
        let flags = widened_by(method, graph, name);
        format!(
            "{what} is {found}, and the engine was built for {range}: build it anew, with more of {flags} (--force)"
        )
    };
    match *place {
        Place::Rank => format!("input '{input}' has {found} dimensions, expected {range}"),
        Place::Value => built(format!("the value of input '{input}'"), input),
        Place::Dimension(i) => {
            let info = signature.inputs.iter().find(|info| info.name == *input);
            let name = info.and_then(|info| info.shape.get(i)).map(String::as_str).unwrap_or_default();
            built(format!("dimension {i} ({name}) of input '{input}'"), name)
        }
    }
}

/// The command that builds the engines in `dir`.
pub(super) fn build_command(flavour: Flavour, dir: &Path) -> String {
    let bundle = dir.parent().and_then(Path::parent).unwrap_or(dir).display();
    format!("accordion build {bundle} --runtime {}", flavour.word())
}
