//! The runtime's own matrix product, for kernels that leave many rows to it.

use crate::operator::error;
use ort::operator::{ComputeContext, KernelContext};
use ort::{AsPointer, Error, sys};
use std::ffi::{CStr, c_int, c_void};
use std::ptr::{NonNull, null_mut};

/// The runtime's own `Gemm` with `transB`.
pub(crate) struct Gemm(NonNull<sys::OrtOp>);

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

    /// For nodes with that many inputs: `x [rows, in]`, `weight [out, in]` and perhaps `bias [out]`.
    pub(crate) fn new(context: &KernelContext<'_>, inputs: usize) -> ort::Result<Self> {
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

    /// Computes `output [rows, out]` of `inputs`, all of them fp32.
    pub(crate) fn invoke(
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
