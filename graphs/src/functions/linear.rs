//! `Linear`: a linear layer over a weight as checkpoints store it.

use crate::dtype::DType;
use crate::onnx::{BuildError, Function, Scope};
use std::rc::Rc;

/// `Linear(x [rows, in], weight [out, in], bias [out]) -> x * weight^T + bias`. A function's inputs are all there, so the
/// operator has two forms; a graph uses the one without bias.
///
/// # Errors
///
/// The body is inconsistent.
pub fn linear() -> Result<Function, BuildError> {
    let g = Scope::new("Linear", Rc::default());
    let x = g.input("x", DType::F32, &["rows".into(), "in".into()]);
    let weight = g.input("weight", DType::F32, &["out".into(), "in".into()]);
    g.output("y", &x.linear(&weight, None));
    Function::new("Linear", &[], &g)
}
