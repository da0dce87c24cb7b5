//! The file of a significance table.
//!
//! It is safetensors, with the tensors `bias` f32 `[layers, distances]`, `count` i64 `[distances]` (samples per distance)
//! and `deviation` f32 `[layers]`, and one metadata entry, [`METADATA_KEY`], whose text is a JSON object: `format`
//! ([`FORMAT`]) and the fields of [`Provenance`]. The same table gives the same bytes.

use super::{MAX_ENTRIES, Provenance, SignificanceTable};
use safetensors::tensor::{Dtype, TensorView};
use safetensors::{SafeTensorError, SafeTensors};
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

/// Version of the file format.
pub const FORMAT: &str = "accordion.significance/1";

/// Key of the metadata entry. There is only this one because safetensors writes several in no particular order.
pub const METADATA_KEY: &str = "accordion.significance";

/// Larger files are not read: twice what the largest table takes.
const MAX_FILE_BYTES: u64 = 2 * size_of::<f32>() as u64 * MAX_ENTRIES as u64;

/// Why a table's file could not be read or written.
#[derive(Debug, thiserror::Error)]
#[error("significance table {}: {problem}", path.display())]
pub struct TableError {
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
    #[error("larger than {MAX_FILE_BYTES} bytes, which no significance table is")]
    TooLarge,
    /// Not a valid safetensors file, or a tensor is missing.
    #[error("not a valid table: {0}")]
    Safetensors(#[from] SafeTensorError),
    /// Some other safetensors file.
    #[error("the metadata entry {METADATA_KEY:?} is missing: this is not a significance table")]
    NoMetadata,
    /// The metadata entry is not what this format says.
    #[error("metadata entry {METADATA_KEY:?}: {0}")]
    Metadata(#[source] serde_json::Error),
    /// Written in another format, perhaps by a newer version.
    #[error("format {found:?} is not known, expected {FORMAT:?}")]
    Format {
        /// Format of the file.
        found: String,
    },
    /// A tensor has another element type.
    #[error("tensor {tensor:?} is {found:?}, expected {expected:?}")]
    Type {
        /// Tensor.
        tensor: &'static str,
        /// Its type.
        found: Dtype,
        /// The type it should have.
        expected: Dtype,
    },
    /// A tensor has another shape.
    #[error("tensor {tensor:?} has shape {found:?}, expected {expected}")]
    Shape {
        /// Tensor.
        tensor: &'static str,
        /// Its shape.
        found: Vec<usize>,
        /// The shape it should have.
        expected: String,
    },
    /// A number is impossible.
    #[error("tensor {tensor:?}, element {index}: {found}, expected {expected}")]
    Value {
        /// Tensor.
        tensor: &'static str,
        /// Row-major index of the element.
        index: usize,
        /// The number.
        found: f64,
        /// What it should be.
        expected: &'static str,
    },
}

#[derive(Serialize, Deserialize)]
struct Header {
    format: String,
    #[serde(flatten)]
    provenance: Provenance,
}

#[derive(Deserialize)]
struct Format {
    format: String,
}

impl SignificanceTable {
    /// Writes the table: aside, then renamed to `path`, so that no reader ever sees half of it.
    ///
    /// # Errors
    ///
    /// The folder cannot be written to. What was at `path` is then still there, and nothing else.
    pub fn save(&self, path: &Path) -> Result<(), TableError> {
        self.write(path).map_err(|problem| TableError { path: path.into(), problem })
    }

    fn write(&self, path: &Path) -> Result<(), TableProblem> {
        let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let mut builder = tempfile::Builder::new();
        #[cfg(unix)]
        {
            // As an ordinary new file, subject to the umask; the default of temporary files is owner only.
            use std::os::unix::fs::PermissionsExt;
            builder.permissions(std::fs::Permissions::from_mode(0o666));
        }
        let bytes = self.to_bytes()?;
        let mut file = builder.tempfile_in(folder)?;
        file.write_all(&bytes)?;
        file.as_file().sync_all()?;
        file.persist(path).map_err(|error| error.error)?;
        Ok(())
    }

    fn to_bytes(&self) -> Result<Vec<u8>, TableProblem> {
        let header = Header { format: FORMAT.into(), provenance: self.provenance.clone() };
        let metadata = serde_json::to_string(&header).map_err(TableProblem::Metadata)?;
        let bias: Vec<u8> = self.bias.iter().flat_map(|x| x.to_le_bytes()).collect();
        let count: Vec<u8> = self.counts.iter().flat_map(|x| x.to_le_bytes()).collect();
        let deviation: Vec<u8> = self.deviation.iter().flat_map(|x| x.to_le_bytes()).collect();
        let (layers, distances) = (self.num_layers(), self.num_distances());
        let tensors = [
            ("bias", TensorView::new(Dtype::F32, vec![layers, distances], &bias)?),
            ("count", TensorView::new(Dtype::I64, vec![distances], &count)?),
            ("deviation", TensorView::new(Dtype::F32, vec![layers], &deviation)?),
        ];
        Ok(safetensors::serialize(tensors, Some(HashMap::from([(METADATA_KEY.to_owned(), metadata)])))?)
    }

    /// Reads a table and checks all of it.
    ///
    /// # Errors
    ///
    /// The file cannot be read or is not a valid table of this format.
    pub fn load(path: &Path) -> Result<Self, TableError> {
        let read = || -> Result<Self, TableProblem> {
            let file = File::open(path)?;
            if file.metadata()?.len() > MAX_FILE_BYTES {
                return Err(TableProblem::TooLarge);
            }
            let mut bytes = Vec::new();
            // A file may grow, and devices have no length.
            file.take(MAX_FILE_BYTES).read_to_end(&mut bytes)?;
            Self::from_bytes(format!("significance table {}", path.display()), &bytes)
        };
        read().map_err(|problem| TableError { path: path.into(), problem })
    }

    fn from_bytes(name: String, bytes: &[u8]) -> Result<Self, TableProblem> {
        let (_, metadata) = SafeTensors::read_metadata(bytes)?;
        let entry =
            metadata.metadata().as_ref().and_then(|map| map.get(METADATA_KEY)).ok_or(TableProblem::NoMetadata)?;
        // The version first: other versions may have other fields.
        let Format { format } = serde_json::from_str(entry).map_err(TableProblem::Metadata)?;
        if format != FORMAT {
            return Err(TableProblem::Format { found: format });
        }
        let Header { provenance, .. } = serde_json::from_str(entry).map_err(TableProblem::Metadata)?;

        let file = SafeTensors::deserialize(bytes)?;
        let (shape, bias) = tensor(&file, "bias", Dtype::F32, f32::from_le_bytes)?;
        let (layers, distances) = match shape[..] {
            [layers, distances]
                if layers.checked_mul(distances).is_some_and(|entries| (1..=MAX_ENTRIES).contains(&entries)) =>
            {
                (layers, distances)
            }
            _ => {
                let expected = format!("[layers, distances] with 1 to {MAX_ENTRIES} elements");
                return Err(TableProblem::Shape { tensor: "bias", found: shape, expected });
            }
        };
        let (shape, count) = tensor(&file, "count", Dtype::I64, i64::from_le_bytes)?;
        check_shape("count", shape, distances)?;
        let (shape, deviation) = tensor(&file, "deviation", Dtype::F32, f32::from_le_bytes)?;
        check_shape("deviation", shape, layers)?;

        let value = |tensor, index, found, expected| TableProblem::Value { tensor, index, found, expected };
        if let Some(i) = bias.iter().position(|x| !x.is_finite()) {
            return Err(value("bias", i, bias[i].into(), "a finite number"));
        }
        if let Some(i) = deviation.iter().position(|x| !x.is_finite() || *x < 0.0) {
            return Err(value("deviation", i, deviation[i].into(), "a finite number not below 0"));
        }
        let mut at_most = i64::MAX;
        for (index, &n) in count.iter().enumerate() {
            let at_least = i64::from(index == 0);
            if !(at_least..=at_most).contains(&n) {
                return Err(value("count", index, n as f64, "positive, then not increasing and not below 0"));
            }
            at_most = n;
        }
        let counts = count.into_iter().map(i64::unsigned_abs).collect();
        Ok(Self { name, counts, bias, deviation, provenance })
    }
}

/// Shape and elements of the tensor called `name`.
fn tensor<T, const N: usize>(
    file: &SafeTensors<'_>,
    name: &'static str,
    expected: Dtype,
    element: fn([u8; N]) -> T,
) -> Result<(Vec<usize>, Vec<T>), TableProblem> {
    let view = file.tensor(name)?;
    if view.dtype() != expected {
        return Err(TableProblem::Type { tensor: name, found: view.dtype(), expected });
    }
    let elements = view.data().as_chunks::<N>().0.iter().map(|&bytes| element(bytes)).collect();
    Ok((view.shape().to_vec(), elements))
}

fn check_shape(tensor: &'static str, found: Vec<usize>, expected: usize) -> Result<(), TableProblem> {
    if found == [expected] {
        return Ok(());
    }
    Err(TableProblem::Shape { tensor, found, expected: format!("[{expected}]") })
}
