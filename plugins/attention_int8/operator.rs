//! `ai.accordion::GroupQueryAttentionInt8` as a custom operator of ONNX Runtime.

use std::ops::Range;

use ort::operator::{
    BoxedKernel, ComputeContext, KernelContext, Operator, OperatorInput, OperatorOutput, ShapeInferenceContext,
};
use ort::value::TensorElementType::{Float32, Int8, Int64};

use super::{Entries, Present, attend};
use crate::attention::Geometry;
use crate::operator::{error, expect_shape, input, length, output, output_like_first_input, tensor};
use crate::parallel::SessionThreads;

/// The operator of `contract.md`, for the CPU provider.
#[derive(Debug, Clone, Copy)]
pub struct GroupQueryAttentionInt8;

impl Operator for GroupQueryAttentionInt8 {
    type Kernel<'attr> = BoxedKernel<'attr>;

    fn name(&self) -> &'static str {
        "GroupQueryAttentionInt8"
    }

    fn inputs(&self) -> impl IntoIterator<Item = OperatorInput> {
        [Float32, Float32, Float32, Int8, Int8, Float32, Float32, Int64].map(OperatorInput::required)
    }

    fn outputs(&self) -> impl IntoIterator<Item = OperatorOutput> {
        [Float32, Int8, Int8, Float32, Float32].map(OperatorOutput::required)
    }

    fn create_kernel<'attr>(&self, _: &KernelContext<'attr>) -> ort::Result<Self::Kernel<'attr>> {
        Ok(Box::new(compute))
    }

    fn infer_shape(&self, context: &mut ShapeInferenceContext) -> ort::Result<()> {
        output_like_first_input(context)
    }
}

fn compute(context: &ComputeContext) -> ort::Result<()> {
    let (query, key, value) = (input(context, 0, "query")?, input(context, 1, "key")?, input(context, 2, "value")?);
    let ([batch, rows, width], query) = tensor::<f32, 3>(&query, "query")?;
    let (key_shape, key) = tensor::<f32, 3>(&key, "key")?;
    let (value_shape, value) = tensor::<f32, 3>(&value, "value")?;
    let (past_key, past_value) = (input(context, 3, "past_key")?, input(context, 4, "past_value")?);
    let (past_shape, past_key) = tensor::<i8, 4>(&past_key, "past_key")?;
    let (past_value_shape, past_value) = tensor::<i8, 4>(&past_value, "past_value")?;
    let (key_scale, value_scale) = (input(context, 5, "past_key_scale")?, input(context, 6, "past_value_scale")?);
    let (key_scale_shape, key_scale) = tensor::<f32, 4>(&key_scale, "past_key_scale")?;
    let (value_scale_shape, value_scale) = tensor::<f32, 4>(&value_scale, "past_value_scale")?;
    let past_rows = length(&input(context, 7, "past_length")?, "past_length")?;

    let [_, kv_heads, past_capacity, head_dim] = past_shape;
    expect_shape("past_key", &past_shape, &[batch, kv_heads, past_capacity, head_dim])?;
    expect_shape("past_value", &past_value_shape, &past_shape)?;
    let new_shape = [batch, rows, kv_heads.saturating_mul(head_dim)];
    expect_shape("key", &key_shape, &new_shape)?;
    expect_shape("value", &value_shape, &new_shape)?;
    expect_shape("past_key_scale", &key_scale_shape, &[batch, kv_heads, 1, head_dim])?;
    expect_shape("past_value_scale", &value_scale_shape, &[batch, kv_heads, 1, head_dim])?;
    if head_dim == 0 || width == 0 || !width.is_multiple_of(head_dim) {
        return Err(error(format!("query has {width} columns, expected a positive multiple of {head_dim}")));
    }
    if past_rows > past_capacity {
        return Err(error(format!("past_length is {past_rows}, but past_key has {past_capacity} positions")));
    }
    let needed = past_rows.checked_add(rows).ok_or_else(|| error("past_length is too large"))?;
    let capacity = past_capacity.max(needed);
    let geometry = Geometry { batch, rows, heads: width / head_dim, kv_heads, head_dim, past: past_rows, capacity };

    // Not slices: until it is known whether the outputs are the same memory, nothing may be borrowed.
    let past = [past_key.as_ptr_range(), past_value.as_ptr_range()];
    let scales = [key_scale, value_scale];
    let mut out = output(context, 0, "output", [batch, rows, width])?;
    let mut present_key = output(context, 1, "present_key", [batch, kv_heads, capacity, head_dim])?;
    let mut present_value = output(context, 2, "present_value", [batch, kv_heads, capacity, head_dim])?;
    let mut present_key_scale = output(context, 3, "present_key_scale", key_scale_shape)?;
    let mut present_value_scale = output(context, 4, "present_value_scale", key_scale_shape)?;
    let output = out.try_extract_tensor_mut::<f32>()?.1;
    let present = [
        Present {
            entries: present_key.try_extract_tensor_mut::<i8>()?.1,
            scale: present_key_scale.try_extract_tensor_mut::<f32>()?.1,
        },
        Present {
            entries: present_value.try_extract_tensor_mut::<i8>()?.1,
            scale: present_value_scale.try_extract_tensor_mut::<f32>()?.1,
        },
    ];
    for (scale, present) in scales.iter().zip(&present) {
        if !apart(&scale.as_ptr_range(), &present.scale.as_ptr_range()) {
            return Err(error("the scales of past and present overlap: bind them to different buffers"));
        }
    }
    let copied = copied(&past, &[present[0].entries.as_ptr_range(), present[1].entries.as_ptr_range()])?;
    let slice = |at: &Range<*const i8>| {
        // SAFETY: a whole input, which lives until this function returns, apart from everything that is written.
        copied.then(|| unsafe { std::slice::from_raw_parts(at.start, at.end.addr() - at.start.addr()) })
    };
    let [past_key, past_value] = past.each_ref().map(|at| slice(at).map(|entries| (entries, past_capacity)));
    let entries = [
        Entries { past: past_key, scale: scales[0], new: key },
        Entries { past: past_value, scale: scales[1], new: value },
    ];
    attend(&geometry, query, entries, present, output, &SessionThreads(context)).map_err(error)
}

fn apart<T>(a: &Range<*const T>, b: &Range<*const T>) -> bool {
    a.end <= b.start || b.end <= a.start
}

/// Whether keys and values of past and present are all apart. Otherwise they are pairwise the same.
fn copied(past: &[Range<*const i8>; 2], present: &[Range<*const i8>; 2]) -> ort::Result<bool> {
    let crossed = !apart(&past[0], &present[1]) || !apart(&past[1], &present[0]);
    if !crossed && past == present {
        Ok(false)
    } else if !crossed && apart(&past[0], &present[0]) && apart(&past[1], &present[1]) {
        Ok(true)
    } else {
        Err(error(
            "past and present overlap: bind both of the keys to one buffer and both of the values to another, or all \
             four apart",
        ))
    }
}
