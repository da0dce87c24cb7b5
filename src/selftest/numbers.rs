//! Numbers as bytes of an element type, and back.

use crate::cuda::Element;
use half::{bf16, f16};

/// The elements' bytes; each number is rounded to the nearest.
pub fn encode(values: &[f32], element: Element) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(values.len() * element.bytes());
    for &value in values {
        match element {
            Element::F32 => bytes.extend(value.to_le_bytes()),
            Element::F16 => bytes.extend(f16::from_f32(value).to_le_bytes()),
            Element::Bf16 => bytes.extend(bf16::from_f32(value).to_le_bytes()),
        }
    }
    bytes
}

/// `int64` as bytes.
pub(super) fn integers(values: &[i64]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

/// Bytes as `int64`.
pub(super) fn to_integers(bytes: &[u8]) -> Vec<i64> {
    bytes.as_chunks().0.iter().map(|bytes| i64::from_le_bytes(*bytes)).collect()
}

/// Bytes as `float32`.
pub(super) fn to_floats(bytes: &[u8]) -> Vec<f32> {
    bytes.as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect()
}

/// What identifies numbers that are the same to the operators: NaN is one, and so are the zeros, of which a sum may give
/// either.
pub fn identities(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| if value.is_nan() { f32::NAN.to_bits() } else { (value + 0.0).to_bits() }).collect()
}
