//! The product of `StridedCompress`, by cuBLASLt: it reads the kept rows where they are, through their leading dimension.

use super::calls::{Address, Element, Refusal, StridedCompress, StridedRows};
use super::device::Device;
use super::error::CudaError;
use super::kernels::Kernels;
use super::libraries::require;
use cudarc::cublaslt::result::{self, CublasError};
use cudarc::cublaslt::sys;
use std::ffi::{CStr, c_void};

const FUNCTIONS: &[&CStr] = &[
    c"cublasLtCreate",
    c"cublasLtDestroy",
    c"cublasLtMatmul",
    c"cublasLtMatmulAlgoGetHeuristic",
    c"cublasLtMatmulDescCreate",
    c"cublasLtMatmulDescDestroy",
    c"cublasLtMatmulDescSetAttribute",
    c"cublasLtMatmulPreferenceCreate",
    c"cublasLtMatmulPreferenceDestroy",
    c"cublasLtMatmulPreferenceSetAttribute",
    c"cublasLtMatrixLayoutCreate",
    c"cublasLtMatrixLayoutDestroy",
];

/// As in `cublas_api.h`.
const CUBLAS_OP_T: i32 = 1;

/// As in `cublasLt.h`. Sums that are split must not be rounded to half precision before they are added.
const REDUCTION_IN_COMPUTE_TYPE: u32 = 2;

/// What the product may use besides its operands, in bytes.
const WORKSPACE_BYTES: usize = 32 << 20;

/// cuBLASLt, for one device's stream.
#[derive(Debug)]
pub struct CublasLt {
    handle: sys::cublasLtHandle_t,
    device: Device,
}

// SAFETY: cuBLASLt lets any thread use a handle, several at a time; the device is shared as such.
unsafe impl Send for CublasLt {}
// SAFETY: as above.
unsafe impl Sync for CublasLt {}

/// `y [n, m] = a [n, k] w^T`, where `w` is `[m, k]`, all row-major and the rows of `a` `a_stride` elements apart.
#[derive(Debug, Clone, Copy)]
struct Product {
    n: i64,
    m: i64,
    k: i64,
    w: Address,
    a: Address,
    a_stride: i64,
    y: Address,
    element: Element,
}

/// A description of cuBLASLt's, destroyed when dropped.
struct Description<T: Copy>(T, unsafe fn(T) -> Result<(), CublasError>);

impl<T: Copy> Drop for Description<T> {
    fn drop(&mut self) {
        // SAFETY: created with it, destroyed once. Nothing can be done about a failure.
        let _ = unsafe { (self.1)(self.0) };
    }
}

impl CublasLt {
    /// Starts it.
    ///
    /// # Errors
    ///
    /// It is not there, or does not start.
    pub fn open(device: &Device) -> Result<CublasLt, CudaError> {
        require("cublasLt", "cuBLASLt", FUNCTIONS).map_err(|reason| CudaError::CublasLt { reason })?;
        let failed = |source| CudaError::Product { action: "start cuBLASLt", source };
        Ok(CublasLt { handle: result::create_handle().map_err(failed)?, device: device.clone() })
    }

    /// Bytes of workspace that a call needs.
    ///
    /// # Errors
    ///
    /// The lengths are outside the contract.
    pub fn workspace_bytes(rows: &StridedRows) -> Result<usize, Refusal> {
        Ok(mean_bytes(rows)? + WORKSPACE_BYTES)
    }

    /// Compresses, and does not wait for it.
    ///
    /// # Errors
    ///
    /// The call is outside the contract, or cuBLASLt or the driver refuses.
    ///
    /// # Safety
    ///
    /// The addresses are those of tensors on the device with the call's lengths, which stay until the work is done.
    pub unsafe fn compress(&self, kernels: &Kernels, call: &StridedCompress) -> Result<(), CudaError> {
        let StridedCompress { rows, weight, out_width, workspace, workspace_bytes } = *call;
        let refuse = |reason: &str| Refusal { operator: "StridedCompress", reason: reason.to_owned() };
        let (n, k, reserved) = (rows.kept()?, rows.width, mean_bytes(&rows)?);
        let is_length = |length: i64| (0..=i64::from(i32::MAX)).contains(&length);
        if !is_length(out_width) || !is_length(n) {
            return Err(refuse("y has 2^31 or more rows or columns, or a negative number").into());
        }
        if n == 0 || out_width == 0 {
            return Ok(());
        }
        if k == 0 || rows.x == 0 || rows.y == 0 || weight == 0 {
            return Err(refuse("x, y and weight must have elements and an address").into());
        }
        if workspace_bytes < reserved || (workspace_bytes > 0 && workspace == 0) {
            return Err(refuse("the workspace is smaller than the mean of the inputs, or has no address").into());
        }
        let mut product = Product {
            n,
            m: out_width,
            k,
            w: weight,
            a: rows.x + (rows.offset * k) as u64 * rows.element.bytes() as u64,
            a_stride: rows.ratio * k,
            y: rows.y,
            element: rows.element,
        };
        if rows.x2 != 0 {
            // SAFETY: the workspace holds as many rows; else the caller's promise.
            unsafe { kernels.strided_rows(&StridedRows { y: workspace, ..rows }) }?;
            (product.a, product.a_stride) = (workspace, k);
        }
        // SAFETY: the caller's promise.
        unsafe { self.multiply(&product, workspace + reserved as u64, workspace_bytes - reserved) }
            .map_err(|source| CudaError::Product { action: "multiply by cuBLASLt", source })
    }

    /// cuBLAS is column-major: what it sees is `y^T = w a^T`.
    unsafe fn multiply(
        &self,
        product: &Product,
        workspace: Address,
        workspace_bytes: usize,
    ) -> Result<(), CublasError> {
        use sys::cublasLtMatmulPreferenceAttributes_t as Preference;
        let Product { n, m, k, w, a, a_stride, y, element } = *product;
        let data = match element {
            Element::F32 => sys::cudaDataType::CUDA_R_32F,
            Element::F16 => sys::cudaDataType::CUDA_R_16F,
            Element::Bf16 => sys::cudaDataType::CUDA_R_16BF,
        };
        let layout = |rows: i64, columns: i64, leading: i64| {
            let layout = result::create_matrix_layout(data, rows as u64, columns as u64, leading)?;
            Ok::<_, CublasError>(Description(layout, result::destroy_matrix_layout))
        };
        // float32 as it is, not TF32; half precision with sums in float32.
        let compute = sys::cublasComputeType_t::CUBLAS_COMPUTE_32F;
        let desc = result::create_matmul_desc(compute, sys::cudaDataType::CUDA_R_32F)?;
        let desc = Description(desc, result::destroy_matmul_desc);
        let (w_layout, a_layout, y_layout) = (layout(k, m, k)?, layout(k, n, a_stride)?, layout(m, n, m)?);
        let preference = Description(result::create_matmul_pref()?, result::destroy_matmul_pref);
        let set = |attribute, value: &dyn AsBytes| {
            let (at, size) = value.bytes();
            // SAFETY: the value has the attribute's type.
            unsafe { result::set_matmul_pref_attribute(preference.0, attribute, at, size) }
        };
        set(Preference::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &workspace_bytes)?;
        set(Preference::CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, &REDUCTION_IN_COMPUTE_TYPE)?;
        let bytes = element.bytes() as i64;
        set(Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, &alignment(w, k * bytes))?;
        set(Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, &alignment(a, a_stride * bytes))?;
        set(Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, &alignment(y, m * bytes))?;
        set(Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, &alignment(y, m * bytes))?;
        let (transpose, one, zero) = (CUBLAS_OP_T, 1.0_f32, 0.0_f32);
        let scalar = |value: &f32| std::ptr::from_ref(value).cast::<c_void>();
        // SAFETY: all descriptions are alive, attributes have their types, and the tensors are the caller's promise.
        unsafe {
            let (at, size) = transpose.bytes();
            let attribute = sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_TRANSA;
            result::set_matmul_desc_attribute(desc.0, attribute, at, size)?;
            let best = result::get_matmul_algo_heuristic(
                self.handle,
                desc.0,
                w_layout.0,
                a_layout.0,
                y_layout.0,
                y_layout.0,
                preference.0,
            )?;
            result::matmul(
                self.handle,
                desc.0,
                scalar(&one),
                scalar(&zero),
                w as *const c_void,
                w_layout.0,
                a as *const c_void,
                a_layout.0,
                y as *const c_void,
                y_layout.0,
                y as *mut c_void,
                y_layout.0,
                &raw const best.algo,
                workspace as *mut c_void,
                workspace_bytes,
                self.device.stream.cu_stream().cast(),
            )
        }
    }
}

impl Drop for CublasLt {
    fn drop(&mut self) {
        // SAFETY: created by `open`, destroyed once. Nothing can be done about a failure.
        let _ = unsafe { result::destroy_handle(self.handle) };
    }
}

/// Attributes are handed over as addresses and sizes.
trait AsBytes {
    fn bytes(&self) -> (*const c_void, usize);
}

macro_rules! as_bytes {
    ($($number:ty),*) => {$(
        impl AsBytes for $number {
            fn bytes(&self) -> (*const c_void, usize) {
                (std::ptr::from_ref(self).cast(), size_of::<$number>())
            }
        }
    )*};
}
as_bytes!(usize, u32, i32);

/// Bytes of the mean of two inputs, up to where the product's own workspace begins.
fn mean_bytes(rows: &StridedRows) -> Result<usize, Refusal> {
    let kept = rows.kept()?;
    // No more than the bytes of `x`, which can be counted.
    Ok(if rows.x2 == 0 { 0 } else { (kept * rows.width) as usize * rows.element.bytes() }.next_multiple_of(256))
}

/// The largest power of two, at most 256, that divides the address and the distance of rows.
fn alignment(address: Address, row_bytes: i64) -> u32 {
    1 << (address | row_bytes as u64 | 256).trailing_zeros()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn alignments_are_powers_of_two() {
        for (address, row, expected) in [(0x1000, 512, 256), (0x1000, 6, 2), (0x1010, 64, 16), (4, 0, 4), (0, 0, 256)] {
            assert_eq!(alignment(address, row), expected, "{address} {row}");
        }
    }

    #[test]
    fn only_a_mean_is_written_before_it_is_multiplied() {
        let rows = StridedRows { segments: 3, window: 8, width: 5, ratio: 4, offset: 3, ..StridedRows::default() };
        assert_eq!(CublasLt::workspace_bytes(&rows).unwrap(), WORKSPACE_BYTES);
        let mean = StridedRows { x2: 1, element: Element::F16, ..rows };
        assert_eq!(CublasLt::workspace_bytes(&mean).unwrap(), WORKSPACE_BYTES + 256);
        assert!(CublasLt::workspace_bytes(&StridedRows { ratio: 3, ..rows }).is_err());
    }
}
