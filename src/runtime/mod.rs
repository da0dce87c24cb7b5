//! Engines: graphs loaded in a runtime.
//!
//! The pipeline sees only [`Engine`] and [`Loader`]; which runtime is behind them is chosen once, when they are made.

pub mod bound;
mod cuda_operators;
pub(crate) mod dylib;
pub mod locate;
pub mod ort_cpu;
pub mod ort_cuda;
mod placement;
pub mod resident;
mod session;
pub mod steps;

#[cfg(test)]
pub(crate) use session::trace_prefix;

use crate::cuda::Meter;
use crate::tensor::{Tensor, TensorError};
use accordion_graphs::dtype::DType;
use std::sync::Arc;
use steps::{MaybeSteps, StepCall};

/// One graph, loaded and ready to run.
pub trait Engine: Send {
    /// Runs the graph on `inputs` and returns `outputs` in the order asked for.
    ///
    /// `in_place` names tensors that the graph updates: each is given as the input and taken as the output of its
    /// names, in the same memory. They must not be listed in `outputs`.
    ///
    /// # Errors
    ///
    /// A name the graph does not have, a tensor that does not fit it, or a failure of the runtime.
    fn run(
        &mut self,
        inputs: &[(&str, &Tensor)],
        in_place: &mut [InPlace<'_>],
        outputs: &[&str],
    ) -> Result<Vec<Tensor>, EngineError>;

    /// Prepares to run the graph step by step, if the engine has something to gain from it.
    ///
    /// # Errors
    ///
    /// As [`Self::run`], or there is not as much memory.
    fn steps(&mut self, _call: &StepCall<'_>) -> MaybeSteps {
        Ok(None)
    }
}

/// Memory that a graph reads and writes.
pub struct InPlace<'a> {
    /// Name of the graph input.
    pub input: &'a str,
    /// Name of the graph output.
    pub output: &'a str,
    /// Dimensions of both.
    pub shape: &'a [usize],
    /// The elements.
    pub data: Memory<'a>,
}

/// Elements of a tensor that a graph updates.
pub enum Memory<'a> {
    /// Single precision.
    F32(&'a mut [f32]),
    /// 8-bit integers.
    I8(&'a mut [i8]),
}

impl Memory<'_> {
    /// Their type.
    pub fn dtype(&self) -> DType {
        match self {
            Self::F32(_) => DType::F32,
            Self::I8(_) => DType::I8,
        }
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        match self {
            Self::F32(elements) => elements.len(),
            Self::I8(elements) => elements.len(),
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Where they are.
    pub fn as_mut_ptr(&mut self) -> *mut u8 {
        match self {
            Self::F32(elements) => elements.as_mut_ptr().cast(),
            Self::I8(elements) => elements.as_mut_ptr().cast(),
        }
    }
}

/// Loads graphs into one runtime.
pub trait Loader {
    /// Loads the ONNX model `bytes`; `name` is for messages. Weights that the model links to are shared between all
    /// graphs of one loader.
    ///
    /// # Errors
    ///
    /// The runtime refuses the model, or a weight it links to is not there.
    fn load(&self, name: &str, bytes: &[u8], weights: &[String]) -> Result<Box<dyn Engine>, EngineError>;

    /// Whether the engine of graph `name` may have a use for [`Engine::steps`]: if not, it need not be loaded to be asked.
    fn steps(&self, _name: &str) -> bool {
        false
    }

    /// The engine's name: `ort-cpu`.
    fn name(&self) -> &'static str;

    /// Whether [`Engine::steps`] of the graphs that it loaded or loads may record what a step does and repeat the record from now
    /// on. Otherwise they do the same work without one, which is slower and can be looked into. Nothing where no engine records.
    fn record_steps(&self, _on: bool) {}

    /// What measures the work of its engines on their device. Nothing where the host does the work.
    fn meter(&self) -> Option<Arc<Meter>> {
        None
    }
}

impl<L: Loader + ?Sized> Loader for Box<L> {
    fn load(&self, name: &str, bytes: &[u8], weights: &[String]) -> Result<Box<dyn Engine>, EngineError> {
        (**self).load(name, bytes, weights)
    }

    fn steps(&self, name: &str) -> bool {
        (**self).steps(name)
    }

    fn name(&self) -> &'static str {
        (**self).name()
    }

    fn record_steps(&self, on: bool) {
        (**self).record_steps(on);
    }

    fn meter(&self) -> Option<Arc<Meter>> {
        (**self).meter()
    }
}

/// Why a graph could not be loaded or run.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EngineError {
    /// The runtime said no.
    #[error("graph '{graph}': {message}")]
    Runtime {
        /// The graph.
        graph: String,
        /// What the runtime said.
        message: String,
    },
    /// It cannot run on this machine.
    #[error("{engine}: {reason}")]
    Unavailable {
        /// The engine.
        engine: &'static str,
        /// What is missing, and where to get it.
        reason: String,
    },
    /// An input or output is not one of the graph's.
    #[error("graph '{graph}' has no {kind} '{name}'")]
    UnknownName {
        /// The graph.
        graph: String,
        /// "input" or "output".
        kind: &'static str,
        /// The name asked for.
        name: String,
    },
    /// A weight is missing or unreadable.
    #[error("graph '{graph}': {source}")]
    Weight {
        /// The graph.
        graph: String,
        /// What is wrong with it.
        source: Box<crate::checkpoint::CheckpointError>,
    },
    /// A result is not the tensor it should be.
    #[error("graph '{graph}', output '{name}': {source}")]
    Output {
        /// The graph.
        graph: String,
        /// The output.
        name: String,
        /// What is wrong with it.
        source: TensorError,
    },
    /// Values that were observed on the way are not what they should be.
    #[error("graph '{graph}': {source}")]
    Observed {
        /// The graph.
        graph: String,
        /// What is wrong with them.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}
