//! Calibration tables for Accordion graphs: what is measured once on ordinary text and then travels with a bundle.
//!
//! - [`significance`]: the expected attention logit by layer and distance, which HOMER subtracts before it prunes.
//! - [`windows`]: which parts of a text a calibration reads.

pub mod quantize;
pub mod significance;
pub mod windows;
