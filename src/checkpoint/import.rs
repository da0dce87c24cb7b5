//! What every import shares: a checkpoint folder written aside and renamed, weights streamed into it.

use super::error::{CheckpointError, io_error};
use super::required::required_tensors;
use super::safetensors;
use accordion_graphs::architecture::Llama;
use accordion_graphs::dtype::DType;
use serde_json::Value;
use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use tempfile::TempDir;

/// A checkpoint folder in the making. Dropped before [`Folder::publish`], it leaves nothing behind.
pub(crate) struct Folder {
    /// Beside the goal, so that the rename stays on one file system.
    staging: TempDir,
    content: PathBuf,
    goal: PathBuf,
}

/// Fills the row of that number of a tensor as it is stored. A vector is a single row.
pub(crate) type RowReader<'a> = Box<dyn Fn(usize, &mut [f32]) + 'a>;

/// In which order the rows of the q and k projections are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum RowOrder {
    /// As Hugging Face has them: the first halves of all rotary pairs of a head, then the second halves.
    Halves,
    /// As the original Llama code has them: the two of a pair side by side.
    Pairs,
}

impl RowOrder {
    /// Where row `row` of a projection is stored, for heads of `head_dim` rows.
    fn stored_row(self, row: usize, head_dim: usize) -> usize {
        match self {
            Self::Halves => row,
            Self::Pairs => {
                let (within, half) = (row % head_dim, head_dim / 2);
                row - within + 2 * (within % half) + within / half
            }
        }
    }
}

impl Folder {
    /// Starts a folder that will become `goal`, which must not exist.
    pub(crate) fn create(goal: &Path) -> Result<Self, CheckpointError> {
        if fs::symlink_metadata(goal).is_ok() {
            return Err(CheckpointError::Exists { path: goal.to_owned() });
        }
        let parent = match goal.parent() {
            Some(parent) if parent != Path::new("") => parent,
            _ => Path::new("."),
        };
        let staging = tempfile::Builder::new().prefix(".import-").tempdir_in(parent).map_err(io_error(parent))?;
        // A folder of its own inside: temporary folders are private to the user, a checkpoint need not be.
        let content = staging.path().join("checkpoint");
        fs::create_dir(&content).map_err(io_error(&content))?;
        Ok(Self { staging, content, goal: goal.to_owned() })
    }

    /// Writes a JSON file.
    pub(crate) fn write_json(&self, name: &str, value: &Value) -> Result<(), CheckpointError> {
        let path = self.content.join(name);
        fs::write(&path, format!("{value:#}\n")).map_err(io_error(&path))
    }

    /// Writes the tensors of `model` as fp32, one row in memory at a time. `rows` opens a tensor by its Hugging Face
    /// name; the rows of the q and k projections come in `order` and are put into Hugging Face's here.
    pub(crate) fn write_weights<'a>(
        &self,
        model: &Llama,
        order: RowOrder,
        mut progress: impl FnMut(u64, u64),
        rows: impl Fn(&str) -> Result<RowReader<'a>, CheckpointError>,
    ) -> Result<(), CheckpointError> {
        const BUFFER: usize = 1 << 20;
        let path = self.content.join(safetensors::SINGLE);
        let total = required_tensors(model).map(|(_, shape)| elements(&shape)).sum();
        let mut written = 0;
        let mut file = BufWriter::with_capacity(BUFFER, File::create(&path).map_err(io_error(&path))?);
        let header = safetensors::header(DType::F32, required_tensors(model));
        file.write_all(&header).map_err(io_error(&path))?;
        let (mut values, mut bytes) = (Vec::new(), Vec::new());
        for (name, shape) in required_tensors(model) {
            let read = rows(&name)?;
            let rotated = name.contains(".q_proj.") || name.contains(".k_proj.");
            let stored = |row| if rotated { order.stored_row(row, model.head_dim) } else { row };
            let (row_count, row_len) = if let [rows, len] = shape[..] { (rows, len) } else { (1, shape[0]) };
            values.resize(row_len, 0.0);
            for row in 0..row_count {
                bytes.clear();
                if row_count == shape[0] {
                    read(stored(row), &mut values);
                    bytes.extend(values.iter().flat_map(|x| x.to_le_bytes()));
                } else {
                    read(0, &mut values);
                    bytes.extend((0..row_len).flat_map(|i| values[stored(i)].to_le_bytes()));
                }
                file.write_all(&bytes).map_err(io_error(&path))?;
            }
            written += elements(&shape);
            progress(written, total);
        }
        file.flush().map_err(io_error(&path))
    }

    /// Gives the folder its final name.
    pub(crate) fn publish(self) -> Result<(), CheckpointError> {
        if fs::symlink_metadata(&self.goal).is_ok() {
            return Err(CheckpointError::Exists { path: self.goal });
        }
        fs::rename(&self.content, &self.goal).map_err(io_error(&self.goal))?;
        drop(self.staging);
        Ok(())
    }
}

fn elements(shape: &[usize]) -> u64 {
    shape.iter().map(|&dim| dim as u64).product()
}
