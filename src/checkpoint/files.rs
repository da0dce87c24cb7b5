//! Opening files that somebody else wrote.

use super::error::{CheckpointError, io_error};
use std::fs::File;
use std::io::{ErrorKind, Read};
use std::path::Path;

/// Whether there is anything at `path`.
pub(crate) fn exists(path: &Path) -> Result<bool, CheckpointError> {
    path.try_exists().map_err(io_error(path))
}

/// Opens a regular file and tells its size. Pipes and devices, which may never end, are refused.
pub(crate) fn open(path: &Path) -> Result<(File, u64), CheckpointError> {
    let metadata = std::fs::metadata(path).map_err(io_error(path))?;
    if !metadata.is_file() {
        return Err(io_error(path)(std::io::Error::new(ErrorKind::InvalidInput, "not a regular file")));
    }
    let file = File::open(path).map_err(io_error(path))?;
    Ok((file, metadata.len()))
}

/// The whole of a file that has at most `limit` bytes.
pub(crate) fn read_bounded(path: &Path, limit: u64) -> Result<Vec<u8>, CheckpointError> {
    let (file, size) = open(path)?;
    if size > limit {
        return Err(CheckpointError::TooLarge { path: path.to_owned(), found: size, limit });
    }
    let mut bytes = Vec::with_capacity(size as usize);
    file.take(limit).read_to_end(&mut bytes).map_err(io_error(path))?;
    Ok(bytes)
}

/// A JSON file that has at most `limit` bytes.
pub(crate) fn read_json(path: &Path, limit: u64) -> Result<serde_json::Value, CheckpointError> {
    serde_json::from_slice(&read_bounded(path, limit)?)
        .map_err(|source| CheckpointError::Json { path: path.to_owned(), source })
}
