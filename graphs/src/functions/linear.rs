//! `Linear`: a linear layer over a weight as checkpoints store it.

use crate::dtype::DType;
use crate::onnx::{Operator, Scope, Value};

/// `Linear(x [rows, in], weight [out, in]) -> x * weight^T`.
pub const LINEAR: Operator = Operator { name: "Linear", attributes: &[], body: linear };

fn linear(g: &Scope) {
    let [x, weight] = inputs(g);
    g.output("y", &x.linear(&weight, None));
}

/// `LinearBias(x [rows, in], weight [out, in], bias [out]) -> x * weight^T + bias`. A function's inputs are all there, so a
/// bias makes another operator.
pub const LINEAR_BIAS: Operator = Operator { name: "LinearBias", attributes: &[], body: linear_bias };

fn linear_bias(g: &Scope) {
    let [x, weight] = inputs(g);
    let bias = g.input("bias", DType::F32, &["out".into()]);
    g.output("y", &x.linear(&weight, Some(&bias)));
}

fn inputs(g: &Scope) -> [Value; 2] {
    [("x", "rows"), ("weight", "out")].map(|(name, rows)| g.input(name, DType::F32, &[rows.into(), "in".into()]))
}
