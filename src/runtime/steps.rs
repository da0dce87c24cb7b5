//! Calls that are made again and again with tensors that stay in their places: one token of a decoder after the other.
//!
//! Nothing changes its shape or its address from call to call, so that an engine may record what a call does and repeat that.

use super::EngineError;
use crate::tensor::Tensor;

/// What a graph is run on, again and again.
pub struct StepCall<'a> {
    /// Inputs of one `int64` each, of any rank, whose values every step is given anew.
    pub changing: &'a [&'a str],
    /// The name of the `changing` input that holds how many rows of the caches are valid.
    pub length: &'a str,
    /// Inputs that stay as they are.
    pub fixed: &'a [(&'a str, &'a Tensor)],
    /// Caches that every step appends a row to.
    pub caches: &'a [StepCache<'a>],
    /// Rows that the caches have room for.
    pub capacity: usize,
    /// What every step returns.
    pub outputs: &'a [&'a str],
}

/// Rows that a graph reads, and that a row of its own is appended to.
pub struct StepCache<'a> {
    /// Name of the graph's input `[batch, groups, capacity, width]`, of which the first rows are valid and all others are zeros.
    pub input: &'a str,
    /// Name of the graph's output `[batch, groups, 1, width]`, which is appended.
    pub output: &'a str,
    /// The first rows, `[batch, groups, rows, width]`, no more than the capacity.
    pub rows: &'a Tensor,
}

/// A graph whose caches it keeps.
pub trait Steps: Send {
    /// Runs the graph with `values` for the changing inputs, in the order of [`StepCall::changing`]; appends a row to every
    /// cache behind as many rows as the value of [`StepCall::length`] says; returns [`StepCall::outputs`].
    ///
    /// # Errors
    ///
    /// There is no room for another row, or the runtime fails. The caches are lost then.
    fn step(&mut self, values: &[i64]) -> Result<Vec<Tensor>, EngineError>;

    /// The first `length` rows of every cache, `[batch, groups, length, width]`, in the order of [`StepCall::caches`].
    ///
    /// # Errors
    ///
    /// The runtime fails.
    fn rows(&self, length: usize) -> Result<Vec<Tensor>, EngineError>;
}

/// What [`Engine::steps`](super::Engine::steps) returns: nothing where an engine has no use for tensors that stay in their places.
pub type MaybeSteps = Result<Option<Box<dyn Steps>>, EngineError>;
