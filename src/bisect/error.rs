//! What can keep a fault from being looked for.

use crate::bundle::BundleError;
use crate::checkpoint::CheckpointError;
use crate::pipeline::PipelineError;
use crate::reference::ReferenceError;
use crate::runtime::EngineError;
use crate::staging::StagingError;
use crate::tensor::TensorError;
use crate::verify::VerifyError;
use accordion_graphs::onnx::BuildError;
use accordion_graphs::plan::PlanError;
use std::path::PathBuf;

/// Why a search could not be made, or its result not be written. That nothing is wrong is no error.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BisectError {
    /// The graphs are built in another way today.
    #[error(
        "{}: this version builds graph '{graph}' differently than the one that exported the bundle ({producer}), so that \
         nothing could be said about its nodes; export the bundle again",
        path.display()
    )]
    OtherVersion {
        /// The bundle's graph file.
        path: PathBuf,
        /// The graph.
        graph: String,
        /// What wrote the bundle.
        producer: String,
    },
    /// The bundle lacks something or is damaged.
    #[error(transparent)]
    Bundle(#[from] BundleError),
    /// The graph cannot be built or cut.
    #[error(transparent)]
    Build(#[from] BuildError),
    /// The sides of a comparison could not be prepared.
    #[error(transparent)]
    Verify(#[from] VerifyError),
    /// There is no plan for the lengths.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// The graphs could not be given their inputs.
    #[error(transparent)]
    Pipeline(#[from] PipelineError),
    /// A graph could not be loaded or run.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// The reference could not be computed.
    #[error("the reference: {0}")]
    Reference(#[from] ReferenceError),
    /// A tensor has another form than it should.
    #[error("unexpected tensor: {0}")]
    Tensor(#[from] TensorError),
    /// The weights cannot be read.
    #[error(transparent)]
    Checkpoint(#[from] Box<CheckpointError>),
    /// The reproducer's folder cannot be written.
    #[error(transparent)]
    Staging(#[from] StagingError),
}
