//! Rows of activations as signed bytes.

// Forced inlining puts the loops into a function that carries a target feature: only there are they vectors of that width.
#![allow(clippy::inline_always)]

use super::InputScale;
use crate::scratch::Scratch;

/// Numbers that go through the loops side by side.
const LANES: usize = 16;
/// Rows are this many bytes apart, or a multiple: a whole vector can be read from any place that is a multiple of its size.
const ALIGNMENT: usize = 64;
/// Adding it to a number of up to 22 bits rounds that to the nearest whole one, ties to even, in the lowest bits.
const ROUND: f32 = 12_582_912.0;

/// Rows of signed bytes.
#[derive(Default)]
pub(super) struct Rows {
    /// `[rows, stride]`, zeros behind the end of a row.
    pub(super) numbers: Scratch<i8>,
    /// Bytes from one row to the next.
    pub(super) stride: usize,
    /// What the sums of a row's products start from: minus 128 times the sum of the row, because weights are multiplied as
    /// unsigned bytes, greater by 128.
    pub(super) starts: Scratch<i32>,
    /// What one of each row's numbers stands for; NaN where the row has no numbers.
    pub(super) scales: Scratch,
}

impl Rows {
    /// Makes room for rows of `inner` numbers.
    pub(super) fn resize(&mut self, rows: usize, inner: usize) {
        self.stride = inner.next_multiple_of(ALIGNMENT);
        self.numbers.at_least(rows * self.stride);
        self.starts.at_least(rows);
        self.scales.at_least(rows);
    }
}

/// Quantizes the row `x * smoothing` into `to`, which may be longer. Returns what the sums of its products start from, and
/// its scale.
#[inline(always)]
pub(super) fn quantize(x: &[f32], smoothing: &[f32], scale: InputScale, to: &mut [i8]) -> (i32, f32) {
    let (scale, damage) = match scale {
        InputScale::Static(scale) => (scale, 0.0),
        InputScale::PerRow => row_scale(x, smoothing),
    };
    let (to, rest) = to.split_at_mut(x.len());
    rest.fill(0);
    let (mut sums, mut damages) = ([0_i32; LANES], [damage; LANES]);
    let mut some = |x: &[f32], smoothing: &[f32], to: &mut [i8]| {
        for i in 0..x.len() {
            let steps = (x[i] * smoothing[i] / scale).clamp(-128.0, 127.0);
            // Only NaN has survived.
            damages[i] += steps * 0.0;
            let number = ((steps + ROUND).to_bits() as i32).wrapping_sub(ROUND.to_bits() as i32) as i8;
            sums[i] += i32::from(number);
            to[i] = number;
        }
    };
    let whole = x.len() / LANES * LANES;
    for i in (0..whole).step_by(LANES) {
        some(&x[i..i + LANES], &smoothing[i..i + LANES], &mut to[i..i + LANES]);
    }
    some(&x[whole..], &smoothing[whole..], &mut to[whole..]);
    (-128 * sums.iter().sum::<i32>(), scale + damages.iter().sum::<f32>())
}

/// The largest magnitude of `x * smoothing` over 127, and NaN if there is none.
#[inline(always)]
fn row_scale(x: &[f32], smoothing: &[f32]) -> (f32, f32) {
    let (mut most, mut damages) = ([0.0_f32; LANES], [0.0_f32; LANES]);
    let mut some = |x: &[f32], smoothing: &[f32]| {
        for i in 0..x.len() {
            let size = (x[i] * smoothing[i]).abs();
            damages[i] += size * 0.0;
            most[i] = if size > most[i] { size } else { most[i] };
        }
    };
    let whole = x.len() / LANES * LANES;
    for i in (0..whole).step_by(LANES) {
        some(&x[i..i + LANES], &smoothing[i..i + LANES]);
    }
    some(&x[whole..], &smoothing[whole..]);
    let most = most.into_iter().fold(0.0, f32::max);
    ((most / 127.0).max(f32::MIN_POSITIVE), damages.iter().sum())
}
