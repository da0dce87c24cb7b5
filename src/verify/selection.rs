//! Comparison of surviving tokens, and of choices between two halves. Two correct computations may decide differently when
//! scores are equal up to rounding, so a decision is compared together with the scores it was made by.

use super::compare::{floats, integers};
use crate::tensor::Tensor;
use serde::{Deserialize, Serialize};

/// The distance of two selections of the same size, or of as many choices between two.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SelectionDifference {
    /// Tokens that survive, on each side; or the number of choices.
    pub kept: usize,
    /// Tokens that survive on the actual side only (and as many on the expected side only); or choices that differ.
    pub exchanged: usize,
    /// The largest score that was wrongly dropped minus the smallest that was kept in its stead, in expected scores.
    /// Perturbing every score by half of it makes the actual selection right. Of choices, the widest distance between the
    /// two scores of one that differs. Absent when nothing was exchanged.
    pub score_gap: Option<f64>,
    /// The largest finite magnitude among the scores.
    pub score_scale: f64,
}

/// Why two selections could not be compared.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SelectionError {
    /// Another number of survivors.
    #[error("{actual} tokens were kept, expected {expected}")]
    Size {
        /// Kept on the actual side.
        actual: usize,
        /// Kept on the expected side.
        expected: usize,
    },
    /// One side is no list of choices between the pairs of scores.
    #[error("the {side} choices are not 0 or 1 for each of {pairs} pairs of scores")]
    NoChoices {
        /// `"actual"` or `"expected"`.
        side: &'static str,
        /// Number of pairs.
        pairs: usize,
    },
    /// One side is no list of ascending indices into the scores.
    #[error("the {side} indices are not ascending positions below {scores}")]
    Malformed {
        /// `"actual"` or `"expected"`.
        side: &'static str,
        /// Number of scores.
        scores: usize,
    },
    /// The scores are not floats, or contain NaN.
    #[error("the scores are not numbers")]
    Scores,
}

/// Compares two ascending index lists `[kept]` into `scores` `[tokens]`, of which the highest survived. Infinite scores
/// mark tokens exempt from the cut.
///
/// # Errors
///
/// The lists have different lengths, are not ascending or leave the scores, or the scores are no numbers.
pub fn compare_selections(
    actual: &Tensor,
    expected: &Tensor,
    scores: &Tensor,
) -> Result<SelectionDifference, SelectionError> {
    let scores = floats(scores).filter(|s| s.iter().all(|v| !v.is_nan())).ok_or(SelectionError::Scores)?;
    let actual = indices(actual, "actual", scores.len())?;
    let expected = indices(expected, "expected", scores.len())?;
    if actual.len() != expected.len() {
        return Err(SelectionError::Size { actual: actual.len(), expected: expected.len() });
    }
    // Both lists ascend, so membership is a binary search.
    let only_in = |here: &[usize], there: &[usize]| -> Vec<f64> {
        here.iter().filter(|i| there.binary_search(i).is_err()).map(|&i| scores[i]).collect()
    };
    let taken = only_in(&actual, &expected);
    let dropped = only_in(&expected, &actual);
    let score_gap = (!taken.is_empty()).then(|| {
        let lowest_taken = taken.iter().copied().fold(f64::INFINITY, f64::min);
        let highest_dropped = dropped.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        // Negative if the expected selection contradicts its own scores, which is no better.
        (highest_dropped - lowest_taken).abs().min(f64::MAX)
    });
    let score_scale = scores.iter().filter(|s| s.is_finite()).fold(0.0, |scale: f64, s| scale.max(s.abs()));
    Ok(SelectionDifference { kept: expected.len(), exchanged: taken.len(), score_gap, score_scale })
}

/// Compares two lists of choices `[count]` between the first (0) and the second (1) of `scores` `[count, 2]`.
///
/// # Errors
///
/// A list is not as long as there are pairs of scores, holds something else than 0 and 1, or the scores are no numbers.
pub fn compare_choices(
    actual: &Tensor,
    expected: &Tensor,
    scores: &Tensor,
) -> Result<SelectionDifference, SelectionError> {
    let scores = floats(scores).filter(|s| s.iter().all(|v| v.is_finite())).ok_or(SelectionError::Scores)?;
    let pairs = scores.as_chunks::<2>().0;
    let choices = |tensor: &Tensor, side| {
        integers(tensor)
            .filter(|list| list.len() == pairs.len() && list.iter().all(|half| (0..2).contains(half)))
            .ok_or(SelectionError::NoChoices { side, pairs: pairs.len() })
    };
    let (actual, expected) = (choices(actual, "actual")?, choices(expected, "expected")?);
    let other = pairs.iter().zip(actual.iter().zip(&expected)).filter(|(_, (a, e))| a != e);
    let gaps: Vec<f64> = other.map(|([left, right], _)| (left - right).abs()).collect();
    let score_gap = gaps.iter().copied().reduce(f64::max);
    let score_scale = scores.iter().fold(0.0, |scale: f64, s| scale.max(s.abs()));
    Ok(SelectionDifference { kept: expected.len(), exchanged: gaps.len(), score_gap, score_scale })
}

fn indices(tensor: &Tensor, side: &'static str, scores: usize) -> Result<Vec<usize>, SelectionError> {
    integers(tensor)
        .and_then(|list| list.into_iter().map(|i| usize::try_from(i).ok().filter(|&i| i < scores)).collect())
        .filter(|list: &Vec<usize>| list.is_sorted_by(|a, b| a < b))
        .ok_or(SelectionError::Malformed { side, scores })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn ids(list: &[i64]) -> Tensor {
        Tensor::from_i64([list.len()], list.to_vec()).unwrap()
    }

    fn scores() -> Tensor {
        Tensor::from_f32([6], vec![f32::INFINITY, 1.0, 3.0, 2.0, 2.5, f32::INFINITY]).unwrap()
    }

    #[test]
    fn the_gap_is_that_of_the_worst_exchange() {
        let same = compare_selections(&ids(&[0, 2, 4, 5]), &ids(&[0, 2, 4, 5]), &scores()).unwrap();
        assert_eq!((same.kept, same.exchanged, same.score_gap), (4, 0, None));
        let near = compare_selections(&ids(&[0, 2, 3, 5]), &ids(&[0, 2, 4, 5]), &scores()).unwrap();
        assert_eq!((near.exchanged, near.score_gap), (1, Some(0.5)));
        let far = compare_selections(&ids(&[0, 1, 3, 5]), &ids(&[0, 2, 4, 5]), &scores()).unwrap();
        assert_eq!((far.exchanged, far.score_gap), (2, Some(2.0)));
        assert!((far.score_scale - 3.0).abs() < 1e-12);
    }

    #[test]
    fn dropping_an_exempt_token_is_never_near() {
        let found = compare_selections(&ids(&[1, 2, 4, 5]), &ids(&[0, 2, 4, 5]), &scores()).unwrap();
        assert_eq!(found.score_gap, Some(f64::MAX));
    }

    #[test]
    fn choices_are_as_far_apart_as_the_scores_of_the_worst() {
        let scores = Tensor::from_f32([3, 2], vec![0.5, 0.25, 1.0, -1.0, 0.5, 0.625]).unwrap();
        let found = |actual: &[i64]| compare_choices(&ids(actual), &ids(&[0, 0, 1]), &scores);
        assert_eq!(found(&[0, 0, 1]).unwrap().score_gap, None);
        let other = found(&[1, 0, 0]).unwrap();
        assert_eq!((other.kept, other.exchanged, other.score_gap), (3, 2, Some(0.25)));
        let none = Err(SelectionError::NoChoices { side: "actual", pairs: 3 });
        assert_eq!(found(&[0, 0, 2]), none);
        assert_eq!(found(&[0, 0]), none);
    }

    #[test]
    fn malformed_lists_are_refused() {
        let good = ids(&[0, 1]);
        let malformed = |side| Err(SelectionError::Malformed { side, scores: 6 });
        assert_eq!(compare_selections(&ids(&[1, 0]), &good, &scores()), malformed("actual"));
        assert_eq!(compare_selections(&ids(&[1, 1]), &good, &scores()), malformed("actual"));
        assert_eq!(compare_selections(&good, &ids(&[0, 6]), &scores()), malformed("expected"));
        assert_eq!(compare_selections(&good, &ids(&[-1, 0]), &scores()), malformed("expected"));
        let size = Err(SelectionError::Size { actual: 2, expected: 1 });
        assert_eq!(compare_selections(&good, &ids(&[0]), &scores()), size);
        let nan = Tensor::from_f32([2], vec![f32::NAN, 0.0]).unwrap();
        assert_eq!(compare_selections(&good, &good, &nan), Err(SelectionError::Scores));
    }
}
