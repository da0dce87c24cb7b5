#![allow(clippy::unwrap_used, clippy::float_cmp, clippy::many_single_char_names)]

use super::*;
use crate::parallel::Threads;
use proptest::prelude::*;

struct Case {
    sizes: Sizes,
    tensors: [Vec<f32>; 6],
}

impl Case {
    /// Step sizes are positive and `a` is negative, as a model's are.
    fn new(sizes: Sizes) -> Self {
        let Sizes { segments, window, channels, states } = sizes;
        let noise = |count: usize, seed: u32, from: f32, to: f32| -> Vec<f32> {
            let unit = |i: u32| (i.wrapping_mul(2_654_435_761).wrapping_add(seed) >> 8) as f32 / (1 << 24) as f32;
            (0..count as u32).map(|i| from + (to - from) * unit(i)).collect()
        };
        let rows = segments * window;
        let tensors = [
            noise(rows * channels, 1, -2.0, 2.0),
            noise(rows * channels, 2, 0.0, 1.5),
            noise(channels * states, 3, -3.0, -0.01),
            noise(rows * states, 4, -1.0, 1.0),
            noise(rows * states, 5, -1.0, 1.0),
            noise(channels, 6, -1.0, 1.0),
        ];
        Self { sizes, tensors }
    }

    fn run(&self, level: Level, threads: usize) -> Result<Vec<f32>, SelectiveScanError> {
        let [u, dt, a, b, c, skip] = self.tensors.each_ref().map(Vec::as_slice);
        let mut out = vec![f32::NAN; self.sizes.segments * self.sizes.window * self.sizes.channels];
        selective_scan_at(level, self.sizes, &Inputs { u, dt, a, b, c, skip }, &mut out, &Threads(threads))?;
        Ok(out)
    }

    /// The definition, in double precision.
    fn expected(&self) -> Vec<f64> {
        let Sizes { segments, window, channels, states } = self.sizes;
        let [u, dt, a, b, c, skip] =
            self.tensors.each_ref().map(|t| t.iter().map(|&x| f64::from(x)).collect::<Vec<f64>>());
        let mut out = vec![0.0; u.len()];
        for s in 0..segments {
            for d in 0..channels {
                let mut state = vec![0.0; states];
                for row in s * window..(s + 1) * window {
                    let i = row * channels + d;
                    out[i] = skip[d] * u[i];
                    for (n, state) in state.iter_mut().enumerate() {
                        *state = (dt[i] * a[d * states + n]).exp() * *state + dt[i] * b[row * states + n] * u[i];
                        out[i] += *state * c[row * states + n];
                    }
                }
            }
        }
        out
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]
    #[test]
    fn agrees_with_the_definition_at_every_level(
        segments in 0..3_usize, window in 0..40_usize, channels in 0..150_usize, states in 0..20_usize
    ) {
        let case = Case::new(Sizes { segments, window, channels, states });
        let expected = case.expected();
        for level in Level::available() {
            for (i, (found, expected)) in case.run(level, 2).unwrap().iter().zip(&expected).enumerate() {
                let difference = (f64::from(*found) - expected).abs();
                prop_assert!(difference < 2e-5, "{level:?} at {i}: {found}, expected {expected}");
            }
        }
    }
}

#[test]
fn every_segment_starts_anew() {
    let one = Case::new(Sizes { segments: 1, window: 9, channels: 20, states: 5 });
    let sizes = Sizes { segments: 2, ..one.sizes };
    let twice = |i: usize| [&one.tensors[i][..], &one.tensors[i][..]].concat();
    let two = Case {
        sizes,
        tensors: [twice(0), twice(1), one.tensors[2].clone(), twice(3), twice(4), one.tensors[5].clone()],
    };
    let (one, two) = (one.run(Level::detect(), 1).unwrap(), two.run(Level::detect(), 1).unwrap());
    assert_eq!(two, [one.clone(), one].concat());
}

#[test]
fn threads_do_not_change_a_bit() {
    let case = Case::new(Sizes { segments: 2, window: 33, channels: 200, states: 16 });
    assert_eq!(case.run(Level::detect(), 1).unwrap(), case.run(Level::detect(), 3).unwrap());
}

#[test]
fn refuses_what_does_not_fit() {
    let sizes = Sizes { segments: 1, window: 2, channels: 3, states: 4 };
    for (which, expected) in [
        "u has 7 elements, expected 6",
        "dt has 7 elements, expected 6",
        "A has 13 elements, expected 12",
        "B has 9 elements, expected 8",
        "C has 9 elements, expected 8",
        "skip has 4 elements, expected 3",
    ]
    .into_iter()
    .enumerate()
    {
        let mut case = Case::new(sizes);
        case.tensors[which].push(0.0);
        assert_eq!(case.run(Level::detect(), 1).unwrap_err().to_string(), expected);
    }
}
