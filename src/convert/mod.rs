//! Checkpoints made out of other checkpoints, whose weights they link to.

mod assembly;
mod rcc;
mod sharedllm;

pub use rcc::{RccOptions, to_rcc};
pub use sharedllm::{CrossAttention, SharedLlmOptions, to_sharedllm};

use crate::checkpoint::{Checkpoint, CheckpointError};
use crate::staging::StagingError;
use accordion_graphs::architecture::Compressor;
use accordion_graphs::dtype::DType;
use accordion_graphs::plan::PlanError;
use serde_json::Value;
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
    /// The method is not made of such a model.
    #[error("{}: {method} is made of a plain {made_of}, and this is {found}", path.display())]
    Family {
        /// The checkpoint.
        path: PathBuf,
        /// The method.
        method: &'static str,
        /// What it is made of.
        made_of: &'static str,
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
    /// Settings that no graph has.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// A number type that new tensors cannot have.
    #[error("{}: tensor {tensor} is of type {found:?}, expected fp32, fp16 or bf16", path.display())]
    NumberType {
        /// The checkpoint.
        path: PathBuf,
        /// A tensor whose type the new ones would have.
        tensor: String,
        /// Its type.
        found: DType,
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

/// What a checkpoint that cannot be converted is already.
fn trained_for(compressor: &Compressor) -> String {
    match compressor {
        Compressor::Rcc(_) => "rcc already",
        Compressor::SharedLlm(_) => "sharedllm already",
        _ => "a checkpoint of another method",
    }
    .to_owned()
}

/// The family that a config.json names.
fn family(config: &Value) -> &str {
    config.get("model_type").and_then(Value::as_str).unwrap_or_default()
}

/// Number type of the tensor called `name`.
fn dtype_of(source: &Checkpoint, name: &str) -> Result<DType, ConvertError> {
    let weight = source.weights().get(name).ok_or_else(|| {
        Box::new(CheckpointError::MissingTensor { path: source.dir().to_owned(), name: name.to_owned() })
    })?;
    Ok(weight.dtype)
}
