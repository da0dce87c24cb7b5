//! `SwiGlu`: the gated activation between the MLP's projections.

use crate::dtype::DType;
use crate::onnx::{Dim, Operator, Scope};

/// `SwiGlu(gate, up) -> silu(gate) * up`, all of one shape.
pub const SWIGLU: Operator = Operator { name: "SwiGlu", attributes: &[], body: swiglu };

fn swiglu(g: &Scope) {
    let shape = [Dim::from("rows"), "width".into()];
    let (gate, up) = (g.input("gate", DType::F32, &shape), g.input("up", DType::F32, &shape));
    g.output("activation", &(&gate * gate.sigmoid() * up));
}
