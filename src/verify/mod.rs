//! Comparison of the same taps from two computations: engine, reference or golden file.
//!
//! - [`compare`]: numbers only; how far two tensors are apart.
//! - [`selection`]: the same for sets of surviving tokens, where near-ties have to be told from errors.
//! - [`verdict`]: bounds, and what they say about those numbers.
//! - [`schema`]: the report that is printed, stored and drawn.
//! - [`order`]: tap names put into the order in which the model computes them.

pub mod compare;
pub mod order;
pub mod schema;
pub mod selection;
pub mod verdict;
