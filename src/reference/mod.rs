//! The methods a second time, in plain `ndarray` and `f32`: slow, obvious, and independent of the graphs and of any
//! runtime, so that a bug cannot sit on both sides of a comparison.
//!
//! From the workspace this module uses the [architecture](accordion_graphs::architecture), the
//! [plan](accordion_graphs::plan), [`crate::tensor`] and [`crate::taps`], and nothing else; a test holds it to that.
//!
//! - [`transformer`]: what causal transformers have in common, and loading one by weight name: [`llama`], whose layers come
//!   in two halves, or [`neox`].
//! - [`mamba`]: the other kind of encoder.
//! - [`rope`]: rotary positions under every scaling an architecture can name.
//! - [`quantize`]: what linear layers over integers and 8-bit floats round their rows to.
//! - [`plain`]: a forward pass over a growing cache.
//! - [`homer`]: hierarchical context merging, node by node.
//! - [`rcc`]: recurrent context compression, segment by segment.
//! - [`sharedllm`]: keys and values of a context tree, and a model whose bottom layers attend to them.
//! - [`decode`]: what follows a context state, at the positions the authors' two code paths use.
//! - [`training`]: the loss that the models were trained with.
//!
//! Matrix products go through `ndarray`'s `dot`, which uses up to four threads (one per physical core, or as many as
//! the environment variable `MATMUL_NUM_THREADS` says).

mod array;
mod attention;
pub mod cache;
pub mod decode;
pub mod homer;
pub mod llama;
pub mod mamba;
pub mod neox;
pub mod plain;
pub mod quantize;
pub mod rcc;
pub mod rope;
pub mod sharedllm;
pub mod training;
pub mod transformer;
mod weights;

pub use array::to_tensor;
pub use weights::Linear;

use crate::tensor::TensorError;
use accordion_graphs::plan::PlanError;

/// Why the reference could not compute something.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ReferenceError {
    /// The source of the weights has no such tensor, or could not read it.
    #[error("weight `{name}` could not be read")]
    Weight {
        /// Its Hugging Face name.
        name: String,
        /// What the source said.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// A weight does not have the shape that the architecture gives it.
    #[error("weight `{name}` has shape {found:?}, the architecture expects {expected:?}")]
    WeightShape {
        /// Its Hugging Face name.
        name: String,
        /// Its shape.
        found: Vec<usize>,
        /// The shape that the architecture gives it.
        expected: Vec<usize>,
    },
    /// What a matrix multiplies cannot be rounded so.
    #[error("the {what} of what `{name}` multiplies cannot be used: {found}")]
    Rounding {
        /// The matrix.
        name: String,
        /// What of the rounding.
        what: &'static str,
        /// What it is.
        found: String,
    },
    /// The architecture itself is contradictory.
    #[error("{what} is {found}, expected {expected}")]
    Architecture {
        /// The field of the architecture.
        what: &'static str,
        /// Its value.
        found: usize,
        /// What it has to be.
        expected: String,
    },
    /// The architecture is of a family that has no reference.
    #[error("the reference has no {what} of this family")]
    Family {
        /// What has a family.
        what: &'static str,
    },
    /// A token id lies outside the vocabulary.
    #[error("token id {id} is outside the vocabulary of {vocab_size} tokens")]
    TokenId {
        /// The id.
        id: u32,
        /// Number of token ids.
        vocab_size: usize,
    },
    /// Two inputs that belong together have different lengths.
    #[error("{what}: found {found}, expected {expected}")]
    Length {
        /// What was counted.
        what: &'static str,
        /// How many there are.
        found: usize,
        /// How many there have to be.
        expected: usize,
    },
    /// The significance table does not reach as far back as the node that prunes.
    #[error(
        "the significance table of layer {layer} has {found} entries, but {node} prunes over distances up to \
         {largest_distance}"
    )]
    SignificanceTooShort {
        /// The layer that prunes.
        layer: usize,
        /// The node that prunes.
        node: String,
        /// Entries of the row.
        found: usize,
        /// The largest distance between the last token and another one.
        largest_distance: i64,
    },
    /// The model attends to a window only, and more rows than that take part.
    #[error("{rows} rows attend to each other, but the model's sliding window is {window}")]
    SlidingWindow {
        /// Rows, cached ones included.
        rows: usize,
        /// The architecture's window.
        window: usize,
    },
    /// The row that stands for the running text is not part of it.
    #[error("the query is row {row} of a running text of {running} tokens")]
    Query {
        /// The row.
        row: usize,
        /// Tokens of the running text.
        running: usize,
    },
    /// The released code of SharedLLM looks the rotation of a single token up at an index that grows with the number of
    /// chunks, in a table as long as a head is wide.
    #[error("the released code has no rotation for a single token after {chunks} chunks, only for up to {most}")]
    SingleTokenRotation {
        /// Chunks of the context.
        chunks: usize,
        /// Most chunks that there is a rotation for.
        most: usize,
    },
    /// A method's settings contradict each other or the architecture.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// A tensor could not be made.
    #[error(transparent)]
    Tensor(#[from] TensorError),
}

impl ReferenceError {
    /// The same error where the weights' names follow on `path`.
    fn within(self, path: &str) -> Self {
        match self {
            Self::Weight { name, source } => Self::Weight { name: format!("{path}.{name}"), source },
            Self::WeightShape { name, found, expected } => {
                Self::WeightShape { name: format!("{path}.{name}"), found, expected }
            }
            Self::Rounding { name, what, found } => Self::Rounding { name: format!("{path}.{name}"), what, found },
            other => other,
        }
    }
}

type Result<T, E = ReferenceError> = std::result::Result<T, E>;

fn expect_length(what: &'static str, found: usize, expected: usize) -> Result<()> {
    if found == expected { Ok(()) } else { Err(ReferenceError::Length { what, found, expected }) }
}

#[cfg(test)]
mod tests;
