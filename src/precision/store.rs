//! The tensors of a bundle in its precision, in one safetensors file.

use super::choose::{Chosen, Matrix};
use super::{PrecisionError, WEIGHTS_FILE};
use crate::checkpoint::{
    ALIASES, Checkpoint, NamedShape, add_aliases, aliases_json, read_index, safetensors_mixed_header,
};
use crate::staging::Staging;
use crate::tensor::Tensor;
use accordion_calibration::quantize::{
    Bits, INT8_MAX, ScaleSign, quantize_blocks, quantize_float8, quantize_rows_int8,
};
use accordion_graphs::dtype::DType;
use accordion_graphs::fp8;
use accordion_graphs::precision::{MatrixForm, MatrixPart};
use accordion_graphs::weights::WeightIndex;
use half::{bf16, f16};
use std::collections::{BTreeMap, HashMap};
use std::io::{self, BufWriter, Write};

const BUFFER: usize = 1 << 20;

/// A tensor to write.
struct Entry {
    name: String,
    dtype: DType,
    shape: Vec<usize>,
    source: Source,
}

/// Where its bytes come from.
enum Source {
    /// The checkpoint's tensor of that name, as it is.
    Checkpoint,
    /// The checkpoint's tensor of that name, rounded.
    Rounded,
    /// A part of the matrix called so.
    Part { matrix: String, part: MatrixPart },
}

/// Writes `tensors`, those that are `chosen` by their parts, and returns where they are. What is the same tensor in the checkpoint
/// by another name is written once, and `aliases.json` has the other names.
pub(super) fn write(
    checkpoint: &Checkpoint,
    tensors: &[NamedShape],
    chosen: &Chosen,
    staging: &mut Staging,
) -> Result<WeightIndex, PrecisionError> {
    let (entries, aliases) = without_aliases(entries(checkpoint, tensors, chosen)?, checkpoint.weights().aliases());
    let total = entries.iter().filter_map(|entry| entry.dtype.bytes_of_shape(&entry.shape)).sum::<usize>();
    staging.check_room(total as u64)?;
    let header =
        safetensors_mixed_header(entries.iter().map(|entry| (entry.name.clone(), entry.dtype, entry.shape.clone())));
    let mut problem = None;
    staging
        .write_with(WEIGHTS_FILE, |file| {
            let mut file = BufWriter::with_capacity(BUFFER, file);
            file.write_all(&header)?;
            // What entries count in units of comes from the same computation, and is written behind all entries.
            let mut later = BTreeMap::new();
            for entry in &entries {
                match entry.bytes(checkpoint, chosen, &mut later) {
                    Ok(bytes) => file.write_all(&bytes)?,
                    Err(error) => {
                        problem = Some(error);
                        return Err(io::Error::other("a tensor cannot be quantized"));
                    }
                }
            }
            file.flush()
        })
        .map_err(|error| problem.unwrap_or(PrecisionError::Staging(error)))?;
    if let Some(from) = checkpoint.weights().files().first() {
        staging.date_like(WEIGHTS_FILE, from)?;
    }
    let mut index = read_index(&[staging.path(WEIGHTS_FILE)]).map_err(Box::new)?;
    if !aliases.is_empty() {
        staging.write_json(ALIASES, &aliases_json(&aliases))?;
        add_aliases(&staging.path(ALIASES), &mut index).map_err(Box::new)?;
    }
    Ok(index)
}

/// The entries without those of a tensor that is there by another name and in the same form, and the names of these.
fn without_aliases(
    mut entries: Vec<Entry>,
    known: &BTreeMap<String, String>,
) -> (Vec<Entry>, BTreeMap<String, String>) {
    let mut written: HashMap<(String, DType), String> = HashMap::new();
    let mut aliases = BTreeMap::new();
    entries.retain(|entry| {
        if let Source::Part { .. } = entry.source {
            return true;
        }
        let tensor = known.get(&entry.name).unwrap_or(&entry.name).clone();
        let first = written.entry((tensor, entry.dtype)).or_insert_with(|| entry.name.clone());
        if *first != entry.name {
            aliases.insert(entry.name.clone(), first.clone());
        }
        *first == entry.name
    });
    (entries, aliases)
}

/// What the file holds, in its order: entries first, whose lengths are multiples of a vector in every model of use, so that
/// all begin where vectors load best; then what is counted in, then what stays as it is.
fn entries(checkpoint: &Checkpoint, tensors: &[NamedShape], chosen: &Chosen) -> Result<Vec<Entry>, PrecisionError> {
    let mut entries = Vec::new();
    for (name, shape) in tensors {
        if let Some(&Matrix { form, shape, .. }) = chosen.matrices.get(name) {
            entries.extend(form.parts(shape).into_iter().map(|(part, dtype, shape)| Entry {
                name: form.part_name(name, part),
                dtype,
                shape,
                source: Source::Part { matrix: name.clone(), part },
            }));
        } else if let Some(&dtype) = chosen.rounded.get(name) {
            entries.push(Entry { name: name.clone(), dtype, shape: shape.clone(), source: Source::Rounded });
        } else {
            let dtype = checkpoint.tensor(name).map_err(Box::new)?.dtype();
            entries.push(Entry { name: name.clone(), dtype, shape: shape.clone(), source: Source::Checkpoint });
        }
    }
    entries.sort_by_key(|entry| match entry.source {
        Source::Part { part: MatrixPart::Entries, .. } => 0,
        Source::Part { .. } => 1,
        Source::Rounded => 2,
        Source::Checkpoint => 3,
    });
    Ok(entries)
}

impl Entry {
    /// The bytes of the tensor. Entries leave the other parts of their matrix in `later`.
    fn bytes(
        &self,
        checkpoint: &Checkpoint,
        chosen: &Chosen,
        later: &mut BTreeMap<(String, MatrixPart), Vec<f32>>,
    ) -> Result<Vec<u8>, PrecisionError> {
        let (name, part) = match &self.source {
            Source::Checkpoint => return Ok(checkpoint.tensor(&self.name).map_err(Box::new)?.bytes().to_vec()),
            Source::Rounded => {
                return rounded(&self.name, &checkpoint.tensor(&self.name).map_err(Box::new)?, self.dtype);
            }
            Source::Part { matrix, part } => (matrix, *part),
        };
        if part != MatrixPart::Entries {
            let numbers = later.remove(&(name.clone(), part)).unwrap_or_default();
            return Ok(numbers.iter().flat_map(|x| x.to_le_bytes()).collect());
        }
        let Some(Matrix { form, input, .. }) = chosen.matrices.get(name) else { return Ok(Vec::new()) };
        let tensor = checkpoint.tensor(name).map_err(Box::new)?;
        let (mut weights, columns) = (tensor.to_f32(), tensor.shape().last().copied().unwrap_or(0));
        if let Some(input) = input {
            if let Some(factors) = &input.factors {
                for (weight, factor) in weights.iter_mut().zip(factors.iter().cycle()) {
                    *weight /= factor;
                }
                later.insert((name.clone(), MatrixPart::Smoothing), factors.clone());
            }
            let levels = if *form == MatrixForm::Fp8 { fp8::MAX } else { INT8_MAX };
            later.insert((name.clone(), MatrixPart::InputScale), vec![input.threshold / levels]);
        }
        let (bytes, scale) = match *form {
            MatrixForm::Int8 { .. } | MatrixForm::Int8PerToken { .. } => {
                quantize_rows_int8(&weights, columns).map(|(entries, scale)| (to_bytes(&entries), scale))
            }
            MatrixForm::Block { bits, block } => {
                let bits = if bits == 8 { Bits::Eight } else { Bits::Four };
                quantize_blocks(&weights, columns, bits, block, ScaleSign::Either)
                    .map(|blocks| (blocks.packed, blocks.scales))
            }
            MatrixForm::Fp8 => {
                quantize_float8(&weights, fp8::MAX, fp8::from_f32).map(|(entries, scale)| (entries, vec![scale]))
            }
        }
        .map_err(|source| PrecisionError::Quantize { name: name.clone(), source })?;
        later.insert((name.clone(), MatrixPart::Scale), scale);
        Ok(bytes)
    }
}

fn to_bytes(entries: &[i8]) -> Vec<u8> {
    entries.iter().map(|x| x.cast_unsigned()).collect()
}

/// The bytes of `tensor`, called `name`, in the 16-bit format `dtype`. What is infinite stays so, but nothing becomes it.
fn rounded(name: &str, tensor: &Tensor, dtype: DType) -> Result<Vec<u8>, PrecisionError> {
    if tensor.dtype() == dtype {
        return Ok(tensor.bytes().to_vec());
    }
    let mut bytes = Vec::with_capacity(2 * tensor.len());
    for value in tensor.to_f32() {
        let (number, back) = if dtype == DType::F16 {
            let number = f16::from_f32(value);
            (number.to_bits(), number.to_f32())
        } else {
            let number = bf16::from_f32(value);
            (number.to_bits(), number.to_f32())
        };
        if back.is_infinite() && value.is_finite() {
            return Err(PrecisionError::Overflow { name: name.to_owned(), value, dtype });
        }
        bytes.extend(number.to_le_bytes());
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn rounding_refuses_what_becomes_infinite() {
        let tensor = |values: &[f32]| Tensor::from_f32([values.len()], values.to_vec()).unwrap();
        let bytes = rounded("w", &tensor(&[1.0, -65519.0, f32::INFINITY]), DType::F16).unwrap();
        assert_eq!(bytes, [0x00, 0x3C, 0xFF, 0xFB, 0x00, 0x7C]);
        let error = rounded("w", &tensor(&[1.0, 65520.0]), DType::F16).unwrap_err().to_string();
        assert!(error.contains("'w' holds 65520, which fp16"), "{error}");
        assert_eq!(rounded("w", &tensor(&[65520.0]), DType::Bf16).unwrap(), [0x80, 0x47]);
        assert!(rounded("w", &tensor(&[f32::MAX]), DType::Bf16).is_err());
    }
}
