//! `StridedCompress`: every `ratio`-th row of a segment through a linear map, RCC's compression.

use crate::dtype::DType;
use crate::onnx::{Dim, Operator, Scope, Value};

const ATTRIBUTES: [&str; 2] = ["ratio", "offset"];

/// `StridedCompress(x [S, W, He], weight [H, He]) -> y [S * W / ratio, H]`: rows `offset`, `offset + ratio`, ... of every
/// segment, in order, times `weight^T`. `ratio` divides `W` and `offset` is below it.
pub const STRIDED_COMPRESS: Operator =
    Operator { name: "StridedCompress", attributes: &ATTRIBUTES, body: strided_compress };

fn strided_compress(g: &Scope) {
    let selected = selected_input(g, "x");
    g.output("y", &selected.linear(&weight(g), None));
}

/// `StridedCompressMean(x [S, W, He], x2 [S, W, He], weight [H, He])`: as [`STRIDED_COMPRESS`] of the mean of both.
pub const STRIDED_COMPRESS_MEAN: Operator =
    Operator { name: "StridedCompressMean", attributes: &ATTRIBUTES, body: strided_compress_mean };

fn strided_compress_mean(g: &Scope) {
    let [x, x2] = ["x", "x2"].map(|name| selected_input(g, name));
    g.output("y", &x.mean(&x2).linear(&weight(g), None));
}

fn weight(g: &Scope) -> Value {
    g.input("weight", DType::F32, &["out".into(), "in".into()])
}

/// The rows that the attributes select of the input `name`, `[S * W / ratio, He]`.
fn selected_input(g: &Scope, name: &str) -> Value {
    let x = g.input(name, DType::F32, &["segments".into(), "window".into(), "in".into()]);
    let [ratio, offset] = ATTRIBUTES.map(|name| g.integer_attribute(name));
    select_rows(&x, [&ratio, &offset], "selected".into())
}

/// Rows `offset`, `offset + ratio`, ... of every segment of `x [S, W, width]`, `[S * W / ratio, width]`; ratio and offset
/// are `[1]`, and `extent` names the number of rows. A window that the ratio does not divide is refused at run time.
pub(crate) fn select_rows(x: &Value, [ratio, offset]: [&Value; 2], extent: Dim) -> Value {
    let g = x.scope();
    let [segments, width] = [x.dim(0), x.dim(2)];
    let groups = g.concat(&[&x.shape_at_run_time(0, 1), &g.ints(&[-1]), ratio, &x.shape_at_run_time(2, 3)], 0);
    let grouped = x.reshape_as(&groups, &[segments, "groups".into(), "ratio".into(), width.clone()]);
    grouped
        .slice(2, offset, &(offset + g.ints(&[1])), 1.into())
        .reshape_as(&g.concat(&[&g.ints(&[-1]), &x.shape_at_run_time(2, 3)], 0), &[extent, width])
}
