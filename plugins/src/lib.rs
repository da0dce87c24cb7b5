//! Fused operators of Accordion graphs, in ONNX domain `ai.accordion`.
//!
//! Each operator has one folder with its contract and its kernels. On the CPU they are custom operators of ONNX Runtime,
//! registered by [`domain`], and plain functions that need no runtime. Graphs carry the same operators as model-local
//! functions of standard nodes; where an operator is registered, ONNX Runtime takes it instead.

#[path = "../attention/mod.rs"]
pub mod attention;
#[path = "../attention_int8/mod.rs"]
pub mod attention_int8;
mod gemm;
mod guard;
#[path = "../linear/mod.rs"]
pub mod linear;
#[path = "../linear_block/mod.rs"]
pub mod linear_block;
#[path = "../linear_int8/mod.rs"]
pub mod linear_int8;
#[path = "../merge_cache/mod.rs"]
pub mod merge_cache;
pub mod operator;
pub mod parallel;
mod scratch;
#[path = "../selective_scan/mod.rs"]
pub mod selective_scan;
mod simd;
#[path = "../swiglu/mod.rs"]
pub mod swiglu;
#[path = "../topk_prune/mod.rs"]
pub mod topk_prune;

pub use guard::Operators;
use ort::operator::OperatorDomain;
use std::sync::{Mutex, PoisonError};

/// The domain of all operators here.
pub const DOMAIN: &str = "ai.accordion";

/// All operators, to register with a session builder.
///
/// # Errors
///
/// ONNX Runtime is not loaded or refuses an operator.
pub fn domain() -> ort::Result<OperatorDomain> {
    Operators::new(DOMAIN)?
        .add(attention::GroupQueryAttention)?
        .add(attention_int8::GroupQueryAttentionInt8)?
        .add(attention::GroupQueryAttentionBf16)?
        .add(linear::Linear)?
        .add(linear::LinearBias)?
        .add(linear_block::LinearBlock4)?
        .add(linear_block::LinearBlock8)?
        .add(linear_int8::LinearInt8)?
        .add(linear_int8::LinearInt8PerToken)?
        .add(merge_cache::MergeCache)?
        .add(selective_scan::SelectiveScan)?
        .add(swiglu::SwiGlu)?
        .add(topk_prune::TopKPrune)
        .map(Operators::into_domain)
}

/// Makes a session that [`domain`] is registered with, by `commit`. ONNX Runtime adds a domain to a table of the process with
/// the first such session, and refuses a second one that is made at the same moment: the first is therefore made alone.
///
/// # Errors
///
/// Those of `commit`.
pub fn commit<T>(commit: impl FnOnce() -> ort::Result<T>) -> ort::Result<T> {
    static KNOWN: Mutex<bool> = Mutex::new(false);
    let mut known = KNOWN.lock().unwrap_or_else(PoisonError::into_inner);
    if *known {
        drop(known);
        return commit();
    }
    let session = commit()?;
    *known = true;
    Ok(session)
}
