//! The compiled kernels on a device, and launching them.

use super::append::AppendRows;
use super::calls::{Kernel, Launch, StridedRows, TopKPrune};
use super::compile::{Architecture, Source, cached};
use super::device::Device;
use super::error::{CudaError, Doing as _};
use cudarc::driver::sys::CUresult;
use cudarc::driver::{CudaFunction, DeviceRepr, DriverError, LaunchConfig, PushKernelArg as _};
use cudarc::nvrtc::Ptx;
use std::path::{Path, PathBuf};

/// Where compiled kernels come from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Origin {
    /// A folder with `topk_prune.sm_90.cubin`, `topk_prune.compute_80.ptx` and the like, made by `plugins/cuda/build.sh`.
    Folder(PathBuf),
    /// NVRTC, which leaves what it made in this folder.
    Compiler(PathBuf),
}

/// Kernels, ready on one device.
#[derive(Debug)]
pub struct Kernels {
    device: Device,
    functions: Vec<(Kernel, CudaFunction)>,
}

// SAFETY: structures of numbers, laid out as in the header that the kernels include.
unsafe impl DeviceRepr for TopKPrune {}
// SAFETY: as above.
unsafe impl DeviceRepr for StridedRows {}
// SAFETY: as above.
unsafe impl DeviceRepr for AppendRows {}

/// Code for the device from a folder: its own, else that of the same generation with the highest number below, else what the
/// driver itself compiles.
fn prebuilt(folder: &Path, source: Source, architecture: Architecture) -> Result<Vec<u8>, CudaError> {
    let path = |minor| folder.join(format!("{}.{}.cubin", source.name(), Architecture { minor, ..architecture }));
    let read = |path: PathBuf| std::fs::read(&path).map_err(|source| CudaError::Io { path, source });
    if let Some(path) = (0..=architecture.minor).rev().map(path).find(|path| path.is_file()) {
        return read(path);
    }
    let intermediate = folder.join(format!("{}.compute_80.ptx", source.name()));
    if architecture.major < 8 || !intermediate.is_file() {
        return read(path(architecture.minor));
    }
    let mut text = read(intermediate)?;
    // The driver takes a string.
    text.push(0);
    Ok(text)
}

impl Kernels {
    /// Loads them all.
    ///
    /// # Errors
    ///
    /// There is no code for this device, it cannot be made, or the driver refuses it.
    pub fn load(device: &Device, origin: &Origin) -> Result<Kernels, CudaError> {
        Self::load_of(device, origin, &Source::ALL)
    }

    /// Loads those of some sources. Launching others fails.
    ///
    /// # Errors
    ///
    /// As [`Self::load`].
    pub fn load_of(device: &Device, origin: &Origin, sources: &[Source]) -> Result<Kernels, CudaError> {
        let architecture = device.architecture()?;
        let mut functions = Vec::with_capacity(Kernel::ALL.len());
        for &source in sources {
            let code = match origin {
                Origin::Folder(folder) => prebuilt(folder, source, architecture)?,
                Origin::Compiler(cache) => cached(source, architecture, cache)?,
            };
            let loading = || format!("load the kernels of {} for {architecture}", source.name());
            let module = device.context.load_module(Ptx::from_binary(code)).doing(loading())?;
            for &kernel in Kernel::ALL.iter().filter(|kernel| kernel.source() == source) {
                let function = module.load_function(kernel.name());
                functions.push((kernel, function.doing(format!("find {} in the compiled kernels", kernel.name()))?));
            }
        }
        Ok(Kernels { device: device.clone(), functions })
    }

    /// Prunes, in at most three launches, and does not wait for them.
    ///
    /// # Errors
    ///
    /// The call is outside the contract, or the driver refuses.
    ///
    /// # Safety
    ///
    /// The addresses are those of tensors on this device with the call's lengths, which stay until the work is done.
    pub unsafe fn topk_prune(&self, call: &TopKPrune) -> Result<(), CudaError> {
        for launch in call.launches()? {
            // SAFETY: the caller's promise.
            unsafe { self.launch(launch, call) }?;
        }
        Ok(())
    }

    /// Copies every so-manieth row, or the mean of two inputs there, and does not wait for it.
    ///
    /// # Errors
    ///
    /// As for [`Kernels::topk_prune`].
    ///
    /// # Safety
    ///
    /// As for [`Kernels::topk_prune`].
    pub unsafe fn strided_rows(&self, call: &StridedRows) -> Result<(), CudaError> {
        match call.launch()? {
            // SAFETY: the caller's promise.
            Some(launch) => unsafe { self.launch(launch, call) },
            None => Ok(()),
        }
    }

    /// Appends a row to every cache, in one launch, and does not wait for it.
    ///
    /// # Errors
    ///
    /// As for [`Kernels::topk_prune`].
    ///
    /// # Safety
    ///
    /// As for [`Kernels::topk_prune`]; the pairs are addresses of such tensors, too.
    pub unsafe fn append_rows(&self, call: &AppendRows) -> Result<(), CudaError> {
        match call.launch()? {
            // SAFETY: the caller's promise.
            Some(launch) => unsafe { self.launch(launch, call) },
            None => Ok(()),
        }
    }

    /// One launch of a call, to be timed by itself.
    ///
    /// # Errors
    ///
    /// The driver refuses.
    ///
    /// # Safety
    ///
    /// The launch is one of the call's, before which come those that the call has before it; else as for
    /// [`Kernels::topk_prune`].
    pub unsafe fn launch<Call: DeviceRepr>(&self, launch: Launch, call: &Call) -> Result<(), CudaError> {
        let Launch { kernel, grid, threads } = launch;
        let function = self.functions.iter().find(|(known, _)| *known == kernel).map(|(_, function)| function);
        let function = function.ok_or(DriverError(CUresult::CUDA_ERROR_NOT_FOUND));
        let function = function.doing(format!("find {} in the compiled kernels", kernel.name()))?;
        let config = LaunchConfig { grid_dim: (grid.0, grid.1, 1), block_dim: (threads, 1, 1), shared_mem_bytes: 0 };
        // SAFETY: the kernel takes the call as its only argument, by value; its addresses are the caller's promise.
        unsafe { self.device.stream.launch_builder(function).arg(call).launch(config) }
            .doing(format!("launch {}", kernel.name()))?;
        Ok(())
    }
}

impl Kernel {
    fn source(self) -> Source {
        match self {
            Kernel::ScoreF32 | Kernel::ScoreF16 | Kernel::ScoreBf16 | Kernel::Select | Kernel::Gather => {
                Source::TopKPrune
            }
            Kernel::StridedSelect | Kernel::StridedMeanF32 | Kernel::StridedMeanF16 | Kernel::StridedMeanBf16 => {
                Source::StridedCompress
            }
            Kernel::AppendRows => Source::AppendRows,
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn code_of_the_same_generation_serves_newer_devices() {
        let folder = tempfile::tempdir().unwrap();
        for name in ["topk_prune.sm_80.cubin", "topk_prune.sm_89.cubin", "topk_prune.sm_90.cubin"] {
            std::fs::write(folder.path().join(name), name).unwrap();
        }
        let code = |major, minor| prebuilt(folder.path(), Source::TopKPrune, Architecture { major, minor });
        for (device, file) in [((8, 0), "80"), ((8, 6), "80"), ((8, 9), "89"), ((9, 0), "90")] {
            assert_eq!(code(device.0, device.1).unwrap(), format!("topk_prune.sm_{file}.cubin").as_bytes());
        }
        let error = code(10, 0).unwrap_err().to_string();
        assert!(error.contains("topk_prune.sm_100.cubin"), "{error}");

        std::fs::write(folder.path().join("topk_prune.compute_80.ptx"), ".version 9.0").unwrap();
        assert_eq!(code(10, 0).unwrap(), b".version 9.0\0");
        assert_eq!(code(9, 0).unwrap(), b"topk_prune.sm_90.cubin");
        assert!(code(7, 5).is_err());
    }
}
