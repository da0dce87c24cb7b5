//! Memory of the host that a device copies from and to by itself, and copies of rows that do not lie one behind the other.

use super::calls::Address;
use super::device::Device;
use super::error::{CudaError, Doing as _};
use cudarc::driver::{CudaContext, result, sys};
use std::ffi::c_void;
use std::ptr::NonNull;
use std::sync::Arc;

/// Page-locked memory of the host, freed when dropped.
#[derive(Debug)]
pub(crate) struct HostBuffer {
    first: NonNull<u8>,
    len: usize,
    context: Arc<CudaContext>,
}

// SAFETY: memory of the process, which nothing but this refers to.
unsafe impl Send for HostBuffer {}
// SAFETY: as above.
unsafe impl Sync for HostBuffer {}

impl HostBuffer {
    /// What it holds. Nothing that writes it is under way.
    pub(crate) fn bytes(&self) -> &[u8] {
        // SAFETY: as many bytes were taken, and written.
        unsafe { std::slice::from_raw_parts(self.first.as_ptr(), self.len) }
    }

    /// The same, to be changed. Nothing that reads it is under way either.
    pub(crate) fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above.
        unsafe { std::slice::from_raw_parts_mut(self.first.as_ptr(), self.len) }
    }

    /// Where its byte `offset` lies.
    pub(crate) fn place(&self, offset: usize) -> Place {
        Place::Host(self.first.as_ptr().wrapping_add(offset).cast())
    }
}

impl Drop for HostBuffer {
    fn drop(&mut self) {
        // Nothing can be done about a failure.
        let _ = self.context.bind_to_thread();
        // SAFETY: taken by `Device::host_buffer`, freed once.
        let _ = unsafe { result::free_host(self.first.as_ptr().cast()) };
    }
}

/// Where rows lie: where the first begins, and how many bytes further on each next one does.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Rows {
    pub(crate) first: Place,
    pub(crate) stride: usize,
}

/// An address.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Place {
    Host(*mut c_void),
    Device(Address),
}

impl Place {
    /// Memory that is only read.
    pub(crate) fn of(bytes: &[u8]) -> Self {
        Self::Host(bytes.as_ptr().cast_mut().cast())
    }

    /// As the driver takes it: the kind, the address on the host, that on the device.
    fn parts(self) -> (sys::CUmemorytype, *mut c_void, Address) {
        match self {
            Self::Host(at) => (sys::CUmemorytype::CU_MEMORYTYPE_HOST, at, 0),
            Self::Device(at) => (sys::CUmemorytype::CU_MEMORYTYPE_DEVICE, std::ptr::null_mut(), at),
        }
    }
}

impl Device {
    /// Page-locked zeros.
    ///
    /// # Errors
    ///
    /// There is not as much memory.
    pub(crate) fn host_buffer(&self, len: usize) -> Result<HostBuffer, CudaError> {
        self.bind()?;
        // The driver has no buffer of no bytes.
        // SAFETY: it is written below, before anybody can read it.
        let first = unsafe { result::malloc_host(len.max(1), 0) };
        let first = first.doing(format!("take {len} bytes of page-locked memory"))?.cast::<u8>();
        let null = || cudarc::driver::DriverError(sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY);
        let first = NonNull::new(first).ok_or_else(null).doing("take page-locked memory")?;
        // SAFETY: as many bytes are there.
        unsafe { first.write_bytes(0, len) };
        Ok(HostBuffer { first, len, context: Arc::clone(&self.context) })
    }

    /// Copies `count` rows of `bytes` bytes, and does not wait for it.
    ///
    /// # Errors
    ///
    /// The driver refuses.
    ///
    /// # Safety
    ///
    /// The rows are there, and those that are written nobody else's, until the work is done or, where it is being recorded, as long
    /// as the record may be launched.
    pub(crate) unsafe fn copy_rows(&self, from: Rows, to: Rows, count: usize, bytes: usize) -> Result<(), CudaError> {
        if count == 0 || bytes == 0 {
            return Ok(());
        }
        self.bind()?;
        let (from_type, from_host, from_device) = from.first.parts();
        let (to_type, to_host, to_device) = to.first.parts();
        let copy = sys::CUDA_MEMCPY2D {
            srcXInBytes: 0,
            srcY: 0,
            srcMemoryType: from_type,
            srcHost: from_host,
            srcDevice: from_device,
            srcArray: std::ptr::null_mut(),
            srcPitch: from.stride,
            dstXInBytes: 0,
            dstY: 0,
            dstMemoryType: to_type,
            dstHost: to_host,
            dstDevice: to_device,
            dstArray: std::ptr::null_mut(),
            dstPitch: to.stride,
            WidthInBytes: bytes,
            Height: count,
        };
        // SAFETY: the caller's promise; the description is read before this returns.
        unsafe { sys::cuMemcpy2DAsync_v2(&raw const copy, self.stream.cu_stream()) }
            .result()
            .doing(format!("copy {count} rows of {bytes} bytes"))
    }
}
