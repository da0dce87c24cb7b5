//! The host as the place of tensors, as if it were a device: what a GPU runs, except for what CUDA itself does.

use accordion::checkpoint::WeightMaps;
use accordion::runtime::bound::{Bound, BoundOptions, Place};
use accordion::runtime::locate::{LoadOptions, LoadedRuntime, load};
use ort::memory::MemoryInfo;
use ort::session::builder::SessionBuilder;

pub(crate) struct Host(MemoryInfo<'static>);

impl Host {
    /// What loads graphs over `weights` there, with our kernels for the CPU.
    pub(crate) fn loader(weights: WeightMaps) -> Bound<Self> {
        let runtime = runtime();
        let options = BoundOptions { operators: Some(accordion_plugins::domain().unwrap()), allow_fallback: false };
        Bound::new(runtime, weights, Self(MemoryInfo::default()), options)
    }
}

fn runtime() -> &'static LoadedRuntime {
    load(LoadOptions::fetching(&mut |_| {})).unwrap()
}

impl Place for Host {
    type Block = Vec<u64>;

    fn engine(&self) -> &'static str {
        "host"
    }

    fn provider(&self) -> &'static str {
        "CPUExecutionProvider"
    }

    fn memory(&self) -> &MemoryInfo<'static> {
        &self.0
    }

    fn provide(&self, builder: SessionBuilder) -> Result<SessionBuilder, ort::Error> {
        Ok(builder)
    }

    fn upload(&self, bytes: &[u8]) -> Result<(Vec<u64>, usize), String> {
        let words = bytes.chunks(8).map(|word| {
            let mut padded = [0; 8];
            padded[..word.len()].copy_from_slice(word);
            u64::from_ne_bytes(padded)
        });
        let block: Vec<u64> = words.collect();
        let address = block.as_ptr().addr();
        Ok((block, address))
    }

    unsafe fn download(&self, address: usize, bytes: &mut [u8]) -> Result<(), String> {
        // SAFETY: the caller promises as many bytes.
        bytes.copy_from_slice(unsafe { std::slice::from_raw_parts(address as *const u8, bytes.len()) });
        Ok(())
    }
}
