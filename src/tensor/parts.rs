//! Tensors one behind the other, and parts of tensors: copied where they lie, so that what is on a device stays there.

use super::{HostBytes, Storage, Tensor, TensorError};
use accordion_graphs::dtype::DType;
use std::ops::Range;
use std::sync::Arc;

/// Runs of bytes, each as far behind the one before as a row of a matrix: what is copied from one memory into another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Runs {
    /// How many there are.
    pub count: usize,
    /// Bytes of each.
    pub bytes: usize,
    /// Byte of the one memory at which the first begins.
    pub from: usize,
    /// Bytes from one to the next there.
    pub from_pitch: usize,
    /// Byte of the other memory that the first is copied to.
    pub to: usize,
    /// Bytes from one to the next there.
    pub to_pitch: usize,
}

impl Runs {
    /// Whether they lie inside memories of so many bytes.
    pub fn fit(&self, from_len: usize, to_len: usize) -> bool {
        let fits = |start: usize, pitch: usize, len: usize| {
            let last = self.count.checked_sub(1).map_or(Some(0), |last| last.checked_mul(pitch));
            last.and_then(|last| last.checked_add(start)?.checked_add(self.bytes)).is_some_and(|end| end <= len)
        };
        fits(self.from, self.from_pitch, from_len) && fits(self.to, self.to_pitch, to_len)
    }
}

impl Tensor {
    /// `parts` one behind the other along dimension `axis`, in which alone they may differ. They are copied where they lie if
    /// that is one device, else on the host; a single one that has elements is not copied.
    ///
    /// # Errors
    ///
    /// They do not fit together, or the device fails.
    pub fn concat(parts: &[&Self], axis: usize) -> Result<Self, TensorError> {
        let unlike = || TensorError::Unlike { axis, parts: parts.iter().map(|part| format!("{part:?}")).collect() };
        let first = *parts.first().ok_or_else(unlike)?;
        let mut shape = first.shape.clone();
        let extent = parts.iter().try_fold(0_usize, |sum, part| {
            let mut expected = part.shape.clone();
            *expected.get_mut(axis)? = *shape.get(axis)?;
            (part.dtype == first.dtype && expected == shape).then(|| sum.checked_add(part.shape[axis]))?
        });
        shape[axis] = extent.ok_or_else(unlike)?;
        let filled: Vec<&Self> = parts.iter().copied().filter(|part| !part.is_empty()).collect();
        if let [only] = filled[..] {
            return only.reshaped(shape);
        }
        let run = |shape: &[usize]| run_bytes(first.dtype, &shape[axis..]).ok_or_else(unlike);
        let (to_pitch, count) = (run(&shape)?, shape[..axis].iter().product());
        let mut pieces = Vec::with_capacity(filled.len());
        let mut to = 0;
        for part in filled {
            let bytes = run(&part.shape)?;
            pieces.push((part, Runs { count, bytes, from: part.offset, from_pitch: bytes, to, to_pitch }));
            to += bytes;
        }
        Self::gathered(first.dtype, shape, &pieces)
    }

    /// Entries `range` of dimension `axis`: in the same memory where they lie together there, else copied, where they lie.
    ///
    /// # Errors
    ///
    /// There are no such entries, or the device fails.
    pub fn narrow(&self, axis: usize, range: Range<usize>) -> Result<Self, TensorError> {
        let outside = || TensorError::Outside { axis, range: range.clone(), shape: self.shape.clone() };
        let extent = *self.shape.get(axis).ok_or_else(outside)?;
        if range.start > range.end || range.end > extent {
            return Err(outside());
        }
        if range.len() == extent {
            return Ok(self.clone());
        }
        let mut shape = self.shape.clone();
        shape[axis] = range.len();
        let entry = run_bytes(self.dtype, &shape[axis + 1..]).ok_or_else(outside)?;
        let count = shape[..axis].iter().product();
        let from = self.offset + range.start * entry;
        if count == 1 {
            return Ok(Self { dtype: self.dtype, shape, storage: Arc::clone(&self.storage), offset: from });
        }
        let bytes = range.len() * entry;
        let runs = Runs { count, bytes, from, from_pitch: extent * entry, to: 0, to_pitch: bytes };
        Self::gathered(self.dtype, shape, &[(self, runs)])
    }

    /// The same elements at the beginning of memory of their own, where they lie.
    ///
    /// # Errors
    ///
    /// The device fails.
    pub fn detached(&self) -> Result<Self, TensorError> {
        let bytes = self.byte_len();
        let runs = Runs { count: 1, bytes, from: self.offset, from_pitch: bytes, to: 0, to_pitch: bytes };
        Self::gathered(self.dtype, self.shape.clone(), &[(self, runs)])
    }

    /// A tensor that `pieces` fill.
    fn gathered(dtype: DType, shape: Vec<usize>, pieces: &[(&Self, Runs)]) -> Result<Self, TensorError> {
        let Some(byte_len) = dtype.bytes_of_shape(&shape) else {
            return Err(TensorError::TooShort { dtype, shape, available: 0 });
        };
        let pieces: Vec<(&dyn Storage, Runs)> =
            pieces.iter().filter(|_| byte_len > 0).map(|&(part, runs)| (part.storage.as_ref(), runs)).collect();
        let there = pieces.first().map(|(storage, _)| storage.gathered(byte_len, &pieces));
        let storage = match there.transpose().map_err(TensorError::Device)?.flatten() {
            Some(storage) => storage,
            None => Arc::new(on_host(byte_len, &pieces)?),
        };
        Self::from_storage(dtype, shape, storage, 0)
    }
}

/// Bytes that elements of this shape take, if they end where a byte does and their number can be told.
fn run_bytes(dtype: DType, shape: &[usize]) -> Option<usize> {
    let elements = shape.iter().try_fold(1_usize, |n, &dim| n.checked_mul(dim))?;
    let bytes = dtype.bytes_of(elements)?;
    (dtype.bytes_of(elements.checked_mul(2)?)? == bytes.checked_mul(2)?).then_some(bytes)
}

fn on_host(byte_len: usize, pieces: &[(&dyn Storage, Runs)]) -> Result<HostBytes, TensorError> {
    let mut host = HostBytes::filled(byte_len, 0);
    for (storage, runs) in pieces {
        storage.fetch().map_err(TensorError::Device)?;
        let (from, to) = (storage.bytes(), host.bytes_mut());
        for i in 0..runs.count {
            let (start, goal) = (runs.from + i * runs.from_pitch, runs.to + i * runs.to_pitch);
            to[goal..goal + runs.bytes].copy_from_slice(&from[start..start + runs.bytes]);
        }
    }
    Ok(host)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn numbers(shape: [usize; 3], first: u8) -> Tensor {
        let count: usize = shape.iter().product();
        Tensor::from_f32(shape, (0..count).map(|i| f32::from(first) + i as f32).collect()).unwrap()
    }

    #[test]
    fn parts_lie_one_behind_the_other_along_any_axis() {
        let (a, b) = (numbers([2, 1, 2], 0), numbers([2, 2, 2], 10));
        let joined = Tensor::concat(&[&a, &b, &a], 1).unwrap();
        assert_eq!(joined.shape(), [2, 4, 2]);
        let expected = [0, 1, 10, 11, 12, 13, 0, 1, 2, 3, 14, 15, 16, 17, 2, 3].map(|i: u8| f32::from(i));
        assert_eq!(joined.as_f32().unwrap(), expected);
        let joined = Tensor::concat(&[&b.rows(1..2), &b], 0).unwrap();
        assert_eq!(
            (joined.shape(), joined.as_f32().unwrap()[..5].to_vec()),
            (&[3, 2, 2][..], vec![14.0, 15.0, 16.0, 17.0, 10.0])
        );
        let ids = [[1, 2], [3, 4]].map(|ids| Tensor::from_i64([2, 1], ids.to_vec()).unwrap());
        assert_eq!(Tensor::concat(&[&ids[0], &ids[1]], 1).unwrap().as_i64().unwrap(), [1, 3, 2, 4]);
    }

    #[test]
    fn what_has_no_elements_adds_nothing_and_a_single_part_is_not_copied() {
        let (none, some) = (numbers([2, 0, 2], 0), numbers([2, 3, 2], 0));
        let joined = Tensor::concat(&[&none, &some, &none], 1).unwrap();
        assert_eq!((joined.shape(), joined.bytes().as_ptr()), (some.shape(), some.bytes().as_ptr()));
        assert_eq!(Tensor::concat(&[&none, &none], 1).unwrap().shape(), [2, 0, 2]);
        assert_eq!(Tensor::concat(&[&none, &none], 0).unwrap().shape(), [4, 0, 2]);
    }

    #[test]
    fn parts_that_do_not_fit_together_are_refused() {
        let (a, b) = (numbers([2, 1, 2], 0), numbers([2, 1, 3], 0));
        let error = Tensor::concat(&[&a, &b], 1).unwrap_err().to_string();
        assert_eq!(error, "tensors cannot be joined along axis 1: fp32 [2, 1, 2], fp32 [2, 1, 3]");
        let ids = Tensor::from_i64([2, 1, 2], vec![0; 4]).unwrap();
        for (parts, axis) in [(&[][..], 0), (&[&a, &ids], 1), (&[&a, &a], 3), (&[&a, &a.rows(0..1)], 1)] {
            assert!(matches!(Tensor::concat(parts, axis), Err(TensorError::Unlike { .. })), "{parts:?}");
        }
        // Two elements share a byte: rows of three would have to be taken apart.
        let halves = |shape: [usize; 2]| Tensor::from_storage(DType::I4, shape, Arc::new(vec![0x21_u8; 3]), 0).unwrap();
        assert!(Tensor::concat(&[&halves([2, 3]), &halves([2, 3])], 1).is_err());
        assert_eq!(Tensor::concat(&[&halves([3, 2]), &halves([3, 2])], 1).unwrap().bytes(), [0x21; 6]);
    }

    #[test]
    fn entries_are_copied_only_where_they_lie_apart() {
        let all = numbers([2, 3, 2], 0);
        assert_eq!(all.narrow(1, 1..3).unwrap().as_f32().unwrap(), [2.0, 3.0, 4.0, 5.0, 8.0, 9.0, 10.0, 11.0]);
        assert_eq!(all.narrow(2, 1..2).unwrap().as_f32().unwrap(), [1.0, 3.0, 5.0, 7.0, 9.0, 11.0]);
        assert_eq!(all.narrow(1, 2..2).unwrap().shape(), [2, 0, 2]);
        let second = all.rows(1..2).narrow(1, 1..2).unwrap();
        assert_eq!(second.bytes().as_ptr(), all.bytes()[32..].as_ptr());
        for (axis, range) in [(1, 2..4), (3, 0..1), (1, Range { start: 2, end: 1 })] {
            let error = all.narrow(axis, range.clone()).unwrap_err();
            assert_eq!(error, TensorError::Outside { axis, range, shape: vec![2, 3, 2] });
        }
    }

    #[test]
    fn runs_fit_or_do_not() {
        let runs = Runs { count: 3, bytes: 4, from: 8, from_pitch: 10, to: 0, to_pitch: 4 };
        assert!(runs.fit(32, 12));
        assert!(!runs.fit(31, 12) && !runs.fit(32, 11));
        assert!(!Runs { from_pitch: usize::MAX, ..runs }.fit(usize::MAX, 12));
    }
}
