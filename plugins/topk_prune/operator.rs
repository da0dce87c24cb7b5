//! `ai.accordion::TopKPrune` as a custom operator of ONNX Runtime.

use ort::operator::{BoxedKernel, ComputeContext, KernelContext, Operator, OperatorInput, OperatorOutput};
use ort::value::TensorElementType::{Float32, Int64};

use super::{Inputs, Lengths, Outputs, prune};
use crate::operator::{error, expect_shape, input, length, optional_output, output, tensor};
use crate::parallel::SessionThreads;

/// The operator of `contract.md`, for the CPU provider.
#[derive(Debug, Clone, Copy)]
pub struct TopKPrune;

impl Operator for TopKPrune {
    type Kernel<'attr> = BoxedKernel<'attr>;

    fn name(&self) -> &'static str {
        "TopKPrune"
    }

    fn inputs(&self) -> impl IntoIterator<Item = OperatorInput> {
        [Float32, Float32, Float32, Int64, Float32, Float32, Int64, Int64, Int64].map(OperatorInput::required)
    }

    fn outputs(&self) -> impl IntoIterator<Item = OperatorOutput> {
        [
            OperatorOutput::required(Int64),
            OperatorOutput::required(Float32),
            OperatorOutput::required(Int64),
            OperatorOutput::required(Float32),
            OperatorOutput::required(Float32),
            OperatorOutput::optional(Float32),
        ]
    }

    fn create_kernel<'attr>(&self, context: &KernelContext<'attr>) -> ort::Result<Self::Kernel<'attr>> {
        let scale = context.get::<f32>("scale");
        Ok(Box::new(move |context: &ComputeContext| compute(context, scale)))
    }
}

fn compute(context: &ComputeContext, scale: Option<f32>) -> ort::Result<()> {
    let names = ["query_last", "key", "bias", "position_ids", "hidden", "kv"];
    let mut values = Vec::with_capacity(names.len());
    for (index, name) in names.into_iter().enumerate() {
        values.push(input(context, index, name)?);
    }
    let ([batch, heads, head_dim], query_last) = tensor::<f32, 3>(&values[0], "query_last")?;
    let (key_shape, key) = tensor::<f32, 4>(&values[1], "key")?;
    let (_, bias) = tensor::<f32, 1>(&values[2], "bias")?;
    let (position_shape, position_ids) = tensor::<i64, 2>(&values[3], "position_ids")?;
    let (hidden_shape, hidden) = tensor::<f32, 3>(&values[4], "hidden")?;
    let (kv_shape, kv) = tensor::<f32, 6>(&values[5], "kv")?;
    let [_, kv_heads, tokens, _] = key_shape;
    let [.., width] = hidden_shape;
    let layers = kv_shape[1];
    expect_shape("key", &key_shape, &[batch, kv_heads, tokens, head_dim])?;
    expect_shape("position_ids", &position_shape, &[batch, tokens])?;
    expect_shape("hidden", &hidden_shape, &[batch, tokens, width])?;
    expect_shape("kv", &kv_shape, &[batch, layers, 2, kv_heads, tokens, head_dim])?;
    let keep = length(&input(context, 6, "keep")?, "keep")?;
    let prefix = length(&input(context, 7, "prefix_length")?, "prefix_length")?;
    let suffix = length(&input(context, 8, "suffix_length")?, "suffix_length")?;
    // Before any output is allocated: its size is this number.
    if keep > tokens {
        return Err(error(format!("keep is {keep}, but there are {tokens} tokens")));
    }

    let mut keep_idx = output(context, 0, "keep_idx", [batch, keep])?;
    let mut kept_hidden = output(context, 1, "kept_hidden", [batch, keep, width])?;
    let mut kept_position_ids = output(context, 2, "kept_position_ids", [batch, keep])?;
    let mut kept_kv = output(context, 3, "kept_kv", [batch, layers, 2, kv_heads, keep, head_dim])?;
    let mut scores = output(context, 4, "scores", [batch, tokens])?;
    let mut metric = optional_output(context, 5, [batch, heads, tokens])?;
    let mut unasked = Vec::new();
    let metric = if let Some(metric) = &mut metric {
        metric.try_extract_tensor_mut::<f32>()?.1
    } else {
        unasked.resize(batch * heads * tokens, 0.0);
        &mut unasked
    };
    prune(
        &Lengths { batch, heads, kv_heads, head_dim, length: tokens, hidden: width, layers, keep, prefix, suffix },
        &Inputs {
            query_last,
            key,
            bias,
            position_ids,
            hidden,
            kv,
            scale: scale.unwrap_or_else(|| 1.0 / (head_dim as f32).sqrt()),
        },
        Outputs {
            keep_idx: keep_idx.try_extract_tensor_mut()?.1,
            kept_hidden: kept_hidden.try_extract_tensor_mut()?.1,
            kept_position_ids: kept_position_ids.try_extract_tensor_mut()?.1,
            kept_kv: kept_kv.try_extract_tensor_mut()?.1,
            scores: scores.try_extract_tensor_mut()?.1,
            metric,
        },
        &SessionThreads(context),
    )
    .map_err(error)
}
