//! What can go wrong between token ids and text.

use super::sampling::LogitsError;
use crate::bundle::BundleError;
use crate::runtime::EngineError;
use crate::tensor::TensorError;
use accordion_calibration::significance::MismatchError;
use accordion_graphs::plan::PlanError;

/// Why a pipeline stopped.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PipelineError {
    /// The prompt does not fit the method's settings.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// The bundle lacks something or is damaged.
    #[error(transparent)]
    Bundle(#[from] BundleError),
    /// A graph could not be loaded or run.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// A graph gave a tensor of another form than its interface says.
    #[error("unexpected tensor between graphs: {0}")]
    Tensor(#[from] TensorError),
    /// No token can be chosen from the logits.
    #[error(transparent)]
    Logits(#[from] LogitsError),
    /// A token id that the model does not know.
    #[error("token id {id} is outside the model's vocabulary of {vocab_size}")]
    TokenId {
        /// The id.
        id: u32,
        /// Number of ids.
        vocab_size: usize,
    },
    /// The significance table does not cover the plan.
    #[error("the significance table has {found} entries for layer {layer}, the plan needs {expected}")]
    ShortTable {
        /// The layer.
        layer: usize,
        /// Entries there are.
        found: usize,
        /// Entries needed.
        expected: usize,
    },
    /// Something is to be pruned, and nothing says what scores are expected.
    #[error(
        "pruning this context needs a significance table: make one with `accordion calibrate significance CHECKPOINT \
         --text FILE -o TABLE` and pass it with --table TABLE, or prune by uncalibrated scores with --table none"
    )]
    NoTable,
    /// The significance table was made for something else.
    #[error(transparent)]
    Table(#[from] MismatchError),
    /// Nothing stands behind the slots.
    #[error(
        "there is no prompt behind the compressed context: the first token would be read from its last slot, which \
         predicts nothing; give a prompt of at least one token"
    )]
    EmptyPrompt,
    /// What is kept of a context depends on the prompt, and there is none.
    #[error("{method} compresses a context for a question: give one with --prompt")]
    NeedsPrompt {
        /// The method.
        method: &'static str,
    },
    /// A plain prompt is longer than what the model was trained for.
    #[error(
        "a prompt of {length} tokens is longer than the {max_positions} positions the model was trained for; shorten \
         it, compress it with another method, or pass --allow-overlong"
    )]
    Overlong {
        /// Tokens of the prompt.
        length: usize,
        /// Positions of the model.
        max_positions: usize,
    },
    /// The bundle's decoder attends to a compressed context besides its own cache.
    #[error(
        "a bundle of sharedllm has no decoder that reads a context plainly; export the model it was made of with \
         `accordion export plain`"
    )]
    NoPlainDecoder,
    /// The bundle was exported for other lengths.
    #[error(
        "the bundle has no graph '{graph}', which a context of {context} tokens needs (tree height {height}); \
         export it again with --context {context}"
    )]
    NotExported {
        /// The missing graph.
        graph: String,
        /// Context tokens.
        context: usize,
        /// Height of the tree.
        height: usize,
    },
    /// The bundle was exported with other settings than the run's.
    #[error("the bundle's method is {found}, the run's {expected}")]
    Settings {
        /// The bundle's method.
        found: String,
        /// The run's.
        expected: String,
    },
    /// The released code has no rotation for a single token behind so many chunks.
    #[error(
        "{chunks} chunks are too many for heads of {head_dim} as released, where the number of chunks + 1 has to be less; \
         use fewer or longer chunks, or export with --quirks fixed"
    )]
    ManyChunks {
        /// Chunks of the context.
        chunks: usize,
        /// Width of a head.
        head_dim: usize,
    },
    /// The context is longer than the model can attend to.
    #[error(
        "a sequence of {length} tokens is longer than the model's sliding window of {window}, which is not supported"
    )]
    SlidingWindow {
        /// Rows that attend to each other.
        length: usize,
        /// The model's window.
        window: usize,
    },
}
