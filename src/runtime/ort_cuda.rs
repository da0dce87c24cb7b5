//! Graphs in ONNX Runtime's CUDA provider.
//!
//! ONNX Runtime, our kernels and our copies use one stream, on which everything happens in order. Products of float32 stay
//! products of float32: TF32 is off.

use super::EngineError;
use super::bound::{Bound, BoundOptions, Place};
use super::locate::LoadedRuntime;
use crate::checkpoint::WeightMaps;
use crate::cuda::{Address, Buffer, Device, Kernels, Origin, Source};
use ort::memory::{AllocationDevice, AllocatorType, MemoryInfo, MemoryType};
use ort::session::Session;
use ort::session::builder::SessionBuilder;
use ort::{AsPointer as _, Error, sys};
use std::ffi::{CString, c_char};
use std::path::Path;
use std::ptr::{NonNull, null_mut};
use std::sync::Arc;

const NAME: &str = "ort-cuda";

/// How ONNX Runtime calls the provider.
pub(super) const PROVIDER: &str = "CUDAExecutionProvider";

/// What lies beside `libonnxruntime.so` in a build with CUDA.
const BESIDE: [&str; 2] = ["libonnxruntime_providers_shared.so", "libonnxruntime_providers_cuda.so"];

/// What is to be done where it is not.
const GET_RUNTIME: &str = "install the Python package onnxruntime-gpu and set ORT_DYLIB_PATH to its \
                           onnxruntime/capi/libonnxruntime.so.<version>; libonnxruntime_providers_cuda.so has to lie beside it";

/// What is to be done where CUDA's own libraries are not found.
const GET_LIBRARIES: &str = "the provider needs cuBLAS, cuRAND, cuFFT and the runtime of the CUDA release it was built for \
                             (13 for onnxruntime-gpu 1.31) and cuDNN 9: from NVIDIA's packages or the Python packages \
                             nvidia-cublas, nvidia-curand, nvidia-cufft, nvidia-cuda-runtime and nvidia-cudnn-cu13; put their \
                             folders into LD_LIBRARY_PATH";

/// How the provider is set up.
#[derive(Debug, Clone)]
pub struct OrtCudaOptions {
    /// Number of the GPU, from 0.
    pub device: usize,
    /// Where our own kernels come from; without them the bodies of the model-local functions run.
    pub kernels: Option<Origin>,
    /// Whether nodes that compute may run on the CPU.
    pub allow_fallback: bool,
}

/// A loader of graphs that link to `weights`.
///
/// # Errors
///
/// The runtime has no CUDA provider, its libraries, a driver or a GPU are missing, or our kernels cannot be had.
pub fn open(
    runtime: &'static LoadedRuntime,
    weights: WeightMaps,
    options: &OrtCudaOptions,
) -> Result<Bound<Gpu>, EngineError> {
    let gpu = Gpu::open(runtime, options.device)?;
    let unavailable = |reason: String| EngineError::Unavailable { engine: NAME, reason };
    let operators = options.kernels.as_ref().map(|origin| {
        let kernels =
            Kernels::load_of(&gpu.device, origin, &Source::OPERATORS).map_err(|e| unavailable(e.to_string()))?;
        super::cuda_operators::domain(&gpu.device, Arc::new(kernels)).map_err(|e| unavailable(e.to_string()))
    });
    let options = BoundOptions { operators: operators.transpose()?, allow_fallback: options.allow_fallback };
    Ok(Bound::new(runtime, weights, gpu, options))
}

/// A GPU, as a place of tensors.
pub struct Gpu {
    device: Device,
    ordinal: i32,
    memory: MemoryInfo<'static>,
}

impl Gpu {
    fn open(runtime: &LoadedRuntime, ordinal: usize) -> Result<Self, EngineError> {
        let unavailable = |reason: String| EngineError::Unavailable { engine: NAME, reason };
        check_build(&runtime.library().path, &runtime.execution_providers()).map_err(unavailable)?;
        let device = Device::open(ordinal).map_err(|e| unavailable(e.to_string()))?;
        let ordinal = i32::try_from(ordinal).map_err(|e| unavailable(e.to_string()))?;
        let memory = MemoryInfo::new(AllocationDevice::CUDA, ordinal, AllocatorType::Device, MemoryType::Default);
        let memory = memory.map_err(|e| unavailable(e.to_string()))?;
        let gpu = Self { device, ordinal, memory };
        // Loads the provider, and with it what it is linked to.
        let builder = Session::builder(runtime.environment()).and_then(|builder| gpu.provide(builder));
        builder.map_err(|e| unavailable(format!("{}; {GET_LIBRARIES}", e.to_string().trim_end())))?;
        Ok(gpu)
    }
}

/// The provider's options, as ONNX Runtime keeps them.
struct ProviderOptions(NonNull<sys::OrtCUDAProviderOptionsV2>);

impl Drop for ProviderOptions {
    fn drop(&mut self) {
        // SAFETY: created in `Gpu::options`, released nowhere else.
        unsafe { (ort::api().ReleaseCUDAProviderOptions)(self.0.as_ptr()) };
    }
}

impl Gpu {
    fn options(&self) -> Result<ProviderOptions, Error> {
        let stream = self.device.stream_pointer().addr();
        let options = [
            ("device_id", self.ordinal.to_string()),
            ("use_tf32", "0".to_owned()),
            // Chunk lengths are many, and every region would be twice as large as the one before.
            ("arena_extend_strategy", "kSameAsRequested".to_owned()),
            ("has_user_compute_stream", "1".to_owned()),
            ("user_compute_stream", stream.to_string()),
        ];
        let text = |text: &str| CString::new(text).map_err(|e| Error::new(e.to_string()));
        let keys = options.iter().map(|(key, _)| text(key)).collect::<Result<Vec<_>, _>>()?;
        let values = options.iter().map(|(_, value)| text(value)).collect::<Result<Vec<_>, _>>()?;
        let pointers = |texts: &[CString]| -> Vec<*const c_char> { texts.iter().map(|text| text.as_ptr()).collect() };
        let (keys, values) = (&pointers(&keys), &pointers(&values));
        let (api, mut created) = (ort::api(), null_mut());
        // SAFETY: all texts live through the calls, which copy them; the statuses are freed here.
        unsafe {
            Error::result_from_status((api.CreateCUDAProviderOptions)(&raw mut created))?;
            let created = NonNull::new(created).ok_or_else(|| Error::new("the runtime returned no options"))?;
            let created = ProviderOptions(created);
            let update = api.UpdateCUDAProviderOptions;
            Error::result_from_status(update(created.0.as_ptr(), keys.as_ptr(), values.as_ptr(), keys.len()))?;
            Ok(created)
        }
    }
}

/// Whether the build of ONNX Runtime at `library` with these providers is one for CUDA, and complete.
fn check_build(library: &Path, providers: &[String]) -> Result<(), String> {
    if !providers.iter().any(|provider| provider == PROVIDER) {
        return Err(format!("{} is a build without {PROVIDER}; {GET_RUNTIME}", library.display()));
    }
    let folder = library.canonicalize().unwrap_or_else(|_| library.to_owned());
    let folder = folder.parent().unwrap_or(Path::new("."));
    match BESIDE.iter().find(|name| !folder.join(name).is_file()) {
        Some(missing) => Err(format!("there is no {}; {GET_RUNTIME}", folder.join(missing).display())),
        None => Ok(()),
    }
}

impl Place for Gpu {
    type Block = Buffer;

    fn engine(&self) -> &'static str {
        NAME
    }

    fn provider(&self) -> &'static str {
        PROVIDER
    }

    fn memory(&self) -> &MemoryInfo<'static> {
        &self.memory
    }

    fn provide(&self, mut builder: SessionBuilder) -> Result<SessionBuilder, Error> {
        let options = self.options()?;
        let append = ort::api().SessionOptionsAppendExecutionProvider_CUDA_V2;
        // SAFETY: both are alive and valid, and the options are copied; the status is freed here.
        unsafe { Error::result_from_status(append(builder.ptr_mut(), options.0.as_ptr())) }?;
        Ok(builder)
    }

    fn upload(&self, bytes: &[u8]) -> Result<(Buffer, usize), String> {
        let buffer = self.device.upload(bytes).map_err(|e| e.to_string())?;
        let address = usize::try_from(buffer.address()).map_err(|e| e.to_string())?;
        Ok((buffer, address))
    }

    unsafe fn download(&self, address: usize, bytes: &mut [u8]) -> Result<(), String> {
        // SAFETY: the caller's promise; ONNX Runtime computes on the same stream.
        unsafe { self.device.read(address as Address, bytes) }.map_err(|e| e.to_string())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn builds_without_cuda_or_without_its_files_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let library = folder.path().join("libonnxruntime.so.1.31.1");
        let without = check_build(&library, &["CPUExecutionProvider".to_owned()]).unwrap_err();
        assert!(without.contains("without CUDAExecutionProvider") && without.contains("ORT_DYLIB_PATH"), "{without}");

        let providers = [PROVIDER.to_owned()];
        std::fs::write(&library, "").unwrap();
        std::fs::write(folder.path().join(BESIDE[0]), "").unwrap();
        let incomplete = check_build(&library, &providers).unwrap_err();
        assert!(incomplete.contains(BESIDE[1]) && incomplete.contains("onnxruntime-gpu"), "{incomplete}");

        std::fs::write(folder.path().join(BESIDE[1]), "").unwrap();
        check_build(&library, &providers).unwrap();
    }
}
