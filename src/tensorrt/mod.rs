//! `TensorRT` and `TensorRT-RTX`: from a bundle's graphs to engines, which NVIDIA calls plans.
//!
//! NVIDIA's builder and parser are C++ and come from packages of their own. A [`shim`] in C is compiled on the user's
//! machine, once per flavour and version, with the headers that belong to the library ([`toolkit`]); nothing is linked. Every
//! graph gets optimization profiles from the plan of the method ([`ranges`]), and what is built is kept in the bundle with
//! its hash ([`engines`]), because a plan is executable content. [`TensorRt`] runs them.

mod build;
mod compile;
pub mod engines;
mod error;
mod execute;
pub mod layers;
mod loaded;
mod memory;
mod model;
pub mod ranges;
mod recording;
mod select;
pub mod shim;
mod step_inputs;
mod steps;
mod sys;
pub mod toolkit;

pub use build::{BuildOptions, Built, BuiltProfile, build_graph, devices};
pub use error::TensorRtError;
pub use execute::{ExecutionOptions, TensorRt, try_to_load};
pub use toolkit::Flavour;
