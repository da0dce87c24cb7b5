//! `ai.accordion::GroupQueryAttention` as a custom operator of ONNX Runtime.

use std::ops::Range;

use ort::operator::{
    BoxedKernel, ComputeContext, KernelContext, Operator, OperatorInput, OperatorOutput, ShapeInferenceContext,
};
use ort::value::TensorElementType::{Float32, Int64};

use super::{AttentionError, Geometry, Inputs, Outputs, Past, attend, attend_bf16};
use crate::operator::{
    error, expect_shape, input, integer, length, optional_input, output, output_like_first_input, tensor,
};
use crate::parallel::{ParallelFor, SessionThreads};

/// [`attend`] or [`attend_bf16`].
type Attend = fn(&Geometry, &Inputs<'_>, Outputs<'_>, &dyn ParallelFor) -> Result<(), AttentionError>;

macro_rules! operator {
    ($(#[$doc:meta])* $operator:ident, $attend:ident) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy)]
        pub struct $operator;

        impl Operator for $operator {
            type Kernel<'attr> = BoxedKernel<'attr>;

            fn name(&self) -> &'static str {
                stringify!($operator)
            }

            fn inputs(&self) -> impl IntoIterator<Item = OperatorInput> {
                let past = [Float32, Float32, Int64].map(OperatorInput::optional);
                [Float32; 3].map(OperatorInput::required).into_iter().chain(past)
            }

            fn outputs(&self) -> impl IntoIterator<Item = OperatorOutput> {
                [Float32; 3].map(OperatorOutput::required)
            }

            fn create_kernel<'attr>(&self, context: &KernelContext<'attr>) -> ort::Result<Self::Kernel<'attr>> {
                kernel($attend, context)
            }

            fn infer_shape(&self, context: &mut ShapeInferenceContext) -> ort::Result<()> {
                output_like_first_input(context)
            }
        }
    };
}

operator! {
    /// The operator of `contract.md`, for the CPU provider.
    GroupQueryAttention, attend
}
operator! {
    /// The operator of `contract.md` over numbers of type bfloat16, for the CPU provider.
    GroupQueryAttentionBf16, attend_bf16
}

fn kernel<'attr>(attend: Attend, context: &KernelContext<'attr>) -> ort::Result<BoxedKernel<'attr>> {
    let heads = integer(context, "num_heads")?;
    let kv_heads = integer(context, "kv_num_heads")?;
    if kv_heads == 0 || heads == 0 || !heads.is_multiple_of(kv_heads) {
        return Err(error(format!(
            "num_heads is {heads} and kv_num_heads is {kv_heads}: expected a positive multiple of kv_num_heads"
        )));
    }
    let scale = context.get::<f32>("scale");
    Ok(Box::new(move |context: &ComputeContext| compute(context, attend, [heads, kv_heads], scale)))
}

fn compute(
    context: &ComputeContext,
    attend: Attend,
    [heads, kv_heads]: [usize; 2],
    scale: Option<f32>,
) -> ort::Result<()> {
    let (query, key, value) = (input(context, 0, "query")?, input(context, 1, "key")?, input(context, 2, "value")?);
    let ([batch, rows, width], query) = tensor::<f32, 3>(&query, "query")?;
    let (key_shape, key) = tensor::<f32, 3>(&key, "key")?;
    let (value_shape, value) = tensor::<f32, 3>(&value, "value")?;
    if width == 0 || !width.is_multiple_of(heads) {
        return Err(error(format!("query has {width} columns, expected a positive multiple of num_heads, {heads}")));
    }
    let head_dim = width / heads;
    expect_shape("key", &key_shape, &[batch, rows, kv_heads * head_dim])?;
    expect_shape("value", &value_shape, &[batch, rows, kv_heads * head_dim])?;

    let past_key = optional_input(context, 3)?;
    let past_value = optional_input(context, 4)?;
    let past_length = optional_input(context, 5)?;
    let cache = match (&past_key, &past_value, &past_length) {
        (None, None, None) => None,
        (Some(key), Some(value), Some(rows)) => {
            let (key_shape, key) = tensor::<f32, 4>(key, "past_key")?;
            let (value_shape, value) = tensor::<f32, 4>(value, "past_value")?;
            let [_, _, capacity, _] = key_shape;
            expect_shape("past_key", &key_shape, &[batch, kv_heads, capacity, head_dim])?;
            expect_shape("past_value", &value_shape, &[batch, kv_heads, capacity, head_dim])?;
            let rows = length(rows, "past_length")?;
            if rows > capacity {
                return Err(error(format!("past_length is {rows}, but past_key has {capacity} positions")));
            }
            Some(Cache { key: key.as_ptr_range(), value: value.as_ptr_range(), capacity, rows })
        }
        _ => return Err(error("past_key, past_value and past_length come together or not at all")),
    };

    let (past_rows, past_capacity) = cache.as_ref().map_or((0, 0), |cache| (cache.rows, cache.capacity));
    let needed = past_rows.checked_add(rows).ok_or_else(|| error("past_length is too large"))?;
    let capacity = past_capacity.max(needed);
    let mut out = output(context, 0, "output", [batch, rows, width])?;
    let mut present_key = output(context, 1, "present_key", [batch, kv_heads, capacity, head_dim])?;
    let mut present_value = output(context, 2, "present_value", [batch, kv_heads, capacity, head_dim])?;
    let output = out.try_extract_tensor_mut::<f32>()?.1;
    let present_key = present_key.try_extract_tensor_mut::<f32>()?.1;
    let present_value = present_value.try_extract_tensor_mut::<f32>()?.1;
    let past = match cache {
        None => Past::InPlace,
        // SAFETY: the ranges are whole inputs, which live until this function returns.
        Some(cache) => unsafe { cache.past(&present_key.as_ptr_range(), &present_value.as_ptr_range()) }?,
    };
    attend(
        &Geometry { batch, rows, heads, kv_heads, head_dim, past: past_rows, capacity },
        &Inputs { query, key, value, past, scale: scale.unwrap_or_else(|| 1.0 / (head_dim as f32).sqrt()) },
        Outputs { output, present_key, present_value },
        &SessionThreads(context),
    )
    .map_err(error)
}

/// Where a tensor lies.
type Place = Range<*const f32>;

/// The past as it came in. Not slices: until it is known whether the outputs are the same memory, nothing may be borrowed.
struct Cache {
    key: Place,
    value: Place,
    /// Positions that there is room for.
    capacity: usize,
    /// Positions that are valid.
    rows: usize,
}

impl Cache {
    /// # Safety
    ///
    /// The places are readable for `'a`.
    unsafe fn past<'a>(self, present_key: &Place, present_value: &Place) -> ort::Result<Past<'a>> {
        let apart = |a: &Place, b: &Place| a.end <= b.start || b.end <= a.start;
        let crossed = !apart(&self.key, present_value) || !apart(&self.value, present_key);
        if !crossed && self.key == *present_key && self.value == *present_value {
            Ok(Past::InPlace)
        } else if !crossed && apart(&self.key, present_key) && apart(&self.value, present_value) {
            // SAFETY: readable by the caller's promise, and apart from everything that is written.
            let slice = |at: Place| unsafe {
                std::slice::from_raw_parts(at.start, (at.end.addr() - at.start.addr()) / size_of::<f32>())
            };
            Ok(Past::Copied { key: slice(self.key), value: slice(self.value), capacity: self.capacity })
        } else {
            Err(error(
                "past and present overlap: bind both of the keys to one buffer and both of the values to another, or all \
                 four apart",
            ))
        }
    }
}
