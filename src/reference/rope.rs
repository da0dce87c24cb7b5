//! Rotary positions: frequencies under every scaling, and the rotation itself.
//!
//! Formulas: rotary embedding (Su et al. 2021), position interpolation (Chen et al. 2023), NTK-aware scaling and `YaRN` (Peng et al.
//! 2023), Llama 3.1's wavelength bands, in the form that Hugging Face's `transformers` gives them.

use accordion_graphs::architecture::{Rope, RopeScaling};
use ndarray::{Array2, Array3};
use std::f64::consts::TAU;

/// One frequency per pair of dimensions, and what cos and sin are multiplied with.
#[derive(Debug, Clone, PartialEq)]
pub struct Frequencies {
    /// Radians per position, `[d / 2]`.
    pub inv_freq: Vec<f32>,
    /// Multiplies cos and sin.
    pub attention_factor: f32,
}

impl Frequencies {
    /// The frequencies for heads of width `head_dim` in a call whose largest position is `largest_position`; only
    /// dynamic scaling looks at the latter.
    pub fn new(rope: &Rope, head_dim: usize, largest_position: i64) -> Self {
        let dim = head_dim as f64;
        let unscaled = |theta: f64| (0..head_dim / 2).map(move |i| theta.powf(-2.0 * i as f64 / dim));
        let round = |frequencies: &mut dyn Iterator<Item = f64>| frequencies.map(|f| f as f32).collect();
        let mut attention_factor = 1.0;
        let inv_freq = match rope.scaling {
            RopeScaling::None => round(&mut unscaled(rope.theta)),
            RopeScaling::Linear { factor } => round(&mut unscaled(rope.theta).map(|f| f / factor)),
            RopeScaling::Dynamic { factor, original_max_positions } => {
                let original = original_max_positions as f64;
                let len = (largest_position as f64 + 1.0).max(original);
                let growth = (factor * len / original - (factor - 1.0)).powf(dim / (dim - 2.0));
                round(&mut unscaled(rope.theta * growth))
            }
            RopeScaling::Yarn { factor, original_max_positions, beta_fast, beta_slow, attention_factor: scale } => {
                attention_factor = scale as f32;
                // The (fractional) pair of dimensions that turns `rotations` times over the trained length.
                let pair = |rotations: f64| {
                    dim * (original_max_positions as f64 / (rotations * TAU)).ln() / (2.0 * rope.theta.ln())
                };
                let low = pair(beta_fast).floor().max(0.0);
                // A ramp from a pair to itself would divide by zero.
                let high = match pair(beta_slow).ceil().min(dim - 1.0) {
                    high if high.total_cmp(&low).is_eq() => high + 0.001,
                    high => high,
                };
                round(&mut unscaled(rope.theta).enumerate().map(|(i, f)| {
                    let interpolated = ((i as f64 - low) / (high - low)).clamp(0.0, 1.0);
                    f / factor * interpolated + f * (1.0 - interpolated)
                }))
            }
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_positions } => {
                let original = original_max_positions as f64;
                round(&mut unscaled(rope.theta).map(|f| {
                    // How often the frequency turns over the trained length decides its band.
                    let turns = original * f / TAU;
                    let kept = ((turns - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0.0, 1.0);
                    (1.0 - kept) * f / factor + kept * f
                }))
            }
        };
        Self { inv_freq, attention_factor }
    }
}

/// Cosines and sines of a list of positions, both `[L, d / 2]`, attention factor included.
#[derive(Debug, Clone)]
pub struct Rotary {
    cos: Array2<f32>,
    sin: Array2<f32>,
}

impl Rotary {
    /// The rotation of rows at `positions`. Angles are products in `f32`, as in the models' own code.
    pub fn new(rope: &Rope, head_dim: usize, positions: &[i64]) -> Self {
        let largest = positions.iter().copied().max().unwrap_or(0);
        let Frequencies { inv_freq, attention_factor } = Frequencies::new(rope, head_dim, largest);
        let of_angles = |f: fn(f32) -> f32| {
            Array2::from_shape_fn((positions.len(), inv_freq.len()), |(row, i)| {
                f(positions[row] as f32 * inv_freq[i]) * attention_factor
            })
        };
        Self { cos: of_angles(f32::cos), sin: of_angles(f32::sin) }
    }

    /// The rotation of `rows` rows by `angle` in all of their `pairs` pairs of dimensions.
    pub(super) fn of_angle(angle: f32, rows: usize, pairs: usize) -> Self {
        Self { cos: Array2::from_elem((rows, pairs), angle.cos()), sin: Array2::from_elem((rows, pairs), angle.sin()) }
    }

    /// Rotates `x [heads, L, d]`, where dimension `i` pairs with dimension `i + r / 2` of the `r` dimensions that the rotation
    /// was made for. The rest of a wider head stays.
    pub fn apply(&self, x: &Array3<f32>) -> Array3<f32> {
        let half = self.cos.ncols();
        Array3::from_shape_fn(x.dim(), |(head, row, i)| {
            if i >= 2 * half {
                return x[[head, row, i]];
            }
            let (cos, sin) = (self.cos[[row, i % half]], self.sin[[row, i % half]]);
            if i < half {
                x[[head, row, i]] * cos - x[[head, row, i + half]] * sin
            } else {
                x[[head, row, i]] * cos + x[[head, row, i - half]] * sin
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frequencies(theta: f64, scaling: RopeScaling, head_dim: usize, largest: i64) -> Vec<f32> {
        Frequencies::new(&Rope { theta, scaling }, head_dim, largest).inv_freq
    }

    #[track_caller]
    fn assert_close(found: &[f32], expected: &[f32]) {
        assert_eq!(found.len(), expected.len());
        for (f, e) in found.iter().zip(expected) {
            assert!((f - e).abs() <= 2e-6 * e.abs(), "{found:?}\n{expected:?}");
        }
    }

    #[test]
    fn linear_divides_every_frequency() {
        assert_close(&frequencies(10000.0, RopeScaling::Linear { factor: 4.0 }, 4, 0), &[0.25, 0.0025]);
    }

    #[test]
    fn dynamic_grows_the_base_only_beyond_the_trained_length() {
        let dynamic =
            |largest| frequencies(100.0, RopeScaling::Dynamic { factor: 2.0, original_max_positions: 8 }, 4, largest);
        assert_close(&dynamic(7), &[1.0, 0.1]);
        // 16 positions: base 100 * (2 * 16 / 8 - 1)^(4 / 2) = 900.
        assert_close(&dynamic(15), &[1.0, 1.0 / 30.0]);
    }

    #[test]
    fn llama3_keeps_high_divides_low_and_blends_between() {
        // Turns over 2 pi * 100 positions: 100, 10, 1, 0.1 for theta = 10^4 and d = 8; the band is (1, 19).
        let original_max_positions = 628;
        let turns = f64::from(628) / TAU;
        let found = frequencies(
            10000.0,
            RopeScaling::Llama3 { factor: 8.0, low_freq_factor: 1.0, high_freq_factor: 19.0, original_max_positions },
            8,
            0,
        );
        let kept = (turns * 0.1 - 1.0) / 18.0;
        let blend = (0.1 * ((1.0 - kept) / 8.0 + kept)) as f32;
        assert_close(&found, &[1.0, blend, 0.01 / 8.0, 0.001 / 8.0]);
    }

    #[test]
    fn yarn_interpolates_slow_pairs_and_leaves_fast_ones() {
        let scaling = RopeScaling::Yarn {
            factor: 4.0,
            original_max_positions: 4096,
            beta_fast: 32.0,
            beta_slow: 1.0,
            attention_factor: 1.138_629_4,
        };
        let found = frequencies(10000.0, scaling.clone(), 128, 0);
        let plain = frequencies(10000.0, RopeScaling::None, 128, 0);
        // Llama 2: the ramp runs from pair floor(20.94) to pair ceil(45.03).
        assert_close(&found[..=20], &plain[..=20]);
        assert_close(&[found[33] / plain[33]], &[1.0 - 0.75 * 13.0 / 26.0]);
        assert_close(&found[46..], &plain[46..].iter().map(|f| f / 4.0).collect::<Vec<_>>());
        let rope = Rope { theta: 10000.0, scaling };
        assert_close(&[Frequencies::new(&rope, 128, 0).attention_factor], &[1.138_629_4]);
    }

    #[test]
    fn a_rotation_pairs_the_halves_of_a_head() {
        let rope = Rope { theta: 10000.0, scaling: RopeScaling::None };
        let x = Array3::from_shape_fn((1, 2, 4), |(_, _, i)| [1.0, 0.0, 0.0, 2.0][i]);
        let rotated = Rotary::new(&rope, 4, &[0, 3]).apply(&x);
        assert_close(
            rotated.as_slice().unwrap_or_default(),
            &[1.0, 0.0, 0.0, 2.0, 3_f32.cos(), -2.0 * 0.03_f32.sin(), 3_f32.sin(), 2.0 * 0.03_f32.cos()],
        );
    }

    #[test]
    fn a_narrower_rotation_leaves_the_rest_of_a_head() {
        let rope = Rope { theta: 10000.0, scaling: RopeScaling::None };
        let x = Array3::from_shape_fn((1, 1, 4), |(_, _, i)| [1.0, 0.0, 5.0, 6.0][i]);
        let rotated = Rotary::new(&rope, 2, &[3]).apply(&x);
        assert_close(rotated.as_slice().unwrap_or_default(), &[3_f32.cos(), 3_f32.sin(), 5.0, 6.0]);
    }
}
