//! `ai.accordion::GroupQueryAttention` as a custom operator of ONNX Runtime.

use ort::operator::{
    BoxedKernel, ComputeContext, KernelContext, Operator, OperatorInput, OperatorOutput, ShapeInferenceContext,
};
use ort::value::TensorElementType::{Float32, Int64};

use super::{Geometry, Inputs, Outputs, Past, attend};
use crate::operator::{error, input, integer, length, optional_input, output, tensor};
use crate::parallel::SessionThreads;

/// The operator of `contract.md`, for the CPU provider.
#[derive(Debug, Clone, Copy)]
pub struct GroupQueryAttention;

impl Operator for GroupQueryAttention {
    type Kernel<'attr> = BoxedKernel<'attr>;

    fn name(&self) -> &'static str {
        "GroupQueryAttention"
    }

    fn inputs(&self) -> impl IntoIterator<Item = OperatorInput> {
        [
            OperatorInput::required(Float32),
            OperatorInput::required(Float32),
            OperatorInput::required(Float32),
            OperatorInput::optional(Float32),
            OperatorInput::optional(Float32),
            OperatorInput::optional(Int64),
        ]
    }

    fn outputs(&self) -> impl IntoIterator<Item = OperatorOutput> {
        [OperatorOutput::required(Float32), OperatorOutput::required(Float32), OperatorOutput::required(Float32)]
    }

    fn create_kernel<'attr>(&self, context: &KernelContext<'attr>) -> ort::Result<Self::Kernel<'attr>> {
        let heads = integer(context, "num_heads")?;
        let kv_heads = integer(context, "kv_num_heads")?;
        if kv_heads == 0 || heads == 0 || !heads.is_multiple_of(kv_heads) {
            return Err(error(format!(
                "num_heads is {heads} and kv_num_heads is {kv_heads}: expected a positive multiple of kv_num_heads"
            )));
        }
        let scale = context.get::<f32>("scale");
        Ok(Box::new(move |context: &ComputeContext| compute(context, heads, kv_heads, scale)))
    }

    fn infer_shape(&self, context: &mut ShapeInferenceContext) -> ort::Result<()> {
        match context.inputs().first() {
            Some(query) => context.set_output(0, query),
            None => Ok(()),
        }
    }
}

fn compute(context: &ComputeContext, heads: usize, kv_heads: usize, scale: Option<f32>) -> ort::Result<()> {
    let (query, key, value) = (input(context, 0, "query")?, input(context, 1, "key")?, input(context, 2, "value")?);
    let ([batch, rows, width], query) = tensor::<f32, 3>(&query, "query")?;
    let (key_shape, key) = tensor::<f32, 3>(&key, "key")?;
    let (value_shape, value) = tensor::<f32, 3>(&value, "value")?;
    if width == 0 || !width.is_multiple_of(heads) {
        return Err(error(format!("query has {width} columns, expected a positive multiple of num_heads, {heads}")));
    }
    let head_dim = width / heads;
    for (name, shape) in [("key", key_shape), ("value", value_shape)] {
        let expected = [batch, rows, kv_heads * head_dim];
        if shape != expected {
            return Err(error(format!("{name} has shape {shape:?}, expected {expected:?}")));
        }
    }

    let past_key = optional_input(context, 3)?;
    let past_value = optional_input(context, 4)?;
    let past_length = optional_input(context, 5)?;
    let past = match (&past_key, &past_value, &past_length) {
        (None, None, None) => None,
        (Some(key), Some(value), Some(length_value)) => {
            let (shape, key) = tensor::<f32, 4>(key, "past_key")?;
            let (value_shape, value) = tensor::<f32, 4>(value, "past_value")?;
            let expected = [batch, kv_heads, shape[2], head_dim];
            for (name, shape) in [("past_key", shape), ("past_value", value_shape)] {
                if shape != expected {
                    return Err(error(format!("{name} has shape {shape:?}, expected {expected:?}")));
                }
            }
            let past_rows = length(length_value, "past_length")?;
            if past_rows > shape[2] {
                return Err(error(format!("past_length is {past_rows}, but past_key has {} positions", shape[2])));
            }
            Some((past_rows, shape[2], key.as_ptr_range(), value.as_ptr_range()))
        }
        _ => return Err(error("past_key, past_value and past_length come together or not at all")),
    };

    let (past_rows, past_capacity) = past.as_ref().map_or((0, 0), |past| (past.0, past.1));
    let needed = past_rows.checked_add(rows).ok_or_else(|| error("past_length is too large"))?;
    let geometry =
        Geometry { batch, rows, heads, kv_heads, head_dim, past: past_rows, capacity: past_capacity.max(needed) };
    let present_shape = [batch, kv_heads, geometry.capacity, head_dim];
    let mut out = output(context, 0, "output", [batch, rows, width])?;
    let mut present_key = output(context, 1, "present_key", present_shape)?;
    let mut present_value = output(context, 2, "present_value", present_shape)?;
    let output = out.try_extract_tensor_mut::<f32>()?.1;
    let present_key = present_key.try_extract_tensor_mut::<f32>()?.1;
    let present_value = present_value.try_extract_tensor_mut::<f32>()?.1;

    let past = match past {
        None => Past::InPlace,
        Some((_, capacity, key, value)) => {
            let [in_place_key, in_place_value] =
                [(&key, &*present_key), (&value, &*present_value)].map(|(past, present)| {
                    let present = present.as_ptr_range();
                    if *past == present {
                        Some(true)
                    } else {
                        (past.end <= present.start || present.end <= past.start || past.is_empty()).then_some(false)
                    }
                });
            match (in_place_key, in_place_value) {
                (Some(true), Some(true)) => Past::InPlace,
                (Some(false), Some(false)) => {
                    let len = |range: &std::ops::Range<*const f32>| {
                        (range.end.addr() - range.start.addr()) / size_of::<f32>()
                    };
                    // SAFETY: the ranges are whole input tensors, which live as long as this call and do not overlap
                    // the outputs.
                    let [key, value] =
                        [&key, &value].map(|range| unsafe { std::slice::from_raw_parts(range.start, len(range)) });
                    Past::Copied { key, value, capacity }
                }
                _ => {
                    return Err(error(
                        "bind past and present of both key and value to the same two buffers, or to four apart",
                    ));
                }
            }
        }
    };
    let scale = scale.unwrap_or_else(|| 1.0 / (head_dim as f32).sqrt());
    attend(
        &geometry,
        &Inputs { query, key, value, past, scale },
        Outputs { output, present_key, present_value },
        &SessionThreads(context),
    )
    .map_err(error)
}
