//! How far two tensors are apart: one pass over both, in blocks, accumulated in `f64`. No judgement here.

use crate::tensor::Tensor;
use accordion_graphs::dtype::DType;
use accordion_graphs::fp8;
use half::{bf16, f16};
use serde::{Deserialize, Serialize};

/// Elements decoded at a time, so that comparing needs the same little memory for every tensor.
const BLOCK: usize = 4096;

/// Smallest denominator of [`FloatDifference::max_rel`]: differences around zero are not blown up.
pub const RELATIVE_FLOOR: f64 = 1e-3;

/// NaN and infinity counts of one tensor.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NonFinite {
    /// Elements that are not a number.
    pub nan: usize,
    /// Elements that are infinite.
    pub inf: usize,
}

impl NonFinite {
    fn count(&mut self, value: f64) {
        self.nan += usize::from(value.is_nan());
        self.inf += usize::from(value.is_infinite());
    }
}

/// The distance of two float tensors `a` (actual) and `b` (expected). Sums, maxima and norms run over the pairs in
/// which both values are finite; all numbers here are finite.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct FloatDifference {
    /// Elements of each tensor.
    pub elements: usize,
    /// Largest `|a - b|`.
    pub max_abs: f64,
    /// Where that is; absent when no element differs.
    pub max_abs_at: Option<Vec<usize>>,
    /// Mean `|a - b|`.
    pub mean_abs: f64,
    /// Largest `|a - b| / max(|b|, RELATIVE_FLOOR)`.
    pub max_rel: f64,
    /// Most numbers of the coarser one of the two types that lie between `a` and `b`, plus one: units in the last place, however
    /// small the numbers are. Absent of types that have none, and from results of versions that did not count.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_ulps: Option<u64>,
    /// `‖a - b‖ / ‖b‖`; absent when `b` is zero.
    pub norm_rel: Option<f64>,
    /// Cosine of the angle between `a` and `b` as vectors; absent when either is zero.
    pub cosine: Option<f64>,
    /// Largest `|b|`, the scale against which differences are seen.
    pub scale: f64,
    /// Non-finite elements of `a`.
    pub actual_non_finite: NonFinite,
    /// Non-finite elements of `b`.
    pub expected_non_finite: NonFinite,
    /// Pairs of which exactly one is infinite, or both with opposite signs.
    pub infinity_mismatches: usize,
}

/// The distance of two integer tensors.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct IntegerDifference {
    /// Elements of each tensor.
    pub elements: usize,
    /// Elements that differ.
    pub mismatches: usize,
    /// The first of them.
    pub first: Option<IntegerMismatch>,
}

/// One pair of unequal integers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct IntegerMismatch {
    /// Where.
    pub at: Vec<usize>,
    /// What is there.
    pub actual: i64,
    /// What should be there.
    pub expected: i64,
}

/// What two tensors turned out to be, once compared.
#[derive(Debug, Clone, PartialEq)]
pub enum Comparison {
    /// Two float tensors, of any two float types.
    Float(FloatDifference),
    /// Two integer (or boolean) tensors, of any two such types.
    Integer(IntegerDifference),
    /// Different shapes, or a float against an integer tensor.
    Incomparable,
}

pub(super) type Decoder<T> = fn(&[u8], &mut Vec<T>);

pub(super) fn float_decoder(dtype: DType) -> Option<Decoder<f64>> {
    fn decode<const N: usize>(bytes: &[u8], out: &mut Vec<f64>, one: impl Fn([u8; N]) -> f64) {
        out.extend(bytes.as_chunks::<N>().0.iter().map(|&b| one(b)));
    }
    Some(match dtype {
        DType::F32 => |bytes, out| decode(bytes, out, |b| f64::from(f32::from_le_bytes(b))),
        DType::F16 => |bytes, out| decode(bytes, out, |b| f16::from_le_bytes(b).to_f64()),
        DType::Bf16 => |bytes, out| decode(bytes, out, |b| bf16::from_le_bytes(b).to_f64()),
        DType::F8E4m3 => |bytes, out| decode(bytes, out, |[b]| f64::from(fp8::to_f32(b))),
        DType::I64 | DType::I32 | DType::Bool | DType::U8 | DType::I8 | DType::I4 => return None,
    })
}

fn integer_decoder(dtype: DType) -> Option<Decoder<i64>> {
    Some(match dtype {
        DType::I64 => |bytes, out| out.extend(bytes.as_chunks().0.iter().map(|&b| i64::from_le_bytes(b))),
        DType::I32 => |bytes, out| out.extend(bytes.as_chunks().0.iter().map(|&b| i64::from(i32::from_le_bytes(b)))),
        DType::Bool | DType::U8 => |bytes, out| out.extend(bytes.iter().map(|&b| i64::from(b))),
        DType::I8 => |bytes, out| out.extend(bytes.iter().map(|&b| i64::from(i8::from_le_bytes([b])))),
        DType::F32 | DType::F16 | DType::Bf16 | DType::F8E4m3 | DType::I4 => return None,
    })
}

/// How many units in the last place two finite numbers are apart, in the coarser one of the types `a` and `b`.
fn ulps(a: DType, b: DType) -> Option<fn(f64, f64) -> u64> {
    // Bit patterns are in the order of the numbers, apart from the sign.
    fn ordered(bits: u32, width: u32) -> i64 {
        let sign = 1_i64 << (width - 1);
        let bits = i64::from(bits);
        if bits & sign == 0 { bits } else { sign - bits }
    }
    fn apart(a: i64, b: i64) -> u64 {
        a.abs_diff(b)
    }
    match (a, b) {
        (DType::F32, DType::F32) => {
            Some(|a, b| apart(ordered((a as f32).to_bits(), 32), ordered((b as f32).to_bits(), 32)))
        }
        (DType::Bf16, DType::F32 | DType::F16 | DType::Bf16) | (DType::F32 | DType::F16, DType::Bf16) => {
            Some(|a, b| {
                let [a, b] = [a, b].map(|x| ordered(bf16::from_f64(x).to_bits().into(), 16));
                apart(a, b)
            })
        }
        (DType::F16, DType::F32 | DType::F16) | (DType::F32, DType::F16) => Some(|a, b| {
            let [a, b] = [a, b].map(|x| ordered(f16::from_f64(x).to_bits().into(), 16));
            apart(a, b)
        }),
        _ => None,
    }
}

/// Calls `visit(index, a, b)` for every pair of elements. The tensors have the same number of elements.
fn for_each_pair<T: Copy>(
    (a, decode_a): (&Tensor, Decoder<T>),
    (b, decode_b): (&Tensor, Decoder<T>),
    mut visit: impl FnMut(usize, T, T),
) {
    let (mut block_a, mut block_b) = (Vec::with_capacity(BLOCK), Vec::with_capacity(BLOCK));
    let blocks = a.bytes().chunks(BLOCK * a.dtype().size()).zip(b.bytes().chunks(BLOCK * b.dtype().size()));
    for (n, (bytes_a, bytes_b)) in blocks.enumerate() {
        block_a.clear();
        block_b.clear();
        decode_a(bytes_a, &mut block_a);
        decode_b(bytes_b, &mut block_b);
        for (i, (&a, &b)) in block_a.iter().zip(&block_b).enumerate() {
            visit(n * BLOCK + i, a, b);
        }
    }
}

/// Coordinates of element `index` of a tensor of `shape`, row-major.
pub(super) fn coordinates(mut index: usize, shape: &[usize]) -> Vec<usize> {
    let mut at: Vec<usize> = shape
        .iter()
        .rev()
        .map(|&dim| {
            let here = index % dim.max(1);
            index /= dim.max(1);
            here
        })
        .collect();
    at.reverse();
    at
}

/// Compares `actual` with `expected`. Types may differ inside the floats and inside the integers.
pub fn compare(actual: &Tensor, expected: &Tensor) -> Comparison {
    if actual.shape() != expected.shape() {
        return Comparison::Incomparable;
    }
    let types = (actual.dtype(), expected.dtype());
    if let (Some(a), Some(b)) = (float_decoder(types.0), float_decoder(types.1)) {
        return Comparison::Float(compare_floats((actual, a), (expected, b)));
    }
    if let (Some(a), Some(b)) = (integer_decoder(types.0), integer_decoder(types.1)) {
        return Comparison::Integer(compare_integers((actual, a), (expected, b)));
    }
    Comparison::Incomparable
}

fn compare_floats(actual: (&Tensor, Decoder<f64>), expected: (&Tensor, Decoder<f64>)) -> FloatDifference {
    let mut found = FloatDifference { elements: actual.0.len(), ..FloatDifference::default() };
    let mut worst = None;
    let ulps = ulps(actual.0.dtype(), expected.0.dtype());
    found.max_ulps = ulps.map(|_| 0);
    let (mut finite, mut sum_abs) = (0usize, 0.0);
    let (mut dot, mut square_a, mut square_b, mut square_diff) = (0.0, 0.0, 0.0, 0.0);
    for_each_pair(actual, expected, |index, a, b| {
        if !(a.is_finite() && b.is_finite()) {
            found.actual_non_finite.count(a);
            found.expected_non_finite.count(b);
            let one_is_nan = a.is_nan() || b.is_nan();
            found.infinity_mismatches += usize::from(!one_is_nan && a.total_cmp(&b).is_ne());
            return;
        }
        let diff = (a - b).abs();
        if diff > found.max_abs {
            found.max_abs = diff;
            worst = Some(index);
        }
        found.max_rel = found.max_rel.max(diff / b.abs().max(RELATIVE_FLOOR));
        found.scale = found.scale.max(b.abs());
        if let (Some(ulps), true) = (ulps, diff > 0.0) {
            found.max_ulps = found.max_ulps.max(Some(ulps(a, b)));
        }
        finite += 1;
        sum_abs += diff;
        dot += a * b;
        square_a += a * a;
        square_b += b * b;
        square_diff += diff * diff;
    });
    found.max_abs_at = worst.map(|index| coordinates(index, actual.0.shape()));
    found.mean_abs = sum_abs / finite.max(1) as f64;
    found.norm_rel = (square_b > 0.0).then(|| (square_diff / square_b).sqrt());
    found.cosine =
        (square_a > 0.0 && square_b > 0.0).then(|| (dot / (square_a.sqrt() * square_b.sqrt())).clamp(-1.0, 1.0));
    found
}

fn compare_integers(actual: (&Tensor, Decoder<i64>), expected: (&Tensor, Decoder<i64>)) -> IntegerDifference {
    let mut found = IntegerDifference { elements: actual.0.len(), mismatches: 0, first: None };
    for_each_pair(actual, expected, |index, a, b| {
        if a != b {
            found.mismatches += 1;
            found.first.get_or_insert_with(|| IntegerMismatch {
                at: coordinates(index, actual.0.shape()),
                actual: a,
                expected: b,
            });
        }
    });
    found
}

/// All elements of an integer tensor; `None` for a float tensor.
pub(super) fn integers(tensor: &Tensor) -> Option<Vec<i64>> {
    let mut out = Vec::with_capacity(tensor.len());
    integer_decoder(tensor.dtype())?(tensor.bytes(), &mut out);
    Some(out)
}

/// All elements of a float tensor; `None` for an integer tensor.
pub(super) fn floats(tensor: &Tensor) -> Option<Vec<f64>> {
    let mut out = Vec::with_capacity(tensor.len());
    float_decoder(tensor.dtype())?(tensor.bytes(), &mut out);
    Some(out)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::panic)]

    use super::*;
    use proptest::prelude::*;

    fn f32s(shape: &[usize], data: &[f32]) -> Tensor {
        Tensor::from_f32(shape, data.to_vec()).unwrap()
    }

    fn float(actual: &Tensor, expected: &Tensor) -> FloatDifference {
        match compare(actual, expected) {
            Comparison::Float(difference) => difference,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_planted_difference_is_found_where_it_is() {
        // More than two blocks, so that the index has to survive block borders.
        let expected: Vec<f32> = (0..10_000).map(|i| (i as f32 * 0.37).sin()).collect();
        let mut actual = expected.clone();
        actual[9_105] += 0.5;
        let found = float(&f32s(&[100, 100], &actual), &f32s(&[100, 100], &expected));
        assert_eq!(found.max_abs_at, Some(vec![91, 5]));
        assert!((found.max_abs - 0.5).abs() < 1e-6);
        assert!((found.mean_abs - 0.5 / 10_000.0).abs() < 1e-9);
        assert!(found.cosine.unwrap() < 1.0);
    }

    #[test]
    fn the_numbers_are_those_of_the_formulas() {
        let found = float(&f32s(&[2], &[3.0, 4.5]), &f32s(&[2], &[3.0, 4.0]));
        assert_eq!(found.norm_rel, Some(0.1));
        assert!((found.max_rel - 0.125).abs() < 1e-12);
        let cosine = (9.0 + 18.0) / (29.25f64.sqrt() * 5.0);
        assert!((found.cosine.unwrap() - cosine).abs() < 1e-12);
        assert_eq!(float(&f32s(&[1], &[1e-6]), &f32s(&[1], &[0.0])).cosine, None);
    }

    #[test]
    fn non_finite_values_are_counted_and_equal_infinities_agree() {
        let (nan, inf) = (f32::NAN, f32::INFINITY);
        let found = float(&f32s(&[5], &[nan, inf, inf, -inf, 1.0]), &f32s(&[5], &[0.0, inf, -inf, 2.0, 1.0]));
        assert_eq!(found.actual_non_finite, NonFinite { nan: 1, inf: 3 });
        assert_eq!(found.expected_non_finite, NonFinite { nan: 0, inf: 2 });
        assert_eq!(found.infinity_mismatches, 2);
        assert!(found.max_abs.abs() < f64::EPSILON);
    }

    #[test]
    fn half_precision_is_compared_by_value() {
        let bytes: Vec<u8> = [1.0f32, -2.5].iter().flat_map(|&v| f16::from_f32(v).to_le_bytes()).collect();
        let halves: Vec<f16> = bytes.as_chunks().0.iter().map(|&b| f16::from_le_bytes(b)).collect();
        let half = Tensor::from_storage(DType::F16, [2], std::sync::Arc::new(halves), 0).unwrap();
        assert!(float(&half, &f32s(&[2], &[1.0, -2.5])).max_abs_at.is_none());
    }

    #[test]
    fn units_in_the_last_place_are_those_of_the_coarser_type() {
        let ulps = |a: &Tensor, b: &Tensor| float(a, b).max_ulps;
        let one = f32s(&[3], &[1.0, -0.0, 2.0]);
        assert_eq!(ulps(&one, &one), Some(0));
        assert_eq!(ulps(&f32s(&[3], &[1.0 + 3.0 * f32::EPSILON, 0.0, 2.0]), &one), Some(3));
        // Below two the numbers lie half as far apart; around zero they are many.
        assert_eq!(ulps(&f32s(&[3], &[1.0, -0.0, 2.0 - f32::EPSILON]), &one), Some(1));
        let tiny = f32::from_bits(1);
        assert_eq!(ulps(&f32s(&[1], &[tiny]), &f32s(&[1], &[-tiny])), Some(2));
        let half = Tensor::from_storage(DType::F16, [1], std::sync::Arc::new(vec![f16::from_f32(1.0)]), 0).unwrap();
        assert_eq!(ulps(&half, &f32s(&[1], &[1.001])), Some(1));
        assert_eq!(ulps(&half, &f32s(&[1], &[1.0001])), Some(0));
    }

    #[test]
    fn integers_are_exact_beyond_the_precision_of_floats() {
        let big = (1 << 53) + 1;
        let a = Tensor::from_i64([1, 3], vec![7, big, 1]).unwrap();
        let b = Tensor::from_i64([1, 3], vec![7, big - 1, 2]).unwrap();
        let Comparison::Integer(found) = compare(&a, &b) else { panic!("integers") };
        assert_eq!(found.mismatches, 2);
        assert_eq!(found.first, Some(IntegerMismatch { at: vec![0, 1], actual: big, expected: big - 1 }));
        assert_eq!(compare(&a, &f32s(&[1, 3], &[7.0, 0.0, 0.0])), Comparison::Incomparable);
        assert_eq!(compare(&a, &Tensor::from_i64([3], vec![7, big, 1]).unwrap()), Comparison::Incomparable);
    }

    proptest! {
        #[test]
        fn blocks_give_what_a_plain_loop_gives(values in prop::collection::vec((-10.0f32..10.0, -10.0f32..10.0), 1..9000)) {
            let (a, b): (Vec<f32>, Vec<f32>) = values.into_iter().unzip();
            let found = float(&f32s(&[a.len()], &a), &f32s(&[b.len()], &b));
            let diffs = || a.iter().zip(&b).map(|(a, b)| (f64::from(*a) - f64::from(*b)).abs());
            prop_assert!((found.max_abs - diffs().fold(0.0, f64::max)).abs() < 1e-12);
            prop_assert!((found.mean_abs - diffs().sum::<f64>() / a.len() as f64).abs() < 1e-9);
        }
    }
}
