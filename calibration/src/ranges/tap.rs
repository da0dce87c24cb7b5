//! The magnitudes of a tap, in view of narrower floating-point formats.

use super::site::absmax;

/// From here on numbers become infinite in half precision.
const F16_OVERFLOW: f32 = 65520.0;

/// Up to here numbers become zero in half precision.
const F16_UNDERFLOW: f32 = 1.0 / (1_u32 << 25) as f32;

/// What is known about the values of a tap.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TapRange {
    /// Values seen.
    pub values: u64,
    /// Those that are NaN or infinite; what follows is about the others.
    pub non_finite: u64,
    /// The largest magnitude.
    pub absmax: f32,
    /// The smallest magnitude that is not zero; infinity where there is none.
    pub smallest: f32,
    /// Values that half precision makes infinite.
    pub f16_overflow: u64,
    /// Values that are not zero, and that half precision makes zero.
    pub f16_underflow: u64,
}

impl Default for TapRange {
    fn default() -> Self {
        Self { values: 0, non_finite: 0, absmax: 0.0, smallest: f32::INFINITY, f16_overflow: 0, f16_underflow: 0 }
    }
}

impl TapRange {
    /// Adds `values`.
    pub(super) fn observe(&mut self, values: &[f32]) {
        let largest = absmax(values);
        self.values += values.len() as u64;
        let count = |of: &dyn Fn(f32) -> bool| values.iter().filter(|&&x| of(x.abs())).count() as u64;
        if largest.is_finite() {
            self.absmax = self.absmax.max(largest);
        } else {
            self.non_finite += count(&|x| !x.is_finite());
            let finite = values.iter().filter(|x| x.is_finite());
            self.absmax = finite.fold(self.absmax, |max, x| max.max(x.abs()));
        }
        if self.absmax >= F16_OVERFLOW {
            self.f16_overflow += count(&|x| x.is_finite() && x >= F16_OVERFLOW);
        }
        // Zeros are given the pattern of infinity, which is above those of all other numbers.
        let smallest = values.iter().fold(self.smallest.to_bits(), |min, x| {
            let bits = x.to_bits() & 0x7FFF_FFFF;
            min.min(if bits == 0 { f32::INFINITY.to_bits() } else { bits })
        });
        self.smallest = f32::from_bits(smallest);
        if self.smallest <= F16_UNDERFLOW {
            self.f16_underflow += count(&|x| x > 0.0 && x <= F16_UNDERFLOW);
        }
    }

    /// Adds what was seen elsewhere, or returns `None` if that cannot be counted.
    pub(super) fn merge(&mut self, other: &Self) -> Option<()> {
        self.values = self.values.checked_add(other.values)?;
        // None of these can be more than the values.
        self.non_finite += other.non_finite;
        self.f16_overflow += other.f16_overflow;
        self.f16_underflow += other.f16_underflow;
        self.absmax = self.absmax.max(other.absmax);
        self.smallest = self.smallest.min(other.smallest);
        Some(())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn what_half_precision_loses_is_counted() {
        let mut range = TapRange::default();
        range.observe(&[0.0, -0.0, 1.0, -65519.0]);
        assert_eq!((range.absmax, range.smallest, range.f16_overflow, range.f16_underflow), (65519.0, 1.0, 0, 0));
        range.observe(&[-65520.0, f32::NAN, f32::NEG_INFINITY, 2_f32.powi(-25), -2_f32.powi(-25).next_up(), 1e-40]);
        let expected =
            TapRange { values: 10, non_finite: 2, absmax: 65520.0, smallest: 1e-40, f16_overflow: 1, f16_underflow: 2 };
        assert_eq!(range, expected);
    }

    #[test]
    fn parts_make_the_whole() {
        let values = [3.0, 0.0, -1e-9, 7e4, f32::INFINITY, 2.0, -5.0];
        let mut whole = TapRange::default();
        whole.observe(&values);
        for cut in 0..values.len() {
            let [mut a, mut b] = [TapRange::default(); 2];
            a.observe(&values[..cut]);
            b.observe(&values[cut..]);
            a.merge(&b).unwrap();
            assert_eq!(a, whole, "cut at {cut}");
        }
    }
}
