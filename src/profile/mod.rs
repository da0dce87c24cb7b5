//! What a method costs: latency, memory, and how far from the machine's limits.
//!
//! - [`stats`]: repeated timing and its statistics.
//! - [`stopwatch`]: time per graph.
//! - [`ceilings`]: the rates of this machine; [`roofline`]: how far something is from what they allow.
//! - [`trace`]: time per module, of nodes that a runtime records; [`layers`]: of layers that an engine reports.
//! - [`load`]: what else the machine is doing; [`trust`]: what the numbers are worth.
//! - [`decoding`]: tokens one by one, with CUDA graphs and without.
//! - [`measure`]: one method at one prompt length, measured.
//! - [`paired`]: two configurations, measured alternately.
//! - [`schema`]: the report that is printed, stored and drawn.

pub mod ceilings;
pub mod decoding;
pub mod details;
pub mod layers;
pub mod load;
pub mod measure;
pub mod paired;
pub mod regression;
pub mod roofline;
pub mod schema;
pub mod stats;
pub mod stopwatch;
mod student;
pub mod trace;
pub mod trust;

use crate::bundle::BundleError;
use crate::cuda::CudaError;
use crate::pipeline::PipelineError;
use crate::pipeline::state_file::StateError;
use crate::runtime::EngineError;
use crate::tensor::TensorError;
use accordion_graphs::onnx::BuildError;
use accordion_graphs::plan::PlanError;
use std::path::PathBuf;

/// Why something could not be measured.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ProfileError {
    /// The bundle is at fault.
    #[error(transparent)]
    Bundle(#[from] BundleError),
    /// A graph of a rate's measurement is inconsistent.
    #[error(transparent)]
    Build(#[from] BuildError),
    /// The runtime refused or failed a graph of a rate's measurement.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// The device failed.
    #[error(transparent)]
    Device(#[from] CudaError),
    /// There is no plan for the prompt.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// The method failed.
    #[error(transparent)]
    Pipeline(#[from] PipelineError),
    /// What the runtime recorded cannot be read.
    #[error("{}: {problem}", path.display())]
    Trace {
        /// The file or folder.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// Nothing can be recorded as a CUDA graph.
    #[error(
        "--cuda-graph both: no decoding step can be recorded: there is no engine of one (export the bundle again, and build it \
         again), or no kernel that appends its rows"
    )]
    NoSteps,
    /// Engines that were to measure their layers told of none.
    #[error("the engines told the time of no layer: NVIDIA's library has no profiler, or does not call it")]
    NoLayers,
    /// The bundle's method needs a part of the checkpoint that bundle.json does not describe.
    #[error("bundle.json does not describe what its method adds to the decoder")]
    NoModel,
    /// A saved state cannot be used.
    #[error(transparent)]
    State(#[from] StateError),
    /// The protocol asked for no run at all.
    #[error("nothing was measured: at least one run is needed")]
    NoRun,
    /// An input could not be made.
    #[error(transparent)]
    Tensor(#[from] TensorError),
}
