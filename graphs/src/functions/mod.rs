//! The operators of the domain `ai.accordion`, each a model-local function with a body of standard operators.
//!
//! The body is the executable form of the operator's contract: any ONNX runtime can run it, and every fused kernel is
//! held to it.

mod attention;
mod attention_int8;
mod linear;
mod merge_cache;
mod quantized;
mod selective_scan;
mod strided_compress;
mod swiglu;
mod topk_prune;

pub use attention::{CACHED_ATTENTION, CACHED_ATTENTION_BF16, CAUSAL_ATTENTION, CAUSAL_ATTENTION_BF16};
pub use attention_int8::CACHED_ATTENTION_INT8;
pub(crate) use attention_int8::{append, dequantized};
pub use linear::{LINEAR, LINEAR_BIAS};
pub use merge_cache::MERGE_CACHE;
pub(crate) use merge_cache::merge_rows;
pub use quantized::{
    LINEAR_BLOCK_4, LINEAR_BLOCK_8, LINEAR_INT8, LINEAR_INT8_PER_TOKEN, linear_block, linear_int8,
    linear_int8_per_token,
};
pub use selective_scan::SELECTIVE_SCAN;
pub(crate) use strided_compress::select_rows;
pub use strided_compress::{STRIDED_COMPRESS, STRIDED_COMPRESS_MEAN};
pub use swiglu::SWIGLU;
pub(crate) use topk_prune::last_row_logits;
pub use topk_prune::{TOPK_PRUNE, TOPK_PRUNE_16};
