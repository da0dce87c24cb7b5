//! Tensors that stay where an engine made them: on a device, until the host reads them.

use crate::tensor::{HostBytes, MaybeStorage, Runs, Storage, Tensor, TensorError};
use accordion_graphs::dtype::DType;
use std::any::Any;
use std::sync::{Arc, OnceLock};

/// Memory of a device that a tensor keeps alive.
pub trait DeviceMemory: Sized + Send + Sync + 'static {
    /// Copies all of it into `bytes`, which has its length, once everything that writes it is done.
    ///
    /// # Errors
    ///
    /// What the device says.
    fn download(&self, bytes: &mut [u8]) -> Result<(), String>;

    /// New memory of `byte_len` bytes, which `pieces` fill, of which there is at least one; nothing if they lie on several
    /// devices.
    ///
    /// # Errors
    ///
    /// What the device says.
    ///
    /// # Safety
    ///
    /// All runs lie inside the memory that they are copied from, and inside `byte_len` bytes.
    unsafe fn gathered(byte_len: usize, pieces: &[(&Self, Runs)]) -> Result<Option<Self>, String>;
}

/// Device memory, and its copy on the host once somebody has read it.
pub struct Resident<M> {
    memory: M,
    byte_len: usize,
    host: OnceLock<Result<HostBytes, String>>,
    /// What is read where the copy failed.
    lost: OnceLock<HostBytes>,
}

impl<M: DeviceMemory> Resident<M> {
    /// A tensor of `memory`, from its first byte on.
    ///
    /// # Errors
    ///
    /// The number of bytes of the shape overflows.
    pub fn tensor(dtype: DType, shape: impl Into<Vec<usize>>, memory: M) -> Result<Tensor, TensorError> {
        let shape = shape.into();
        let Some(byte_len) = dtype.bytes_of_shape(&shape) else {
            return Err(TensorError::TooShort { dtype, shape, available: 0 });
        };
        Tensor::from_storage(dtype, shape, Arc::new(Self::new(memory, byte_len)), 0)
    }

    fn new(memory: M, byte_len: usize) -> Self {
        Self { memory, byte_len, host: OnceLock::new(), lost: OnceLock::new() }
    }

    /// The memory.
    pub fn memory(&self) -> &M {
        &self.memory
    }

    fn host(&self) -> &Result<HostBytes, String> {
        self.host.get_or_init(|| {
            let mut host = HostBytes::filled(self.byte_len, 0);
            self.memory.download(&mut host.bytes_mut()[..self.byte_len])?;
            Ok(host)
        })
    }
}

impl<M: DeviceMemory> Storage for Resident<M> {
    fn bytes(&self) -> &[u8] {
        let host = match self.host() {
            Ok(host) => host,
            Err(_) => self.lost.get_or_init(|| HostBytes::filled(self.byte_len, 0xff)),
        };
        &host.bytes()[..self.byte_len]
    }

    fn byte_len(&self) -> usize {
        self.byte_len
    }

    fn allows(&self, offset: usize, alignment: usize) -> bool {
        offset.is_multiple_of(alignment)
    }

    fn fetch(&self) -> Result<(), String> {
        self.host().as_ref().map(|_| ()).map_err(Clone::clone)
    }

    fn gathered(&self, byte_len: usize, pieces: &[(&dyn Storage, Runs)]) -> MaybeStorage {
        let mut here = Vec::with_capacity(pieces.len());
        for &(storage, runs) in pieces {
            let storage: &dyn Any = storage;
            let Some(resident) = storage.downcast_ref::<Self>() else { return Ok(None) };
            if !runs.fit(resident.byte_len, byte_len) {
                return Err(format!("{runs:?} do not fit into {} and {byte_len} bytes", resident.byte_len));
            }
            here.push((&resident.memory, runs));
        }
        // SAFETY: all runs fit, and the memory of each is as long as it says.
        let memory = unsafe { M::gathered(byte_len, &here) }?;
        Ok(memory.map(|memory| Arc::new(Self::new(memory, byte_len)) as Arc<dyn Storage>))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    #[derive(Default)]
    struct Memory {
        device: u8,
        bytes: Vec<u8>,
        broken: bool,
        downloads: Arc<AtomicUsize>,
    }

    impl DeviceMemory for Memory {
        fn download(&self, bytes: &mut [u8]) -> Result<(), String> {
            self.downloads.fetch_add(1, Ordering::Relaxed);
            if self.broken {
                return Err("unspecified launch failure".to_owned());
            }
            bytes.copy_from_slice(&self.bytes);
            Ok(())
        }

        unsafe fn gathered(byte_len: usize, pieces: &[(&Self, Runs)]) -> Result<Option<Self>, String> {
            let (first, _) = pieces[0];
            if pieces.iter().any(|(memory, _)| memory.device != first.device) {
                return Ok(None);
            }
            let mut bytes = vec![0; byte_len];
            for (memory, runs) in pieces {
                for i in 0..runs.count {
                    let (from, to) = (runs.from + i * runs.from_pitch, runs.to + i * runs.to_pitch);
                    bytes[to..to + runs.bytes].copy_from_slice(&memory.bytes[from..from + runs.bytes]);
                }
            }
            Ok(Some(Self { device: first.device, bytes, broken: false, downloads: Arc::clone(&first.downloads) }))
        }
    }

    fn numbers() -> Vec<u8> {
        [1.0_f32, 2.0, 3.0, 4.0, 5.0, 6.0].iter().flat_map(|x| x.to_le_bytes()).collect()
    }

    #[test]
    fn only_reading_copies_and_only_once() {
        let memory = Memory { bytes: numbers(), ..Memory::default() };
        let downloads = Arc::clone(&memory.downloads);
        let tensor = Resident::tensor(DType::F32, [3, 2], memory).unwrap();
        let row = tensor.rows(1..2).reshaped([2]).unwrap();
        assert_eq!(row.stored_in::<Resident<Memory>>().map(|(_, offset)| offset), Some(8));
        assert_eq!(downloads.load(Ordering::Relaxed), 0);
        assert_eq!(row.as_f32().unwrap(), [3.0, 4.0]);
        assert_eq!(tensor.to_f32(), [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
        assert_eq!(downloads.load(Ordering::Relaxed), 1);
    }

    #[test]
    fn what_lies_on_one_device_is_joined_there_and_nothing_else() {
        let on = |device: u8, downloads: &Arc<AtomicUsize>| {
            let memory = Memory { device, bytes: numbers(), broken: false, downloads: Arc::clone(downloads) };
            Resident::tensor(DType::F32, [3, 2], memory).unwrap()
        };
        let downloads = Arc::default();
        let (a, b) = (on(0, &downloads), on(0, &downloads).rows(1..3));
        let host = Tensor::from_f32([3, 1], vec![7.0, 8.0, 9.0]).unwrap();
        let joined = Tensor::concat(&[&a, &b], 0).unwrap();
        let part = joined.narrow(1, 1..2).unwrap();
        let beside = Tensor::concat(&[&a, &a], 1).unwrap();
        assert!([&joined, &part, &beside].iter().all(|tensor| tensor.stored_in::<Resident<Memory>>().is_some()));
        assert_eq!(downloads.load(Ordering::Relaxed), 0);
        assert_eq!(part.as_f32().unwrap(), [2.0, 4.0, 6.0, 4.0, 6.0]);
        assert_eq!(beside.as_f32().unwrap(), [1.0, 2.0, 1.0, 2.0, 3.0, 4.0, 3.0, 4.0, 5.0, 6.0, 5.0, 6.0]);
        assert_eq!(b.detached().unwrap().as_f32().unwrap(), [3.0, 4.0, 5.0, 6.0]);
        for (other, axis) in [(&host, 1), (&on(1, &downloads), 0)] {
            let joined = Tensor::concat(&[&a, other], axis).unwrap();
            assert!(joined.stored_in::<Resident<Memory>>().is_none());
            let first_row = if axis == 1 { [1.0, 2.0, 7.0] } else { [1.0, 2.0, 3.0] };
            assert_eq!(joined.as_f32().unwrap()[..3], first_row);
        }
    }

    #[test]
    fn a_copy_that_fails_is_an_error_and_never_a_number() {
        let memory = Memory { broken: true, ..Memory::default() };
        let tensor = Resident::tensor(DType::F32, [2], memory).unwrap();
        assert_eq!(tensor.as_f32().unwrap_err(), TensorError::Device("unspecified launch failure".to_owned()));
        assert!(tensor.to_f32().iter().all(|x| x.is_nan()));
    }

    #[test]
    fn memory_of_the_host_is_not_a_devices() {
        let tensor = Tensor::from_f32([1], vec![1.0]).unwrap();
        assert!(tensor.stored_in::<Resident<Memory>>().is_none());
    }
}
