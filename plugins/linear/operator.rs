//! `ai.accordion::Linear` and `LinearBias` as custom operators of ONNX Runtime.

use super::{MAX_ROWS, Sizes, linear};
use crate::operator::{error, input, tensor};
use crate::parallel::SessionThreads;
use ort::operator::{
    ComputeContext, Kernel, KernelContext, Operator, OperatorInput, OperatorOutput, ShapeInferenceContext,
};
use ort::sys;
use ort::value::TensorElementType::Float32;
use ort::{AsPointer, Error};
use std::ffi::{CStr, c_int, c_void};
use std::ptr::{NonNull, null_mut};

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

/// The runtime's own `Gemm` with `transB`.
struct Gemm(NonNull<sys::OrtOp>);

// SAFETY: the runtime allows an operator to be invoked and released from any thread; invocations are exclusive, because
// the kernel that owns it is.
unsafe impl Send for Gemm {}

/// An attribute of a node, released when dropped.
struct NodeAttribute(*mut sys::OrtOpAttr);

impl NodeAttribute {
    fn new<T>(name: &CStr, value: &T, kind: sys::OrtOpAttrType) -> ort::Result<Self> {
        let mut attribute = null_mut();
        let value = std::ptr::from_ref(value).cast::<c_void>();
        // SAFETY: the name and the one value live through the call, which copies them; the status is freed here.
        unsafe {
            Error::result_from_status((ort::api().CreateOpAttr)(name.as_ptr(), value, 1, kind, &raw mut attribute))
        }?;
        Ok(Self(attribute))
    }
}

impl Drop for NodeAttribute {
    fn drop(&mut self) {
        // SAFETY: created in `new`, released nowhere else.
        unsafe { (ort::api().ReleaseOpAttr)(self.0) };
    }
}

impl Gemm {
    /// The version of the standard operator set that `Gemm` last changed in.
    const VERSION: c_int = 13;

    fn new(context: &KernelContext<'_>, inputs: usize) -> ort::Result<Self> {
        use sys::OrtOpAttrType::{ORT_OP_ATTR_FLOAT, ORT_OP_ATTR_INT};
        // A node that is made this way gets no default values: all attributes are given.
        let attributes = [
            NodeAttribute::new(c"transA", &0_i64, ORT_OP_ATTR_INT)?,
            NodeAttribute::new(c"transB", &1_i64, ORT_OP_ATTR_INT)?,
            NodeAttribute::new(c"alpha", &1.0_f32, ORT_OP_ATTR_FLOAT)?,
            NodeAttribute::new(c"beta", &1.0_f32, ORT_OP_ATTR_FLOAT)?,
        ];
        let attributes = attributes.each_ref().map(|attribute| attribute.0.cast_const());
        let mut type_names = [c"T".as_ptr()];
        let types = [sys::ONNXTensorElementDataType::ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT];
        let mut gemm = null_mut();
        // SAFETY: everything that is pointed to lives through the call, which copies it, and the counts are theirs; the status
        // is freed here.
        unsafe {
            Error::result_from_status((ort::api().CreateOp)(
                context.ptr(),
                c"Gemm".as_ptr(),
                c"".as_ptr(),
                Self::VERSION,
                type_names.as_mut_ptr(),
                types.as_ptr(),
                1,
                attributes.as_ptr(),
                attributes.len() as c_int,
                inputs as c_int,
                1,
                &raw mut gemm,
            ))
        }?;
        NonNull::new(gemm).map(Self).ok_or_else(|| error("the runtime made no Gemm"))
    }

    fn invoke(
        &self,
        context: &ComputeContext,
        inputs: &[*const sys::OrtValue],
        output: *mut sys::OrtValue,
    ) -> ort::Result<()> {
        // SAFETY: the operator, the context and all values are alive, and the counts are theirs; the status is freed here.
        unsafe {
            Error::result_from_status((ort::api().InvokeOp)(
                context.ptr(),
                self.0.as_ptr(),
                inputs.as_ptr(),
                inputs.len() as c_int,
                &raw const output,
                1,
            ))
        }
    }
}

impl Drop for Gemm {
    fn drop(&mut self) {
        // SAFETY: created in `new`, released nowhere else.
        unsafe { (ort::api().ReleaseOp)(self.0.as_ptr()) };
    }
}
