//! `ai.accordion::MergeCache` as a custom operator of ONNX Runtime.

use ort::operator::{BoxedKernel, ComputeContext, KernelContext, Operator, OperatorInput, OperatorOutput};
use ort::value::TensorElementType::{Float32, Int64};

use super::{Lengths, merge};
use crate::operator::{error, expect_shape, input, length, output, tensor};
use crate::parallel::SessionThreads;

/// The operator of `contract.md`, for the CPU provider.
#[derive(Debug, Clone, Copy)]
pub struct MergeCache;

impl Operator for MergeCache {
    type Kernel<'attr> = BoxedKernel<'attr>;

    fn name(&self) -> &'static str {
        "MergeCache"
    }

    fn inputs(&self) -> impl IntoIterator<Item = OperatorInput> {
        [Float32, Float32, Int64, Float32, Int64, Int64].map(OperatorInput::required)
    }

    fn outputs(&self) -> impl IntoIterator<Item = OperatorOutput> {
        [OperatorOutput::required(Float32)]
    }

    fn create_kernel<'attr>(&self, _: &KernelContext<'attr>) -> ort::Result<Self::Kernel<'attr>> {
        Ok(Box::new(compute))
    }
}

fn compute(context: &ComputeContext) -> ort::Result<()> {
    let values = [input(context, 0, "left_kv")?, input(context, 1, "right_kv")?, input(context, 3, "new_kv")?];
    let (left_shape, left_kv) = tensor::<f32, 6>(&values[0], "left_kv")?;
    let (right_shape, right_kv) = tensor::<f32, 6>(&values[1], "right_kv")?;
    let (new_shape, new_kv) = tensor::<f32, 6>(&values[2], "new_kv")?;
    let keep_idx = input(context, 2, "keep_idx")?;
    let ([keep_batch, keep], keep_idx) = tensor::<i64, 2>(&keep_idx, "keep_idx")?;
    let prefix = length(&input(context, 4, "prefix_length")?, "prefix_length")?;
    let suffix = length(&input(context, 5, "suffix_length")?, "suffix_length")?;
    let [batch, old_layers, two, kv_heads, left, head_dim] = left_shape;
    let [_, new_layers, _, _, _, _] = new_shape;
    let right = right_shape[4];
    if two != 2 || keep_batch != batch {
        return Err(error(format!("left_kv has shape {left_shape:?} and keep_idx {keep_batch} rows: they do not fit")));
    }
    expect_shape("right_kv", &right_shape, &[batch, old_layers, 2, kv_heads, right, head_dim])?;
    expect_shape("new_kv", &new_shape, &[batch, new_layers, 2, kv_heads, keep, head_dim])?;
    let mut kv = output(context, 0, "kv", [batch, old_layers + new_layers, 2, kv_heads, keep, head_dim])?;
    let planes = |layers: usize| layers * 2 * kv_heads;
    let lengths = Lengths {
        batch,
        old_planes: planes(old_layers),
        new_planes: planes(new_layers),
        left,
        right,
        prefix,
        suffix,
        keep,
        head_dim,
    };
    let kv = kv.try_extract_tensor_mut::<f32>()?.1;
    merge(&lengths, [left_kv, right_kv], keep_idx, new_kv, kv, &SessionThreads(context)).map_err(error)
}
