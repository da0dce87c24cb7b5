//! Steps of a decoder: an engine that runs again and again over memory of its own, recorded as a CUDA graph and repeated.
//!
//! Between two steps nothing changes but a few integers. They are written into page-locked memory, from which the recorded work
//! copies them; it runs the engine, appends the new rows to the caches, and copies what is asked for into page-locked memory.

use super::execute::{Executable, RunError};
use super::loaded::{Context, Port};
use super::memory::{Memory, Placed};
use super::recording::Recording;
use super::step_inputs::{CacheShape, Input, Source};
use crate::cuda::{Address, AppendRows, AppendedRow, Buffer, Graph, HostBuffer, Kernels, Place, Rows};
use crate::runtime::EngineError;
use crate::runtime::resident::Resident;
use crate::runtime::steps::{StepCall, Steps};
use crate::tensor::{HostBytes, Tensor, TensorError};
use accordion_graphs::dtype::DType;
use std::sync::{Arc, Mutex, PoisonError};

/// Distance of tensors in one buffer: what the library wants their addresses to be a multiple of.
const SLOT: usize = 256;
/// Bytes of one integer.
const INTEGER: usize = size_of::<i64>();

/// An engine with everything that its steps read and write.
pub(super) struct Replay {
    recorded: Recorded,
    work: Work,
    graph: String,
    /// Which of the integers is the number of valid rows.
    length: usize,
    results: Vec<StepResult>,
    caches: Vec<Buffer>,
    shape: CacheShape,
    /// What the engine reads.
    _fixed: Vec<(Tensor, Option<Placed>)>,
    recording: Arc<Recording>,
    memory: Arc<Memory>,
    /// Whose context is above, and has to be gone before.
    executable: Arc<Mutex<Executable>>,
}

/// What is known of the recorded work.
enum Recorded {
    /// The library wants to have run once before.
    TooEarly,
    /// It has.
    NotYet,
    As(Graph),
}

/// The work of one step.
struct Work {
    context: Context,
    /// The integers on the host, one behind the other, and below on the device, each in a slot of its own.
    staged: HostBuffer,
    /// What is asked for on the host.
    host: HostBuffer,
    copies: Vec<Copy>,
    slots: Buffer,
    /// All outputs of the engine, each from a slot of its own on.
    outputs: Buffer,
    kernels: Arc<Kernels>,
    append: AppendRows,
    _pairs: Buffer,
    _scratch: Buffer,
    memory: Arc<Memory>,
}

/// A part of the outputs that goes to the host.
#[derive(Clone, Copy)]
struct Copy {
    from: usize,
    to: usize,
    bytes: usize,
}

/// What a step returns, and where it comes to lie on the host.
struct StepResult {
    dtype: DType,
    shape: Vec<usize>,
    copy: Copy,
}

/// Where the tensors of one buffer begin, each at a slot of its own.
#[derive(Default)]
struct Layout {
    bytes: usize,
}

impl Layout {
    fn add(&mut self, bytes: usize) -> Result<usize, RunError> {
        let at = self.bytes;
        let end = at.checked_add(bytes).and_then(|end| end.checked_next_multiple_of(SLOT));
        self.bytes = end.ok_or("the outputs are larger than memory can be")?;
        Ok(at)
    }
}

impl Replay {
    /// Takes memory for steps, and copies the first rows there. Nothing if there is no kernel to append rows with, or the engine
    /// reads an integer that changes before it is enqueued.
    pub(super) fn new(shared: &Arc<Mutex<Executable>>, call: &StepCall<'_>) -> Result<Option<Self>, RunError> {
        let executable = shared.lock().unwrap_or_else(PoisonError::into_inner);
        let (memory, recording) = (&executable.memory, &executable.recording);
        let device = memory.device();
        device.bind()?;
        let shape = CacheShape::of(call)?;
        let (Some(kernels), Some(element)) = (recording.kernels(device), shape.element()) else { return Ok(None) };
        let ports = executable.engine.ports();
        let inputs = Input::all(&ports, &executable.signature, call)?;
        if inputs.iter().any(|input| input.port.on_host && !matches!(input.source, Source::Fixed(_))) {
            return Ok(None);
        }
        let profile = executable.profile(&inputs.iter().map(Input::asked).collect::<Result<Vec<_>, _>>()?)?;
        let length = call.changing.iter().position(|name| *name == call.length);
        let length = length.ok_or_else(|| RunError::NoInput(call.length.to_owned()))?;
        // SAFETY: `Replay` waits, and drops it before the engine, which it keeps.
        let mut context = unsafe { executable.engine.open_context(profile, device.stream_pointer()) }?;
        let scratch = device.allocate(context.memory_bytes().max(SLOT))?;
        // SAFETY: as large as it says, and kept with the context.
        unsafe { context.set_memory(scratch.address()) };

        let heads = shape.batch * shape.groups;
        let capacity = shape.bytes(shape.capacity)?;
        let cache_bytes = heads.checked_mul(capacity).ok_or("the caches are larger than memory can be")?;
        let caches = call.caches.iter().map(|cache| {
            let buffer = device.zeros(cache_bytes)?;
            let to = Rows { first: Place::Device(buffer.address()), stride: capacity };
            // SAFETY: no more rows than there is room for, in memory that was just taken.
            unsafe { memory.place_rows(cache.rows, to, heads) }?;
            Ok(buffer)
        });
        let caches = caches.collect::<Result<Vec<Buffer>, RunError>>()?;

        let slots = device.zeros(SLOT * call.changing.len())?;
        let staged = device.host_buffer(INTEGER * call.changing.len())?;
        let mut fixed = Vec::with_capacity(call.fixed.len());
        for Input { port, source, shape } in &inputs {
            context.set_shape(port, shape)?;
            let address = match *source {
                Source::Changing(index) => slots.address() + (SLOT * index) as Address,
                Source::Cache(index) => caches[index].address(),
                Source::Fixed(tensor) => {
                    let tensor = if port.on_host { tensor.clone().on_host()? } else { tensor.clone() };
                    let placed = if port.on_host { None } else { Some(memory.place(&tensor)?) };
                    let on_host = || tensor.bytes().as_ptr().expose_provenance() as Address;
                    let address = placed.as_ref().map_or_else(on_host, |placed| placed.address);
                    fixed.push((tensor, placed));
                    address
                }
            };
            // SAFETY: all of this is kept with the context.
            unsafe { context.set_address(port, address) }?;
        }
        context.infer_shapes()?;

        let mut layout = Layout::default();
        let mut found: Vec<(&Port, Vec<usize>, Copy)> = Vec::new();
        for port in ports.iter().filter(|port| !port.is_input) {
            let shape = context.shape(port)?;
            let bytes = port.dtype.bytes_of_shape(&shape);
            let bytes = bytes.ok_or_else(|| format!("output '{}' has shape {shape:?}", port.name))?;
            found.push((port, shape, Copy { from: layout.add(bytes)?, to: 0, bytes }));
        }
        let outputs = device.allocate(layout.bytes.max(SLOT))?;
        for (port, _, Copy { from, .. }) in &found {
            // SAFETY: as above.
            unsafe { context.set_address(port, outputs.address() + *from as Address) }?;
        }
        let output = |name: &str| {
            let output = found.iter().find(|(port, ..)| port.name == name);
            output.ok_or_else(|| RunError::from(format!("the engine has no output '{name}'")))
        };
        let mut pairs = Vec::with_capacity(call.caches.len() * AppendedRow::BYTES);
        for (cache, buffer) in call.caches.iter().zip(&caches) {
            let (port, found, Copy { from, .. }) = output(cache.output)?;
            if *found != shape.with(1) || port.dtype != shape.dtype {
                let (name, expected) = (cache.output, shape.with(1));
                let expected = format!("{} {expected:?}", shape.dtype);
                return Err(format!("output '{name}' is {} {found:?}, expected {expected}", port.dtype).into());
            }
            let row = outputs.address() + *from as Address;
            pairs.extend(AppendedRow { row, cache: buffer.address() }.to_bytes());
        }
        let pairs = device.upload(&pairs)?;
        let mut layout = Layout::default();
        let results = call.outputs.iter().map(|name| {
            let (port, shape, copy) = output(name)?;
            let copy = Copy { to: layout.add(copy.bytes)?, ..*copy };
            Ok(StepResult { dtype: port.dtype, shape: shape.clone(), copy })
        });
        let results = results.collect::<Result<Vec<_>, RunError>>()?;
        let append = AppendRows {
            pairs: pairs.address(),
            length_at: slots.address() + (SLOT * length) as Address,
            caches: call.caches.len() as i64,
            rows: heads as i64,
            capacity: shape.capacity as i64,
            width: shape.width as i64,
            element,
        };
        append.launch()?;
        let work = Work {
            context,
            staged,
            slots,
            kernels,
            append,
            _pairs: pairs,
            host: device.host_buffer(layout.bytes)?,
            outputs,
            copies: results.iter().map(|result| result.copy).collect(),
            _scratch: scratch,
            memory: Arc::clone(memory),
        };
        Ok(Some(Self {
            recorded: Recorded::TooEarly,
            work,
            graph: executable.engine.name().to_owned(),
            length,
            results,
            caches,
            shape,
            _fixed: fixed,
            recording: Arc::clone(recording),
            memory: Arc::clone(memory),
            executable: Arc::clone(shared),
        }))
    }

    fn run(&mut self, values: &[i64]) -> Result<Vec<Tensor>, RunError> {
        let (found, expected) = (values.len(), self.work.staged.bytes().len() / INTEGER);
        if found != expected {
            return Err(format!("a step was given {found} values, expected {expected}").into());
        }
        let (length, capacity) = (values[self.length], self.shape.capacity);
        if !usize::try_from(length).is_ok_and(|length| length < capacity) {
            return Err(format!("a step behind {length} rows, with room for {capacity}").into());
        }
        let staged = self.work.staged.bytes_mut();
        for (slot, value) in staged.as_chunks_mut::<INTEGER>().0.iter_mut().zip(values) {
            *slot = value.to_ne_bytes();
        }
        self.memory.device().bind()?;
        self.enqueue()?;
        self.memory.wait()?;
        self.results.iter().map(|result| Ok(result.tensor(self.work.host.bytes())?)).collect()
    }

    /// Puts a step on the stream.
    fn enqueue(&mut self) -> Result<(), RunError> {
        // One enqueues an engine at a time: what it says of errors is kept with the engine.
        let _one = self.executable.lock().unwrap_or_else(PoisonError::into_inner);
        let (meter, graph) = (self.memory.meter(), self.graph.as_str());
        let record = self.recording.is_on(graph) && self.work.context.can_be_recorded();
        if record && matches!(self.recorded, Recorded::NotYet) {
            match self.memory.device().capture(|| self.work.enqueue()) {
                Ok(recorded) => self.recorded = Recorded::As(recorded),
                Err(reason) => self.recording.refuse(graph, &reason.to_string()),
            }
        }
        match &self.recorded {
            Recorded::As(recorded) if record => meter.around(graph, || recorded.launch())??,
            _ => meter.around(graph, || self.work.enqueue())??,
        }
        if matches!(self.recorded, Recorded::TooEarly) {
            self.recorded = Recorded::NotYet;
        }
        Ok(())
    }
}

impl Work {
    fn enqueue(&mut self) -> Result<(), WorkError> {
        let device = self.memory.device();
        let count = self.staged.bytes().len() / INTEGER;
        let from = Rows { first: self.staged.place(0), stride: INTEGER };
        let to = Rows { first: Place::Device(self.slots.address()), stride: SLOT };
        // SAFETY: both are kept until nothing is under way any more, and are as large.
        unsafe { device.copy_rows(from, to, count, INTEGER) }?;
        self.context.enqueue().map_err(WorkError::Engine)?;
        // SAFETY: all rows and caches have these shapes, and are kept as above.
        unsafe { self.kernels.append_rows(&self.append) }?;
        for &Copy { from, to, bytes } in &self.copies {
            let from = Rows { first: Place::Device(self.outputs.address() + from as Address), stride: bytes };
            let to = Rows { first: self.host.place(to), stride: bytes };
            // SAFETY: as above.
            unsafe { device.copy_rows(from, to, 1, bytes) }?;
        }
        Ok(())
    }
}

/// Why a step could not be put on the stream.
#[derive(Debug, thiserror::Error)]
enum WorkError {
    #[error(transparent)]
    Device(#[from] crate::cuda::CudaError),
    #[error("{0}")]
    Engine(String),
}

impl StepResult {
    /// A copy of it: the next step comes to lie in the same place.
    fn tensor(&self, host: &[u8]) -> Result<Tensor, TensorError> {
        let Copy { to, bytes, .. } = self.copy;
        let mut copied = HostBytes::filled(bytes, 0);
        copied.bytes_mut()[..bytes].copy_from_slice(&host[to..to + bytes]);
        Tensor::from_storage(self.dtype, self.shape.clone(), Arc::new(copied), 0)
    }
}

impl Steps for Replay {
    fn step(&mut self, values: &[i64]) -> Result<Vec<Tensor>, EngineError> {
        self.run(values).map_err(|error| error.of(self.graph.clone()))
    }

    fn rows(&self, length: usize) -> Result<Vec<Tensor>, EngineError> {
        self.first_rows(length).map_err(|error| error.of(self.graph.clone()))
    }
}

impl Replay {
    fn first_rows(&self, length: usize) -> Result<Vec<Tensor>, RunError> {
        let Self { shape, memory, .. } = self;
        if length > shape.capacity {
            return Err(format!("{length} rows are asked for, and there is room for {}", shape.capacity).into());
        }
        let (heads, bytes, stride) = (shape.batch * shape.groups, shape.bytes(length)?, shape.bytes(shape.capacity)?);
        let rows = |cache: &Buffer| {
            let rows = memory.output(heads * bytes)?;
            let from = Rows { first: Place::Device(cache.address()), stride };
            let to = Rows { first: Place::Device(rows.address()), stride: bytes };
            // SAFETY: no more than the cache has, into memory that was just taken; both are freed behind the copy.
            unsafe { memory.device().copy_rows(from, to, heads, bytes) }?;
            Ok(Resident::tensor(shape.dtype, shape.with(length), rows)?)
        };
        self.caches.iter().map(rows).collect()
    }
}

impl Drop for Replay {
    fn drop(&mut self) {
        // The graph, the context and page-locked memory must be gone only when nothing is under way. Work that has failed is not.
        let _ = self.memory.wait();
    }
}
