//! Between rows and sequences.

use crate::onnx::Value;

/// `x [batch * L, D]` as `[batch, L, D]`, with the batch and length of `positions [batch, L]`.
pub fn unflatten(x: &Value, positions: &Value) -> Value {
    let g = x.scope();
    let width = x.dim(1);
    let shape = g.concat(&[&positions.within(g).shape_at_run_time(0, 2), &g.ints(&[-1])], 0);
    x.reshape_as(&shape, &[positions.dim(0), positions.dim(1), width])
}
