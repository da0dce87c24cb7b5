//! Element types of checkpoint tensors and graph values.

use serde::{Deserialize, Serialize};

/// An element type that both safetensors and ONNX can store.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DType {
    /// IEEE single precision.
    F32,
    /// IEEE half precision.
    F16,
    /// The upper half of an `f32`.
    Bf16,
    /// Signed 64-bit integer: ids, positions, lengths.
    I64,
    /// Signed 32-bit integer.
    I32,
    /// Boolean, one byte an element.
    Bool,
    /// Unsigned byte.
    U8,
    /// Signed byte.
    I8,
    /// Signed 4-bit integer, two to a byte, the first of them in the lower half.
    I4,
    /// 8-bit float with 4 bits of exponent, finite up to 448.
    F8E4m3,
}

impl DType {
    /// Size of one element in bytes; of the smallest type, of the byte that holds two.
    pub const fn size(self) -> usize {
        match self {
            Self::I64 => 8,
            Self::F32 | Self::I32 => 4,
            Self::F16 | Self::Bf16 => 2,
            Self::Bool | Self::U8 | Self::I8 | Self::I4 | Self::F8E4m3 => 1,
        }
    }

    /// Bytes that `elements` take, if the number can be told.
    pub const fn bytes_of(self, elements: usize) -> Option<usize> {
        match self {
            Self::I4 => Some(elements.div_ceil(2)),
            _ => elements.checked_mul(self.size()),
        }
    }

    /// Bytes that a tensor of this shape takes, if the number can be told.
    pub fn bytes_of_shape(self, shape: &[usize]) -> Option<usize> {
        shape.iter().try_fold(1_usize, |n, &dim| n.checked_mul(dim)).and_then(|elements| self.bytes_of(elements))
    }

    /// Whether the elements are floating-point numbers.
    pub const fn is_float(self) -> bool {
        matches!(self, Self::F32 | Self::F16 | Self::Bf16 | Self::F8E4m3)
    }
}

impl std::fmt::Display for DType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::F32 => "fp32",
            Self::F16 => "fp16",
            Self::Bf16 => "bf16",
            Self::I64 => "int64",
            Self::I32 => "int32",
            Self::Bool => "bool",
            Self::U8 => "uint8",
            Self::I8 => "int8",
            Self::I4 => "int4",
            Self::F8E4m3 => "fp8-e4m3",
        })
    }
}
