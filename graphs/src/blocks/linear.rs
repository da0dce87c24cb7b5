//! A linear layer of the checkpoint.

use super::Target;
use crate::functions;
use crate::onnx::{Scope, Value};

/// `x [rows, in] * weight [out, in]^T (+ bias [out])`, named after `layer`.
pub(super) fn linear(layer: &Scope, target: Target, x: &Value, weight: &Value, bias: Option<&Value>) -> Value {
    let x = x.within(layer);
    match (target, bias) {
        (Target::OrtCpu, None) => {
            let result = (x.dtype(), vec![x.dim(0), weight.dim(0)]);
            layer.call(&functions::LINEAR, &[&x, weight], vec![], vec![result])[0].clone()
        }
        _ => x.linear(weight, bias),
    }
}
