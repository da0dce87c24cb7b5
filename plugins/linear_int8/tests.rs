#![allow(clippy::unwrap_used, clippy::float_cmp)]

use super::*;
use crate::parallel::Threads;
use proptest::prelude::*;

fn noise(count: usize, seed: u32) -> Vec<f32> {
    (0..count as u32).map(|i| ((i * 2_654_435_761 + seed) % 2000) as f32 / 1000.0 - 1.0).collect()
}

fn bytes(count: usize, seed: u32) -> Vec<i8> {
    (0..count as u32).map(|i| ((i.wrapping_mul(2_654_435_761).wrapping_add(seed)) >> 24) as i8).collect()
}

struct Call {
    sizes: Sizes,
    x: Vec<f32>,
    weight: Vec<i8>,
    weight_scale: Vec<f32>,
    smoothing: Vec<f32>,
    input_scale: InputScale,
}

impl Call {
    fn new(rows: usize, inner: usize, outer: usize, input_scale: InputScale) -> Self {
        Self {
            sizes: Sizes { rows, inner, outer },
            x: noise(rows * inner, 1),
            weight: bytes(outer * inner, 2),
            weight_scale: noise(outer, 3).iter().map(|x| 0.01 + 0.005 * x).collect(),
            smoothing: noise(inner, 4).iter().map(|x| 1.0 + 0.5 * x).collect(),
            input_scale,
        }
    }

    fn run(&self, level: Level, threads: usize) -> Result<Vec<f32>, LinearInt8Error> {
        let Self { sizes, x, weight, weight_scale, smoothing, input_scale } = self;
        let inputs = Inputs { x, weight, weight_scale, input_scale: *input_scale, smoothing };
        let mut out = vec![f32::NAN; sizes.rows * sizes.outer];
        linear_int8_at(level, *sizes, &inputs, &mut out, &Threads(threads)).map(|()| out)
    }

    /// The definition, number by number.
    fn expected(&self) -> Vec<f32> {
        let Sizes { rows, inner, outer } = self.sizes;
        let mut expected = Vec::new();
        for row in 0..rows {
            let x: Vec<f32> = self.x[row * inner..][..inner].iter().zip(&self.smoothing).map(|(x, s)| x * s).collect();
            let scale = match self.input_scale {
                InputScale::Static(scale) => scale,
                InputScale::PerRow => {
                    (x.iter().fold(0.0_f32, |most, x| most.max(x.abs())) / 127.0).max(f32::MIN_POSITIVE)
                }
            };
            let numbers: Vec<i32> =
                x.iter().map(|x| (x / scale).round_ties_even().clamp(-128.0, 127.0) as i32).collect();
            for o in 0..outer {
                let products = numbers.iter().zip(&self.weight[o * inner..]).map(|(n, w)| n * i32::from(*w));
                expected.push(products.sum::<i32>() as f32 * (self.weight_scale[o] * scale));
            }
        }
        expected
    }
}

proptest! {
    #[test]
    fn is_the_definition_to_the_bit_at_every_level(
        rows in 1..120_usize, inner in 0..300_usize, outer in 0..150_usize, dynamic: bool
    ) {
        // A static scale that some entries saturate with.
        let scale = if dynamic { InputScale::PerRow } else { InputScale::Static(0.0101) };
        let call = Call::new(rows, inner, outer, scale);
        let expected = call.expected();
        for level in Level::available() {
            prop_assert!(call.run(level, 2).unwrap() == expected, "{level:?}");
        }
    }
}

#[test]
fn slabs_and_threads_do_not_change_a_bit() {
    let mut call = Call::new(13, 1100, 1000, InputScale::PerRow);
    let expected = call.expected();
    assert!(call.weight.len() > SLAB);
    assert!(call.run(Level::detect(), 1).unwrap() == expected);
    assert!(call.run(Level::detect(), 3).unwrap() == expected);
    call.sizes.rows = 1;
    call.x.truncate(1100);
    assert!(call.run(Level::detect(), 3).unwrap() == expected[..1000]);
}

#[test]
fn sums_have_room_for_the_largest_numbers() {
    for rows in [1, 5] {
        let mut call = Call::new(rows, MAX_INNER, 2, InputScale::Static(1.0));
        call.x.fill(-1e9);
        call.weight.fill(-128);
        for level in Level::available() {
            assert!(call.run(level, 1).unwrap() == call.expected(), "{level:?}");
        }
    }
}

#[test]
fn what_is_not_a_number_stays_in_its_row() {
    for (scale, infinite) in [(InputScale::Static(0.01), false), (InputScale::PerRow, true)] {
        for rows in [3, 7] {
            let mut call = Call::new(rows, 40, 70, scale);
            call.x[40..80].fill(0.0);
            call.x[5] = f32::NAN;
            call.x[2 * 40 + 39] = f32::INFINITY;
            for level in Level::available() {
                let out = call.run(level, 1).unwrap();
                assert!(out[..70].iter().all(|y| y.is_nan()), "{level:?}");
                assert!(out[70..140].iter().all(|&y| y == 0.0), "{level:?}");
                assert!(out[140..210].iter().all(|y| y.is_nan() == infinite), "{level:?}");
            }
        }
    }
}

#[test]
fn refuses_what_does_not_fit() {
    let refuse = |change: &dyn Fn(&mut Call)| {
        let mut call = Call::new(2, 3, 4, InputScale::Static(1.0));
        change(&mut call);
        call.run(Level::Portable, 1).unwrap_err().to_string()
    };
    assert_eq!(refuse(&|call| call.x.push(0.0)), "x has 7 elements, expected 6");
    assert_eq!(refuse(&|call| call.weight.push(0)), "weight has 13 elements, expected 12");
    assert_eq!(refuse(&|call| call.weight_scale.push(0.0)), "weight_scale has 5 elements, expected 4");
    assert_eq!(refuse(&|call| call.smoothing.push(0.0)), "smoothing has 4 elements, expected 3");
    let too_wide = Call::new(1, MAX_INNER + 1, 1, InputScale::PerRow).run(Level::Portable, 1).unwrap_err().to_string();
    assert_eq!(too_wide, "x has 131072 columns, expected at most 131071");
    for scale in [0.0, -1.0, f32::NAN, f32::INFINITY] {
        let message = refuse(&|call| call.input_scale = InputScale::Static(scale));
        assert_eq!(message, format!("input_scale is {scale}, expected a positive number"));
    }
}
