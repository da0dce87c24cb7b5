//! An engine in NVIDIA's library, and what runs it with the shapes of one of its optimization profiles.

use super::layers::LayerRecord;
use super::shim::{Observer, Shim, c_observer, message};
use super::{TensorRtError, sys};
use crate::cuda::Address;
use accordion_graphs::dtype::DType;
use std::ffi::{CStr, CString, c_char, c_void};
use std::ptr::{NonNull, null_mut};
use std::sync::Arc;

/// An input or output of an engine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Port {
    pub(super) name: String,
    c_name: CString,
    pub(super) is_input: bool,
    /// Whether its values decide shapes: then the library reads it on the host.
    pub(super) on_host: bool,
    pub(super) dtype: DType,
}

/// The shim's functions that run engines.
#[derive(Clone, Copy)]
struct Calls {
    engine_close: sys::EngineClose,
    context_open: sys::ContextOpen,
    set_memory: sys::SetMemory,
    set_shape: sys::SetShape,
    set_address: sys::SetAddress,
    infer_shapes: sys::InferShapes,
    shape: sys::Shape,
    enqueue: sys::Enqueue,
    measure_layers: sys::MeasureLayers,
    layer_times: sys::LayerTimes,
    context_close: sys::ContextClose,
}

/// An engine. What it was put on a stream for has to be done before it is dropped.
pub(super) struct LoadedEngine {
    /// Of the graph, for messages.
    name: String,
    engine: NonNull<sys::Engine>,
    ports: Arc<[Port]>,
    /// One for each profile that has been used.
    contexts: Vec<Option<Context>>,
    calls: Calls,
    /// Where its layers' times go, if they are measured.
    layers: Option<Arc<LayerRecord>>,
    /// Its code.
    shim: Arc<Shim>,
}

// SAFETY: an engine and its contexts may be used from any thread, if from one at a time, which `&mut` makes sure of.
unsafe impl Send for LoadedEngine {}

impl LoadedEngine {
    /// Loads the engine of graph `name`. There must be a driver: without one the library answers with an address that is none.
    ///
    /// # Errors
    ///
    /// The library refuses it, and says why; or it has an input or output that cannot be given or taken.
    pub(super) fn open(
        shim: Arc<Shim>,
        name: &str,
        plan: &[u8],
        observer: &dyn Observer,
    ) -> Result<Self, TensorRtError> {
        let refused = |message| TensorRtError::Graph { graph: name.to_owned(), message };
        let calls = Calls {
            engine_close: shim.function(c"accordion_tensorrt_engine_close")?,
            context_open: shim.function(c"accordion_tensorrt_context_open")?,
            set_memory: shim.function(c"accordion_tensorrt_context_set_memory")?,
            set_shape: shim.function(c"accordion_tensorrt_context_set_shape")?,
            set_address: shim.function(c"accordion_tensorrt_context_set_address")?,
            infer_shapes: shim.function(c"accordion_tensorrt_context_infer_shapes")?,
            shape: shim.function(c"accordion_tensorrt_context_shape")?,
            enqueue: shim.function(c"accordion_tensorrt_context_enqueue")?,
            measure_layers: shim.function(c"accordion_tensorrt_context_measure_layers")?,
            layer_times: shim.function(c"accordion_tensorrt_context_layer_times")?,
            context_close: shim.function(c"accordion_tensorrt_context_close")?,
        };
        let open: sys::EngineOpen = shim.function(c"accordion_tensorrt_engine_open")?;
        let describe: sys::EngineTensor = shim.function(c"accordion_tensorrt_engine_tensor")?;
        let (mut engine, mut tensors, mut profiles) = (null_mut(), 0, 0);
        // SAFETY: the bytes, the observer and the places of results live over the call, which keeps none of them.
        message(|text, size| unsafe {
            let (data, observer) = (plan.as_ptr().cast(), c_observer(&observer));
            let (engine, tensors, profiles) = (&raw mut engine, &raw mut tensors, &raw mut profiles);
            open(shim.as_ptr(), data, plan.len(), observer, engine, tensors, profiles, text, size)
        })
        .map_err(refused)?;
        let engine = NonNull::new(engine).ok_or_else(|| refused("the library gave no engine".to_owned()))?;
        let contexts = (0..profiles).map(|_| None).collect();
        // From here on it is closed when dropped.
        let name = name.to_owned();
        let mut loaded = Self { name, engine, ports: Arc::default(), contexts, calls, layers: None, shim };
        let mut ports = Vec::new();
        for index in 0..tensors {
            let mut tensor = sys::Tensor {
                name: std::ptr::null(),
                is_input: 0,
                on_host: 0,
                type_: -1,
                is_linear: 0,
                rank: 0,
                shape: [0; sys::MAX_RANK],
            };
            // SAFETY: the engine is open, and the place of the result lives over the call.
            message(|text, size| unsafe { describe(engine.as_ptr(), index, &raw mut tensor, text, size) })
                .map_err(refused)?;
            // SAFETY: a C string that lives as long as the engine.
            let c_name = unsafe { CStr::from_ptr(tensor.name) }.to_owned();
            ports.push(port(c_name, &tensor).map_err(refused)?);
        }
        loaded.ports = ports.into();
        Ok(loaded)
    }

    /// Has the contexts that are made from now on measure their layers. A call then waits for its work.
    ///
    /// # Errors
    ///
    /// The library does not say what layers there are.
    pub(super) fn measure_layers(&mut self, record: &Arc<LayerRecord>) -> Result<(), TensorRtError> {
        let refused = |message| TensorRtError::Graph { graph: self.name.clone(), message };
        let layers: sys::EngineLayers = self.shim.function(c"accordion_tensorrt_engine_layers")?;
        let mut json = sys::Bytes { data: null_mut(), size: 0 };
        // SAFETY: the engine is open, and the place of the result lives over the call.
        let status = message(|text, size| unsafe { layers(self.engine.as_ptr(), &raw mut json, text, size) });
        let json = self.shim.taken(json)?;
        status.map_err(refused)?;
        record.describe(&self.name, &json).map_err(refused)?;
        self.layers = Some(Arc::clone(record));
        Ok(())
    }

    /// Its inputs and outputs.
    pub(super) fn ports(&self) -> Arc<[Port]> {
        Arc::clone(&self.ports)
    }

    /// How many optimization profiles it has.
    pub(super) fn num_profiles(&self) -> usize {
        self.contexts.len()
    }

    /// What runs it with shapes of profile `profile` on `stream`, which is the same for all calls.
    ///
    /// # Errors
    ///
    /// The library refuses, and says why.
    pub(super) fn context(&mut self, profile: usize, stream: *mut c_void) -> Result<&mut Context, String> {
        if self.contexts.get(profile).is_some_and(Option::is_none) {
            // SAFETY: it is closed when this is dropped, before the engine.
            self.contexts[profile] = Some(unsafe { self.open_context(profile, stream) }?);
        }
        self.contexts.get_mut(profile).and_then(Option::as_mut).ok_or_else(|| format!("there is no profile {profile}"))
    }

    /// Another one, whose shapes and addresses are nobody else's.
    ///
    /// # Errors
    ///
    /// As [`Self::context`].
    ///
    /// # Safety
    ///
    /// What it was used for is done, and it is dropped, before the engine is; and `stream` is one of the device.
    pub(super) unsafe fn open_context(&self, profile: usize, stream: *mut c_void) -> Result<Context, String> {
        let calls = self.calls;
        let (mut context, mut bytes) = (null_mut(), 0);
        // SAFETY: the engine is open, the stream is the caller's promise, and the results' places live over the call.
        message(|text, size| unsafe {
            let (context, bytes) = (&raw mut context, &raw mut bytes);
            (calls.context_open)(self.engine.as_ptr(), profile as i32, stream, context, bytes, text, size)
        })?;
        let raw = NonNull::new(context).ok_or("the library gave no execution context")?;
        let layers = self.layers.as_ref().map(|record| Layers { graph: self.name.clone(), record: Arc::clone(record) });
        if layers.is_some() {
            // SAFETY: the context is open.
            unsafe { (calls.measure_layers)(raw.as_ptr()) };
        }
        Ok(Context { raw, memory_bytes: usize::try_from(bytes).unwrap_or_default(), calls, stream, layers })
    }

    /// Its name, for messages.
    pub(super) fn name(&self) -> &str {
        &self.name
    }
}

impl Drop for LoadedEngine {
    fn drop(&mut self) {
        self.contexts.clear();
        // SAFETY: opened once and closed once, behind its contexts.
        unsafe { (self.calls.engine_close)(self.engine.as_ptr()) };
    }
}

/// What runs an engine with the shapes of one profile.
pub(super) struct Context {
    raw: NonNull<sys::Context>,
    memory_bytes: usize,
    calls: Calls,
    stream: *mut c_void,
    layers: Option<Layers>,
}

/// Where the times of an engine's layers go.
struct Layers {
    graph: String,
    record: Arc<LayerRecord>,
}

// SAFETY: as for the engine.
unsafe impl Send for Context {}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: opened once and closed once, before the engine.
        unsafe { (self.calls.context_close)(self.raw.as_ptr()) };
    }
}

impl Context {
    /// Whether [`Self::enqueue`] can be recorded: not where it waits for its work.
    pub(super) fn can_be_recorded(&self) -> bool {
        self.layers.is_none()
    }

    /// How much device memory it needs for intermediate values.
    pub(super) fn memory_bytes(&self) -> usize {
        self.memory_bytes
    }

    /// Gives it that memory.
    ///
    /// # Safety
    ///
    /// At `address` there are [`Self::memory_bytes`] of device memory, until what is enqueued is done.
    pub(super) unsafe fn set_memory(&mut self, address: Address) {
        // SAFETY: the caller's promise.
        unsafe { (self.calls.set_memory)(self.raw.as_ptr(), pointer(address), self.memory_bytes as i64) };
    }

    /// Sets the shape of an input.
    ///
    /// # Errors
    ///
    /// It does not fit the profile.
    pub(super) fn set_shape(&mut self, port: &Port, shape: &[usize]) -> Result<(), String> {
        let shape: Vec<i64> = shape.iter().map(|&n| n as i64).collect();
        // SAFETY: the name and the extents live over the call.
        message(|text, size| unsafe {
            let (name, extents) = (port.c_name.as_ptr(), shape.as_ptr());
            (self.calls.set_shape)(self.raw.as_ptr(), name, extents, shape.len() as i32, text, size)
        })
    }

    /// Says where an input or output is.
    ///
    /// # Errors
    ///
    /// The library refuses.
    ///
    /// # Safety
    ///
    /// There is as much memory as the shape takes: of the host until [`Self::enqueue`] returns if the port is on the host,
    /// otherwise of the device, at a multiple of 256 bytes, until what is enqueued is done.
    pub(super) unsafe fn set_address(&mut self, port: &Port, address: Address) -> Result<(), String> {
        // SAFETY: the name lives over the call; the memory is the caller's promise.
        message(|text, size| unsafe {
            (self.calls.set_address)(self.raw.as_ptr(), port.c_name.as_ptr(), pointer(address), text, size)
        })
    }

    /// Computes the shapes of outputs.
    ///
    /// # Errors
    ///
    /// An input has no shape or no value yet, or they do not go together.
    pub(super) fn infer_shapes(&mut self) -> Result<(), String> {
        // SAFETY: the context is open; what is on the host is there by the promise of `set_address`.
        message(|text, size| unsafe { (self.calls.infer_shapes)(self.raw.as_ptr(), text, size) })
    }

    /// The shape of an output, once shapes have been inferred.
    ///
    /// # Errors
    ///
    /// It is not known before the engine runs.
    pub(super) fn shape(&self, port: &Port) -> Result<Vec<usize>, String> {
        let (mut shape, mut rank) = ([0_i64; sys::MAX_RANK], 0);
        // SAFETY: the name and the places of results live over the call, which writes no more than the header says.
        message(|text, size| unsafe {
            let (name, extents) = (port.c_name.as_ptr(), shape.as_mut_ptr());
            (self.calls.shape)(self.raw.as_ptr(), name, extents, &raw mut rank, text, size)
        })?;
        let extents = shape.get(..usize::try_from(rank).unwrap_or(usize::MAX));
        let known = extents.and_then(|e| e.iter().map(|&n| usize::try_from(n).ok()).collect::<Option<Vec<_>>>());
        known.ok_or_else(|| format!("the shape of output '{}' is not known before it runs: {shape:?}", port.name))
    }

    /// Puts the work on the stream, and does not wait for it.
    ///
    /// # Errors
    ///
    /// The library or the device refuses.
    pub(super) fn enqueue(&mut self) -> Result<(), String> {
        // SAFETY: every address is what `set_address` and `set_memory` were promised.
        message(|text, size| unsafe { (self.calls.enqueue)(self.raw.as_ptr(), self.stream, text, size) })?;
        if let Some(layers) = &self.layers {
            let user = std::ptr::from_ref(layers).cast_mut().cast();
            // SAFETY: the context is open, and the record lives over the call, in which alone it is used.
            unsafe { (self.calls.layer_times)(self.raw.as_ptr(), user, on_layer) };
        }
        Ok(())
    }
}

unsafe extern "C" fn on_layer(user: *mut c_void, layer: *const c_char, milliseconds: f32) {
    // SAFETY: the shim hands back the pointer that `enqueue` gave it, and a C string.
    let (layers, layer) = unsafe { (&*user.cast::<Layers>(), CStr::from_ptr(layer)) };
    layers.record.add(&layers.graph, &layer.to_string_lossy(), milliseconds);
}

fn pointer(address: Address) -> *mut c_void {
    std::ptr::with_exposed_provenance_mut(address as usize)
}

fn port(c_name: CString, tensor: &sys::Tensor) -> Result<Port, String> {
    let name = c_name.to_string_lossy().into_owned();
    let (is_input, on_host) = (tensor.is_input != 0, tensor.on_host != 0);
    let refused = |problem: &str| Err(format!("{} '{name}' {problem}", if is_input { "input" } else { "output" }));
    let Some(dtype) = element_type(tensor.type_) else {
        return refused(&format!("has the element type {}, which is not supported", tensor.type_));
    };
    if tensor.is_linear == 0 {
        return refused("is not row-major");
    }
    if on_host && !is_input {
        return refused("is a shape, which the library leaves on the host: not supported");
    }
    Ok(Port { name, c_name, is_input, on_host, dtype })
}

/// The element types, by their numbers in `nvinfer1::DataType`.
fn element_type(number: i32) -> Option<DType> {
    Some(match number {
        0 => DType::F32,
        1 => DType::F16,
        2 => DType::I8,
        3 => DType::I32,
        4 => DType::Bool,
        5 => DType::U8,
        6 => DType::F8E4m3,
        7 => DType::Bf16,
        8 => DType::I64,
        9 => DType::I4,
        _ => return None,
    })
}
