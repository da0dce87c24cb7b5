//! What can be wrong with a precision.

use crate::checkpoint::CheckpointError;
use crate::staging::StagingError;
use accordion_calibration::quantize::QuantizeError;
use accordion_calibration::ranges::{MismatchError, TableError};
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

/// Fewer would store more scales than weights.
pub(super) const MIN_BLOCK: usize = 8;
/// More have no use: a row is not longer.
pub(super) const MAX_BLOCK: usize = 1024;
