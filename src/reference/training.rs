//! The loss that the models were trained with.

use super::{Result, expect_length};
use ndarray::Array2;

/// The mean cross entropy of every row's prediction of the next row's label, over the sequences of a batch: `logits` and
/// `labels` hold one `[L, vocab]` and one `[L]` per sequence. Labels that are `None` are left out of the mean; the loss of
/// a batch that has no other is not a number.
///
/// # Errors
///
/// Logits and labels differ in number.
pub fn next_token_loss(logits: &[Array2<f32>], labels: &[Vec<Option<u32>>]) -> Result<f32> {
    expect_length("sequences of labels", labels.len(), logits.len())?;
    let (mut sum, mut count) = (0.0, 0);
    for (logits, labels) in logits.iter().zip(labels) {
        expect_length("labels of a sequence", labels.len(), logits.nrows())?;
        for (row, label) in logits.rows().into_iter().zip(labels.iter().skip(1)) {
            let Some(label) = *label else { continue };
            let largest = row.fold(f32::NEG_INFINITY, |a, &b| a.max(b));
            let normalizer = row.mapv(|logit| (logit - largest).exp()).sum().ln() + largest;
            sum += row.get(label as usize).map_or(f32::NAN, |logit| normalizer - logit);
            count += 1;
        }
    }
    Ok(sum / count as f32)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use ndarray::array;

    #[test]
    fn rows_predict_the_label_of_the_next_row() {
        let logits = [array![[0.0, 0.0], [5.0, 5.0 + 3_f32.ln()], [9.0, 0.0]], array![[0.0, 0.0], [7.0, 7.0]]];
        let labels = [vec![Some(0), Some(0), Some(1)], vec![Some(1), None]];
        // -ln(1/2) and -ln(3/4); the last row and the row before an ignored label predict nothing.
        let loss = next_token_loss(&logits, &labels).unwrap();
        assert!((2.0 * loss - 2_f32.ln() - (4.0_f32 / 3.0).ln()).abs() < 1e-6, "{loss}");
        assert!(next_token_loss(&logits, &labels[..1]).is_err());
    }
}
