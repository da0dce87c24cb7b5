//! Where the tensors of a checkpoint lie on disk.

use crate::dtype::DType;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// One tensor's place in a checkpoint file. The bytes are raw, little-endian and contiguous: what ONNX external data is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WeightRef {
    /// Index into [`WeightIndex::files`].
    pub file: usize,
    /// Byte offset of the first element from the start of the file.
    pub offset: u64,
    /// Number of bytes; always `product(shape) * dtype.size()`.
    pub len: u64,
    /// Dimensions, outermost first. Linear weights are `[out, in]`, as Hugging Face stores them.
    pub shape: Vec<usize>,
    /// Element type as stored.
    pub dtype: DType,
}

/// Every tensor of a checkpoint by its name, with the files that hold them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct WeightIndex {
    files: Vec<PathBuf>,
    entries: BTreeMap<String, WeightRef>,
}

impl WeightIndex {
    /// An index over `files` (shards in any fixed order) and the tensors in them.
    pub fn new(files: Vec<PathBuf>, entries: BTreeMap<String, WeightRef>) -> Self {
        Self { files, entries }
    }

    /// The files that hold the tensors; [`WeightRef::file`] indexes this.
    pub fn files(&self) -> &[PathBuf] {
        &self.files
    }

    /// The tensor called `name`, if the checkpoint has it.
    pub fn get(&self, name: &str) -> Option<&WeightRef> {
        self.entries.get(name)
    }

    /// The file that holds `weight`.
    pub fn file_of(&self, weight: &WeightRef) -> Option<&Path> {
        self.files.get(weight.file).map(PathBuf::as_path)
    }

    /// All tensors in name order.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &WeightRef)> {
        self.entries.iter().map(|(name, weight)| (name.as_str(), weight))
    }

    /// Number of elements over all tensors.
    pub fn parameter_count(&self) -> u64 {
        self.entries.values().map(|w| w.len / w.dtype.size() as u64).sum()
    }

    /// Number of bytes over all tensors.
    pub fn byte_count(&self) -> u64 {
        self.entries.values().map(|w| w.len).sum()
    }
}
