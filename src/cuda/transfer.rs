//! Memory of the host that a device copies from and to by itself, and copies of rows that do not lie one behind the other.

use super::calls::Address;
use super::device::Device;
use super::error::{CudaError, Doing as _};
use crate::tensor::Runs;
use cudarc::driver::{CudaContext, DriverError, result, sys};
use std::ffi::c_void;
use std::ptr::NonNull;
use std::sync::Arc;

/// Rows that lie further apart are copied one by one: the driver takes no longer distances.
const MAX_STRIDE: usize = i32::MAX as usize;

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

    /// So many bytes further on.
    fn after(self, bytes: usize) -> Self {
        match self {
            Self::Host(at) => Self::Host(at.wrapping_byte_add(bytes)),
            Self::Device(at) => Self::Device(at + bytes as Address),
        }
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
        let far = |rows: Rows| count > 1 && rows.stride > MAX_STRIDE;
        if far(from) || far(to) || bytes > MAX_STRIDE {
            let row = |rows: Rows, i: usize| rows.first.after(i * rows.stride);
            // SAFETY: the caller's promise.
            return (0..count).try_for_each(|i| unsafe { self.copy_row(row(from, i), row(to, i), bytes) });
        }
        self.bind()?;
        // That of a single row counts for nothing, and the driver looks at it.
        let stride = |rows: Rows| if count == 1 { bytes } else { rows.stride };
        let (from_type, from_host, from_device) = from.first.parts();
        let (to_type, to_host, to_device) = to.first.parts();
        let copy = sys::CUDA_MEMCPY2D {
            srcXInBytes: 0,
            srcY: 0,
            srcMemoryType: from_type,
            srcHost: from_host,
            srcDevice: from_device,
            srcArray: std::ptr::null_mut(),
            srcPitch: stride(from),
            dstXInBytes: 0,
            dstY: 0,
            dstMemoryType: to_type,
            dstHost: to_host,
            dstDevice: to_device,
            dstArray: std::ptr::null_mut(),
            dstPitch: stride(to),
            WidthInBytes: bytes,
            Height: count,
        };
        // SAFETY: the caller's promise; the description is read before this returns.
        unsafe { sys::cuMemcpy2DAsync_v2(&raw const copy, self.stream.cu_stream()) }
            .result()
            .doing(format!("copy {count} rows of {bytes} bytes"))
    }
    /// Copies a row of `bytes` bytes, and does not wait for it.
    ///
    /// # Safety
    ///
    /// As [`Self::copy_rows`].
    unsafe fn copy_row(&self, from: Place, to: Place, bytes: usize) -> Result<(), CudaError> {
        self.bind()?;
        let stream = self.stream.cu_stream();
        // SAFETY: the caller's promise.
        let copied = unsafe {
            match (from, to) {
                (Place::Device(from), Place::Device(to)) => sys::cuMemcpyDtoDAsync_v2(to, from, bytes, stream).result(),
                (Place::Host(from), Place::Device(to)) => sys::cuMemcpyHtoDAsync_v2(to, from, bytes, stream).result(),
                (Place::Device(from), Place::Host(to)) => sys::cuMemcpyDtoHAsync_v2(to, from, bytes, stream).result(),
                (Place::Host(_), Place::Host(_)) => Err(DriverError(sys::CUresult::CUDA_ERROR_INVALID_VALUE)),
            }
        };
        copied.doing(format!("copy {bytes} bytes"))
    }

    /// Copies runs of bytes of what lies at one address of this device to what lies at the other, and does not wait for it.
    ///
    /// # Errors
    ///
    /// The driver refuses.
    ///
    /// # Safety
    ///
    /// As [`Self::copy_rows`]; the runs do not overlap.
    pub(crate) unsafe fn copy_runs(&self, from: Address, to: Address, runs: &Runs) -> Result<(), CudaError> {
        let rows = |start, offset, stride| Rows { first: Place::Device(start).after(offset), stride };
        let (from, to) = (rows(from, runs.from, runs.from_pitch), rows(to, runs.to, runs.to_pitch));
        // SAFETY: the caller's promise.
        unsafe { self.copy_rows(from, to, runs.count, runs.bytes) }
    }
}
