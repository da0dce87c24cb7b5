//! What the files of all tables have in common.
//!
//! A table is a safetensors file with one metadata entry, whose text is a JSON object with the field `format`, the version
//! of the format. There is only one entry because safetensors writes several in no particular order: the same table gives
//! the same bytes.

use safetensors::tensor::{Dtype, TensorView};
use safetensors::{SafeTensorError, SafeTensors};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

/// Why a table's file could not be read or written.
#[derive(Debug, thiserror::Error)]
#[error("{kind} {}: {problem}", path.display())]
pub struct TableError {
    /// What kind of table it is or should be: "significance table".
    pub kind: &'static str,
    /// The file.
    pub path: PathBuf,
    /// What is wrong with it.
    #[source]
    pub problem: TableProblem,
}

/// What is wrong with a table's file.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TableProblem {
    /// The system refused.
    #[error("{0}")]
    Io(#[from] io::Error),
    /// Too large to be a table.
    #[error("larger than {limit} bytes, which no table of this kind is")]
    TooLarge {
        /// The largest there may be.
        limit: u64,
    },
    /// Not a valid safetensors file, or a tensor is missing.
    #[error("not a valid table: {0}")]
    Safetensors(#[from] SafeTensorError),
    /// Some other safetensors file.
    #[error("the metadata entry {key:?} is missing: this is another kind of file")]
    NoMetadata {
        /// Key of the entry.
        key: &'static str,
    },
    /// The metadata entry is not what the format says.
    #[error("metadata entry {key:?}: {source}")]
    Metadata {
        /// Key of the entry.
        key: &'static str,
        /// What is wrong with it.
        source: serde_json::Error,
    },
    /// Written in another format, perhaps by a newer version.
    #[error("format {found:?} is not known, expected {expected:?}")]
    Format {
        /// Format of the file.
        found: String,
        /// Format that can be read.
        expected: &'static str,
    },
    /// A tensor has another element type.
    #[error("tensor {tensor:?} is {found:?}, expected {expected:?}")]
    Type {
        /// Tensor.
        tensor: String,
        /// Its type.
        found: Dtype,
        /// The type it should have.
        expected: Dtype,
    },
    /// A tensor has another shape.
    #[error("tensor {tensor:?} has shape {found:?}, expected {expected}")]
    Shape {
        /// Tensor.
        tensor: String,
        /// Its shape.
        found: Vec<usize>,
        /// The shape it should have.
        expected: String,
    },
    /// A number is impossible.
    #[error("tensor {tensor:?}, element {index}: {found}, expected {expected}")]
    Value {
        /// Tensor.
        tensor: String,
        /// Row-major index of the element.
        index: usize,
        /// The number.
        found: f64,
        /// What it should be.
        expected: &'static str,
    },
    /// What a part of the table says cannot be so.
    #[error("{part}: {problem}")]
    Contradiction {
        /// The part.
        part: String,
        /// What it says.
        problem: String,
    },
}

/// A kind of table.
pub(crate) struct Kind {
    /// How messages call it.
    pub(crate) name: &'static str,
    /// Version of the format.
    pub(crate) format: &'static str,
    /// Key of the metadata entry.
    pub(crate) key: &'static str,
    /// Larger files are not read.
    pub(crate) max_bytes: u64,
}

/// The metadata entry of a table that is described by `H`.
#[derive(Serialize, Deserialize)]
struct Header<H> {
    format: String,
    #[serde(flatten)]
    description: H,
}

#[derive(Deserialize)]
struct Format {
    format: String,
}

impl Kind {
    pub(crate) fn error(&self, path: &Path, problem: TableProblem) -> TableError {
        TableError { kind: self.name, path: path.into(), problem }
    }

    /// The bytes of a table with `tensors`, described by `description`.
    pub(crate) fn serialize<'d>(
        &self,
        description: &impl Serialize,
        tensors: impl IntoIterator<Item = (impl AsRef<str> + Ord + std::fmt::Display, TensorView<'d>)>,
    ) -> Result<Vec<u8>, TableProblem> {
        let header = Header { format: self.format.into(), description };
        let metadata = serde_json::to_string(&header).map_err(|e| self.metadata(e))?;
        Ok(safetensors::serialize(tensors, Some(HashMap::from([(self.key.to_owned(), metadata)])))?)
    }

    fn metadata(&self, source: serde_json::Error) -> TableProblem {
        TableProblem::Metadata { key: self.key, source }
    }

    /// The whole file `path`.
    pub(crate) fn read(&self, path: &Path) -> Result<Vec<u8>, TableProblem> {
        let file = File::open(path)?;
        if file.metadata()?.len() > self.max_bytes {
            return Err(TableProblem::TooLarge { limit: self.max_bytes });
        }
        let mut bytes = Vec::new();
        // A file may grow, and devices have no length.
        file.take(self.max_bytes).read_to_end(&mut bytes)?;
        Ok(bytes)
    }

    /// Description and tensors of a table's bytes.
    pub(crate) fn parse<'b, H: DeserializeOwned>(&self, bytes: &'b [u8]) -> Result<(H, SafeTensors<'b>), TableProblem> {
        let (_, metadata) = SafeTensors::read_metadata(bytes)?;
        let entry = metadata.metadata().as_ref().and_then(|map| map.get(self.key));
        let entry = entry.ok_or(TableProblem::NoMetadata { key: self.key })?;
        // The version first: other versions may have other fields.
        let Format { format } = serde_json::from_str(entry).map_err(|e| self.metadata(e))?;
        if format != self.format {
            return Err(TableProblem::Format { found: format, expected: self.format });
        }
        let Header { description, .. } = serde_json::from_str(entry).map_err(|e| self.metadata(e))?;
        Ok((description, SafeTensors::deserialize(bytes)?))
    }
}

/// Writes `bytes` aside, then renames the file to `path`, so that no reader ever sees half of it.
pub(crate) fn write_aside(path: &Path, bytes: &[u8]) -> Result<(), TableProblem> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let mut builder = tempfile::Builder::new();
    #[cfg(unix)]
    {
        // As an ordinary new file, subject to the umask; the default of temporary files is owner only.
        use std::os::unix::fs::PermissionsExt;
        builder.permissions(std::fs::Permissions::from_mode(0o666));
    }
    let mut file = builder.tempfile_in(folder)?;
    file.write_all(bytes)?;
    file.as_file().sync_all()?;
    file.persist(path).map_err(|error| error.error)?;
    Ok(())
}

/// Shape and elements of the tensor called `name`.
pub(crate) fn tensor<T, const N: usize>(
    file: &SafeTensors<'_>,
    name: &str,
    expected: Dtype,
    element: fn([u8; N]) -> T,
) -> Result<(Vec<usize>, Vec<T>), TableProblem> {
    let view = file.tensor(name)?;
    if view.dtype() != expected {
        return Err(TableProblem::Type { tensor: name.to_owned(), found: view.dtype(), expected });
    }
    let elements = view.data().as_chunks::<N>().0.iter().map(|&bytes| element(bytes)).collect();
    Ok((view.shape().to_vec(), elements))
}

/// Elements of the tensor called `name`, whose shape must be `shape`.
pub(crate) fn shaped_tensor<T, const N: usize>(
    file: &SafeTensors<'_>,
    name: &str,
    shape: &[usize],
    expected: Dtype,
    element: fn([u8; N]) -> T,
) -> Result<Vec<T>, TableProblem> {
    let (found, elements) = tensor(file, name, expected, element)?;
    if found == shape {
        return Ok(elements);
    }
    Err(TableProblem::Shape { tensor: name.to_owned(), found, expected: format!("{shape:?}") })
}
