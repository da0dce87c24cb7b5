//! Parts of golden tensors.
//!
//! Some of what the authors' code computes reaches nothing, and an implementation may leave it out. It then gives the rest
//! under the golden name and the ranges along each axis, as Python writes them: `len150/prefill_logits[:, 24:]`. Ranges of
//! axes that are not named are whole.

use super::compare::{Tensors, integers};
use accordion::tensor::Tensor;
use ndarray::{ArrayD, Axis, IxDyn, Slice};

/// The tensors that are parts of `name`: key, ranges, value.
pub(crate) fn of<'a>(
    name: &'a str,
    found: &'a Tensors,
) -> impl Iterator<Item = (&'a str, Vec<(usize, usize)>, &'a Tensor)> {
    let from = format!("{name}[");
    let keys = found.range(from.clone()..).take_while(move |(key, _)| key.starts_with(&from));
    keys.map(move |(key, value)| (key.as_str(), ranges(&key[name.len()..]).unwrap_or_else(|| panic!("{key}")), value))
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

/// The part `ranges` of `tensor`.
pub(crate) fn slice(tensor: &Tensor, ranges: &[(usize, usize)]) -> Result<Tensor, String> {
    assert!(integers(tensor).is_none(), "integers are compared as a whole");
    let mut array = ArrayD::from_shape_vec(IxDyn(tensor.shape()), tensor.to_f32()).map_err(|e| e.to_string())?;
    for (axis, &(start, end)) in ranges.iter().enumerate() {
        let len = tensor.shape().get(axis).copied().unwrap_or(0);
        let end = end.min(len);
        if start >= end {
            return Err(format!("the golden has no rows {start}..{end} along axis {axis} of {:?}", tensor.shape()));
        }
        array.slice_axis_inplace(Axis(axis), Slice::from(start..end));
    }
    Tensor::from_f32(array.shape(), array.iter().copied().collect()).map_err(|e| e.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_cut_along_every_named_axis() {
        let tensor = Tensor::from_f32([2, 3, 2], (0..12_u8).map(f32::from).collect()).unwrap();
        let part = |text: &str| slice(&tensor, &ranges(text).unwrap()).map(|t| (t.shape().to_vec(), t.to_f32()));
        assert_eq!(part("[1:, 1:2]"), Ok((vec![1, 1, 2], vec![8.0, 9.0])));
        assert_eq!(part("[:, :, 1:]").unwrap().1, [1.0, 3.0, 5.0, 7.0, 9.0, 11.0]);
        assert!(part("[:, 3:]").is_err());
        assert_eq!(ranges("[1]"), None);
    }
}
