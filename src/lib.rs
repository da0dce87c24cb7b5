//! Accordion folds long contexts: it builds the graphs of context-compression methods as ONNX, runs them on ONNX
//! Runtime, proves that what runs is what the papers' code computes, and says what it costs.
//!
//! Data flows one way:
//!
//! [`checkpoint`] → plan and graphs ([`accordion_graphs`]) → [`bundle`] → [`runtime`] → [`pipeline`] →
//! [`verify`] / [`profile`] / [`eval`] → [`report`].
//!
//! [`reference`](mod@reference) computes the same methods a second time, in plain `ndarray`, and shares nothing with the graphs but the
//! [plan](accordion_graphs::plan) and the [architecture](accordion_graphs::architecture).

pub mod bisect;
pub mod bundle;
pub mod checkpoint;
pub mod convert;
pub mod cuda;
pub mod environment;
pub mod eval;
pub mod fetch;
pub mod goldens;
pub mod models;
pub(crate) mod npz;
pub mod pipeline;
pub mod precision;
pub mod profile;
pub mod reference;
pub mod report;
pub mod runtime;
pub mod selftest;
pub mod staging;
pub mod synthetic;
pub mod taps;
pub mod tensor;
pub mod tensorrt;
pub mod verify;
