//! `ai.accordion::LinearInt8` and `LinearInt8PerToken` as custom operators of ONNX Runtime.

use super::{InputScale, Inputs, Sizes, linear_int8};
use crate::operator::{error, expect_shape, input, tensor};
use crate::parallel::SessionThreads;
use ort::operator::{
    BoxedKernel, ComputeContext, KernelContext, Operator, OperatorInput, OperatorOutput, ShapeInferenceContext,
};
use ort::value::TensorElementType::{Float32, Int8};

/// The operator of `contract.md` with a static scale, for the CPU provider.
#[derive(Debug, Clone, Copy)]
pub struct LinearInt8;

impl Operator for LinearInt8 {
    type Kernel<'attr> = BoxedKernel<'attr>;

    fn name(&self) -> &'static str {
        "LinearInt8"
    }

    fn inputs(&self) -> impl IntoIterator<Item = OperatorInput> {
        [Float32, Int8, Float32, Float32, Float32].map(OperatorInput::required)
    }

    fn outputs(&self) -> impl IntoIterator<Item = OperatorOutput> {
        [OperatorOutput::required(Float32)]
    }

    fn create_kernel<'attr>(&self, _: &KernelContext<'attr>) -> ort::Result<Self::Kernel<'attr>> {
        Ok(Box::new(|context: &ComputeContext| {
            let scale_value = input(context, 3, "input_scale")?;
            let ([], scale) = tensor::<f32, 0>(&scale_value, "input_scale")?;
            compute(context, InputScale::Static(scale[0]), 4)
        }))
    }

    fn infer_shape(&self, _: &mut ShapeInferenceContext) -> ort::Result<()> {
        Ok(())
    }
}

/// The operator of `contract.md` with a scale for every row, for the CPU provider.
#[derive(Debug, Clone, Copy)]
pub struct LinearInt8PerToken;

impl Operator for LinearInt8PerToken {
    type Kernel<'attr> = BoxedKernel<'attr>;

    fn name(&self) -> &'static str {
        "LinearInt8PerToken"
    }

    fn inputs(&self) -> impl IntoIterator<Item = OperatorInput> {
        [Float32, Int8, Float32, Float32].map(OperatorInput::required)
    }

    fn outputs(&self) -> impl IntoIterator<Item = OperatorOutput> {
        [OperatorOutput::required(Float32)]
    }

    fn create_kernel<'attr>(&self, _: &KernelContext<'attr>) -> ort::Result<Self::Kernel<'attr>> {
        Ok(Box::new(|context: &ComputeContext| compute(context, InputScale::PerRow, 3)))
    }

    fn infer_shape(&self, _: &mut ShapeInferenceContext) -> ort::Result<()> {
        Ok(())
    }
}

/// Runs the kernel on the inputs of both operators; `smoothing` is the one of that index.
fn compute(context: &ComputeContext, input_scale: InputScale, smoothing: usize) -> ort::Result<()> {
    let (x_value, weight_value) = (input(context, 0, "x")?, input(context, 1, "weight")?);
    let (scale_value, smoothing_value) = (input(context, 2, "weight_scale")?, input(context, smoothing, "smoothing")?);
    let ([rows, inner], x) = tensor::<f32, 2>(&x_value, "x")?;
    let ([outer, weight_inner], weight) = tensor::<i8, 2>(&weight_value, "weight")?;
    if weight_inner != inner {
        return Err(error(format!("weight has {weight_inner} columns, expected those of x, {inner}")));
    }
    let (shape, weight_scale) = tensor::<f32, 1>(&scale_value, "weight_scale")?;
    expect_shape("weight_scale", &shape, &[outer])?;
    let (shape, smoothing) = tensor::<f32, 1>(&smoothing_value, "smoothing")?;
    expect_shape("smoothing", &shape, &[inner])?;
    let mut output = crate::operator::output(context, 0, "y", [rows, outer])?;
    let inputs = Inputs { x, weight, weight_scale, input_scale, smoothing };
    let output = output.try_extract_tensor_mut::<f32>()?.1;
    linear_int8(Sizes { rows, inner, outer }, &inputs, output, &SessionThreads(context)).map_err(error)
}
