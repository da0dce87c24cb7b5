//! The first place at which a graph goes another way than the reference, and a folder that shows it to others.
//!
//! - [`rebuild`]: the graphs of a bundle once more, with everything that the builder knows of them.
//! - [`case`](mod@case): one run of a graph, and the reference's value at each of its taps.
//! - [`search`]: from a wrong output to the nodes that went wrong.
//! - [`plain`] and [`homer`]: the cases of these methods.
//! - [`reproducer`]: the nodes, their inputs and what should come out, as files for any runtime.
//!
//! ONNX files are not parsed: a cut is made in the rebuilt graph, and only if that is, byte by byte, the bundle's own.

pub mod case;
mod error;
pub mod homer;
pub mod plain;
pub mod rebuild;
pub mod reproducer;
pub mod search;

pub use error::BisectError;
