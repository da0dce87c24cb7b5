//! `Linear`: a linear layer over a weight as checkpoints store it.

use crate::dtype::DType;
use crate::onnx::{Operator, Scope};

/// `Linear(x [rows, in], weight [out, in]) -> x * weight^T`. The kernel can add a bias; a function's inputs are all there,
/// and layers with one stay `Gemm`.
pub const LINEAR: Operator = Operator { name: "Linear", attributes: &[], body: linear };

fn linear(g: &Scope) {
    let x = g.input("x", DType::F32, &["rows".into(), "in".into()]);
    let weight = g.input("weight", DType::F32, &["out".into(), "in".into()]);
    g.output("y", &x.linear(&weight, None));
}
