//! What custom operators of ONNX Runtime share, those of other providers too: reading inputs and attributes with errors that name
//! them.

use ort::operator::{ComputeContext, KernelContext, ShapeInferenceContext};
use ort::value::{PrimitiveTensorElementType, ValueRef, ValueRefMut, ValueType};

/// An error of an operator, as ONNX Runtime wants it.
pub fn error(message: impl std::fmt::Display) -> ort::Error {
    ort::Error::new(message.to_string())
}

/// The integer attribute `name`.
///
/// # Errors
///
/// The node does not have it, or it is negative.
pub fn integer(context: &KernelContext<'_>, name: &str) -> ort::Result<usize> {
    let value = context.get::<i64>(name).ok_or_else(|| error(format!("attribute {name} is missing")))?;
    usize::try_from(value).map_err(|_| error(format!("attribute {name} is {value}, expected at least 0")))
}

/// Input `index`, which must be there.
///
/// # Errors
///
/// The node does not have it.
pub fn input<'a>(context: &'a ComputeContext, index: usize, name: &str) -> ort::Result<ValueRef<'a>> {
    optional_input(context, index)?.ok_or_else(|| error(format!("input {name} is missing")))
}

/// Input `index`, or `None` where the node does not have it.
pub(crate) fn optional_input(context: &ComputeContext, index: usize) -> ort::Result<Option<ValueRef<'_>>> {
    if index < context.num_inputs()? { context.input(index) } else { Ok(None) }
}

/// Declares output 0 to have the shape of input 0. Nothing is declared where a dimension of it is neither known nor named:
/// ONNX Runtime would take that for a length of -1.
pub(crate) fn output_like_first_input(context: &mut ShapeInferenceContext) -> ort::Result<()> {
    match context.inputs().first() {
        Some(first @ ValueType::Tensor { shape, dimension_symbols, .. })
            if shape.iter().zip(dimension_symbols.iter()).all(|(&dim, name)| dim >= 0 || !name.is_empty()) =>
        {
            context.set_output(0, first)
        }
        _ => Ok(()),
    }
}

/// The shape and elements of an input of rank `N`.
pub(crate) fn tensor<'v, T: PrimitiveTensorElementType, const N: usize>(
    value: &'v ValueRef<'_>,
    name: &str,
) -> ort::Result<([usize; N], &'v [T])> {
    let (shape, data) = value.try_extract_tensor::<T>()?;
    let dims: Vec<usize> = shape.iter().map(|&dim| dim.max(0) as usize).collect();
    let dims = <[usize; N]>::try_from(dims)
        .map_err(|dims| error(format!("{name} has shape {dims:?}, expected {N} dimensions")))?;
    Ok((dims, data))
}

/// Refuses a shape other than the expected one.
///
/// # Errors
///
/// It is another.
pub fn expect_shape(name: &str, found: &[usize], expected: &[usize]) -> ort::Result<()> {
    if found == expected { Ok(()) } else { Err(error(format!("{name} has shape {found:?}, expected {expected:?}"))) }
}

/// The one element of an int64 input in memory of the host, a length.
///
/// # Errors
///
/// It is no such tensor, or the length is negative.
pub fn length(value: &ValueRef<'_>, name: &str) -> ort::Result<usize> {
    let (shape, data) = value.try_extract_tensor::<i64>()?;
    match data {
        &[value] => usize::try_from(value).map_err(|_| error(format!("{name} is {value}, expected at least 0"))),
        _ => Err(error(format!("{name} has shape {shape:?}, expected one element"))),
    }
}

/// Output `index`, allocated with this shape.
///
/// # Errors
///
/// The node does not have it, or there is not as much memory.
pub fn output<'a, const N: usize>(
    context: &'a ComputeContext,
    index: usize,
    name: &str,
    shape: [usize; N],
) -> ort::Result<ValueRefMut<'a>> {
    optional_output(context, index, shape)?.ok_or_else(|| error(format!("output {name} is missing")))
}

/// Output `index`, or `None` where the node does not have it.
///
/// # Errors
///
/// There is not as much memory.
pub fn optional_output<const N: usize>(
    context: &ComputeContext,
    index: usize,
    shape: [usize; N],
) -> ort::Result<Option<ValueRefMut<'_>>> {
    if index < context.num_outputs()? { context.output(index, shape.map(|dim| dim as i64)) } else { Ok(None) }
}
