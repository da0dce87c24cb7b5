//! `SwiGlu`: the gated activation between the MLP's projections.

use crate::dtype::DType;
use crate::onnx::{BuildError, Dim, Function, Scope};
use std::rc::Rc;

/// `SwiGlu(gate, up) -> silu(gate) * up`, all of one shape.
///
/// # Errors
///
/// The body is inconsistent.
pub fn swiglu() -> Result<Function, BuildError> {
    let g = Scope::new("SwiGlu", Rc::default());
    let shape = [Dim::from("rows"), "width".into()];
    let (gate, up) = (g.input("gate", DType::F32, &shape), g.input("up", DType::F32, &shape));
    g.output("activation", &(&gate * gate.sigmoid() * up));
    Function::new("SwiGlu", &[], &g)
}
