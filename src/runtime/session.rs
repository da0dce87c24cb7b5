//! What all engines of ONNX Runtime share: how a session is set up, what its graph takes and gives, and values over memory.

use super::EngineError;
use super::locate::LoadedRuntime;
use crate::checkpoint::WeightMaps;
use crate::tensor::Tensor;
use accordion_graphs::dtype::DType;
use accordion_graphs::onnx::without_unused;
use ort::memory::MemoryInfo;
use ort::operator::OperatorDomain;
use ort::session::builder::SessionBuilder;
use ort::session::{Session, SharedSessionInner};
use ort::sys;
use ort::value::{DynValue, Outlet, ValueType};
use ort::{AsPointer, Error};
use std::collections::HashMap;
use std::ffi::{CString, c_void};
use std::path::PathBuf;
use std::ptr::{NonNull, null_mut};
use std::sync::Arc;
use std::time::Instant;

/// What the name of the file begins with in which a session that is loaded `micros` after the first one records the
/// nodes of `graph`.
pub(crate) fn trace_prefix(micros: u128, graph: &str) -> String {
    format!("{micros}-{graph}")
}

/// Makes an error of `graph` out of what the runtime said.
pub(super) fn failed<E: ToString>(graph: &str) -> impl Fn(E) -> EngineError + '_ {
    move |message| EngineError::Runtime { graph: graph.to_owned(), message: message.to_string() }
}

/// How the sessions of one loader are made.
pub(super) struct Sessions {
    pub(super) runtime: &'static LoadedRuntime,
    pub(super) weights: WeightMaps,
    pub(super) operators: Option<Arc<OperatorDomain>>,
    /// The folder that sessions record their nodes' times in, and the moment they count from.
    pub(super) trace: Option<(PathBuf, Instant)>,
}

impl Sessions {
    /// The options of a session of graph `name`, without weights.
    pub(super) fn builder(&self, name: &str) -> Result<SessionBuilder, EngineError> {
        let failed = failed::<Error>(name);
        let mut builder = Session::builder(self.runtime.environment()).map_err(&failed)?;
        // Lengths change from call to call: a plan of the memory for one shape would be kept beside those of all others.
        builder = builder.with_memory_pattern(false).map_err(|e| failed(e.into()))?;
        builder = builder.with_prepacking(false).map_err(|e| failed(e.into()))?;
        // The runtime's arena keeps a region for every size it ever saw, and chunk lengths are many; the system's allocator
        // joins what is freed (and keeps it: see `locate`).
        // SAFETY: the builder owns valid options, which the call only changes; the status is freed here.
        unsafe { Error::result_from_status((ort::api().DisableCpuMemArena)(builder.ptr_mut())) }.map_err(&failed)?;
        // Weights that are given replace the files, but the runtime checks that those exist.
        let folder = self.weights.index().files().first().and_then(|file| file.parent()).map(std::path::absolute);
        if let Some(Ok(folder)) = folder {
            let key = "session.model_external_initializers_file_folder_path";
            builder = builder.with_config_entry(key, folder.to_string_lossy()).map_err(|e| failed(e.into()))?;
        }
        if let Some((folder, since)) = &self.trace {
            let file = folder.join(trace_prefix(since.elapsed().as_micros(), name));
            builder = builder.with_profiling(file).map_err(|e| failed(e.into()))?;
        }
        if let Some(domain) = &self.operators {
            builder = builder.with_operators(Arc::clone(domain)).map_err(|e| failed(e.into()))?;
        }
        Ok(builder)
    }

    /// The weight `weight` of graph `name`, where the checkpoint is mapped.
    pub(super) fn weight(&self, name: &str, weight: &str) -> Result<Tensor, EngineError> {
        let tensor = self.weights.tensor(weight);
        tensor.map_err(|e| EngineError::Weight { graph: name.to_owned(), source: Box::new(e) })
    }

    /// Makes the session of the model `bytes`.
    pub(super) fn commit(&self, mut builder: SessionBuilder, name: &str, bytes: &[u8]) -> Result<Session, EngineError> {
        let bytes = &without_unused(bytes);
        let session = if self.operators.is_some() {
            accordion_plugins::commit(|| builder.commit_from_memory(bytes))
        } else {
            builder.commit_from_memory(bytes)
        };
        session.map_err(failed(name))
    }
}

type Names = HashMap<String, (CString, Option<DType>)>;

/// What a graph takes and gives.
pub(super) struct Interface {
    pub(super) graph: String,
    inputs: Names,
    outputs: Names,
}

impl Interface {
    pub(super) fn of(graph: &str, session: &Session) -> Self {
        Self { graph: graph.to_owned(), inputs: names(session.inputs()), outputs: names(session.outputs()) }
    }

    /// An input's name, as the runtime takes it.
    pub(super) fn input(&self, name: &str) -> Result<&CString, EngineError> {
        self.find(&self.inputs, "input", name).map(|(name, _)| name)
    }

    /// An output's name, as the runtime takes it.
    pub(super) fn output(&self, name: &str) -> Result<&CString, EngineError> {
        self.find(&self.outputs, "output", name).map(|(name, _)| name)
    }

    /// An output's name and element type.
    pub(super) fn typed_output(&self, name: &str) -> Result<(&CString, DType), EngineError> {
        let (c_name, dtype) = self.find(&self.outputs, "output", name)?;
        let dtype = dtype.ok_or_else(|| self.failed(format!("output '{name}' has an unsupported element type")))?;
        Ok((c_name, dtype))
    }

    fn find<'n>(
        &self,
        names: &'n Names,
        kind: &'static str,
        name: &str,
    ) -> Result<&'n (CString, Option<DType>), EngineError> {
        let unknown = || EngineError::UnknownName { graph: self.graph.clone(), kind, name: name.to_owned() };
        names.get(name).ok_or_else(unknown)
    }

    /// An error of this graph.
    pub(super) fn failed(&self, message: impl ToString) -> EngineError {
        failed(&self.graph)(message)
    }

    /// The shape of output `name`.
    pub(super) fn shape(&self, name: &str, value: &DynValue) -> Result<Vec<usize>, EngineError> {
        match value.dtype() {
            ValueType::Tensor { shape, .. } => Ok(shape.iter().map(|&n| n.max(0) as usize).collect()),
            other => Err(self.failed(format!("output '{name}' is {other:?}, expected a tensor"))),
        }
    }
}

fn names(outlets: &[Outlet]) -> Names {
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
pub(super) struct Borrowed(NonNull<sys::OrtValue>);

impl Borrowed {
    /// Over `len` bytes at `data`, which lie where `place` says.
    pub(super) fn new(
        place: &MemoryInfo<'_>,
        dtype: DType,
        shape: &[usize],
        data: *mut c_void,
        len: usize,
    ) -> Result<Self, String> {
        let shape: Vec<i64> = shape.iter().map(|&n| n as i64).collect();
        let mut value = null_mut();
        // SAFETY: `shape` and `place` live through the call, which copies them; the data is only stored as a pointer. The status
        // is freed here.
        let made = unsafe {
            Error::result_from_status((ort::api().CreateTensorWithDataAsOrtValue)(
                place.ptr(),
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

    /// Over memory of the host that is only read.
    pub(super) fn read_only(tensor: &Tensor) -> Result<Self, String> {
        let bytes = tensor.bytes();
        let data = bytes.as_ptr().cast_mut().cast();
        Self::new(&MemoryInfo::default(), tensor.dtype(), tensor.shape(), data, bytes.len())
    }

    pub(super) fn as_ptr(&self) -> *mut sys::OrtValue {
        self.0.as_ptr()
    }

    /// As a value that `ort` releases.
    pub(super) fn into_value(self) -> DynValue {
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
pub(super) struct Allocated {
    // Freed before the session whose allocator it came from.
    value: DynValue,
    _session: Arc<SharedSessionInner>,
}

impl Allocated {
    /// Takes over what a session returned.
    ///
    /// # Safety
    ///
    /// The value is one that `session` allocated and handed over; nobody else releases it.
    pub(super) unsafe fn new(value: NonNull<sys::OrtValue>, session: &Session) -> Self {
        // SAFETY: the caller's promise.
        let value = unsafe { DynValue::from_ptr(value, Some(session.allocator())) };
        Self { value, _session: session.inner() }
    }

    pub(super) fn value(&self) -> &DynValue {
        &self.value
    }

    /// Where its elements lie; maybe null if there are none.
    pub(super) fn data(&self) -> Result<*mut u8, String> {
        let mut data = null_mut();
        // SAFETY: the value is a tensor; the call only reads where its memory is. The status is freed here.
        let got = unsafe {
            Error::result_from_status((ort::api().GetTensorMutableData)(self.value.ptr().cast_mut(), &raw mut data))
        };
        got.map_err(|e| e.to_string())?;
        Ok(data.cast())
    }
}
