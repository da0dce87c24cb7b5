//! Parts of golden tensors.
//!
//! Some of what the authors' code computes reaches nothing, and an implementation may leave it out. It then gives the rest
//! under the golden name and the ranges along each axis, as Python writes them: `len150/prefill_logits[:, 24:]`. Ranges of
//! axes that are not named are whole.

use super::Tensors;
use crate::tensor::Tensor;
use accordion_graphs::dtype::DType;
use ndarray::{ArrayD, Axis, IxDyn, Slice};

/// What was found of the golden tensor `name`, as a whole or of parts of it: key, what is expected there, value. A part that
/// the golden does not have is held against the whole, whose shape it cannot have.
pub fn pairs<'a>(name: &'a str, expected: &Tensor, found: &'a Tensors) -> Vec<(&'a str, Tensor, &'a Tensor)> {
    let from = format!("{name}[");
    let whole = found.get(name).map(|value| (name, expected.clone(), value));
    let parts = found.range(from.clone()..).take_while(|(key, _)| key.starts_with(&from)).map(|(key, value)| {
        let part = ranges(&key[name.len()..]).and_then(|ranges| slice(expected, &ranges));
        (key.as_str(), part.unwrap_or_else(|| expected.clone()), value)
    });
    whole.into_iter().chain(parts).collect()
}

/// Start and end of every range; an end that is not named is the largest number.
fn ranges(text: &str) -> Option<Vec<(usize, usize)>> {
    let ranges = text.strip_prefix('[')?.strip_suffix(']')?.split(',').map(|range| {
        let (start, end) = range.trim().split_once(':')?;
        let bound = |text: &str, default| if text.is_empty() { Some(default) } else { text.parse().ok() };
        Some((bound(start, 0)?, bound(end, usize::MAX)?))
    });
    ranges.collect()
}

/// The part `ranges` of `tensor`, a tensor of floats.
fn slice(tensor: &Tensor, ranges: &[(usize, usize)]) -> Option<Tensor> {
    if ranges.len() > tensor.shape().len() || !matches!(tensor.dtype(), DType::F32 | DType::F16 | DType::Bf16) {
        return None;
    }
    let mut array = ArrayD::from_shape_vec(IxDyn(tensor.shape()), tensor.to_f32()).ok()?;
    for (axis, (&(start, end), &len)) in ranges.iter().zip(tensor.shape()).enumerate() {
        let end = end.min(len);
        if start >= end {
            return None;
        }
        array.slice_axis_inplace(Axis(axis), Slice::from(start..end));
    }
    Tensor::from_f32(array.shape(), array.iter().copied().collect()).ok()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn parts_are_cut_along_every_named_axis() {
        let tensor = Tensor::from_f32([2, 3, 2], (0..12_u8).map(f32::from).collect()).unwrap();
        let part = |text: &str| slice(&tensor, &ranges(text).unwrap()).map(|t| (t.shape().to_vec(), t.to_f32()));
        assert_eq!(part("[1:, 1:2]"), Some((vec![1, 1, 2], vec![8.0, 9.0])));
        assert_eq!(part("[:, :, 1:]").unwrap().1, [1.0, 3.0, 5.0, 7.0, 9.0, 11.0]);
        assert!(part("[:, 3:]").is_none());
        assert_eq!(ranges("[1]"), None);
    }
}
