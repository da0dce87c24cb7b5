//! The host as the place of tensors, as if it were a device: what a GPU runs, except for what CUDA itself does. What is copied is
//! written down.

use accordion::checkpoint::WeightMaps;
use accordion::runtime::bound::{Bound, BoundOptions, Place};
use accordion::runtime::locate::{LoadOptions, LoadedRuntime, load};
use accordion::tensor::Runs;
use ort::memory::MemoryInfo;
use ort::session::builder::SessionBuilder;
use std::sync::{Arc, Mutex};

/// The host, as if it were a device.
pub(crate) struct Host {
    memory: MemoryInfo<'static>,
    /// Bytes of every copy to the host.
    pub(crate) downloads: Arc<Mutex<Vec<usize>>>,
    pub(crate) uploads: Arc<Mutex<Vec<usize>>>,
    /// Bytes of every copy within it.
    pub(crate) moved: Arc<Mutex<Vec<usize>>>,
    pub(crate) provider: &'static str,
}

impl Place for Host {
    type Block = Vec<u64>;

    fn engine(&self) -> &'static str {
        "host"
    }

    fn provider(&self) -> &'static str {
        self.provider
    }

    fn memory(&self) -> &MemoryInfo<'static> {
        &self.memory
    }

    fn provide(&self, builder: SessionBuilder) -> Result<SessionBuilder, ort::Error> {
        Ok(builder)
    }

    fn upload(&self, bytes: &[u8]) -> Result<(Vec<u64>, usize), String> {
        self.uploads.lock().unwrap().push(bytes.len());
        let words = bytes.chunks(8).map(|word| {
            let mut padded = [0; 8];
            padded[..word.len()].copy_from_slice(word);
            u64::from_ne_bytes(padded)
        });
        let block: Vec<u64> = words.collect();
        let address = block.as_ptr().addr();
        Ok((block, address))
    }

    fn allocate(&self, byte_len: usize) -> Result<(Vec<u64>, usize), String> {
        let block = vec![0xa5a5_a5a5_a5a5_a5a5; byte_len.div_ceil(8)];
        let address = block.as_ptr().addr();
        Ok((block, address))
    }

    unsafe fn copy(&self, to: usize, pieces: &[(usize, Runs)]) -> Result<(), String> {
        for (from, runs) in pieces {
            self.moved.lock().unwrap().push(runs.count * runs.bytes);
            for i in 0..runs.count {
                let from = (from + runs.from + i * runs.from_pitch) as *const u8;
                // SAFETY: the caller promises as many bytes at both ends.
                unsafe { from.copy_to_nonoverlapping((to + runs.to + i * runs.to_pitch) as *mut u8, runs.bytes) };
            }
        }
        Ok(())
    }

    unsafe fn download(&self, address: usize, bytes: &mut [u8]) -> Result<(), String> {
        self.downloads.lock().unwrap().push(bytes.len());
        // SAFETY: the caller promises as many bytes.
        bytes.copy_from_slice(unsafe { std::slice::from_raw_parts(address as *const u8, bytes.len()) });
        Ok(())
    }
}

impl Host {
    pub(crate) fn new() -> Self {
        // The description of memory is the runtime's.
        runtime();
        let (downloads, uploads, moved) = Default::default();
        Self { memory: MemoryInfo::default(), downloads, uploads, moved, provider: "CPUExecutionProvider" }
    }

    /// What loads graphs over `weights` there.
    pub(crate) fn loader(self, weights: WeightMaps, options: BoundOptions) -> Bound<Self> {
        Bound::new(runtime(), weights, self, options)
    }
}

pub(crate) fn runtime() -> &'static LoadedRuntime {
    load(LoadOptions::fetching(&mut |_| {})).unwrap()
}
