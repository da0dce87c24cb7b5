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
    /// Number of bytes; always [`DType::bytes_of_shape`] of the two below.
    pub len: u64,
    /// Dimensions, outermost first. Linear weights are `[out, in]`, as Hugging Face stores them.
    pub shape: Vec<usize>,
    /// Element type as stored.
    pub dtype: DType,
}

/// Every tensor of a checkpoint by its name, with the files that hold them. A tensor may be known by further names, its
/// aliases.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct WeightIndex {
    files: Vec<PathBuf>,
    entries: BTreeMap<String, WeightRef>,
    /// Alias to the name in a file; both are in `entries`.
    aliases: BTreeMap<String, String>,
}

/// Why a tensor cannot have another name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum AliasError {
    /// A name can mean one tensor only.
    #[error("a tensor of that name is there already")]
    Taken,
    /// There is nothing to give the name to.
    #[error("there is no tensor that it could mean")]
    MissingTarget,
    /// Chains could be circles.
    #[error("what it means is an alias itself")]
    AliasOfAlias,
}

impl WeightIndex {
    /// An index over `files` (shards in any fixed order) and the tensors in them.
    pub fn new(files: Vec<PathBuf>, entries: BTreeMap<String, WeightRef>) -> Self {
        Self { files, entries, aliases: BTreeMap::new() }
    }

    /// Makes the tensor `target` known as `alias` too.
    ///
    /// # Errors
    ///
    /// The name is taken, or `target` is not the name of a tensor in a file.
    pub fn alias(&mut self, alias: &str, target: &str) -> Result<(), AliasError> {
        if self.entries.contains_key(alias) {
            return Err(AliasError::Taken);
        }
        if self.aliases.contains_key(target) {
            return Err(AliasError::AliasOfAlias);
        }
        let weight = self.entries.get(target).ok_or(AliasError::MissingTarget)?.clone();
        self.entries.insert(alias.to_owned(), weight);
        self.aliases.insert(alias.to_owned(), target.to_owned());
        Ok(())
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

    /// All tensors in name order, under all of their names.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &WeightRef)> {
        self.entries.iter().map(|(name, weight)| (name.as_str(), weight))
    }

    /// All tensors in name order, under the names that the files give them: every tensor once.
    pub fn stored(&self) -> impl Iterator<Item = (&str, &WeightRef)> {
        self.iter().filter(|(name, _)| !self.aliases.contains_key(*name))
    }

    /// Further names of tensors, each with the name that the files give the tensor.
    pub fn aliases(&self) -> &BTreeMap<String, String> {
        &self.aliases
    }

    /// Number of elements over all tensors, each counted once.
    pub fn parameter_count(&self) -> u64 {
        self.stored().map(|(_, w)| w.len / w.dtype.size() as u64).sum()
    }

    /// Number of bytes over all tensors, each counted once.
    pub fn byte_count(&self) -> u64 {
        self.stored().map(|(_, w)| w.len).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tensor_of_two_names_is_one_tensor() {
        let weight = WeightRef { file: 0, offset: 8, len: 24, shape: vec![2, 3], dtype: DType::F32 };
        let mut index = WeightIndex::new(vec!["w".into()], BTreeMap::from([("a".to_owned(), weight.clone())]));
        assert_eq!(index.alias("b", "a"), Ok(()));
        assert_eq!(index.get("b"), Some(&weight));
        assert_eq!((index.iter().count(), index.stored().count()), (2, 1));
        assert_eq!((index.parameter_count(), index.byte_count()), (6, 24));

        assert_eq!(index.alias("a", "a"), Err(AliasError::Taken));
        assert_eq!(index.alias("b", "a"), Err(AliasError::Taken));
        assert_eq!(index.alias("c", "b"), Err(AliasError::AliasOfAlias));
        assert_eq!(index.alias("c", "d"), Err(AliasError::MissingTarget));
        assert_eq!(index.aliases().len(), 1);
    }
}
