//! The operators of the domain `ai.accordion`, each a model-local function with a body of standard operators.
//!
//! The body is the executable form of the operator's contract: any ONNX runtime can run it, and every fused kernel is
//! held to it.

mod attention;
mod linear;
mod merge_cache;
mod swiglu;
mod topk_prune;

pub use attention::{cached_attention, causal_attention};
pub use linear::linear;
pub use merge_cache::merge_cache;
pub(crate) use merge_cache::merge_rows;
pub use swiglu::swiglu;
pub(crate) use topk_prune::last_row_logits;
pub use topk_prune::topk_prune;
