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

/// Size of the sets of best tokens that [`LogitAgreement`] compares.
pub const TOP_K: usize = 5;

/// Depth to which the rankings of [`RankAgreement`] are known.
pub const RANKS: usize = 50;

/// How much the next rank counts, as a share of the one before it, in [`RankAgreement`]: the first ten ranks have 86 % of the
/// weight.
pub const PERSISTENCE: f64 = 0.9;

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

/// Whether two sets of logits would pick the same tokens. One row is one position.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LogitAgreement {
    /// Positions.
    pub rows: usize,
    /// Positions at which the same token has the highest logit (the lower id where logits are equal).
    pub argmax_matches: usize,
    /// Over the positions where it has not: the largest lead, in expected logits, of the expected token over the one
    /// that was picked instead. Small means a near-tie.
    pub widest_flip: Option<f64>,
    /// Size of the best sets: [`TOP_K`], or the vocabulary if that is smaller.
    pub k: usize,
    /// Mean share of the `k` best tokens that both sides have in common.
    pub mean_overlap: f64,
    /// The worst position's share.
    pub min_overlap: f64,
    /// Whether they would rank and sample alike; absent from results of versions that did not look.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ranks: Option<RankAgreement>,
}

/// Whether two sets of logits rank tokens alike and give them the same probabilities.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct RankAgreement {
    /// Mean rank-biased overlap of the two rankings, 1 where they are the same: the extrapolated one of Webber, Moffat and Zobel
    /// (2010, equation 32) for [`PERSISTENCE`] and the first [`RANKS`] tokens.
    pub mean_overlap: f64,
    /// The worst position's overlap.
    pub min_overlap: f64,
    /// Mean divergence of Kullback and Leibler of the actual probabilities from the expected ones, in nats.
    pub mean_divergence: f64,
    /// The worst position's divergence.
    pub max_divergence: f64,
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

type Decoder<T> = fn(&[u8], &mut Vec<T>);

fn float_decoder(dtype: DType) -> Option<Decoder<f64>> {
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

/// The best `k` of one row, best first; the lower id wins among equal logits, and NaN never gets in.
struct Best {
    k: usize,
    entries: Vec<(f64, usize)>,
}

impl Best {
    fn offer(&mut self, id: usize, logit: f64) {
        let full = self.entries.len() == self.k;
        if logit.is_nan() || (full && self.entries.last().is_some_and(|&(least, _)| logit <= least)) {
            return;
        }
        if full {
            self.entries.pop();
        }
        let place = self.entries.partition_point(|&(other, _)| other >= logit);
        self.entries.insert(place, (logit, id));
    }

    fn ids(&self) -> Vec<usize> {
        self.entries.iter().map(|&(_, id)| id).collect()
    }
}

/// Compares the tokens two logit tensors `[.., vocabulary]` would pick. `None` unless both are float tensors of the same
/// shape with at least one row and one token.
pub fn compare_logits(actual: &Tensor, expected: &Tensor) -> Option<LogitAgreement> {
    let decode = (float_decoder(actual.dtype())?, float_decoder(expected.dtype())?);
    let vocabulary = *actual.shape().last()?;
    if actual.shape() != expected.shape() || actual.is_empty() {
        return None;
    }
    let (k, depth) = (TOP_K.min(vocabulary), RANKS.min(vocabulary));
    let rows = actual.len() / vocabulary;
    let (row_a, row_b) = (vocabulary * actual.dtype().size(), vocabulary * expected.dtype().size());
    let mut found = LogitAgreement {
        rows,
        argmax_matches: 0,
        widest_flip: None,
        k,
        mean_overlap: 0.0,
        min_overlap: 1.0,
        ranks: None,
    };
    let mut ranks = RankAgreement { mean_overlap: 0.0, min_overlap: 1.0, mean_divergence: 0.0, max_divergence: 0.0 };
    let (mut a, mut b) = (Vec::with_capacity(vocabulary), Vec::with_capacity(vocabulary));
    for (bytes_a, bytes_b) in actual.bytes().chunks(row_a).zip(expected.bytes().chunks(row_b)) {
        a.clear();
        b.clear();
        decode.0(bytes_a, &mut a);
        decode.1(bytes_b, &mut b);
        let best_of = |row: &[f64]| {
            let mut best = Best { k: depth, entries: Vec::with_capacity(depth) };
            row.iter().enumerate().for_each(|(id, &logit)| best.offer(id, logit));
            best
        };
        let (best_a, best_b) = (best_of(&a), best_of(&b));
        match (best_a.entries.first(), best_b.entries.first()) {
            (Some((_, picked)), Some((lead, wanted))) if picked != wanted => {
                // A token whose expected logit is NaN or -inf is no near-tie, whatever the other one is.
                let flip = (lead - b[*picked]).min(f64::MAX);
                found.widest_flip = Some(found.widest_flip.map_or(flip, |widest: f64| widest.max(flip)));
            }
            (Some(_), Some(_)) => found.argmax_matches += 1,
            _ => found.widest_flip = Some(f64::MAX),
        }
        let [ids_a, ids_b] = [&best_a, &best_b].map(Best::ids);
        let overlap = common(&ids_a, &ids_b, k) as f64 / k as f64;
        found.mean_overlap += overlap / rows as f64;
        found.min_overlap = found.min_overlap.min(overlap);
        let overlap = rank_biased_overlap(&ids_a, &ids_b, depth);
        ranks.mean_overlap += overlap / rows as f64;
        ranks.min_overlap = ranks.min_overlap.min(overlap);
        let divergence = divergence(&b, &a);
        ranks.mean_divergence = (ranks.mean_divergence + divergence / rows as f64).min(f64::MAX);
        ranks.max_divergence = ranks.max_divergence.max(divergence);
    }
    Some(LogitAgreement { ranks: Some(ranks), ..found })
}

/// Ids that are among the first `k` of both lists.
fn common(a: &[usize], b: &[usize], k: usize) -> usize {
    let first = |ids: &[usize]| ids.len().min(k);
    a[..first(a)].iter().filter(|id| b[..first(b)].contains(id)).count()
}

/// The extrapolated rank-biased overlap of two rankings of which `depth` ranks are known (see [`RankAgreement`]).
fn rank_biased_overlap(a: &[usize], b: &[usize], depth: usize) -> f64 {
    let (mut sum, mut weight, mut agreement) = (0.0, 1.0, 1.0);
    // Ids seen in one ranking and not yet in the other.
    let (mut open, mut shared) = (Vec::new(), 0);
    for d in 0..depth {
        for id in [a.get(d), b.get(d)].into_iter().flatten() {
            match open.iter().position(|other| other == id) {
                Some(place) => {
                    open.swap_remove(place);
                    shared += 1;
                }
                None => open.push(*id),
            }
        }
        agreement = f64::from(shared) / (d + 1) as f64;
        sum += (1.0 - PERSISTENCE) * weight * agreement;
        weight *= PERSISTENCE;
    }
    sum + agreement * weight
}

/// `sum p ln(p / q)` of the probabilities that the logits `expected` and `actual` give, in nats; the largest number where that is
/// infinite or none.
fn divergence(expected: &[f64], actual: &[f64]) -> f64 {
    let log_sum = |logits: &[f64]| {
        let largest = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        largest + logits.iter().map(|logit| (logit - largest).exp()).sum::<f64>().ln()
    };
    let (sum_p, sum_q) = (log_sum(expected), log_sum(actual));
    let terms = expected.iter().zip(actual).map(|(p, q)| {
        let log_p = p - sum_p;
        let p = log_p.exp();
        // What is impossible adds nothing.
        if p == 0.0 { 0.0 } else { p * (log_p - (q - sum_q)) }
    });
    let divergence: f64 = terms.sum();
    if divergence.is_finite() { divergence.max(0.0) } else { f64::MAX }
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

    #[test]
    fn a_flipped_argmax_shows_how_near_the_tie_was() {
        let expected = f32s(&[2, 6], &[0.0, 5.0, 4.75, 3.0, 2.0, 1.0, 9.0, 1.0, 2.0, 3.0, 4.0, 5.0]);
        let actual = f32s(&[2, 6], &[2.5, 4.5, 4.75, 3.0, 2.0, 1.0, 9.0, 1.0, 2.0, 3.0, 4.0, 5.0]);
        let found = compare_logits(&actual, &expected).unwrap();
        assert_eq!((found.rows, found.argmax_matches, found.k), (2, 1, 5));
        assert_eq!(found.widest_flip, Some(0.25));
        assert!((found.min_overlap - 0.8).abs() < 1e-12);
        assert!((found.mean_overlap - 0.9).abs() < 1e-12);
    }

    #[test]
    fn rankings_are_compared_by_the_formula() {
        let same: Vec<usize> = (0..50).collect();
        assert!((rank_biased_overlap(&same, &same, 50) - 1.0).abs() < 1e-12);
        let other: Vec<usize> = (100..150).collect();
        assert!(rank_biased_overlap(&same, &other, 50).abs() < 1e-12);
        // The first two exchanged: agreement 0 at depth 1 and 1 from then on.
        let mut exchanged = same.clone();
        exchanged.swap(0, 1);
        assert!((rank_biased_overlap(&exchanged, &same, 50) - 0.9).abs() < 1e-12);
        // Half of what is known agrees, and so does half of what is not.
        let found = rank_biased_overlap(&[0, 1], &[0, 2], 2);
        assert!((found - (0.1 * 1.0 + 0.1 * 0.9 * 0.5 + 0.81 * 0.5)).abs() < 1e-12);
    }

    #[test]
    fn probabilities_diverge_as_kullback_and_leibler_say() {
        let logits = [0.25_f64.ln(), 0.75_f64.ln()];
        let other = [0.5_f64.ln() + 7.0, 0.5_f64.ln() + 7.0];
        let expected = 0.25 * (0.25_f64 / 0.5).ln() + 0.75 * (0.75_f64 / 0.5).ln();
        assert!((divergence(&logits, &other) - expected).abs() < 1e-12);
        assert!(divergence(&logits, &logits).abs() < 1e-15);
        let impossible = [f64::NEG_INFINITY, 0.0];
        assert!((divergence(&impossible, &other) - 2.0_f64.ln()).abs() < 1e-12);
        assert!(divergence(&other, &impossible) >= f64::MAX && divergence(&[f64::NAN, 0.0], &logits) >= f64::MAX);
    }

    #[test]
    fn logits_are_compared_as_rankings_too() {
        let expected: Vec<f32> = (0..120).map(|i| (i * 37 % 60) as f32 / 10.0).collect();
        let mut actual = expected.clone();
        actual[3] += 9.0;
        let found = compare_logits(&f32s(&[2, 60], &actual), &f32s(&[2, 60], &expected)).unwrap().ranks.unwrap();
        assert!(found.min_overlap < 0.95 && found.mean_overlap > f64::midpoint(1.0, found.min_overlap) - 1e-9);
        assert!(found.max_divergence > 1.0 && (found.mean_divergence - found.max_divergence / 2.0).abs() < 1e-9);
    }

    #[test]
    fn equal_logits_go_to_the_lower_id_and_nan_never_wins() {
        let found = compare_logits(&f32s(&[3], &[f32::NAN, 1.0, 1.0]), &f32s(&[3], &[0.0, 1.0, 1.0])).unwrap();
        assert_eq!(found.argmax_matches, 1);
        assert!(compare_logits(&f32s(&[0, 4], &[]), &f32s(&[0, 4], &[])).is_none());
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
