//! Between rows and sequences.

use crate::onnx::{Dim, Value};

/// `x [batch * L, D]` as `[batch, L, D]`, with the batch and length of `positions [batch, L]`.
pub fn unflatten(x: &Value, positions: &Value) -> Value {
    let g = x.scope();
    let width = x.dim(1);
    // Written out where it is known, for readers of the graph that do not work it out.
    let last = if let Dim::Known(width) = width { width as i64 } else { -1 };
    let shape = g.concat(&[&positions.within(g).shape_at_run_time(0, 2), &g.ints(&[last])], 0);
    x.reshape_as(&shape, &[positions.dim(0), positions.dim(1), width])
}
