//! What a device has to do with memory and libraries that are not ours: those of a runtime that computes on the same stream.

use super::calls::Address;
use super::device::Device;
use super::error::{CudaError, Doing as _};
use cudarc::driver::result;
use std::ffi::c_void;

impl Device {
    /// Copies what lies at `address` into `bytes`, once everything before is done.
    ///
    /// # Errors
    ///
    /// What was under way has failed.
    ///
    /// # Safety
    ///
    /// As many bytes lie there, on this device.
    pub(crate) unsafe fn read(&self, address: Address, bytes: &mut [u8]) -> Result<(), CudaError> {
        let doing = || format!("copy {} bytes from the device", bytes.len());
        self.context.bind_to_thread().doing(doing())?;
        let (doing, stream) = (doing(), self.stream.cu_stream());
        // SAFETY: the bytes are borrowed until the copy is done; else the caller's promise.
        unsafe { result::memcpy_dtoh_async(bytes, address, stream) }.doing(doing)?;
        self.wait()
    }

    /// The stream, as a runtime takes it that is to compute on it too.
    pub(crate) fn shared_stream(&self) -> *mut c_void {
        self.stream.cu_stream().cast()
    }
}
