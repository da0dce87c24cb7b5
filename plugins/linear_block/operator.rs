//! `ai.accordion::LinearBlock8` and `LinearBlock4` as custom operators of ONNX Runtime.

use super::{LinearBlockError, MIN_BLOCK, Weight, linear_block};
use crate::gemm::Gemm;
use crate::operator::{error, expect_shape, input, integer, output, tensor};
use crate::parallel::SessionThreads;
use crate::scratch::Scratch;
use ort::AsPointer;
use ort::operator::{
    ComputeContext, Kernel, KernelContext, Operator, OperatorInput, OperatorOutput, ShapeInferenceContext,
};
use ort::value::TensorElementType::{Float32, Int4, Int8};
use ort::value::{DynTensorValueType, TensorRef, TensorRefMut, ValueRef};
use std::cell::RefCell;

/// Rows up to which our kernel is faster than writing the weight in fp32 and the runtime's product.
const FEW_ROWS: usize = 8;

/// Elements of a panel of the weight, and of its results, that are kept in fp32 at a time.
const PANEL: usize = 4 * 1024 * 1024;

macro_rules! operator {
    ($(#[$doc:meta])* $operator:ident, $bits:literal, $type:ident) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy)]
        pub struct $operator;

        impl Operator for $operator {
            type Kernel<'attr> = LinearBlockKernel<$bits>;

            fn name(&self) -> &'static str {
                stringify!($operator)
            }

            fn inputs(&self) -> impl IntoIterator<Item = OperatorInput> {
                [Float32, $type, Float32].map(OperatorInput::required)
            }

            fn outputs(&self) -> impl IntoIterator<Item = OperatorOutput> {
                [OperatorOutput::required(Float32)]
            }

            fn create_kernel<'attr>(&self, context: &KernelContext<'attr>) -> ort::Result<Self::Kernel<'attr>> {
                LinearBlockKernel::new(context)
            }

            fn infer_shape(&self, _: &mut ShapeInferenceContext) -> ort::Result<()> {
                Ok(())
            }
        }
    };
}

operator! {
    /// The operator of `contract.md` for numbers of 8 bits, for the CPU provider.
    LinearBlock8, 8, Int8
}
operator! {
    /// The operator of `contract.md` for numbers of 4 bits, for the CPU provider.
    LinearBlock4, 4, Int4
}

/// The kernel: few rows here, more by the runtime.
pub struct LinearBlockKernel<const BITS: u8> {
    gemm: Gemm,
    block: usize,
}

impl<const BITS: u8> LinearBlockKernel<BITS> {
    fn new(context: &KernelContext<'_>) -> ort::Result<Self> {
        let block = integer(context, "block_size")?;
        if block < MIN_BLOCK || !block.is_power_of_two() {
            return Err(error(LinearBlockError::BlockSize(block)));
        }
        Ok(Self { gemm: Gemm::new(context, 2)?, block })
    }
}

impl<const BITS: u8> Kernel for LinearBlockKernel<BITS> {
    fn compute(&mut self, context: &ComputeContext) -> ort::Result<()> {
        let (x_value, scale_value) = (input(context, 0, "x")?, input(context, 2, "scale")?);
        let weight_value = input(context, 1, "weight")?.downcast::<DynTensorValueType>()?;
        let ([rows, inner], x) = tensor::<f32, 2>(&x_value, "x")?;
        let block = self.block;
        if !inner.is_multiple_of(block) {
            return Err(error(LinearBlockError::Inner { inner, block }));
        }
        let ([outer, weight_inner], numbers) = packed::<BITS>(&weight_value)?;
        if weight_inner != inner {
            return Err(error(format!("weight has {weight_inner} columns, expected those of x, {inner}")));
        }
        let (shape, scale) = tensor::<f32, 2>(&scale_value, "scale")?;
        expect_shape("scale", &shape, &[outer, inner / block])?;
        let mut y = output(context, 0, "y", [rows, outer])?;
        let y = y.try_extract_tensor_mut::<f32>()?.1;
        let weight = Weight::<BITS> { outer, inner, block, numbers, scale };
        if rows <= FEW_ROWS || inner == 0 {
            return linear_block(rows, x, &weight, y, &SessionThreads(context)).map_err(error);
        }
        // Taken, not borrowed: whatever else this thread may run meanwhile finds memory of its own.
        let mut panels = PANELS.take();
        let result = self.many(context, &x_value, rows, &weight, y, &mut panels);
        PANELS.set(panels);
        result
    }
}

/// A panel of the weight in fp32, and what it gives.
#[derive(Default)]
struct Panels {
    weight: Scratch,
    result: Scratch,
}

thread_local! {
    static PANELS: RefCell<Panels> = RefCell::default();
}

impl<const BITS: u8> LinearBlockKernel<BITS> {
    /// The runtime's own product with the weight in fp32; panel by panel where that would be large.
    fn many(
        &self,
        context: &ComputeContext,
        x: &ValueRef<'_>,
        rows: usize,
        weight: &Weight<'_, BITS>,
        y: &mut [f32],
        panels: &mut Panels,
    ) -> ort::Result<()> {
        let (outer, inner) = (weight.outer, weight.inner);
        let product = |weight: &Weight<'_, BITS>, memory: &mut Scratch, result: &mut [f32]| {
            let columns = weight.outer;
            let memory = &mut memory.at_least(columns * inner)[..columns * inner];
            weight.dequantize(memory, &SessionThreads(context)).map_err(error)?;
            let weight = TensorRef::from_array_view(([columns, inner], &*memory))?;
            let result = TensorRefMut::from_array_view_mut(([rows, columns], result))?;
            self.gemm.invoke(context, &[x.ptr(), weight.ptr()], result.ptr().cast_mut())
        };
        if outer * inner <= PANEL {
            return product(weight, &mut panels.weight, y);
        }
        let columns = (PANEL / inner.max(rows)).clamp(1, outer);
        for first in (0..outer).step_by(columns) {
            let columns = columns.min(outer - first);
            let result = &mut panels.result.at_least(rows * columns)[..rows * columns];
            product(&weight.rows(first, columns), &mut panels.weight, result)?;
            for (from, to) in result.chunks_exact(columns).zip(y.chunks_exact_mut(outer)) {
                to[first..first + columns].copy_from_slice(from);
            }
        }
        Ok(())
    }
}

/// The shape of `weight`, and the bytes that hold its numbers.
fn packed<'v, const BITS: u8>(weight: &'v ValueRef<'_, DynTensorValueType>) -> ort::Result<([usize; 2], &'v [u8])> {
    let dims: Vec<usize> = weight.shape().iter().map(|&dim| dim.max(0) as usize).collect();
    let &[outer, inner] = &dims[..] else {
        return Err(error(format!("weight has shape {dims:?}, expected 2 dimensions")));
    };
    let numbers = outer.checked_mul(inner).ok_or_else(|| error(format!("weight has shape {dims:?}: too large")))?;
    let expected = if BITS == 8 { Int8 } else { Int4 };
    match weight.dtype().tensor_type() {
        Some(found) if found == expected => {}
        found => return Err(error(format!("weight has type {found:?}, expected {expected}"))),
    }
    if numbers == 0 {
        return Ok(([outer, inner], &[]));
    }
    let bytes = numbers.div_ceil(8 / usize::from(BITS));
    // SAFETY: the runtime stores so many bytes for a tensor of this type and shape, and keeps them while the call lasts.
    Ok(([outer, inner], unsafe { std::slice::from_raw_parts(weight.data_ptr().cast(), bytes) }))
}
