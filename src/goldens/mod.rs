//! Golden cases: what the papers' own code computed, on small random models, written to files.
//!
//! One module per method, because each method has its own inputs and results: [`homer`], [`rcc`], [`sharedllm`].

mod config;
mod files;
pub mod homer;
pub mod rcc;
pub mod sharedllm;

pub use homer::HomerCase;
pub use rcc::RccCase;
pub use sharedllm::SharedLlmCase;

use std::path::PathBuf;

/// Why a golden case cannot be read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum GoldenError {
    /// A file or folder is missing or unreadable.
    #[error("{}: cannot be read", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// A file is not what its name says.
    #[error("{}: not a valid {kind} file", path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// What it should be.
        kind: &'static str,
        /// What the parser said.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// A tensor or metadata key is missing.
    #[error("{}: `{key}` is missing", path.display())]
    Missing {
        /// The file.
        path: PathBuf,
        /// The tensor name or metadata key.
        key: String,
    },
    /// A tensor or metadata key holds something else than it should.
    #[error("{}: `{key}` is {found}, expected {expected}", path.display())]
    Invalid {
        /// The file.
        path: PathBuf,
        /// The tensor name or metadata key.
        key: String,
        /// What it is.
        found: String,
        /// What it should be.
        expected: String,
    },
}

type Result<T, E = GoldenError> = std::result::Result<T, E>;
