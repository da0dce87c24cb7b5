//! What can be wrong with a bundle.

use crate::checkpoint::CheckpointError;
use crate::precision::PrecisionError;
use crate::staging::StagingError;
use accordion_calibration::significance::{MismatchError, TableError};
use accordion_graphs::onnx::BuildError;
use accordion_graphs::plan::PlanError;
use std::path::{Path, PathBuf};

/// Why a bundle could not be written or opened.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BundleError {
    /// A file or folder could not be read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What the operating system said.
        source: std::io::Error,
    },
    /// The folder to write is already there.
    #[error("{} exists already; choose another folder, or --force to replace it", path.display())]
    Exists {
        /// The folder.
        path: PathBuf,
    },
    /// Not a bundle, or a damaged one.
    #[error("{}: {problem}", path.display())]
    Invalid {
        /// The file.
        path: PathBuf,
        /// What was found and what was expected.
        problem: String,
    },
    /// The folder cannot be written.
    #[error(transparent)]
    Staging(StagingError),
    /// A file is not the one that was exported.
    #[error("{} changed since the export: {what} was {expected}, is {found}; export the bundle again", path.display())]
    Changed {
        /// The file.
        path: PathBuf,
        /// What differs.
        what: &'static str,
        /// What the manifest says.
        expected: String,
        /// What the file says.
        found: String,
    },
    /// The bundle was not exported for this.
    #[error("{} has no graph '{name}'", dir.display())]
    MissingGraph {
        /// The bundle.
        dir: PathBuf,
        /// The graph.
        name: String,
    },
    /// The significance table cannot be read.
    #[error(transparent)]
    Table(Box<TableError>),
    /// The significance table was made for something else, or is too short.
    #[error("{}: {problem}", path.display())]
    TableMismatch {
        /// The table's file.
        path: PathBuf,
        /// What does not fit.
        problem: MismatchError,
    },
    /// The checkpoint is at fault.
    #[error(transparent)]
    Checkpoint(#[from] Box<CheckpointError>),
    /// The precision does not fit the model.
    #[error(transparent)]
    Precision(#[from] PrecisionError),
    /// The settings do not fit the model.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// A graph came out inconsistent.
    #[error(transparent)]
    Build(#[from] BuildError),
}

impl From<StagingError> for BundleError {
    fn from(error: StagingError) -> Self {
        match error {
            StagingError::Io { path, source } => Self::Io { path, source },
            StagingError::Exists { path } => Self::Exists { path },
            other => Self::Staging(other),
        }
    }
}

impl BundleError {
    pub(super) fn invalid(path: &Path, problem: impl Into<String>) -> Self {
        Self::Invalid { path: path.to_owned(), problem: problem.into() }
    }

    pub(super) fn io(path: &Path) -> impl FnOnce(std::io::Error) -> Self + '_ {
        move |source| Self::Io { path: path.to_owned(), source }
    }
}
