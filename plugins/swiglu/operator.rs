//! `ai.accordion::SwiGlu` as a custom operator of ONNX Runtime.

use ort::operator::{
    BoxedKernel, ComputeContext, KernelContext, Operator, OperatorInput, OperatorOutput, ShapeInferenceContext,
};
use ort::value::TensorElementType::Float32;

use super::swiglu;
use crate::operator::{error, input, output_like_first_input};
use crate::parallel::SessionThreads;

/// The operator of `contract.md`, for the CPU provider.
#[derive(Debug, Clone, Copy)]
pub struct SwiGlu;

impl Operator for SwiGlu {
    type Kernel<'attr> = BoxedKernel<'attr>;

    fn name(&self) -> &'static str {
        "SwiGlu"
    }

    fn inputs(&self) -> impl IntoIterator<Item = OperatorInput> {
        [OperatorInput::required(Float32), OperatorInput::required(Float32)]
    }

    fn outputs(&self) -> impl IntoIterator<Item = OperatorOutput> {
        [OperatorOutput::required(Float32)]
    }

    fn create_kernel<'attr>(&self, _: &KernelContext<'attr>) -> ort::Result<Self::Kernel<'attr>> {
        Ok(Box::new(compute))
    }

    fn infer_shape(&self, context: &mut ShapeInferenceContext) -> ort::Result<()> {
        output_like_first_input(context)
    }
}

fn compute(context: &ComputeContext) -> ort::Result<()> {
    let (gate, up) = (input(context, 0, "gate")?, input(context, 1, "up")?);
    let (shape, gate) = gate.try_extract_tensor::<f32>()?;
    let (up_shape, up) = up.try_extract_tensor::<f32>()?;
    if shape != up_shape {
        return Err(error(format!("up has shape {up_shape:?}, expected that of gate, {shape:?}")));
    }
    let mut output = context.output(0, shape.to_vec())?.ok_or_else(|| error("output is missing"))?;
    swiglu(gate, up, output.try_extract_tensor_mut::<f32>()?.1, &SessionThreads(context)).map_err(error)
}
