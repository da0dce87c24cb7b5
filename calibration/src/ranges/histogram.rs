//! How often magnitudes occur, with bins that grow with what is seen.

/// Number of bins.
pub const BINS: usize = 2048;

/// Exponent of the narrowest bins. Below 2048 times its width, magnitudes are as good as zero.
const MIN_EXPONENT: i32 = -100;

/// Independent counters, so that a run of values in the same bin does not wait for the one before.
const LANES: usize = 4;

/// Counts of magnitudes in [`BINS`] bins from 0 on, each `2^exponent` wide.
///
/// The width is the smallest power of two with which the largest magnitude seen has a bin. When a larger one comes, pairs of
/// bins are joined, which gives exactly the counts that the wider bins would have had from the start: the histogram depends
/// on the values alone, in whatever order and parts they came.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Histogram {
    exponent: i32,
    counts: Vec<u64>,
}

impl Default for Histogram {
    fn default() -> Self {
        Self { exponent: MIN_EXPONENT, counts: vec![0; BINS] }
    }
}

/// The smallest exponent with which `absmax` is below [`BINS`] bins' end.
fn exponent_for(absmax: f32) -> i32 {
    // The exponent of the power of two at or below it; that of subnormal numbers is below all that matter.
    let floor = (absmax.to_bits() >> 23 & 0xFF) as i32 - 127;
    (floor + 1 - BINS.ilog2() as i32).max(MIN_EXPONENT)
}

impl Histogram {
    /// A histogram as it was stored. `None` unless there are [`BINS`] counts, the exponent is that of `absmax`, and nothing
    /// is counted beyond the bin of `absmax`.
    pub(super) fn stored(exponent: i32, counts: Vec<u64>, absmax: f32) -> Option<Self> {
        let histogram = Self { exponent, counts };
        let fits = histogram.counts.len() == BINS && exponent == exponent_for(absmax);
        let last = histogram.counts.iter().rposition(|&n| n > 0).unwrap_or(0);
        (fits && last == histogram.bin(absmax)).then_some(histogram)
    }

    /// Exponent of the bins' width.
    pub(super) fn exponent(&self) -> i32 {
        self.exponent
    }

    /// Counts by bin.
    pub fn counts(&self) -> &[u64] {
        &self.counts
    }

    /// Width of a bin.
    pub fn width(&self) -> f64 {
        f64::from(self.exponent).exp2()
    }

    /// Values counted, if the number can be represented.
    pub(super) fn total(&self) -> Option<u64> {
        self.counts.iter().try_fold(0_u64, |sum, &n| sum.checked_add(n))
    }

    fn bin(&self, magnitude: f32) -> usize {
        (f64::from(magnitude) / self.width()) as usize
    }

    /// Counts `values`, which are finite and not larger than `absmax` in magnitude.
    pub(super) fn count(&mut self, values: &[f32], absmax: f32) {
        self.widen(exponent_for(absmax));
        // A product with a power of two is exact, or less than a bin.
        let per_bin = f32::from_bits(((127 - self.exponent) as u32) << 23);
        let mut lanes = vec![[0_u32; LANES]; BINS];
        // A counter takes at most one count in LANES.
        for part in values.chunks(u32::MAX as usize) {
            let (whole, rest) = part.as_chunks::<LANES>();
            for values in whole {
                for (lane, value) in values.iter().enumerate() {
                    let bin = (value.abs() * per_bin) as usize;
                    lanes[bin.min(BINS - 1)][lane] += 1;
                }
            }
            for value in rest {
                lanes[((value.abs() * per_bin) as usize).min(BINS - 1)][0] += 1;
            }
            for (count, lanes) in self.counts.iter_mut().zip(&mut lanes) {
                *count += lanes.iter().map(|&n| u64::from(n)).sum::<u64>();
                *lanes = [0; LANES];
            }
        }
    }

    /// Adds `weight` times the value of magnitude `magnitude`.
    pub(super) fn add(&mut self, magnitude: f32, weight: u64) {
        self.widen(exponent_for(magnitude));
        let bin = self.bin(magnitude);
        self.counts[bin] += weight;
    }

    /// Takes every count `times` times; the total can then still be represented.
    pub(super) fn multiply(&mut self, times: u64) {
        self.counts.iter_mut().for_each(|n| *n *= times);
    }

    /// Adds what another histogram has counted; their totals together can be represented.
    pub(super) fn merge(&mut self, other: &Self) {
        self.widen(other.exponent);
        let shift = (self.exponent - other.exponent).cast_unsigned().min(BINS.ilog2());
        for (bin, n) in other.counts.iter().enumerate() {
            self.counts[bin >> shift] += n;
        }
    }

    fn widen(&mut self, exponent: i32) {
        if exponent <= self.exponent {
            return;
        }
        let shift = (exponent - self.exponent).cast_unsigned().min(BINS.ilog2());
        for bin in 1..BINS {
            let n = std::mem::take(&mut self.counts[bin]);
            self.counts[bin >> shift] += n;
        }
        self.exponent = exponent;
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;

    fn of(values: &[f32]) -> Histogram {
        let mut histogram = Histogram::default();
        histogram.count(values, values.iter().fold(0.0, |max: f32, v| max.max(v.abs())));
        histogram
    }

    #[test]
    fn the_largest_magnitude_is_in_the_upper_half_of_the_bins() {
        for (absmax, exponent, bin) in [(1.0, -10, 1024), (1.999, -10, 2046), (2.0, -9, 1024), (f32::MAX, 117, 2047)] {
            let histogram = of(&[absmax, -absmax, 0.0]);
            assert_eq!((histogram.exponent(), histogram.counts()[bin], histogram.counts()[0]), (exponent, 2, 1));
            assert_eq!(Histogram::stored(exponent, histogram.counts.clone(), absmax), Some(histogram.clone()));
            assert_eq!(Histogram::stored(exponent + 1, histogram.counts.clone(), absmax), None);
            assert_eq!(Histogram::stored(exponent, histogram.counts, absmax / 1.5), None);
        }
        let tiny = of(&[f32::from_bits(1), 0.0]);
        assert_eq!((tiny.exponent(), tiny.counts()[0]), (MIN_EXPONENT, 2));
    }

    #[test]
    fn a_single_value_counts_as_often_as_it_weighs() {
        let mut histogram = of(&[1.0]);
        histogram.add(3.0, 5);
        assert_eq!((histogram.counts()[512], histogram.counts()[1536], histogram.total()), (1, 5, Some(6)));
    }

    proptest! {
        #[test]
        fn order_and_parts_do_not_matter(
            values in prop::collection::vec((-1.0_f32..1.0, -60_i32..60), 1..40), cut in 0_usize..40,
        ) {
            let mut values: Vec<f32> = values.into_iter().map(|(v, e)| v * 2_f32.powi(e)).collect();
            let whole = of(&values);
            let (a, b) = values.split_at(cut.min(values.len()));
            let (mut ab, mut ba) = (of(a), of(b));
            ab.merge(&of(b));
            ba.merge(&of(a));
            prop_assert_eq!(&ab, &whole);
            prop_assert_eq!(&ba, &whole);
            let mut single = Histogram::default();
            values.reverse();
            for value in &values {
                single.count(&[*value], value.abs());
            }
            prop_assert_eq!(single, whole);
        }
    }
}
