//! `ai.accordion::SelectiveScan` as a custom operator of ONNX Runtime.

use ort::operator::{
    BoxedKernel, ComputeContext, KernelContext, Operator, OperatorInput, OperatorOutput, ShapeInferenceContext,
};
use ort::value::TensorElementType::Float32;

use super::{Inputs, Sizes, selective_scan};
use crate::operator::{error, expect_shape, input, output, tensor};
use crate::parallel::SessionThreads;

/// The operator of `contract.md`, for the CPU provider.
#[derive(Debug, Clone, Copy)]
pub struct SelectiveScan;

const NAMES: [&str; 6] = ["u", "dt", "A", "B", "C", "skip"];

impl Operator for SelectiveScan {
    type Kernel<'attr> = BoxedKernel<'attr>;

    fn name(&self) -> &'static str {
        "SelectiveScan"
    }

    fn inputs(&self) -> impl IntoIterator<Item = OperatorInput> {
        NAMES.map(|_| OperatorInput::required(Float32))
    }

    fn outputs(&self) -> impl IntoIterator<Item = OperatorOutput> {
        [OperatorOutput::required(Float32)]
    }

    fn create_kernel<'attr>(&self, _: &KernelContext<'attr>) -> ort::Result<Self::Kernel<'attr>> {
        Ok(Box::new(compute))
    }

    fn infer_shape(&self, _: &mut ShapeInferenceContext) -> ort::Result<()> {
        Ok(())
    }
}

fn compute(context: &ComputeContext) -> ort::Result<()> {
    let mut values = Vec::with_capacity(NAMES.len());
    for (index, name) in NAMES.into_iter().enumerate() {
        values.push(input(context, index, name)?);
    }
    let ([segments, window, channels], u) = tensor::<f32, 3>(&values[0], "u")?;
    let (dt_shape, dt) = tensor::<f32, 3>(&values[1], "dt")?;
    let (a_shape, a) = tensor::<f32, 2>(&values[2], "A")?;
    let (b_shape, b) = tensor::<f32, 3>(&values[3], "B")?;
    let (c_shape, c) = tensor::<f32, 3>(&values[4], "C")?;
    let (skip_shape, skip) = tensor::<f32, 1>(&values[5], "skip")?;
    let states = a_shape[1];
    expect_shape("dt", &dt_shape, &[segments, window, channels])?;
    expect_shape("A", &a_shape, &[channels, states])?;
    expect_shape("B", &b_shape, &[segments, window, states])?;
    expect_shape("C", &c_shape, &[segments, window, states])?;
    expect_shape("skip", &skip_shape, &[channels])?;
    let mut y = output(context, 0, "y", [segments, window, channels])?;
    selective_scan(
        Sizes { segments, window, channels, states },
        &Inputs { u, dt, a, b, c, skip },
        y.try_extract_tensor_mut::<f32>()?.1,
        &SessionThreads(context),
    )
    .map_err(error)
}
