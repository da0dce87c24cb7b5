//! A few rows that stand for all.

/// Rows of a sample.
pub const SAMPLE_ROWS: usize = 32;

/// The window of a text that rows come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct WindowKey(u64);

/// The finalizer of `SplitMix64` (Steele, Lea and Flood 2014), a permutation of the 64-bit numbers.
fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

impl WindowKey {
    /// The window that begins with token `start` of the text with this hash.
    pub(super) fn new(text_sha256: &str, start: u64) -> Self {
        let text = text_sha256.bytes().fold(0, |key, byte| mix(key ^ u64::from(byte)));
        Self(mix(text ^ mix(start)))
    }

    /// What decides whether row `ordinal` of the window is in a sample.
    fn row(self, ordinal: u64) -> u64 {
        mix(self.0 ^ mix(!ordinal))
    }
}

/// The [`SAMPLE_ROWS`] rows with the smallest keys. Keys are hashes of where a row comes from, so this is a uniform sample
/// without replacement, and that of two sets of rows is made of those of either.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Sample {
    /// Ascending.
    keys: Vec<u64>,
    /// `[keys, channels]`.
    rows: Vec<f32>,
}

impl Sample {
    /// A sample as it was stored, or `None` where the keys do not ascend or are too many.
    pub(super) fn stored(keys: Vec<u64>, rows: Vec<f32>) -> Option<Self> {
        let valid = keys.len() <= SAMPLE_ROWS && keys.is_sorted_by(|a, b| a < b);
        valid.then_some(Self { keys, rows })
    }

    pub(super) fn keys(&self) -> &[u64] {
        &self.keys
    }

    pub(super) fn rows(&self) -> &[f32] {
        &self.rows
    }

    /// Offers `rows` of `channels` each, which are the rows from `first` on of a window.
    pub(super) fn offer(&mut self, rows: &[f32], channels: usize, window: WindowKey, first: u64) {
        for (row, ordinal) in rows.chunks_exact(channels).zip(first..) {
            self.insert(window.row(ordinal), row);
        }
    }

    /// Adds the rows of another sample of the same channels.
    pub(super) fn merge(&mut self, other: &Self) {
        let channels = other.rows.len().checked_div(other.keys.len()).unwrap_or(0).max(1);
        for (&key, row) in other.keys.iter().zip(other.rows.chunks_exact(channels)) {
            self.insert(key, row);
        }
    }

    fn insert(&mut self, key: u64, row: &[f32]) {
        if self.keys.len() == SAMPLE_ROWS && self.keys.last().is_some_and(|&last| key >= last) {
            return;
        }
        let Err(at) = self.keys.binary_search(&key) else { return };
        self.keys.insert(at, key);
        self.rows.splice(at * row.len()..at * row.len(), row.iter().copied());
        self.keys.truncate(SAMPLE_ROWS);
        self.rows.truncate(SAMPLE_ROWS * row.len());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_samples_make_the_sample_of_all_rows() {
        let rows: Vec<f32> = (0..400).map(|i| i as f32).collect();
        let windows = [WindowKey::new("ab", 0), WindowKey::new("ab", 9), WindowKey::new("ac", 0)];
        let mut whole = Sample::default();
        let mut parts: Vec<Sample> = Vec::new();
        for window in windows {
            let mut part = Sample::default();
            part.offer(&rows[..100], 2, window, 0);
            part.offer(&rows[100..], 2, window, 50);
            whole.offer(&rows, 2, window, 0);
            parts.push(part);
        }
        assert_eq!((whole.keys().len(), whole.rows().len()), (SAMPLE_ROWS, 2 * SAMPLE_ROWS));
        for order in [[0, 1, 2], [2, 1, 0], [1, 2, 0]] {
            let mut merged = Sample::default();
            for i in order {
                merged.merge(&parts[i]);
            }
            assert_eq!(merged, whole);
        }
        // Every row is whole.
        assert!(
            whole
                .rows()
                .chunks_exact(2)
                .all(|row| (row[0] as usize).is_multiple_of(2) && row[1] as usize == row[0] as usize + 1)
        );
    }

    #[test]
    fn rows_are_taken_from_everywhere() {
        let mut sample = Sample::default();
        let rows: Vec<f32> = (0..10_000).map(|i| i as f32).collect();
        sample.offer(&rows, 1, WindowKey::new("text", 3), 0);
        let mean = sample.rows().iter().sum::<f32>() / SAMPLE_ROWS as f32;
        // The standard error of the mean of 32 is 510.
        assert!((mean - 5000.0).abs() < 1500.0, "{mean}");
    }
}
