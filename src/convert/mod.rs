//! Checkpoints made out of other checkpoints, whose weights they link to.

mod sharedllm;

pub use sharedllm::{CrossAttention, SharedLlmOptions, to_sharedllm};

use crate::checkpoint::CheckpointError;
use crate::staging::StagingError;
use std::path::PathBuf;

/// What a conversion did.
#[derive(Debug, Clone)]
pub struct Converted {
    /// Bytes written; links have none.
    pub bytes_written: u64,
    /// Further names that tensors have in the new checkpoint.
    pub aliases: usize,
    /// Why files were copied that should have been linked: the first of them, and what the system said.
    pub link_failure: Option<String>,
}

/// Why a checkpoint cannot be converted.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConvertError {
    /// The method's authors define it for another model.
    #[error("{}: sharedllm is made of a plain Llama, and this is {found}", path.display())]
    Family {
        /// The checkpoint.
        path: PathBuf,
        /// What it is.
        found: String,
    },
    /// The method has no such tensors.
    #[error("{} has a tensor {tensor}, but the layers of sharedllm have no biases", path.display())]
    Bias {
        /// The checkpoint.
        path: PathBuf,
        /// The first bias.
        tensor: String,
    },
    /// The number of injected layers does not fit.
    #[error("--layers is {found}, expected 1 to {most}, the layers of {}", path.display())]
    Layers {
        /// The checkpoint.
        path: PathBuf,
        /// What was asked for.
        found: usize,
        /// Layers of the checkpoint.
        most: usize,
    },
    /// A setting that no tree has.
    #[error("{flag} is {found}, expected {expected}")]
    Setting {
        /// The command's flag.
        flag: &'static str,
        /// What was asked for.
        found: String,
        /// What would have been accepted.
        expected: String,
    },
    /// A file name that cannot be written into JSON.
    #[error("{}: the file name is not valid UTF-8", path.display())]
    FileName {
        /// The file.
        path: PathBuf,
    },
    /// The source is at fault.
    #[error(transparent)]
    Checkpoint(#[from] Box<CheckpointError>),
    /// The new folder cannot be written.
    #[error(transparent)]
    Staging(#[from] StagingError),
}
