//! Graphs in ONNX Runtime whose tensors stay where its execution provider computes, by I/O binding.
//!
//! Inputs that an engine of the same loader made are bound where they lie, those of the host are copied, and outputs stay as
//! [`Resident`] tensors until the host reads them. Weights are copied once and shared by all graphs of the loader.
//!
//! What is particular to a provider is its [`Place`]; everything else is the same wherever that is, the CPU included.

use super::locate::LoadedRuntime;
use super::placement::{RECORD_PLACEMENT, astray, shares};
use super::resident::{DeviceMemory, Resident};
use super::session::{Allocated, Borrowed, Interface, Sessions, failed};
use super::{Engine, EngineError, InPlace, Loader};
use crate::checkpoint::WeightMaps;
use crate::tensor::{Runs, Tensor, TensorError};
use accordion_graphs::dtype::DType;
use ort::memory::MemoryInfo;
use ort::operator::OperatorDomain;
use ort::session::Session;
use ort::session::builder::SessionBuilder;
use ort::value::DynValue;
use ort::{AsPointer, Error, sys};
use std::collections::HashMap;
use std::ffi::c_void;
use std::ptr::{NonNull, null, null_mut, slice_from_raw_parts};
use std::sync::{Arc, Mutex, PoisonError};

/// What kernels may rely on: no vector that they load is wider. A tensor that begins elsewhere is copied at the place.
const ALIGNMENT: usize = 16;

/// Where an execution provider computes.
pub trait Place: Send + Sync + 'static {
    /// Memory there, freed when dropped.
    type Block: Send + Sync;

    /// The engine's name: `ort-cuda`.
    fn engine(&self) -> &'static str;

    /// The provider that is to run all nodes that compute: `CUDAExecutionProvider`.
    fn provider(&self) -> &'static str;

    /// Its memory, as ONNX Runtime describes it.
    fn memory(&self) -> &MemoryInfo<'static>;

    /// Has sessions use the provider.
    ///
    /// # Errors
    ///
    /// The provider is not there, or refuses its options.
    fn provide(&self, builder: SessionBuilder) -> Result<SessionBuilder, Error>;

    /// A copy of the host's `bytes`, and its address.
    ///
    /// # Errors
    ///
    /// What the device says.
    fn upload(&self, bytes: &[u8]) -> Result<(Self::Block, usize), String>;

    /// Memory for `byte_len` bytes, at least one, and its address. What was there is there.
    ///
    /// # Errors
    ///
    /// What the device says.
    fn allocate(&self, byte_len: usize) -> Result<(Self::Block, usize), String>;

    /// Copies runs of what lies at the address of each of `pieces` to what lies at `to`, once everything that writes them is
    /// done, and returns when they are copied.
    ///
    /// # Errors
    ///
    /// What the device says.
    ///
    /// # Safety
    ///
    /// As many bytes lie there, and do not overlap.
    unsafe fn copy(&self, to: usize, pieces: &[(usize, Runs)]) -> Result<(), String>;

    /// Copies what lies at `address` into `bytes`, once everything that writes it is done.
    ///
    /// # Errors
    ///
    /// What the device says.
    ///
    /// # Safety
    ///
    /// As many bytes lie there.
    unsafe fn download(&self, address: usize, bytes: &mut [u8]) -> Result<(), String>;
}

/// How sessions are made.
#[derive(Default)]
pub struct BoundOptions {
    /// Our own kernels for the provider. Without them the bodies of the model-local functions run.
    pub operators: Option<OperatorDomain>,
    /// Whether nodes that compute may run elsewhere than at the place.
    pub allow_fallback: bool,
}

/// Loads graphs whose tensors stay at a place.
pub struct Bound<P: Place> {
    sessions: Sessions,
    place: Arc<P>,
    allow_fallback: bool,
    weights: Mutex<HashMap<String, Arc<Weight<P>>>>,
}

/// A weight at the place.
struct Weight<P: Place> {
    _block: P::Block,
    address: usize,
}

impl<P: Place> Bound<P> {
    /// A loader of graphs that link to `weights`.
    pub fn new(runtime: &'static LoadedRuntime, weights: WeightMaps, place: P, options: BoundOptions) -> Self {
        let operators = options.operators.map(Arc::new);
        Self {
            sessions: Sessions { runtime, weights, operators, trace: None },
            place: Arc::new(place),
            allow_fallback: options.allow_fallback,
            weights: Mutex::default(),
        }
    }

    /// The weight `weight`, copied to the place when the first graph needs it. The value only points there.
    fn weight(&self, graph: &str, weight: &str) -> Result<(Arc<Weight<P>>, DynValue), EngineError> {
        let failed = failed::<String>(graph);
        let tensor = self.sessions.weight(graph, weight)?;
        let mut weights = self.weights.lock().unwrap_or_else(PoisonError::into_inner);
        let placed = if let Some(placed) = weights.get(weight) {
            Arc::clone(placed)
        } else {
            let (block, address) = self.place.upload(tensor.bytes()).map_err(&failed)?;
            let placed = Arc::new(Weight { _block: block, address });
            weights.insert(weight.to_owned(), Arc::clone(&placed));
            placed
        };
        let (memory, data) = (self.place.memory(), placed.address as *mut c_void);
        let value = Borrowed::new(memory, tensor.dtype(), tensor.shape(), data, tensor.byte_len()).map_err(failed)?;
        Ok((placed, value.into_value()))
    }
}

impl<P: Place> Loader for Bound<P> {
    fn load(&self, name: &str, bytes: &[u8], weights: &[String]) -> Result<Box<dyn Engine>, EngineError> {
        let builder = self.sessions.builder(name)?;
        let builder = builder.with_config_entry(RECORD_PLACEMENT, "1").map_err(failed(name))?;
        let mut builder = self.place.provide(builder).map_err(failed(name))?;
        let mut placed = Vec::with_capacity(weights.len());
        for weight in weights {
            // A weight that the provider wants elsewhere, as for a node on the CPU, is read from its file instead.
            let (kept, value) = self.weight(name, weight)?;
            builder = builder.with_initializer(weight, value).map_err(failed(name))?;
            placed.push(kept);
        }
        let session = self.sessions.commit(builder, name, bytes)?;
        if !self.allow_fallback
            && let Some(astray) = astray(&shares(&session).map_err(failed(name))?, self.place.provider())
        {
            return Err(failed(name)(format!("{astray}; --allow-fallback lets them")));
        }
        let interface = Interface::of(name, &session);
        let (weights, place) = (self.sessions.weights.clone(), Arc::clone(&self.place));
        Ok(Box::new(BoundEngine { interface, session, place, _placed: placed, _weights: weights }))
    }

    fn name(&self) -> &'static str {
        self.place.engine()
    }
}

struct BoundEngine<P: Place> {
    interface: Interface,
    session: Session,
    place: Arc<P>,
    // The session's initializers point to these; fields are dropped in order, so they outlive it.
    _placed: Vec<Arc<Weight<P>>>,
    _weights: WeightMaps,
}

/// Memory at a place.
struct Kept<P: Place> {
    // Freed before the place.
    _owner: Owner<P>,
    place: Arc<P>,
    address: usize,
}

/// Who frees it.
enum Owner<P: Place> {
    /// The session that allocated it for an output.
    Session { _value: Allocated },
    /// The place.
    Place { _block: P::Block },
}

impl<P: Place> DeviceMemory for Kept<P> {
    fn download(&self, bytes: &mut [u8]) -> Result<(), String> {
        if bytes.is_empty() {
            return Ok(());
        }
        // SAFETY: the tensor was made with the shape of the value, which is kept.
        unsafe { self.place.download(self.address, bytes) }
    }

    unsafe fn gathered(byte_len: usize, pieces: &[(&Self, Runs)]) -> Result<Option<Self>, String> {
        let Some((first, _)) = pieces.first() else { return Ok(None) };
        let place = &first.place;
        if !pieces.iter().all(|(kept, _)| Arc::ptr_eq(&kept.place, place)) {
            return Ok(None);
        }
        let (block, address) = place.allocate(byte_len)?;
        let pieces: Vec<(usize, Runs)> = pieces.iter().map(|&(kept, runs)| (kept.address, runs)).collect();
        // SAFETY: the caller's promise; what was just allocated overlaps nothing.
        unsafe { place.copy(address, &pieces) }?;
        Ok(Some(Self { _owner: Owner::Place { _block: block }, place: Arc::clone(place), address }))
    }
}

// SAFETY: the memory is written by nobody after the run or the copy that filled it, and may be freed from any thread.
unsafe impl<P: Place> Send for Kept<P> {}
// SAFETY: as above; it is only read.
unsafe impl<P: Place> Sync for Kept<P> {}

/// Inputs and outputs of one run.
struct Binding(NonNull<sys::OrtIoBinding>);

impl Drop for Binding {
    fn drop(&mut self) {
        // SAFETY: created by `BoundEngine::binding`, released nowhere else.
        unsafe { (ort::api().ReleaseIoBinding)(self.0.as_ptr()) };
    }
}

impl<P: Place> BoundEngine<P> {
    /// Frees the status of a call.
    ///
    /// # Safety
    ///
    /// It is one that ONNX Runtime has just returned.
    unsafe fn check(&self, status: sys::OrtStatusPtr) -> Result<(), EngineError> {
        // SAFETY: the caller's promise.
        unsafe { Error::result_from_status(status) }.map_err(|e| self.interface.failed(e))
    }

    fn binding(&self) -> Result<Binding, EngineError> {
        let mut binding = null_mut();
        // SAFETY: the session is alive and the place for the result valid.
        unsafe {
            self.check((ort::api().CreateIoBinding)(self.session.ptr().cast_mut(), &raw mut binding))?;
        }
        NonNull::new(binding).map(Binding).ok_or_else(|| self.interface.failed("the runtime returned no binding"))
    }

    /// A tensor as it can be bound: at the place, if it is one that was left there, and aligned.
    fn bindable(&self, tensor: &Tensor) -> Result<(Tensor, Option<usize>), TensorError> {
        let address = |tensor: &Tensor| {
            let (resident, offset) = tensor.stored_in::<Resident<Kept<P>>>()?;
            let kept = Some(resident.memory()).filter(|kept| Arc::ptr_eq(&kept.place, &self.place));
            kept.map(|kept| kept.address + offset)
        };
        match address(tensor) {
            Some(found) if found.is_multiple_of(ALIGNMENT) => Ok((tensor.clone(), Some(found))),
            Some(_) => {
                let aligned = tensor.detached()?;
                let found = address(&aligned);
                Ok((aligned, found))
            }
            None => Ok((tensor.clone().on_host()?, None)),
        }
    }

    /// A value over `tensor`, which was made [bindable](Self::bindable).
    fn value(&self, (tensor, address): &(Tensor, Option<usize>)) -> Result<Borrowed, EngineError> {
        let value = match *address {
            Some(address) => {
                let (memory, data) = (self.place.memory(), address as *mut c_void);
                Borrowed::new(memory, tensor.dtype(), tensor.shape(), data, tensor.byte_len())
            }
            None => Borrowed::read_only(tensor),
        };
        value.map_err(|e| self.interface.failed(e))
    }

    /// The values of the bound outputs, in the order in which they were bound.
    fn results(&self, binding: &Binding) -> Result<Vec<Option<Allocated>>, EngineError> {
        let mut allocator = null_mut();
        let (mut values, mut count) = (null_mut(), 0);
        // SAFETY: the binding is alive and all places for results are valid.
        unsafe {
            self.check((ort::api().GetAllocatorWithDefaultOptions)(&raw mut allocator))?;
            let binding = binding.0.as_ptr();
            self.check((ort::api().GetBoundOutputValues)(binding, allocator, &raw mut values, &raw mut count))?;
        }
        if values.is_null() {
            return Ok(Vec::new());
        }
        // SAFETY: the call left `count` values there, which are ours now.
        let results = unsafe { &*slice_from_raw_parts(values, count) }
            .iter()
            // SAFETY: as above; the session allocated what they hold.
            .map(|&value| NonNull::new(value).map(|value| unsafe { Allocated::new(value, &self.session) }))
            .collect();
        // SAFETY: the list itself came from this allocator.
        unsafe { self.check((ort::api().AllocatorFree)(allocator, values.cast())) }?;
        Ok(results)
    }

    fn tensor(&self, name: &str, dtype: DType, value: Allocated) -> Result<Tensor, EngineError> {
        let shape = self.interface.shape(name, value.value())?;
        let address = value.data().map_err(|e| self.interface.failed(e))?.addr();
        let kept = Kept { _owner: Owner::Session { _value: value }, place: Arc::clone(&self.place), address };
        Resident::tensor(dtype, shape, kept).map_err(|source| EngineError::Output {
            graph: self.interface.graph.clone(),
            name: name.to_owned(),
            source,
        })
    }
}

impl<P: Place> Engine for BoundEngine<P> {
    fn run(
        &mut self,
        inputs: &[(&str, &Tensor)],
        in_place: &mut [InPlace<'_>],
        outputs: &[&str],
    ) -> Result<Vec<Tensor>, EngineError> {
        if let Some(slot) = in_place.first() {
            let engine = self.place.engine();
            let message = format!("'{}' is updated in memory of the host, which {engine} does not reach", slot.input);
            return Err(self.interface.failed(message));
        }
        let binding = self.binding()?;
        // Memory that is bound stays until the run is over.
        let mut bound = Vec::with_capacity(inputs.len());
        for (name, tensor) in inputs {
            let tensor = self.bindable(tensor).map_err(|e| self.interface.failed(e))?;
            let (name, value) = (self.interface.input(name)?, self.value(&tensor)?);
            // SAFETY: the binding, the name and the value are alive; the value is copied to the place here, unless it is there.
            unsafe { self.check((ort::api().BindInput)(binding.0.as_ptr(), name.as_ptr(), value.as_ptr())) }?;
            bound.push((value, tensor));
        }
        // What is asked for twice is bound once.
        let mut asked: Vec<(&str, DType)> = Vec::with_capacity(outputs.len());
        for name in outputs {
            if asked.iter().all(|(known, _)| known != name) {
                let (c_name, dtype) = self.interface.typed_output(name)?;
                let memory = self.place.memory().ptr();
                // SAFETY: the binding, the name and the description of the memory are alive.
                unsafe { self.check((ort::api().BindOutputToDevice)(binding.0.as_ptr(), c_name.as_ptr(), memory)) }?;
                asked.push((name, dtype));
            }
        }
        // SAFETY: session and binding are alive, and so is everything that is bound. The call returns when the work is done.
        unsafe {
            let session = self.session.ptr().cast_mut();
            self.check((ort::api().RunWithBinding)(session, null(), binding.0.as_ptr()))?;
        }
        let mut results = self.results(&binding)?.into_iter();
        drop((binding, bound));
        let mut tensors: Vec<Tensor> = Vec::with_capacity(asked.len());
        for (name, dtype) in &asked {
            let missing = || self.interface.failed(format!("the runtime returned no '{name}'"));
            tensors.push(self.tensor(name, *dtype, results.next().flatten().ok_or_else(missing)?)?);
        }
        let at = |name: &&str| asked.iter().position(|(known, _)| known == name);
        Ok(outputs.iter().filter_map(at).map(|i| tensors[i].clone()).collect())
    }
}
