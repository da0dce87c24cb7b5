//! Calibration tables for Accordion graphs: what is measured once on ordinary text and then travels with a bundle.
//!
//! - [`ranges`]: the ranges of activations, from which INT8 scales are made.
//! - [`significance`]: the expected attention logit by layer and distance, which HOMER subtracts before it prunes.
//! - [`mod@file`]: what can be wrong with a table's file.
//! - [`quantize`]: weight matrices as integers and scales.
//! - [`sensitivity`]: what a layer loses when it alone is quantized.
//! - [`smoothquant`]: activations made easier to quantize.
//! - [`windows`]: which parts of a text a calibration reads.

pub mod file;
mod identity;
pub mod quantize;
pub mod ranges;
pub mod sensitivity;
pub mod significance;
pub mod smoothquant;
pub mod windows;

pub use identity::{ModelIdentity, ModelMismatch};
