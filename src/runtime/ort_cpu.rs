//! Graphs in ONNX Runtime, on the CPU.
//!
//! Weights are given to the runtime as tensors over the memory-mapped checkpoint: one copy of them, in the page cache,
//! serves every graph. Pre-packing is off, because it would copy each of them once more per graph; measured on fp32
//! matrix products it gains nothing at a thousand rows and a few percent at one.

use super::locate::LoadedRuntime;
use super::{Engine, EngineError, InPlace, Loader};
use crate::checkpoint::WeightMaps;
use crate::tensor::{Storage, Tensor};
use accordion_graphs::dtype::DType;
use accordion_graphs::onnx::without_unused;
use ort::operator::OperatorDomain;
use ort::session::{Session, SharedSessionInner};
use ort::sys;
use ort::value::{DynValue, Outlet, ValueType};
use ort::{AsPointer, Error};
use std::collections::HashMap;
use std::ffi::{CString, c_char, c_void};
use std::path::PathBuf;
use std::ptr::{NonNull, null, null_mut};
use std::sync::Arc;
use std::time::Instant;

/// How the runtime is set up.
#[derive(Debug, Clone, Default)]
pub struct OrtOptions {
    /// Whether our own kernels are registered. Without them the bodies of the model-local functions run.
    pub fused_operators: bool,
}

/// Loads graphs into ONNX Runtime's CPU provider.
pub struct OrtCpu {
    runtime: &'static LoadedRuntime,
    weights: WeightMaps,
    operators: Option<Arc<OperatorDomain>>,
    trace: Option<(PathBuf, Instant)>,
}

/// What the name of the file begins with in which a session that is loaded `micros` after the first one records the
/// nodes of `graph`.
pub(crate) fn trace_prefix(micros: u128, graph: &str) -> String {
    format!("{micros}-{graph}")
}

impl OrtCpu {
    /// A loader of graphs that link to `weights`.
    ///
    /// # Errors
    ///
    /// Our kernels cannot be registered.
    pub fn new(
        runtime: &'static LoadedRuntime,
        weights: WeightMaps,
        options: &OrtOptions,
    ) -> Result<Self, EngineError> {
        let failed = |e: ort::Error| EngineError::Runtime {
            graph: accordion_graphs::onnx::DOMAIN.into(),
            message: e.to_string(),
        };
        let operators =
            options.fused_operators.then(|| accordion_plugins::domain().map(Arc::new).map_err(failed)).transpose()?;
        Ok(Self { runtime, weights, operators, trace: None })
    }

    /// The same loader, each of whose sessions records its nodes' times in a file in `folder`, which is complete once
    /// the session is gone. Recording costs time.
    #[must_use]
    pub fn tracing(self, folder: PathBuf) -> Self {
        Self { trace: Some((folder, Instant::now())), ..self }
    }
}

impl Loader for OrtCpu {
    fn load(&self, name: &str, bytes: &[u8], weights: &[String]) -> Result<Box<dyn Engine>, EngineError> {
        let failed = |message: String| EngineError::Runtime { graph: name.to_owned(), message };
        let mut builder = Session::builder(self.runtime.environment()).map_err(|e| failed(e.to_string()))?;
        // Lengths change from call to call: a plan of the memory for one shape would be kept beside those of all others.
        builder = builder.with_memory_pattern(false).map_err(|e| failed(e.to_string()))?;
        builder = builder.with_prepacking(false).map_err(|e| failed(e.to_string()))?;
        // The runtime's arena keeps a region for every size it ever saw, and chunk lengths are many; the system's allocator
        // joins what is freed (and keeps it: see `locate`).
        // SAFETY: the builder owns valid options, which the call only changes; the status is freed here.
        unsafe { Error::result_from_status((ort::api().DisableCpuMemArena)(builder.ptr_mut())) }
            .map_err(|e| failed(e.to_string()))?;
        // The weights given below replace the files, but the runtime checks that those exist.
        let folder = self.weights.index().files().first().and_then(|file| file.parent()).map(std::path::absolute);
        if let Some(Ok(folder)) = folder {
            let key = "session.model_external_initializers_file_folder_path";
            builder = builder.with_config_entry(key, folder.to_string_lossy()).map_err(|e| failed(e.to_string()))?;
        }
        if let Some((folder, since)) = &self.trace {
            let file = folder.join(trace_prefix(since.elapsed().as_micros(), name));
            builder = builder.with_profiling(file).map_err(|e| failed(e.to_string()))?;
        }
        if let Some(domain) = &self.operators {
            builder = builder.with_operators(Arc::clone(domain)).map_err(|e| failed(e.to_string()))?;
        }
        for weight in weights {
            let tensor = self
                .weights
                .tensor(weight)
                .map_err(|e| EngineError::Weight { graph: name.to_owned(), source: Box::new(e) })?;
            let value = Borrowed::read_only(&tensor).map_err(failed)?.into_value();
            builder = builder.with_initializer(weight, value).map_err(|e| failed(e.to_string()))?;
        }
        let bytes = without_unused(bytes);
        let session = if self.operators.is_some() {
            accordion_plugins::commit(|| builder.commit_from_memory(&bytes))
        } else {
            builder.commit_from_memory(&bytes)
        };
        let session = session.map_err(|e| failed(e.to_string()))?;
        let engine = OrtEngine {
            name: name.to_owned(),
            inputs: names(session.inputs()),
            outputs: names(session.outputs()),
            session,
            _weights: self.weights.clone(),
        };
        Ok(Box::new(engine))
    }

    fn name(&self) -> &'static str {
        "ort-cpu"
    }
}

struct OrtEngine {
    name: String,
    inputs: HashMap<String, (CString, Option<DType>)>,
    outputs: HashMap<String, (CString, Option<DType>)>,
    session: Session,
    // The session's initializers point into these mappings; fields are dropped in order, so they outlive it.
    _weights: WeightMaps,
}

fn names(outlets: &[Outlet]) -> HashMap<String, (CString, Option<DType>)> {
    outlets
        .iter()
        .filter_map(|outlet| {
            let name = CString::new(outlet.name()).ok()?;
            Some((outlet.name().to_owned(), (name, element_type(outlet.dtype()))))
        })
        .collect()
}

fn element_type(value: &ValueType) -> Option<DType> {
    use ort::value::TensorElementType as E;
    let ValueType::Tensor { ty, .. } = value else { return None };
    Some(match ty {
        E::Float32 => DType::F32,
        E::Float16 => DType::F16,
        E::Bfloat16 => DType::Bf16,
        E::Int64 => DType::I64,
        E::Int32 => DType::I32,
        E::Bool => DType::Bool,
        E::Uint8 => DType::U8,
        E::Int8 => DType::I8,
        E::Int4 => DType::I4,
        E::Float8E4M3FN => DType::F8E4m3,
        _ => return None,
    })
}

fn onnx_type(dtype: DType) -> sys::ONNXTensorElementDataType {
    use sys::ONNXTensorElementDataType as T;
    match dtype {
        DType::F32 => T::ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT,
        DType::F16 => T::ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16,
        DType::Bf16 => T::ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16,
        DType::I64 => T::ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64,
        DType::I32 => T::ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32,
        DType::Bool => T::ONNX_TENSOR_ELEMENT_DATA_TYPE_BOOL,
        DType::U8 => T::ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8,
        DType::I8 => T::ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8,
        DType::I4 => T::ONNX_TENSOR_ELEMENT_DATA_TYPE_INT4,
        DType::F8E4m3 => T::ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT8E4M3FN,
    }
}

/// A runtime value over memory that it neither owns nor frees.
struct Borrowed(NonNull<sys::OrtValue>);

impl Borrowed {
    fn new(dtype: DType, shape: &[usize], data: *mut c_void, len: usize) -> Result<Self, String> {
        let shape: Vec<i64> = shape.iter().map(|&n| n as i64).collect();
        let info = ort::memory::MemoryInfo::default();
        let mut value = null_mut();
        // SAFETY: `shape` and `info` live through the call, which copies them; the data is only stored as a pointer. The status
        // is freed here.
        let made = unsafe {
            Error::result_from_status((ort::api().CreateTensorWithDataAsOrtValue)(
                info.ptr(),
                data,
                len,
                shape.as_ptr(),
                shape.len(),
                onnx_type(dtype),
                &raw mut value,
            ))
        };
        made.map_err(|e| e.to_string())?;
        NonNull::new(value).map(Self).ok_or_else(|| "the runtime returned no value".to_owned())
    }

    /// Over memory that is only read.
    fn read_only(tensor: &Tensor) -> Result<Self, String> {
        let bytes = tensor.bytes();
        Self::new(tensor.dtype(), tensor.shape(), bytes.as_ptr().cast_mut().cast(), bytes.len())
    }

    /// As a value that `ort` releases.
    fn into_value(self) -> DynValue {
        let value = std::mem::ManuallyDrop::new(self);
        // SAFETY: the value is valid and from here on released by its new owner alone. The allocator only describes
        // where the memory is.
        unsafe { DynValue::from_ptr(value.0, Some(&ort::memory::Allocator::default())) }
    }
}

impl Drop for Borrowed {
    fn drop(&mut self) {
        // SAFETY: created in `new`, released nowhere else.
        unsafe { (ort::api().ReleaseValue)(self.0.as_ptr()) };
    }
}

/// An output that the runtime allocated.
struct OrtStorage {
    // Freed before the session whose allocator it came from.
    _value: DynValue,
    _session: Arc<SharedSessionInner>,
    data: NonNull<u8>,
    len: usize,
}

// SAFETY: the memory is owned by the value, written by nobody after the run that produced it, and may be freed from any
// thread.
unsafe impl Send for OrtStorage {}
// SAFETY: as above; it is only read.
unsafe impl Sync for OrtStorage {}

impl Storage for OrtStorage {
    fn bytes(&self) -> &[u8] {
        // SAFETY: `data` points to `len` initialised bytes that `_value` keeps alive.
        unsafe { std::slice::from_raw_parts(self.data.as_ptr(), self.len) }
    }
}

impl OrtEngine {
    fn name_of<'s>(
        &'s self,
        names: &'s HashMap<String, (CString, Option<DType>)>,
        kind: &'static str,
        name: &str,
    ) -> Result<&'s (CString, Option<DType>), EngineError> {
        names.get(name).ok_or_else(|| EngineError::UnknownName {
            graph: self.name.clone(),
            kind,
            name: name.to_owned(),
        })
    }

    fn tensor(&self, name: &str, dtype: DType, value: NonNull<sys::OrtValue>) -> Result<Tensor, EngineError> {
        // SAFETY: the runtime handed this output over to us; it is freed with the storage below.
        let value = unsafe { DynValue::from_ptr(value, Some(self.session.allocator())) };
        let failed = |message: String| EngineError::Runtime { graph: self.name.clone(), message };
        let shape: Vec<usize> = match value.dtype() {
            ValueType::Tensor { shape, .. } => shape.iter().map(|&n| n.max(0) as usize).collect(),
            other => return Err(failed(format!("output '{name}' is {other:?}, expected a tensor"))),
        };
        let mut data = null_mut();
        // SAFETY: the value is a tensor; the call only reads where its memory is. The status is freed here.
        let got = unsafe {
            Error::result_from_status((ort::api().GetTensorMutableData)(value.ptr().cast_mut(), &raw mut data))
        };
        got.map_err(|e| failed(e.to_string()))?;
        let len = dtype.bytes_of_shape(&shape).ok_or_else(|| failed(format!("output '{name}' has shape {shape:?}")))?;
        // An empty tensor may come without memory.
        let data = NonNull::new(data.cast::<u8>()).unwrap_or(NonNull::<i64>::dangling().cast());
        let storage = OrtStorage { _value: value, _session: self.session.inner(), data, len };
        Tensor::from_storage(dtype, shape, Arc::new(storage), 0).map_err(|source| EngineError::Output {
            graph: self.name.clone(),
            name: name.to_owned(),
            source,
        })
    }
}

impl Engine for OrtEngine {
    fn run(
        &mut self,
        inputs: &[(&str, &Tensor)],
        in_place: &mut [InPlace<'_>],
        outputs: &[&str],
    ) -> Result<Vec<Tensor>, EngineError> {
        let failed = |message: String| EngineError::Runtime { graph: self.name.clone(), message };
        let mut input_names: Vec<*const c_char> = Vec::with_capacity(inputs.len() + in_place.len());
        let mut input_values = Vec::with_capacity(inputs.len() + in_place.len());
        for (name, tensor) in inputs {
            input_names.push(self.name_of(&self.inputs, "input", name)?.0.as_ptr());
            input_values.push(Borrowed::read_only(tensor).map_err(failed)?);
        }
        let mut output_names: Vec<*const c_char> = Vec::with_capacity(outputs.len() + in_place.len());
        let mut output_types = Vec::with_capacity(outputs.len());
        for name in outputs {
            let (c_name, dtype) = self.name_of(&self.outputs, "output", name)?;
            output_names.push(c_name.as_ptr());
            output_types.push(dtype.ok_or_else(|| failed(format!("output '{name}' has an unsupported element type")))?);
        }
        for slot in in_place.iter_mut() {
            let fits = slot.shape.iter().try_fold(1_usize, |n, &dim| n.checked_mul(dim)) == Some(slot.data.len());
            if !fits {
                return Err(failed(format!("'{}' has {} elements, not {:?}", slot.input, slot.data.len(), slot.shape)));
            }
            input_names.push(self.name_of(&self.inputs, "input", slot.input)?.0.as_ptr());
            output_names.push(self.name_of(&self.outputs, "output", slot.output)?.0.as_ptr());
            let (dtype, data) = (slot.data.dtype(), slot.data.as_mut_ptr().cast());
            let len = slot.data.len() * dtype.size();
            input_values.push(Borrowed::new(dtype, slot.shape, data, len).map_err(failed)?);
        }
        let value_pointers: Vec<*const sys::OrtValue> =
            input_values.iter().map(|v: &Borrowed| v.0.as_ptr().cast_const()).collect();
        let mut results: Vec<*mut sys::OrtValue> = vec![null_mut(); outputs.len()];
        // One value serves as input and output of what is updated in place.
        results.extend(value_pointers[inputs.len()..].iter().map(|p| p.cast_mut()));
        // SAFETY: all names and values live through the call and the counts are theirs. Memory bound as both input and
        // output is exclusively borrowed; the operators that are given it append behind what they read.
        let ran = unsafe {
            Error::result_from_status((ort::api().Run)(
                self.session.ptr().cast_mut(),
                null(),
                input_names.as_ptr(),
                value_pointers.as_ptr(),
                value_pointers.len(),
                output_names.as_ptr(),
                output_names.len(),
                results.as_mut_ptr(),
            ))
        };
        ran.map_err(|e| failed(e.to_string()))?;
        outputs
            .iter()
            .zip(output_types)
            .zip(results)
            .map(|((name, dtype), value)| {
                let value = NonNull::new(value).ok_or_else(|| failed(format!("the runtime returned no '{name}'")))?;
                self.tensor(name, dtype, value)
            })
            .collect()
    }
}
