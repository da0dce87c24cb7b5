//! One CUDA device: its facts, its memory, and one stream on which everything happens in order.

use super::calls::Address;
use super::compile::Architecture;
use super::error::{CudaError, Doing as _};
use super::libraries::require;
use cudarc::driver::sys::CUdevice_attribute as Attribute;
use cudarc::driver::{CudaContext, CudaEvent, CudaSlice, CudaStream, DevicePtr as _, DriverError, result, sys};
use std::ffi::{CStr, c_void};
use std::sync::Arc;

/// The driver's functions that are used here, by `cudarc` or directly.
const FUNCTIONS: &[&CStr] = &[
    c"cuCtxGetCurrent",
    c"cuCtxSetCurrent",
    c"cuDeviceGet",
    c"cuDeviceGetAttribute",
    c"cuDeviceGetCount",
    c"cuDeviceGetName",
    c"cuDevicePrimaryCtxRelease_v2",
    c"cuDevicePrimaryCtxRetain",
    c"cuDeviceTotalMem_v2",
    c"cuEventCreate",
    c"cuEventDestroy_v2",
    c"cuEventElapsedTime_v2",
    c"cuEventRecord",
    c"cuEventSynchronize",
    c"cuGetErrorName",
    c"cuGetErrorString",
    c"cuGraphDestroy",
    c"cuGraphExecDestroy",
    c"cuGraphInstantiateWithFlags",
    c"cuGraphLaunch",
    c"cuInit",
    c"cuLaunchKernel",
    c"cuMemAllocAsync",
    c"cuMemAlloc_v2",
    c"cuMemFreeAsync",
    c"cuMemFreeHost",
    c"cuMemFree_v2",
    c"cuMemGetInfo_v2",
    c"cuMemHostAlloc",
    c"cuMemcpy2DAsync_v2",
    c"cuMemcpyDtoDAsync_v2",
    c"cuMemcpyDtoHAsync_v2",
    c"cuMemcpyHtoDAsync_v2",
    c"cuMemsetD8Async",
    c"cuModuleGetFunction",
    c"cuModuleLoadData",
    c"cuModuleUnload",
    c"cuStreamBeginCapture_v2",
    c"cuStreamCreate",
    c"cuStreamDestroy_v2",
    c"cuStreamEndCapture",
    c"cuStreamSynchronize",
];

/// A device with a stream. Its parts live as long as it is used.
#[derive(Debug, Clone)]
pub struct Device {
    pub(super) context: Arc<CudaContext>,
    pub(super) stream: Arc<CudaStream>,
}

/// What a device is.
#[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct DeviceFacts {
    /// `NVIDIA H200`.
    pub name: String,
    /// `9.0`.
    pub compute_capability: String,
    /// Its memory in bytes.
    pub memory_bytes: u64,
    /// Bytes of it that are free.
    pub free_bytes: u64,
    /// Multiprocessors.
    pub multiprocessors: u32,
    /// Bytes of its second-level cache.
    pub l2_bytes: u64,
    /// The fastest its processors run, in MHz.
    pub clock_mhz: f64,
    /// What its memory moves at most by its clock and width, in bytes per second; 0 where the driver does not say.
    pub memory_bandwidth: f64,
}

/// Bytes on a device, freed when dropped.
#[derive(Debug)]
pub struct Buffer(Option<CudaSlice<u8>>, Address);

impl Buffer {
    /// Where it begins, at a multiple of 256 bytes; 0 if it has no bytes.
    pub fn address(&self) -> Address {
        self.1
    }

    /// How many bytes it has.
    pub(crate) fn len(&self) -> usize {
        self.0.as_ref().map_or(0, CudaSlice::len)
    }
}

/// A point of time in the stream.
#[derive(Debug)]
pub struct Moment(CudaEvent);

impl Moment {
    /// Milliseconds from here to a later one, for which this waits.
    ///
    /// # Errors
    ///
    /// What was under way has failed.
    pub fn milliseconds_to(&self, later: &Moment) -> Result<f64, CudaError> {
        self.0.elapsed_ms(&later.0).map(f64::from).doing("wait for the device")
    }
}

/// Work of the stream, recorded to be repeated.
pub struct Graph(cudarc::driver::CudaGraph);

// SAFETY: a graph may be used from any thread, if from one at a time, and `&` of it stays in one: it is not `Sync`.
unsafe impl Send for Graph {}

impl Graph {
    /// Starts the work once more.
    ///
    /// # Errors
    ///
    /// The driver refuses.
    pub fn launch(&self) -> Result<(), CudaError> {
        self.0.launch().doing("launch a CUDA graph")
    }
}

impl Device {
    /// The device of that number, counted from 0.
    ///
    /// # Errors
    ///
    /// There is no driver or no such device, or it does not start.
    pub fn open(ordinal: usize) -> Result<Device, CudaError> {
        let missing = |reason: String| CudaError::Driver { reason };
        require("cuda", "NVIDIA driver", FUNCTIONS).map_err(missing)?;
        let count =
            CudaContext::device_count().map_err(|e| missing(format!("the NVIDIA driver does not start: {e}")))?;
        if ordinal >= usize::try_from(count).unwrap_or_default() {
            return Err(missing(format!("there is no GPU {ordinal}: the NVIDIA driver has {count}")));
        }
        let context = CudaContext::new(ordinal).doing(format!("open GPU {ordinal}"))?;
        // SAFETY: everything happens on one stream, in order, so that buffers need no events of their own.
        unsafe { context.disable_event_tracking() };
        let stream = context.new_stream().doing("make a stream")?;
        Ok(Device { context, stream })
    }

    /// What it is.
    ///
    /// # Errors
    ///
    /// The driver does not say.
    pub fn facts(&self) -> Result<DeviceFacts, CudaError> {
        let facts = || {
            let attribute =
                |attribute: Attribute| self.context.attribute(attribute).map(|value| f64::from(value.max(0)));
            let (free_bytes, memory_bytes) = self.context.mem_get_info()?;
            let (major, minor) = self.context.compute_capability()?;
            let khz = attribute(Attribute::CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE)?;
            let bits = attribute(Attribute::CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH)?;
            Ok(DeviceFacts {
                name: self.context.name()?,
                compute_capability: format!("{major}.{minor}"),
                memory_bytes: memory_bytes as u64,
                free_bytes: free_bytes as u64,
                multiprocessors: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)? as u32,
                l2_bytes: attribute(Attribute::CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE)? as u64,
                clock_mhz: attribute(Attribute::CU_DEVICE_ATTRIBUTE_CLOCK_RATE)? / 1e3,
                // Two transfers in every cycle.
                memory_bandwidth: khz * 1e3 * 2.0 * bits / 8.0,
            })
        };
        facts().doing("ask the device what it is")
    }

    /// Bytes of its memory that are free.
    ///
    /// # Errors
    ///
    /// The driver does not say.
    pub fn free_bytes(&self) -> Result<u64, CudaError> {
        let (free_bytes, _) = self.context.mem_get_info().doing("ask how much memory is free")?;
        Ok(free_bytes as u64)
    }

    /// What its kernels are compiled for.
    ///
    /// # Errors
    ///
    /// The driver does not say.
    pub fn architecture(&self) -> Result<Architecture, CudaError> {
        let (major, minor) = self.context.compute_capability().doing("ask for the compute capability")?;
        Ok(Architecture { major: major.max(0) as u32, minor: minor.max(0) as u32 })
    }

    /// A buffer of zeros.
    ///
    /// # Errors
    ///
    /// There is not as much memory.
    pub fn zeros(&self, bytes: usize) -> Result<Buffer, CudaError> {
        if bytes == 0 {
            return Ok(Buffer(None, 0));
        }
        let slice = self.stream.alloc_zeros::<u8>(bytes).doing(format!("take {bytes} bytes of device memory"))?;
        Ok(self.buffer(slice))
    }

    /// A buffer with these bytes.
    ///
    /// # Errors
    ///
    /// There is not as much memory.
    pub fn upload(&self, bytes: &[u8]) -> Result<Buffer, CudaError> {
        if bytes.is_empty() {
            return Ok(Buffer(None, 0));
        }
        let slice = self.stream.clone_htod(bytes).doing(format!("copy {} bytes to the device", bytes.len()))?;
        // The bytes may be gone as soon as this returns.
        self.wait()?;
        Ok(self.buffer(slice))
    }

    /// A buffer whose bytes are whatever was there: for what writes all of it.
    ///
    /// # Errors
    ///
    /// There is not as much memory.
    pub(crate) fn allocate(&self, bytes: usize) -> Result<Buffer, CudaError> {
        if bytes == 0 {
            return Ok(Buffer(None, 0));
        }
        // SAFETY: any bits are bytes.
        let slice = unsafe { self.stream.alloc::<u8>(bytes) };
        Ok(self.buffer(slice.doing(format!("take {bytes} bytes of device memory"))?))
    }

    /// A buffer with these bytes, which are copied some time before the next [`Self::wait`] returns.
    ///
    /// # Errors
    ///
    /// There is not as much memory.
    ///
    /// # Safety
    ///
    /// The bytes stay where and as they are until then.
    pub(crate) unsafe fn upload_later(&self, bytes: &[u8]) -> Result<Buffer, CudaError> {
        let mut buffer = self.allocate(bytes.len())?;
        if let Some(slice) = &mut buffer.0 {
            self.stream.memcpy_htod(bytes, slice).doing(format!("copy {} bytes to the device", bytes.len()))?;
        }
        Ok(buffer)
    }

    /// A buffer with `bytes` of another from the byte `offset` on, which are copied on the device.
    ///
    /// # Errors
    ///
    /// There are not as many, or not as much memory.
    pub(crate) fn copy_of(&self, buffer: &Buffer, offset: usize, bytes: usize) -> Result<Buffer, CudaError> {
        let mut copy = self.allocate(bytes)?;
        if let (Some(from), Some(to)) = (&buffer.0, &mut copy.0) {
            let outside = || DriverError(sys::CUresult::CUDA_ERROR_INVALID_VALUE);
            let end = offset.checked_add(bytes).ok_or_else(outside).doing("copy on the device")?;
            let part = from.try_slice(offset..end).ok_or_else(outside).doing("copy on the device")?;
            self.stream.memcpy_dtod(&part, to).doing("copy on the device")?;
        }
        Ok(copy)
    }

    /// Copies the first bytes of a buffer into `bytes`, once everything before is done.
    ///
    /// # Errors
    ///
    /// There are not as many, or what was under way has failed.
    pub(crate) fn download_into(&self, buffer: &Buffer, bytes: &mut [u8]) -> Result<(), CudaError> {
        if let (Some(slice), false) = (&buffer.0, bytes.is_empty()) {
            let outside = || DriverError(sys::CUresult::CUDA_ERROR_INVALID_VALUE);
            let doing = format!("copy {} bytes from the device", bytes.len());
            let part = slice.try_slice(..bytes.len()).ok_or_else(outside).doing(&*doing)?;
            self.stream.memcpy_dtoh(&part, bytes).doing(doing)?;
        }
        self.wait()
    }

    /// Copies what lies at `address` into `bytes`, once everything before is done: memory of a library that computes on the
    /// same stream.
    ///
    /// # Errors
    ///
    /// What was under way has failed.
    ///
    /// # Safety
    ///
    /// As many bytes lie there, on this device.
    pub(crate) unsafe fn read(&self, address: Address, bytes: &mut [u8]) -> Result<(), CudaError> {
        self.bind()?;
        let doing = format!("copy {} bytes from the device", bytes.len());
        // SAFETY: the bytes are borrowed until the copy is done; else the caller's promise.
        unsafe { result::memcpy_dtoh_async(bytes, address, self.stream.cu_stream()) }.doing(doing)?;
        self.wait()
    }

    /// Makes this device the one that libraries find in this thread.
    ///
    /// # Errors
    ///
    /// The driver refuses.
    pub(crate) fn bind(&self) -> Result<(), CudaError> {
        self.context.bind_to_thread().doing("select the GPU")
    }

    /// The stream, as libraries take it.
    pub(crate) fn stream_pointer(&self) -> *mut c_void {
        self.stream.cu_stream().cast()
    }

    /// Has the driver keep freed memory for the next buffers. Otherwise it is given back whenever the stream is waited for,
    /// and taken anew.
    ///
    /// # Errors
    ///
    /// The driver refuses.
    pub(crate) fn keep_freed_memory(&self) -> Result<(), CudaError> {
        let functions = [c"cuDeviceGetDefaultMemPool", c"cuMemPoolSetAttribute"];
        if !self.context.has_async_alloc() || require("cuda", "NVIDIA driver", &functions).is_err() {
            return Ok(());
        }
        let attribute = sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
        let mut threshold = u64::MAX;
        // SAFETY: the device is this one, and the attribute is an integer of this size.
        let kept = unsafe {
            result::device::get_default_mem_pool(self.context.cu_device())
                .and_then(|pool| result::mem_pool::set_attribute(pool, attribute, (&raw mut threshold).cast()))
        };
        kept.doing("have the driver keep freed memory")
    }

    fn buffer(&self, slice: CudaSlice<u8>) -> Buffer {
        let address = slice.device_ptr(&self.stream).0;
        Buffer(Some(slice), address)
    }

    /// The bytes of a buffer, once everything before is done.
    ///
    /// # Errors
    ///
    /// What was under way has failed.
    pub fn download(&self, buffer: &Buffer) -> Result<Vec<u8>, CudaError> {
        let Some(slice) = &buffer.0 else { return Ok(Vec::new()) };
        let mut bytes = vec![0; slice.len()];
        self.stream.memcpy_dtoh(slice, &mut bytes).doing(format!("copy {} bytes from the device", slice.len()))?;
        self.wait()?;
        Ok(bytes)
    }

    /// Copies a buffer to another of the same size, on the device.
    ///
    /// # Errors
    ///
    /// The driver refuses.
    pub fn copy(&self, from: &Buffer, to: &mut Buffer) -> Result<(), CudaError> {
        match (&from.0, &mut to.0) {
            (Some(from), Some(to)) => self.stream.memcpy_dtod(from, to).doing("copy on the device"),
            _ => Ok(()),
        }
    }

    /// Waits until everything is done.
    ///
    /// # Errors
    ///
    /// What was under way has failed.
    pub fn wait(&self) -> Result<(), CudaError> {
        self.stream.synchronize().doing("wait for the device")
    }

    /// Now, as far as the stream is.
    ///
    /// # Errors
    ///
    /// The driver refuses.
    pub fn moment(&self) -> Result<Moment, CudaError> {
        let event = self.stream.record_event(Some(sys::CUevent_flags::CU_EVENT_DEFAULT));
        event.map(Moment).doing("record an event")
    }

    /// Records what `work` puts on the stream instead of doing it.
    ///
    /// # Errors
    ///
    /// Those of `work`, or it does something that cannot be recorded.
    pub fn capture<E: From<CudaError>>(&self, work: impl FnOnce() -> Result<(), E>) -> Result<Graph, E> {
        self.stream.begin_capture(sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED).doing("begin a capture")?;
        let done = work();
        // Ended in any case: nothing else could be done on the stream.
        let graph = self.stream.end_capture(sys::CUgraphInstantiate_flags(0)).doing("end a capture");
        done?;
        let nothing = || DriverError(sys::CUresult::CUDA_ERROR_ILLEGAL_STATE);
        Ok(graph?.map(Graph).ok_or_else(nothing).doing("record work as a CUDA graph")?)
    }
}
