//! A linear layer of the checkpoint.

use super::Target;
use crate::functions;
use crate::onnx::{Scope, Value};

/// `x [rows, in] * weight [out, in]^T (+ bias [out])`, named after `layer`.
pub(super) fn linear(layer: &Scope, target: Target, x: &Value, weight: &Value, bias: Option<&Value>) -> Value {
    let x = x.within(layer);
    let result = (x.dtype(), vec![x.dim(0), weight.dim(0)]);
    match (target, bias) {
        (Target::Portable, _) => x.linear(weight, bias),
        (Target::OrtCpu, None) => layer.call(&functions::LINEAR, &[&x, weight], vec![], vec![result]).remove(0),
        (Target::OrtCpu, Some(bias)) => {
            layer.call(&functions::LINEAR_BIAS, &[&x, weight, bias], vec![], vec![result]).remove(0)
        }
    }
}
