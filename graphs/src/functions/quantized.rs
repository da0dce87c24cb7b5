//! Linear layers over weights that are stored as integers.
//!
//! The body of each is also a function of values, for graphs that carry the standard operators themselves.

use crate::dtype::DType;
use crate::onnx::{Attribute, Operator, Scope, Value};

/// Attribute of [`LINEAR_BLOCK_8`] and [`LINEAR_BLOCK_4`]: entries of a weight row that share a scale.
const BLOCK_SIZE: &str = "block_size";

/// `LinearInt8(x [rows, in], weight int8 [out, in], weight_scale [out], input_scale [], smoothing [in]) -> y [rows, out]`:
/// [`linear_int8`].
pub const LINEAR_INT8: Operator = Operator { name: "LinearInt8", attributes: &[], body: linear_int8_body };

fn linear_int8_body(g: &Scope) {
    let [x, weight, weight_scale] = inputs(g, DType::I8, &["out"]);
    let input_scale = g.input("input_scale", DType::F32, &[]);
    let smoothing = g.input("smoothing", DType::F32, &["in".into()]);
    g.output("y", &linear_int8(&x, &weight, &weight_scale, &input_scale, Some(&smoothing)));
}

/// `LinearInt8PerToken(x [rows, in], weight int8 [out, in], weight_scale [out], smoothing [in]) -> y [rows, out]`:
/// [`linear_int8_per_token`].
pub const LINEAR_INT8_PER_TOKEN: Operator =
    Operator { name: "LinearInt8PerToken", attributes: &[], body: linear_int8_per_token_body };

fn linear_int8_per_token_body(g: &Scope) {
    let [x, weight, weight_scale] = inputs(g, DType::I8, &["out"]);
    let smoothing = g.input("smoothing", DType::F32, &["in".into()]);
    g.output("y", &linear_int8_per_token(&x, &weight, &weight_scale, Some(&smoothing)));
}

/// `LinearBlock8(x [rows, in], weight int8 [out, in], scale [out, in / block_size]) -> y [rows, out]`: [`linear_block`].
pub const LINEAR_BLOCK_8: Operator =
    Operator { name: "LinearBlock8", attributes: &[BLOCK_SIZE], body: |g| linear_block_body(g, DType::I8) };

/// `LinearBlock4(x [rows, in], weight int4 [out, in], scale [out, in / block_size]) -> y [rows, out]`: [`linear_block`].
pub const LINEAR_BLOCK_4: Operator =
    Operator { name: "LinearBlock4", attributes: &[BLOCK_SIZE], body: |g| linear_block_body(g, DType::I4) };

fn linear_block_body(g: &Scope, dtype: DType) {
    let [x, weight, scale] = inputs(g, dtype, &["out", "blocks"]);
    g.output("y", &linear_block(&x, &weight, &scale, Attribute::IntOf(BLOCK_SIZE)));
}

/// `x`, the weight of type `dtype` and its scale, whose shape this is.
fn inputs(g: &Scope, dtype: DType, scale: &[&str]) -> [Value; 3] {
    let names: Vec<_> = scale.iter().map(|&name| name.into()).collect();
    let scale = if scale.len() == 1 { "weight_scale" } else { "scale" };
    [
        g.input("x", DType::F32, &["rows".into(), "in".into()]),
        g.input("weight", dtype, &["out".into(), "in".into()]),
        g.input(scale, DType::F32, &names),
    ]
}

/// `quantized(x * smoothing) * dequantized(weight)^T`, `x [rows, in]`: every entry of `x * smoothing [in]` becomes the
/// nearest int8 multiple of `input_scale []`, ties to even; row `o` of `weight`, int8 `[out, in]`, counts in units of
/// `weight_scale[o]`.
///
/// Both are symmetric, as in Xiao et al., "`SmoothQuant`", 2023, with a static scale for the activations; `smoothing` is
/// the reciprocal of its factors, and none means ones.
#[must_use]
pub fn linear_int8(
    x: &Value,
    weight: &Value,
    weight_scale: &Value,
    input_scale: &Value,
    smoothing: Option<&Value>,
) -> Value {
    let quantized = smoothed(x, smoothing).quantize(input_scale, DType::I8);
    let x = quantized.dequantize(input_scale, None, None);
    // ONNX Runtime makes a product of integers of this; of a Gemm only where the weight has zero points as well.
    x.matmul(&weight.within(x.scope()).dequantize(weight_scale, Some(0), None).transpose(&[1, 0]))
}

/// [`linear_int8`] with a scale for every row of `x`: `max |x * smoothing| / 127`. Rows of zeros give zeros: no scale is
/// smaller than the smallest normal number.
#[must_use]
pub fn linear_int8_per_token(x: &Value, weight: &Value, weight_scale: &Value, smoothing: Option<&Value>) -> Value {
    let g = x.scope();
    let x = smoothed(x, smoothing);
    let scale = x.abs().reduce_max(1).unsqueeze(1).div(&g.float(127.0)).maximum(&g.float(f32::MIN_POSITIVE));
    let x = x.div(&scale).round() * &scale;
    x.linear(&weight.within(x.scope()).dequantize(weight_scale, Some(0), None), None)
}

/// `x * dequantized(weight)^T`, `x [rows, in]`, `weight` int8 or int4 `[out, in]`: `block_size` entries after each other
/// in a row of the weight count in units of one entry of `scale [out, in / block_size]`. `in` is a multiple of it.
#[must_use]
pub fn linear_block(x: &Value, weight: &Value, scale: &Value, block_size: Attribute) -> Value {
    x.linear(&weight.within(x.scope()).dequantize(scale, Some(1), Some(block_size)), None)
}

fn smoothed(x: &Value, smoothing: Option<&Value>) -> Value {
    smoothing.map_or_else(|| x.clone(), |smoothing| x * smoothing)
}
