//! Whether two sets of logits would be used alike: which tokens they pick, how they rank them, and how likely they make them.

use super::compare::float_decoder;
use crate::tensor::Tensor;
use serde::{Deserialize, Serialize};

/// Size of the sets of best tokens that [`LogitAgreement`] compares.
pub const TOP_K: usize = 5;

/// Depth to which the rankings of [`RankAgreement`] are known.
pub const RANKS: usize = 50;

/// How much the next rank counts, as a share of the one before it, in [`RankAgreement`]: the first ten ranks have 86 % of the
/// weight.
pub const PERSISTENCE: f64 = 0.9;

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
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn f32s(shape: &[usize], data: &[f32]) -> Tensor {
        Tensor::from_f32(shape, data.to_vec()).unwrap()
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
}
