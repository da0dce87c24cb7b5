//! Why there is no engine.

use super::Flavour;
use super::execute::build_command;
use crate::bundle::BundleError;
use crate::cuda::CudaError;
use crate::fetch::FetchError;
use crate::staging::StagingError;
use accordion_graphs::plan::PlanError;
use std::path::PathBuf;

/// Why engines could not be built or opened.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TensorRtError {
    /// A part of NVIDIA's package is not on this machine.
    #[error(
        "{flavour} needs {what}, and there is none in {}: install NVIDIA's package (or unpack its archive) and name its \
         folder with --root or {}",
        places(searched), flavour.root_variable()
    )]
    Missing {
        /// The package.
        flavour: Flavour,
        /// The part: `NvInfer.h`.
        what: String,
        /// Where it was looked for.
        searched: Vec<PathBuf>,
    },
    /// There is no GPU that the builder could measure on.
    #[error("{flavour} builds on a GPU only: {reason}")]
    NoDevice {
        /// The package.
        flavour: Flavour,
        /// What is missing.
        reason: String,
    },
    /// There is no C++ compiler.
    #[error("a C++ compiler is needed to use NVIDIA's headers: install g++ or clang++, or name one with CXX")]
    NoCompiler,
    /// The shim did not compile.
    #[error("{compiler} with the headers in {}: {message}", headers.display())]
    Compile {
        /// The compiler.
        compiler: String,
        /// The headers.
        headers: PathBuf,
        /// The first error.
        message: String,
    },
    /// A shared library cannot be used.
    #[error("{}: {reason}", path.display())]
    Library {
        /// The library.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The library refused a graph.
    #[error("graph '{graph}': {message}")]
    Graph {
        /// The graph.
        graph: String,
        /// What the library said.
        message: String,
    },
    /// An input has a dimension that the workload says nothing about.
    #[error("graph '{graph}', input '{input}': there is no range for dimension '{dimension}'")]
    UnknownDimension {
        /// The graph.
        graph: String,
        /// The input.
        input: String,
        /// Its name in the graph.
        dimension: String,
    },
    /// A graph's file is not an ONNX model.
    #[error("graph '{graph}': not a serialised ONNX model at byte {offset}")]
    Malformed {
        /// The graph.
        graph: String,
        /// Where it stops being one.
        offset: usize,
    },
    /// The record of engines is damaged, or not of this bundle.
    #[error("{}: {problem}", path.display())]
    Record {
        /// The file.
        path: PathBuf,
        /// What was found and what was expected.
        problem: String,
    },
    /// Nothing was built for this flavour and version.
    #[error(
        "there are no engines of {flavour} {version} ({} does not exist): {}", dir.display(), build_command(*flavour, dir)
    )]
    NotBuilt {
        /// The package.
        flavour: Flavour,
        /// Its version.
        version: String,
        /// Where they would be.
        dir: PathBuf,
    },
    /// Engines were built with plugins.
    #[error("the engines were built with a library of plugins: name it with --plugins")]
    NeedsPlugins,
    /// The device cannot be used.
    #[error(transparent)]
    Device(#[from] CudaError),
    /// An engine is not the one that was built.
    #[error(
        "{} is not the engine that was built here (SHA-256 {found}, recorded {expected}): an engine is a program; --trust \
         loads it all the same", path.display()
    )]
    Untrusted {
        /// The file.
        path: PathBuf,
        /// Hash of the file.
        found: String,
        /// Hash in the record, or "none".
        expected: String,
    },
    /// A file or folder could not be read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What the operating system said.
        source: std::io::Error,
    },
    /// The folder of engines cannot be written.
    #[error(transparent)]
    Staging(#[from] StagingError),
    /// The bundle is at fault.
    #[error(transparent)]
    Bundle(#[from] BundleError),
    /// The method has no plan for the lengths.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// There is no cache folder.
    #[error(transparent)]
    Cache(#[from] FetchError),
}

impl TensorRtError {
    pub(super) fn io(path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Self {
        move |source| Self::Io { path: path.into(), source }
    }
}

/// The first places of a search, and how many more there are.
fn places(searched: &[PathBuf]) -> String {
    const SHOWN: usize = 3;
    let shown: Vec<String> = searched.iter().take(SHOWN).map(|path| path.display().to_string()).collect();
    match searched.len().saturating_sub(SHOWN) {
        0 => shown.join(", "),
        more => format!("{} and {more} more folders", shown.join(", ")),
    }
}
