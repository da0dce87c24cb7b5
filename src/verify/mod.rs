//! Comparison of the same taps from two computations: engine, reference or golden file.
//!
//! - [`compare`]: numbers only; how far two tensors are apart; [`logits`]: whether two sets of logits would be used alike.
//! - [`selection`]: the same for sets of surviving tokens, where near-ties have to be told from errors.
//! - [`verdict`]: bounds, and what they say about those numbers.
//! - [`judge`]: taps of one part, one after the other, and what cannot be compared any more.
//! - [`parts`]: what a side is: whatever walks through its parts and records their taps.
//! - [`homer`], [`plain`], [`rcc`] and [`sharedllm`]: engines and the reference as sides; [`bundle`]: whichever a bundle is
//!   for; [`recording`]: files as sides, and files of them.
//! - [`lockstep`]: two sides, part by part.
//! - [`golden`]: either side against a golden case.
//! - [`linears`]: linear layers over quantized matrices, one by one; [`quantized`]: such bundles as a whole.
//! - [`weights`]: NaN and infinities in a checkpoint.
//! - [`schema`]: the report that is printed, stored and drawn; [`text`]: for a terminal.
//! - [`order`]: tap names put into the order in which the model computes them.

pub mod bundle;
pub mod compare;
mod error;
pub mod golden;
pub mod homer;
pub mod judge;
pub mod linears;
pub mod lockstep;
pub mod logits;
pub mod order;
pub mod parts;
pub mod plain;
pub mod quantized;
pub mod rcc;
pub mod recording;
pub mod schema;
pub mod selection;
pub mod sharedllm;
mod sides;
pub mod text;
pub mod verdict;
pub mod weights;

pub use error::VerifyError;
pub use judge::{Detail, Findings};
