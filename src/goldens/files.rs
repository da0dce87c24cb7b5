//! Reading the files of a case: JSON and safetensors, with errors that name the file and the key.

use super::{GoldenError, Result};
use crate::tensor::{Tensor, TensorError};
use accordion_graphs::dtype::DType;
use half::{bf16, f16};
use safetensors::{Dtype, SafeTensors};
use serde::de::DeserializeOwned;
use std::collections::{BTreeMap, HashMap};
use std::fmt::Display;
use std::path::Path;
use std::sync::Arc;

pub(super) fn missing(path: &Path, key: &str) -> GoldenError {
    GoldenError::Missing { path: path.to_owned(), key: key.to_owned() }
}

pub(super) fn invalid(path: &Path, key: &str, found: &dyn Display, expected: &dyn Display) -> GoldenError {
    GoldenError::Invalid {
        path: path.to_owned(),
        key: key.to_owned(),
        found: found.to_string(),
        expected: expected.to_string(),
    }
}

pub(super) fn read(path: &Path) -> Result<Vec<u8>> {
    std::fs::read(path).map_err(|source| GoldenError::Io { path: path.to_owned(), source })
}

pub(super) fn parse_json<T: DeserializeOwned>(path: &Path, text: &[u8]) -> Result<T> {
    serde_json::from_slice(text).map_err(|source| GoldenError::Format {
        path: path.to_owned(),
        kind: "JSON",
        source: source.into(),
    })
}

pub(super) type Tensors = BTreeMap<String, Tensor>;
pub(super) type Metadata = HashMap<String, String>;

/// All tensors of a safetensors file, and its metadata.
pub(super) fn read_tensors(path: &Path) -> Result<(Tensors, Metadata)> {
    let bytes = read(path)?;
    let malformed = |source| GoldenError::Format { path: path.to_owned(), kind: "safetensors", source };
    let (_, header) = SafeTensors::read_metadata(&bytes).map_err(|e| malformed(e.into()))?;
    let file = SafeTensors::deserialize(&bytes).map_err(|e| malformed(e.into()))?;
    let mut tensors = BTreeMap::new();
    for (name, view) in file.iter() {
        let (shape, data) = (view.shape(), view.data());
        let tensor = match view.dtype() {
            Dtype::F32 => Tensor::from_f32(shape, numbers(data, f32::from_le_bytes)),
            Dtype::I64 => Tensor::from_i64(shape, numbers(data, i64::from_le_bytes)),
            Dtype::I32 => Tensor::from_i32(shape, numbers(data, i32::from_le_bytes)),
            Dtype::F16 => Tensor::from_storage(DType::F16, shape, Arc::new(numbers(data, f16::from_le_bytes)), 0),
            Dtype::BF16 => Tensor::from_storage(DType::Bf16, shape, Arc::new(numbers(data, bf16::from_le_bytes)), 0),
            Dtype::U8 | Dtype::BOOL => Tensor::from_storage(DType::Bool, shape, Arc::new(data.to_vec()), 0),
            other => return Err(invalid(path, name, &format!("{other:?}"), &"F32, F16, BF16, I64, I32, U8 or BOOL")),
        };
        tensors.insert(name.to_owned(), tensor.map_err(|e: TensorError| malformed(e.into()))?);
    }
    Ok((tensors, header.metadata().clone().unwrap_or_default()))
}

fn numbers<T, const N: usize>(bytes: &[u8], number: impl Fn([u8; N]) -> T) -> Vec<T> {
    bytes.as_chunks::<N>().0.iter().map(|&chunk| number(chunk)).collect()
}

/// `tensor` after a round trip through `dtype`, as `f32`.
pub(super) fn rounded(path: &Path, tensor: &Tensor, dtype: DType) -> Result<Tensor> {
    let mut values = tensor.to_f32();
    match dtype {
        DType::F16 => values.iter_mut().for_each(|v| *v = f16::from_f32(*v).to_f32()),
        DType::Bf16 => values.iter_mut().for_each(|v| *v = bf16::from_f32(*v).to_f32()),
        _ => {}
    }
    Tensor::from_f32(tensor.shape(), values).map_err(|source| GoldenError::Format {
        path: path.to_owned(),
        kind: "safetensors",
        source: source.into(),
    })
}

/// The token ids that the tensor `key` holds, in row-major order.
pub(super) fn token_ids(path: &Path, key: &str, tensor: &Tensor) -> Result<Vec<u32>> {
    let ids = tensor.as_i64().map_err(|_| invalid(path, key, &format!("{tensor:?}"), &"int64"))?;
    ids.iter().map(|&id| u32::try_from(id).map_err(|_| invalid(path, key, &id, &"a token id"))).collect()
}
