//! What can keep a comparison from being made.

use crate::bundle::BundleError;
use crate::checkpoint::CheckpointError;
use crate::goldens::GoldenError;
use crate::pipeline::PipelineError;
use crate::pipeline::stop::StopSettingsError;
use crate::reference::ReferenceError;
use crate::runtime::EngineError;
use crate::tensor::TensorError;
use accordion_graphs::plan::PlanError;
use std::path::PathBuf;

/// Why nothing could be compared. That two sides differ is no error: it is what a comparison finds.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum VerifyError {
    /// The graphs could not be run.
    #[error(transparent)]
    Pipeline(#[from] PipelineError),
    /// The reference could not be computed.
    #[error("the reference: {0}")]
    Reference(#[from] ReferenceError),
    /// The golden case cannot be read.
    #[error(transparent)]
    Golden(#[from] GoldenError),
    /// A file is no part of a golden case.
    #[error(
        "{}: not a golden case; expected homer_<case>.json, for rcc <case>.config.json or <case>.cases.safetensors, for \
         sharedllm case_<case>.json",
        path.display()
    )]
    NotGolden {
        /// The file.
        path: PathBuf,
    },
    /// A side of a golden case did not compute something that others are made of.
    #[error("the tap {tap} was not computed")]
    MissingTap {
        /// Its name.
        tap: String,
    },
    /// Arrays do not fit together.
    #[error("unexpected shape: {0}")]
    Shape(#[from] ndarray::ShapeError),
    /// A case generates no token.
    #[error(transparent)]
    Stop(#[from] StopSettingsError),
    /// There is no plan for the lengths.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// The golden's plan is another one.
    #[error("golden {case}: node {node} was run as {found}, the plan says {expected}")]
    OtherPlan {
        /// The case.
        case: String,
        /// Number of the node in the order of execution.
        node: usize,
        /// The golden's node.
        found: String,
        /// The plan's.
        expected: String,
    },
    /// The bundle has no model that compresses.
    #[error("{}: bundle.json describes no compressor of {method}", dir.display())]
    NoCompressor {
        /// The bundle.
        dir: PathBuf,
        /// The method that needs one.
        method: &'static str,
    },
    /// The bundle cannot be written or opened.
    #[error(transparent)]
    Bundle(#[from] BundleError),
    /// The weights cannot be read.
    #[error(transparent)]
    Checkpoint(#[from] Box<CheckpointError>),
    /// An engine could not be made.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// A tensor has another form than it should.
    #[error("unexpected tensor: {0}")]
    Tensor(#[from] TensorError),
    /// A file of recorded taps cannot be read or written.
    #[error("{}: {problem}", path.display())]
    Recording {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// Two bundles are not of the same model and method.
    #[error("{}: its {what} is {found}, expected {expected} as in the other bundle", path.display())]
    OtherModel {
        /// The bundle.
        path: PathBuf,
        /// What differs.
        what: &'static str,
        /// What it is.
        found: String,
        /// What it is in the other bundle.
        expected: String,
    },
    /// A side could not be prepared.
    #[error("{0}")]
    Side(String),
    /// The sides of a comparison do not have the same parts.
    #[error("one side ended before the other: they do not have the same parts")]
    Stopped,
    /// A file could not be written.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
}
