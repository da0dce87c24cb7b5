//! `ai.accordion::Linear` and `LinearBias` as custom operators of ONNX Runtime.

use super::{MAX_ROWS, Sizes, linear};
use crate::gemm::Gemm;
use crate::operator::{error, input, tensor};
use crate::parallel::SessionThreads;
use ort::AsPointer;
use ort::operator::{
    ComputeContext, Kernel, KernelContext, Operator, OperatorInput, OperatorOutput, ShapeInferenceContext,
};
use ort::value::TensorElementType::Float32;

/// The operator of `contract.md`, for the CPU provider.
#[derive(Debug, Clone, Copy)]
pub struct Linear;

impl Operator for Linear {
    type Kernel<'attr> = LinearKernel;

    fn name(&self) -> &'static str {
        "Linear"
    }

    fn inputs(&self) -> impl IntoIterator<Item = OperatorInput> {
        [Float32; 2].map(OperatorInput::required)
    }

    fn outputs(&self) -> impl IntoIterator<Item = OperatorOutput> {
        [OperatorOutput::required(Float32)]
    }

    fn create_kernel<'attr>(&self, context: &KernelContext<'attr>) -> ort::Result<Self::Kernel<'attr>> {
        LinearKernel::new(context, false)
    }

    fn infer_shape(&self, _: &mut ShapeInferenceContext) -> ort::Result<()> {
        Ok(())
    }
}

/// The operator of `contract.md` with a bias, for the CPU provider.
#[derive(Debug, Clone, Copy)]
pub struct LinearBias;

impl Operator for LinearBias {
    type Kernel<'attr> = LinearKernel;

    fn name(&self) -> &'static str {
        "LinearBias"
    }

    fn inputs(&self) -> impl IntoIterator<Item = OperatorInput> {
        [Float32; 3].map(OperatorInput::required)
    }

    fn outputs(&self) -> impl IntoIterator<Item = OperatorOutput> {
        [OperatorOutput::required(Float32)]
    }

    fn create_kernel<'attr>(&self, context: &KernelContext<'attr>) -> ort::Result<Self::Kernel<'attr>> {
        LinearKernel::new(context, true)
    }

    fn infer_shape(&self, _: &mut ShapeInferenceContext) -> ort::Result<()> {
        Ok(())
    }
}

/// The kernel: few rows here, more by the runtime.
pub struct LinearKernel {
    gemm: Gemm,
    biased: bool,
}

impl LinearKernel {
    fn new(context: &KernelContext<'_>, biased: bool) -> ort::Result<Self> {
        Ok(Self { gemm: Gemm::new(context, if biased { 3 } else { 2 })?, biased })
    }
}

impl Kernel for LinearKernel {
    fn compute(&mut self, context: &ComputeContext) -> ort::Result<()> {
        let (x_value, weight_value) = (input(context, 0, "x")?, input(context, 1, "weight")?);
        let bias_value = self.biased.then(|| input(context, 2, "bias")).transpose()?;
        let ([rows, inner], x) = tensor::<f32, 2>(&x_value, "x")?;
        let ([outer, weight_inner], weight) = tensor::<f32, 2>(&weight_value, "weight")?;
        if weight_inner != inner {
            return Err(error(format!("weight has {weight_inner} columns, expected those of x, {inner}")));
        }
        let bias = bias_value.as_ref().map(|bias| tensor::<f32, 1>(bias, "bias")).transpose()?;
        if let Some(([len], _)) = bias
            && len != outer
        {
            return Err(error(format!("bias has {len} elements, expected the rows of weight, {outer}")));
        }
        let shape = [rows as i64, outer as i64];
        let mut output = context.output(0, shape)?.ok_or_else(|| error("output y is missing"))?;
        if rows == 0 {
            return Ok(());
        }
        if rows <= MAX_ROWS {
            let output = output.try_extract_tensor_mut::<f32>()?.1;
            let bias = bias.map(|(_, bias)| bias);
            let sizes = Sizes { rows, inner, outer };
            return linear(sizes, x, weight, bias, output, &SessionThreads(context)).map_err(error);
        }
        let mut inputs = vec![x_value.ptr(), weight_value.ptr()];
        inputs.extend(bias_value.as_ref().map(|bias| bias.ptr()));
        self.gemm.invoke(context, &inputs, output.ptr().cast_mut())
    }
}
