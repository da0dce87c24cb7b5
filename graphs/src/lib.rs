//! Everything that can be said about a model and a method without running anything.
//!
//! - [`architecture`]: what a checkpoint's `config.json` says, typed.
//! - [`weights`]: where each tensor of a checkpoint lies on disk; never its bytes.
//! - [`onnx`]: a scoped, typed, shape-checked builder of ONNX graphs.
//! - [`plan`]: a method's lengths and layer ranges for one prompt, computed from lengths alone.
//! - [`precision`]: what numbers a graph computes with, as passes over built graphs.
//! - [`dtype`]: the element types that appear in checkpoints and graphs; [`fp8`]: the numbers of one of them.
//!
//! `architecture` and `plan` are shared facts: the reference implementation uses them too. Nothing else in this crate
//! may be used by it, so that a bug cannot sit on both sides of a comparison.

pub mod architecture;
pub mod blocks;
pub mod dtype;
pub mod fp8;
pub mod functions;
pub mod methods;
pub mod onnx;
pub mod plan;
pub mod precision;
pub mod weights;
