//! A few rows that stand for all.

use super::site::absmax;

/// Rows of a uniform sample.
pub const SAMPLE_ROWS: usize = 32;

/// Rows with the largest magnitudes that are kept.
pub const EXTREME_ROWS: usize = 8;

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

/// A fixed number of rows: those with the smallest keys. What the smallest keys are of two sets of rows can be told from those of
/// either.
///
/// A key that is a hash of where a row comes from makes it a uniform sample without replacement. A key that is smaller
/// the larger the row's largest magnitude is keeps the extremes.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Sample {
    limit: usize,
    /// Ascending.
    keys: Vec<u64>,
    /// `[keys, channels]`.
    rows: Vec<f32>,
}

impl Sample {
    /// No rows yet.
    pub(super) fn new(limit: usize) -> Self {
        Self { limit, keys: Vec::new(), rows: Vec::new() }
    }

    /// A sample as it was stored, or `None` where the keys do not ascend or are not as many as there are of `all` rows.
    pub(super) fn stored(limit: usize, all: u64, keys: Vec<u64>, rows: Vec<f32>) -> Option<Self> {
        let valid = keys.len() as u64 == all.min(limit as u64) && keys.is_sorted_by(|a, b| a < b);
        valid.then_some(Self { limit, keys, rows })
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

    /// As [`Self::offer`], for a sample of extremes; `largest` is the largest magnitude of all these rows.
    pub(super) fn offer_extremes(
        &mut self,
        rows: &[f32],
        channels: usize,
        window: WindowKey,
        first: u64,
        largest: f32,
    ) {
        // Rows that begin alike in every window have equal magnitudes: what is left of the key tells them apart.
        let key = |largest: f32, hash: u64| u64::from(!largest.to_bits()) << 32 | hash >> 32;
        if self.is_full_below(key(largest, 0)) {
            return;
        }
        for (row, ordinal) in rows.chunks_exact(channels).zip(first..) {
            self.insert(key(absmax(row), window.row(ordinal)), row);
        }
    }

    fn is_full_below(&self, key: u64) -> bool {
        self.keys.len() == self.limit && self.keys.last().is_some_and(|&last| key >= last)
    }

    /// Adds the rows of another sample of the same channels.
    pub(super) fn merge(&mut self, other: &Self) {
        let channels = other.rows.len().checked_div(other.keys.len()).unwrap_or(0).max(1);
        for (&key, row) in other.keys.iter().zip(other.rows.chunks_exact(channels)) {
            self.insert(key, row);
        }
    }

    fn insert(&mut self, key: u64, row: &[f32]) {
        if self.is_full_below(key) {
            return;
        }
        let Err(at) = self.keys.binary_search(&key) else { return };
        self.keys.insert(at, key);
        self.rows.splice(at * row.len()..at * row.len(), row.iter().copied());
        self.keys.truncate(self.limit);
        self.rows.truncate(self.limit * row.len());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_samples_make_the_sample_of_all_rows() {
        let rows: Vec<f32> = (0..400).map(|i| i as f32).collect();
        let windows = [WindowKey::new("ab", 0), WindowKey::new("ab", 9), WindowKey::new("ac", 0)];
        let mut whole = Sample::new(SAMPLE_ROWS);
        let mut parts: Vec<Sample> = Vec::new();
        for window in windows {
            let mut part = Sample::new(SAMPLE_ROWS);
            part.offer(&rows[..100], 2, window, 0);
            part.offer(&rows[100..], 2, window, 50);
            whole.offer(&rows, 2, window, 0);
            parts.push(part);
        }
        assert_eq!((whole.keys().len(), whole.rows().len()), (SAMPLE_ROWS, 2 * SAMPLE_ROWS));
        for order in [[0, 1, 2], [2, 1, 0], [1, 2, 0]] {
            let mut merged = Sample::new(SAMPLE_ROWS);
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
        let mut sample = Sample::new(SAMPLE_ROWS);
        let rows: Vec<f32> = (0..10_000).map(|i| i as f32).collect();
        sample.offer(&rows, 1, WindowKey::new("text", 3), 0);
        let mean = sample.rows().iter().sum::<f32>() / SAMPLE_ROWS as f32;
        // The standard error of the mean of 32 is 510.
        assert!((mean - 5000.0).abs() < 1500.0, "{mean}");
    }

    #[test]
    fn extremes_are_the_rows_with_the_largest_magnitudes() {
        let rows: Vec<f32> = (0..100_u8).flat_map(|i| [f32::from(i * 37 % 100), -f32::from(i * 61 % 100)]).collect();
        let window = WindowKey::new("text", 0);
        let mut whole = Sample::new(EXTREME_ROWS);
        whole.offer_extremes(&rows, 2, window, 0, 99.0);
        let magnitudes: Vec<f32> = whole.rows().chunks_exact(2).map(absmax).collect();
        let mut expected: Vec<f32> = rows.chunks_exact(2).map(absmax).collect();
        expected.sort_unstable_by(|a, b| b.total_cmp(a));
        assert_eq!(magnitudes, expected[..EXTREME_ROWS]);
        let parts = [0..60, 60..200].map(|part| {
            let mut sample = Sample::new(EXTREME_ROWS);
            let rows = &rows[part.clone()];
            rows.chunks(20).zip((part.start as u64 / 2..).step_by(10)).for_each(|(rows, first)| {
                sample.offer_extremes(rows, 2, window, first, absmax(rows));
            });
            sample
        });
        for [mut a, b] in [[parts[0].clone(), parts[1].clone()], [parts[1].clone(), parts[0].clone()]] {
            a.merge(&b);
            assert_eq!(a, whole);
        }
    }
}
