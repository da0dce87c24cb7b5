//! Graphs in ONNX Runtime, on the CPU.
//!
//! Weights are given to the runtime as tensors over the memory-mapped checkpoint: one copy of them, in the page cache,
//! serves every graph. Pre-packing is off, because it would copy each of them once more per graph; measured on fp32
//! matrix products it gains nothing at a thousand rows and a few percent at one.

use super::locate::LoadedRuntime;
use super::session::{Allocated, Borrowed, Interface, Sessions, failed};
use super::{Engine, EngineError, InPlace, Loader};
use crate::checkpoint::WeightMaps;
use crate::tensor::{Storage, Tensor};
use accordion_graphs::dtype::DType;
use ort::memory::MemoryInfo;
use ort::session::Session;
use ort::sys;
use ort::{AsPointer, Error};
use std::ffi::c_char;
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
pub struct OrtCpu(Sessions);

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
        let domain = || accordion_plugins::domain().map(Arc::new).map_err(failed(accordion_graphs::onnx::DOMAIN));
        let operators = options.fused_operators.then(domain).transpose()?;
        Ok(Self(Sessions { runtime, weights, operators, trace: None }))
    }

    /// The same loader, each of whose sessions records its nodes' times in a file in `folder`, which is complete once
    /// the session is gone. Recording costs time.
    #[must_use]
    pub fn tracing(self, folder: PathBuf) -> Self {
        Self(Sessions { trace: Some((folder, Instant::now())), ..self.0 })
    }
}

impl Loader for OrtCpu {
    fn load(&self, name: &str, bytes: &[u8], weights: &[String]) -> Result<Box<dyn Engine>, EngineError> {
        let mut builder = self.0.builder(name)?;
        for weight in weights {
            let tensor = self.0.weight(name, weight)?;
            let value = Borrowed::read_only(&tensor).map_err(failed(name))?.into_value();
            builder = builder.with_initializer(weight, value).map_err(failed(name))?;
        }
        let session = self.0.commit(builder, name, bytes)?;
        let interface = Interface::of(name, &session);
        Ok(Box::new(OrtEngine { interface, session, _weights: self.0.weights.clone() }))
    }

    fn name(&self) -> &'static str {
        "ort-cpu"
    }
}

struct OrtEngine {
    interface: Interface,
    session: Session,
    // The session's initializers point into these mappings; fields are dropped in order, so they outlive it.
    _weights: WeightMaps,
}

/// An output's memory.
struct OrtStorage {
    _value: Allocated,
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
    fn tensor(&self, name: &str, dtype: DType, value: NonNull<sys::OrtValue>) -> Result<Tensor, EngineError> {
        // SAFETY: the runtime handed this output over to us.
        let value = unsafe { Allocated::new(value, &self.session) };
        let shape = self.interface.shape(name, value.value())?;
        let data = value.data().map_err(|e| self.interface.failed(e))?;
        let too_large = || self.interface.failed(format!("output '{name}' has shape {shape:?}"));
        let len = dtype.bytes_of_shape(&shape).ok_or_else(too_large)?;
        // An empty tensor may come without memory.
        let data = NonNull::new(data).unwrap_or(NonNull::<i64>::dangling().cast());
        let storage = OrtStorage { _value: value, data, len };
        Tensor::from_storage(dtype, shape, Arc::new(storage), 0).map_err(|source| EngineError::Output {
            graph: self.interface.graph.clone(),
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
        let interface = &self.interface;
        let failed = |message: String| interface.failed(message);
        let mut input_names: Vec<*const c_char> = Vec::with_capacity(inputs.len() + in_place.len());
        let mut input_values = Vec::with_capacity(inputs.len() + in_place.len());
        for (name, tensor) in inputs {
            input_names.push(interface.input(name)?.as_ptr());
            input_values.push(Borrowed::read_only(tensor).map_err(failed)?);
        }
        let mut output_names: Vec<*const c_char> = Vec::with_capacity(outputs.len() + in_place.len());
        let mut output_types = Vec::with_capacity(outputs.len());
        for name in outputs {
            let (c_name, dtype) = interface.typed_output(name)?;
            output_names.push(c_name.as_ptr());
            output_types.push(dtype);
        }
        let host = MemoryInfo::default();
        for slot in in_place.iter_mut() {
            let fits = slot.shape.iter().try_fold(1_usize, |n, &dim| n.checked_mul(dim)) == Some(slot.data.len());
            if !fits {
                return Err(failed(format!("'{}' has {} elements, not {:?}", slot.input, slot.data.len(), slot.shape)));
            }
            input_names.push(interface.input(slot.input)?.as_ptr());
            output_names.push(interface.output(slot.output)?.as_ptr());
            let (dtype, data) = (slot.data.dtype(), slot.data.as_mut_ptr().cast());
            let len = slot.data.len() * dtype.size();
            input_values.push(Borrowed::new(&host, dtype, slot.shape, data, len).map_err(failed)?);
        }
        let value_pointers: Vec<*const sys::OrtValue> =
            input_values.iter().map(|v: &Borrowed| v.as_ptr().cast_const()).collect();
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
