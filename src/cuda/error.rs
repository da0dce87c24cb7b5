//! What can go wrong between a call and a device.

use super::calls::Refusal;
use std::path::PathBuf;

/// Why something could not be done on a CUDA device.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CudaError {
    /// There is no driver, or no device.
    #[error(
        "{reason}; expected an NVIDIA GPU and its driver: with CUDA 13 that is release 580 or later, from nvidia.com/drivers or \
         the distribution's packages"
    )]
    Driver {
        /// What is missing.
        reason: String,
    },
    /// There is no compiler for kernels.
    #[error(
        "{reason}; kernels are compiled by NVRTC, a part of the CUDA toolkit and of the Python package nvidia-cuda-nvrtc: put its \
         folder into LD_LIBRARY_PATH"
    )]
    Compiler {
        /// What is missing.
        reason: String,
    },
    /// There is no cuBLASLt.
    #[error(
        "{reason}; it is a part of the CUDA toolkit and of the Python package nvidia-cublas: put its folder into LD_LIBRARY_PATH"
    )]
    CublasLt {
        /// What is missing.
        reason: String,
    },
    /// A kernel does not compile.
    #[error("{source} does not compile for {architecture}: {log}", source = .file)]
    Compile {
        /// The source.
        file: &'static str,
        /// `sm_90`.
        architecture: String,
        /// What the compiler says.
        log: String,
    },
    /// The driver refuses.
    #[error("{action}: {source}")]
    Call {
        /// What was to be done.
        action: String,
        /// What the driver says.
        source: cudarc::driver::DriverError,
    },
    /// cuBLASLt refuses.
    #[error("{action}: {source}")]
    Product {
        /// What was to be done.
        action: &'static str,
        /// What it says.
        source: cudarc::cublaslt::result::CublasError,
    },
    /// The call is outside the operator's contract.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// A file or folder.
    #[error("{}: {source}", .path.display())]
    Io {
        /// Which one.
        path: PathBuf,
        /// What happened.
        source: std::io::Error,
    },
}

/// Says what was to be done, where a call to the driver fails.
pub(super) trait Doing<T> {
    fn doing(self, action: impl Into<String>) -> Result<T, CudaError>;
}

impl<T> Doing<T> for Result<T, cudarc::driver::DriverError> {
    fn doing(self, action: impl Into<String>) -> Result<T, CudaError> {
        self.map_err(|source| CudaError::Call { action: action.into(), source })
    }
}
