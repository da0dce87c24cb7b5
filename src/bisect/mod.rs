//! The first place at which a graph goes another way than the reference, and a folder that shows it to others.
//!
//! - [`rebuild`]: the graphs of a bundle once more, with everything that the builder knows of them.
//! - [`case`](mod@case): one run of a graph, and the reference's value at each of its taps.
//! - [`plain`], [`homer`], [`rcc`] and [`sharedllm`]: the cases of these methods; [`bundle`]: of whichever a bundle is for.
//! - [`search`]: in fp32, from a wrong output to the nodes that went wrong; [`by_part`]: in other precisions, the first part and
//!   the first linear layer that is wrong on the reference's values, as closely as [`terms`] says.
//! - [`cumulative`]: every part between two taps, on the reference's values.
//! - [`culprit`]: what is found.
//! - [`reproducer`]: the nodes, their inputs and what should come out, as files for any runtime.
//!
//! ONNX files are not parsed: a cut is made in the rebuilt graph, and only if that is, byte by byte, the bundle's own.

pub mod bundle;
pub mod by_part;
pub mod case;
pub mod culprit;
pub mod cumulative;
mod decoder;
mod error;
pub mod homer;
pub mod plain;
pub mod rcc;
pub mod rebuild;
pub mod reproducer;
pub mod search;
pub mod sharedllm;
mod steps;
pub mod terms;

pub use error::BisectError;
