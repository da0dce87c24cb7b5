//! The bytes behind a [`WeightIndex`]: every file mapped once.

use super::error::{CheckpointError, io_error};
use super::files;
use crate::tensor::{Storage, Tensor};
use accordion_graphs::weights::{WeightIndex, WeightRef};
use memmap2::{Advice, Mmap};
use std::sync::Arc;

/// The files of a [`WeightIndex`], each mapped into memory once and read by the operating system when touched. Clones
/// and the tensors taken from it share the mappings.
///
/// A file must not be truncated while it is mapped: reading past its new end kills the process.
#[derive(Clone)]
pub struct WeightMaps {
    index: Arc<WeightIndex>,
    files: Arc<[Arc<MappedFile>]>,
}

impl std::fmt::Debug for WeightMaps {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("WeightMaps").field("files", &self.index.files()).finish_non_exhaustive()
    }
}

/// One mapped file; `None` when it is empty, which cannot be mapped.
struct MappedFile(Option<Mmap>);

impl Storage for MappedFile {
    fn bytes(&self) -> &[u8] {
        self.0.as_deref().unwrap_or_default()
    }
}

impl WeightMaps {
    /// Maps the files of `index`. The index need not come from a checkpoint: it is checked against the files.
    ///
    /// # Errors
    ///
    /// A file cannot be opened, or a tensor does not lie inside its file or has another length than its shape.
    pub fn open(index: WeightIndex) -> Result<Self, CheckpointError> {
        let mapped: Vec<Arc<MappedFile>> = index
            .files()
            .iter()
            .map(|path| {
                let (file, size) = files::open(path)?;
                if size == 0 {
                    return Ok(Arc::new(MappedFile(None)));
                }
                // SAFETY: the mapping is private and read-only; that nobody truncates the file meanwhile is asked of
                // the user in the documentation of this type, as every memory-mapping loader has to.
                let map = unsafe { Mmap::map(&file) }.map_err(io_error(path))?;
                Ok(Arc::new(MappedFile(Some(map))))
            })
            .collect::<Result<_, CheckpointError>>()?;
        for (name, weight) in index.iter() {
            let available = mapped.get(weight.file).map_or(0, |file| file.bytes().len() as u64);
            let inside = weight.offset.checked_add(weight.len).is_some_and(|end| end <= available);
            let needed = weight.dtype.bytes_of_shape(&weight.shape);
            if !inside || needed.map(|n| n as u64) != Some(weight.len) {
                return Err(CheckpointError::OutsideFile {
                    path: index.file_of(weight).map(Into::into).unwrap_or_default(),
                    name: name.to_owned(),
                    offset: weight.offset,
                    len: weight.len,
                    available,
                });
            }
        }
        Ok(Self { index: Arc::new(index), files: mapped.into() })
    }

    /// The index the maps were opened with.
    pub fn index(&self) -> &WeightIndex {
        &self.index
    }

    /// The bytes of the whole file number `file` of [`WeightIndex::files`].
    pub fn file(&self, file: usize) -> Option<Arc<dyn Storage>> {
        self.files.get(file).map(|mapped| Arc::clone(mapped) as Arc<dyn Storage>)
    }

    /// Shows `visit` the first `len` bytes of every tensor, in name order.
    pub(crate) fn sample(&self, len: u64, mut visit: impl FnMut(&[u8])) {
        // Without the advice the system reads ahead megabytes around every sample. It is a hint: refusal does no harm.
        self.advise(Advice::Random);
        for (_, weight) in self.index.iter() {
            let start = weight.offset as usize;
            visit(&self.files[weight.file].bytes()[start..start + weight.len.min(len) as usize]);
        }
        self.advise(Advice::Normal);
    }

    fn advise(&self, advice: Advice) {
        for map in self.files.iter().filter_map(|file| file.0.as_ref()) {
            let _ = map.advise(advice);
        }
    }

    /// The tensor called `name`: a view into the mapped file, or a copy where the file does not align its elements.
    ///
    /// # Errors
    ///
    /// There is no such tensor.
    pub fn tensor(&self, name: &str) -> Result<Tensor, CheckpointError> {
        let weight = self.index.get(name).ok_or_else(|| CheckpointError::MissingTensor {
            path: self.index.files().first().and_then(|path| path.parent()).map(Into::into).unwrap_or_default(),
            name: name.to_owned(),
        })?;
        let file = &self.files[weight.file];
        let offset = weight.offset as usize;
        let view = if (file.bytes().as_ptr().addr() + offset).is_multiple_of(weight.dtype.size()) {
            Tensor::from_storage(weight.dtype, weight.shape.clone(), Arc::clone(file) as Arc<dyn Storage>, offset)
        } else {
            aligned_copy(weight, &file.bytes()[offset..offset + weight.len as usize])
        };
        view.map_err(|source| CheckpointError::Tensor { name: name.to_owned(), source })
    }
}

/// A copy of `bytes` in memory that is aligned for every element type.
fn aligned_copy(weight: &WeightRef, bytes: &[u8]) -> Result<Tensor, crate::tensor::TensorError> {
    let words: Vec<i64> = bytes
        .chunks(size_of::<i64>())
        .map(|chunk| {
            let mut word = [0; size_of::<i64>()];
            word[..chunk.len()].copy_from_slice(chunk);
            i64::from_ne_bytes(word)
        })
        .collect();
    Tensor::from_storage(weight.dtype, weight.shape.clone(), Arc::new(words), 0)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use accordion_graphs::dtype::DType;
    use std::collections::BTreeMap;

    fn weight(offset: u64, len: u64, shape: &[usize]) -> WeightRef {
        WeightRef { file: 0, offset, len, shape: shape.to_vec(), dtype: DType::F32 }
    }

    fn open(bytes: &[u8], weight: WeightRef) -> Result<WeightMaps, CheckpointError> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("weights");
        std::fs::write(&path, bytes).unwrap();
        WeightMaps::open(WeightIndex::new(vec![path], BTreeMap::from([("w".to_owned(), weight)])))
    }

    #[test]
    fn aligned_tensors_share_the_mapping_and_misaligned_ones_are_copied() {
        let numbers = [1.5_f32, -2.0, 3.25];
        for (padding, shared) in [(4, true), (3, false)] {
            let mut bytes = vec![0; padding];
            bytes.extend(numbers.iter().flat_map(|x| x.to_le_bytes()));
            let maps = open(&bytes, weight(padding as u64, 12, &[3])).unwrap();
            let tensor = maps.tensor("w").unwrap();
            assert_eq!(tensor.as_f32().unwrap(), numbers);
            let file = maps.file(0).unwrap();
            assert_eq!(file.bytes().as_ptr_range().contains(&tensor.bytes().as_ptr()), shared);
        }
    }

    #[test]
    fn an_index_that_lies_is_refused() {
        for lie in [
            weight(4, 12, &[3]),
            weight(u64::MAX, 12, &[3]),
            weight(0, 12, &[4]),
            weight(0, 12, &[1 << 62, 4]),
            WeightRef { file: 1, ..weight(0, 12, &[3]) },
        ] {
            assert!(matches!(open(&[0; 12], lie.clone()), Err(CheckpointError::OutsideFile { .. })), "{lie:?}");
        }
        assert!(open(&[], weight(0, 0, &[0])).is_ok());
    }
}
