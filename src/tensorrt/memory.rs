//! What the engines of one loader share on their device: one stream, on which everything happens in order.
//!
//! Because of that order a buffer may be freed as soon as what uses it is on the stream: the driver takes it back behind that.

use crate::cuda::{Address, Buffer, CudaError, Device, Meter, Place, Rows};
use crate::runtime::resident::{DeviceMemory, Resident};
use crate::tensor::{Runs, Tensor};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// What tensors have to lie at a multiple of.
const ALIGNMENT: Address = 256;

/// A device, and memory of it that engines take turns in.
pub(super) struct Memory {
    device: Device,
    meter: Arc<Meter>,
    /// For intermediate values; as much as the most demanding engine so far needs.
    scratch: Mutex<Buffer>,
    /// What tensors without elements point to: no address may be null.
    nothing: Buffer,
    /// What is being copied to the device from the host, until the stream has been waited for.
    lent: Mutex<Vec<Tensor>>,
}

/// A tensor's memory on the device.
pub(super) struct OnDevice {
    buffer: Buffer,
    memory: Arc<Memory>,
}

impl DeviceMemory for OnDevice {
    fn download(&self, bytes: &mut [u8]) -> Result<(), String> {
        self.memory.download(&self.buffer, bytes).map_err(|e| e.to_string())
    }

    unsafe fn gathered(byte_len: usize, pieces: &[(&Self, Runs)]) -> Result<Option<Self>, String> {
        let Some((first, _)) = pieces.first() else { return Ok(None) };
        let memory = &first.memory;
        if !pieces.iter().all(|(on_device, _)| Arc::ptr_eq(&on_device.memory, memory)) {
            return Ok(None);
        }
        let fill = || {
            let output = memory.output(byte_len)?;
            for (piece, runs) in pieces {
                // SAFETY: the caller's promise; buffers are freed behind the copy, on one stream.
                unsafe { memory.device.copy_runs(piece.buffer.address(), output.buffer.address(), runs) }?;
            }
            Ok(output)
        };
        fill().map(Some).map_err(|e: CudaError| e.to_string())
    }
}

/// Where an input lies while work that reads it is put on the stream.
pub(super) struct Placed {
    pub(super) address: Address,
    /// Made for this input alone.
    _buffer: Option<Buffer>,
}

impl Memory {
    pub(super) fn new(device: Device) -> Result<Arc<Self>, CudaError> {
        device.keep_freed_memory()?;
        let meter = Arc::new(Meter::new(device.clone())?);
        let nothing = device.allocate(ALIGNMENT as usize)?;
        let (scratch, lent) = (Mutex::new(device.allocate(0)?), Mutex::default());
        Ok(Arc::new(Self { device, meter, scratch, nothing, lent }))
    }

    pub(super) fn device(&self) -> &Device {
        &self.device
    }

    pub(super) fn meter(&self) -> &Arc<Meter> {
        &self.meter
    }

    /// Places an input: where it is, if it is on this device already.
    pub(super) fn place(self: &Arc<Self>, tensor: &Tensor) -> Result<Placed, PlaceError> {
        if tensor.is_empty() {
            return Ok(Placed { address: self.nothing.address(), _buffer: None });
        }
        let buffer = match self.resident(tensor) {
            Some((on_device, offset)) => {
                let address = on_device.buffer.address() + offset as Address;
                if address.is_multiple_of(ALIGNMENT) {
                    return Ok(Placed { address, _buffer: None });
                }
                self.device.copy_of(&on_device.buffer, offset, tensor.byte_len())?
            }
            None => self.upload(tensor)?,
        };
        Ok(Placed { address: buffer.address(), _buffer: Some(buffer) })
    }

    /// Where a tensor lies on this device, if it does, and the byte at which it begins.
    fn resident<'t>(self: &Arc<Self>, tensor: &'t Tensor) -> Option<(&'t OnDevice, usize)> {
        let resident = tensor.stored_in::<Resident<OnDevice>>().map(|(resident, offset)| (resident.memory(), offset));
        resident.filter(|(on_device, _)| Arc::ptr_eq(&on_device.memory, self))
    }

    /// Copies a tensor, cut into `count` rows of as many bytes, to where `to` says.
    ///
    /// # Safety
    ///
    /// There is room for them there, and it is nobody else's, until the stream has been waited for.
    pub(super) unsafe fn place_rows(
        self: &Arc<Self>,
        tensor: &Tensor,
        to: Rows,
        count: usize,
    ) -> Result<(), PlaceError> {
        let bytes = tensor.byte_len().checked_div(count).unwrap_or(0);
        let first = if let Some((on_device, offset)) = self.resident(tensor) {
            Place::Device(on_device.buffer.address() + offset as Address)
        } else {
            let tensor = tensor.clone().on_host()?;
            let first = Place::of(tensor.bytes());
            self.lent().push(tensor);
            first
        };
        // SAFETY: what is read is lent, or freed behind the copy; what is written is the caller's promise.
        Ok(unsafe { self.device.copy_rows(Rows { first, stride: bytes }, to, count, bytes) }?)
    }

    fn upload(&self, tensor: &Tensor) -> Result<Buffer, PlaceError> {
        let tensor = tensor.clone().on_host()?;
        let mut lent = self.lent();
        lent.push(tensor.clone());
        // SAFETY: the tensor's memory is lent until the stream has been waited for, and nobody writes what is shared.
        Ok(unsafe { self.device.upload_later(tensor.bytes()) }?)
    }

    /// Memory for an output.
    pub(super) fn output(self: &Arc<Self>, bytes: usize) -> Result<OnDevice, CudaError> {
        Ok(OnDevice { buffer: self.device.allocate(bytes)?, memory: Arc::clone(self) })
    }

    /// Puts `work` on the stream, which may use `bytes` of memory for its intermediate values meanwhile.
    pub(super) fn with_scratch<R>(&self, bytes: usize, work: impl FnOnce(Address) -> R) -> Result<R, CudaError> {
        // Held until the work is on the stream: memory that grows is freed behind it.
        let mut scratch = self.scratch.lock().unwrap_or_else(PoisonError::into_inner);
        if bytes > scratch.len() {
            *scratch = self.device.allocate(0)?;
            *scratch = self.device.allocate(bytes)?;
        }
        Ok(work(if bytes == 0 { 0 } else { scratch.address() }))
    }

    /// Waits until everything is done.
    pub(super) fn wait(&self) -> Result<(), CudaError> {
        let lent = std::mem::take(&mut *self.lent());
        let done = self.meter.waiting(|| self.device.wait());
        drop(lent);
        done
    }

    fn download(&self, buffer: &Buffer, bytes: &mut [u8]) -> Result<(), CudaError> {
        // What is lent from here on may not have been copied when the wait ends.
        let lent = std::mem::take(&mut *self.lent());
        let done = self.meter.waiting(|| self.device.download_into(buffer, bytes));
        drop(lent);
        done
    }

    fn lent(&self) -> MutexGuard<'_, Vec<Tensor>> {
        self.lent.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // What is lent is read until then. A device that fails reads nothing any more.
        let _ = self.device.wait();
    }
}

impl OnDevice {
    /// Where it is; never null.
    pub(super) fn address(&self) -> Address {
        match self.buffer.address() {
            0 => self.memory.nothing.address(),
            address => address,
        }
    }
}

/// Why an input could not be placed.
#[derive(Debug, thiserror::Error)]
pub(super) enum PlaceError {
    #[error(transparent)]
    Device(#[from] CudaError),
    #[error(transparent)]
    Host(#[from] crate::tensor::TensorError),
}
