//! What can be wrong with a precision.

use crate::checkpoint::CheckpointError;
use crate::staging::StagingError;
use accordion_calibration::quantize::QuantizeError;
use accordion_calibration::ranges::{MismatchError, TableError};
use accordion_graphs::dtype::DType;
use accordion_graphs::precision::Precision;

/// Why a model cannot be put into a precision.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PrecisionError {
    /// The block size is none.
    #[error("blocks of {found} weights cannot share a scale: expected a power of two from {MIN_BLOCK} to {MAX_BLOCK}")]
    Block {
        /// The size asked for.
        found: usize,
    },
    /// A word names no matrix.
    #[error("no matrix of the model is called anything with '{word}', which was to be kept")]
    UnknownKeep {
        /// The word.
        word: String,
    },
    /// A bundle says of a matrix what cannot be.
    #[error("matrix '{name}' {problem}")]
    Form {
        /// The matrix.
        name: String,
        /// What is wrong with it.
        problem: String,
    },
    /// A bundle counts in units that nothing can be counted in.
    #[error("tensor '{name}' has {found} at place {at}, expected a positive number")]
    Scale {
        /// The tensor.
        name: String,
        /// Which of its numbers.
        at: usize,
        /// The number.
        found: f32,
    },
    /// A matrix cannot be quantized.
    #[error("tensor '{name}': {source}")]
    Quantize {
        /// The tensor.
        name: String,
        /// Why not.
        source: QuantizeError,
    },
    /// The ranges of activations are not known.
    #[error(
        "precision {precision} needs the ranges of activations: `accordion calibrate ranges` makes a table of them, \
         --ranges takes it"
    )]
    NoRanges {
        /// The precision.
        precision: Precision,
    },
    /// Only portable graphs of 16-bit floating point can be emulated.
    #[error("precision {precision} cannot be emulated for this target: expected fp16 or bf16 and --target portable")]
    Emulated {
        /// The precision.
        precision: Precision,
    },
    /// A weight is too large for the format.
    #[error(
        "tensor '{name}' holds {value}, which {dtype} cannot: keep it as it is with --keep-float, or take another precision"
    )]
    Overflow {
        /// The tensor.
        name: String,
        /// The weight.
        value: f32,
        /// The format.
        dtype: DType,
    },
    /// The range table cannot be read.
    #[error(transparent)]
    Table(Box<TableError>),
    /// The range table was made for something else, or does not have all matrices.
    #[error("{0}")]
    TableMismatch(MismatchError),
    /// The checkpoint is at fault.
    #[error(transparent)]
    Checkpoint(#[from] Box<CheckpointError>),
    /// The file cannot be written.
    #[error(transparent)]
    Staging(#[from] StagingError),
}

/// What the kernels take, as a lower bound: fewer would store more scales than weights.
pub(super) const MIN_BLOCK: usize = 16;
/// More have no use: a row is not longer.
pub(super) const MAX_BLOCK: usize = 1024;
