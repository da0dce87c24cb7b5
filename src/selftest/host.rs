//! What runs the kernels: a GPU, or in this project's own tests the emulator.

use crate::cuda::{Address, AppendRows, CublasLt, CudaError, Device, Kernels, StridedCompress, StridedRows, TopKPrune};

/// Memory, and the operators on it.
pub trait Host {
    /// A tensor's bytes.
    type Memory;
    /// Why something could not be done.
    type Error;

    /// Memory with these bytes; none has the address 0.
    ///
    /// # Errors
    ///
    /// There is not as much memory.
    fn upload(&self, bytes: &[u8]) -> Result<Self::Memory, Self::Error>;

    /// Its address.
    fn address(memory: &Self::Memory) -> Address;

    /// Its bytes now.
    ///
    /// # Errors
    ///
    /// What was to write them has failed.
    fn download(&self, memory: &Self::Memory) -> Result<Vec<u8>, Self::Error>;

    /// `TopKPrune`.
    ///
    /// # Errors
    ///
    /// It is refused.
    ///
    /// # Safety
    ///
    /// The addresses are those of memory with the call's lengths, as below.
    unsafe fn topk_prune(&self, call: &TopKPrune) -> Result<(), Self::Error>;

    /// The rows of `StridedCompress`.
    ///
    /// # Errors
    ///
    /// It is refused.
    ///
    /// # Safety
    ///
    /// As above.
    unsafe fn strided_rows(&self, call: &StridedRows) -> Result<(), Self::Error>;

    /// `StridedCompress`; `false` if there is nothing to multiply with.
    ///
    /// # Errors
    ///
    /// It is refused.
    ///
    /// # Safety
    ///
    /// As above.
    unsafe fn strided_compress(&self, call: &StridedCompress) -> Result<bool, Self::Error>;

    /// A row behind those of every cache.
    ///
    /// # Errors
    ///
    /// It is refused.
    ///
    /// # Safety
    ///
    /// As above; the pairs are addresses of such memory, too.
    unsafe fn append_rows(&self, call: &AppendRows) -> Result<(), Self::Error>;
}

/// A GPU with its kernels and, if there is one, cuBLASLt.
#[derive(Debug)]
pub(super) struct Gpu {
    pub(super) device: Device,
    pub(super) kernels: Kernels,
    pub(super) cublaslt: Option<CublasLt>,
}

impl Host for Gpu {
    type Memory = crate::cuda::Buffer;
    type Error = CudaError;

    fn upload(&self, bytes: &[u8]) -> Result<Self::Memory, CudaError> {
        self.device.upload(bytes)
    }

    fn address(memory: &Self::Memory) -> Address {
        memory.address()
    }

    fn download(&self, memory: &Self::Memory) -> Result<Vec<u8>, CudaError> {
        self.device.download(memory)
    }

    unsafe fn topk_prune(&self, call: &TopKPrune) -> Result<(), CudaError> {
        // SAFETY: the caller's promise, as below.
        unsafe { self.kernels.topk_prune(call) }
    }

    unsafe fn strided_rows(&self, call: &StridedRows) -> Result<(), CudaError> {
        // SAFETY: as above.
        unsafe { self.kernels.strided_rows(call) }
    }

    unsafe fn strided_compress(&self, call: &StridedCompress) -> Result<bool, CudaError> {
        let Some(cublaslt) = &self.cublaslt else { return Ok(false) };
        // SAFETY: as above.
        unsafe { cublaslt.compress(&self.kernels, call) }?;
        Ok(true)
    }

    unsafe fn append_rows(&self, call: &AppendRows) -> Result<(), CudaError> {
        // SAFETY: as above.
        unsafe { self.kernels.append_rows(call) }
    }
}

/// A GPU whose work is recorded as a CUDA graph, and done by launching that.
#[derive(Debug)]
pub(super) struct Recorded<'a>(pub(super) &'a Gpu);

impl Host for Recorded<'_> {
    type Memory = crate::cuda::Buffer;
    type Error = CudaError;

    fn upload(&self, bytes: &[u8]) -> Result<Self::Memory, CudaError> {
        self.0.upload(bytes)
    }

    fn address(memory: &Self::Memory) -> Address {
        memory.address()
    }

    fn download(&self, memory: &Self::Memory) -> Result<Vec<u8>, CudaError> {
        self.0.download(memory)
    }

    unsafe fn topk_prune(&self, call: &TopKPrune) -> Result<(), CudaError> {
        // SAFETY: the caller's promise, as below.
        self.0.device.capture(|| unsafe { self.0.topk_prune(call) })?.launch()?;
        // The graph must not go before it is done, here and below.
        self.0.device.wait()
    }

    unsafe fn strided_rows(&self, call: &StridedRows) -> Result<(), CudaError> {
        // SAFETY: as above.
        self.0.device.capture(|| unsafe { self.0.strided_rows(call) })?.launch()?;
        self.0.device.wait()
    }

    unsafe fn strided_compress(&self, call: &StridedCompress) -> Result<bool, CudaError> {
        if self.0.cublaslt.is_none() {
            return Ok(false);
        }
        // SAFETY: as above.
        self.0.device.capture(|| unsafe { self.0.strided_compress(call) }.map(|_| ()))?.launch()?;
        self.0.device.wait()?;
        Ok(true)
    }

    unsafe fn append_rows(&self, call: &AppendRows) -> Result<(), CudaError> {
        // SAFETY: as above.
        self.0.device.capture(|| unsafe { self.0.append_rows(call) })?.launch()?;
        self.0.device.wait()
    }
}
