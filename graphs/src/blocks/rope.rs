//! Rotary angles of a sequence, once per graph.

use crate::architecture::{Rope, RopeScaling};
use crate::dtype::DType;
use crate::onnx::{Scope, Value};
use std::f64::consts::PI;

/// Cosines and sines, `[batch, sequence, d / 2]`.
pub struct Angles {
    /// Cosines, times the attention factor.
    pub cos: Value,
    /// Sines, times the attention factor.
    pub sin: Value,
}

/// The frequencies of all dimension pairs where they do not depend on the sequence, and what cos and sin are
/// multiplied with.
pub fn frequencies(rope: &Rope, head_dim: usize) -> (Vec<f64>, f64) {
    let d = head_dim as f64;
    let plain = |i: usize| rope.theta.powf(-2.0 * i as f64 / d);
    let pairs = 0..head_dim / 2;
    match rope.scaling {
        RopeScaling::None | RopeScaling::Dynamic { .. } => (pairs.map(plain).collect(), 1.0),
        RopeScaling::Linear { factor } => (pairs.map(|i| plain(i) / factor).collect(), 1.0),
        RopeScaling::Yarn { factor, original_max_positions, beta_fast, beta_slow, attention_factor } => {
            // The dimension pair that turns `rotations` times within the trained length.
            let pair_turning = |rotations: f64| {
                d * (original_max_positions as f64 / (rotations * 2.0 * PI)).ln() / (2.0 * rope.theta.ln())
            };
            let low = pair_turning(beta_fast).floor().max(0.0);
            let high = pair_turning(beta_slow).ceil().min(d - 1.0);
            let high = if (high - low).abs() < f64::EPSILON { high + 0.001 } else { high };
            let blend = |i: usize| {
                let interpolated = ((i as f64 - low) / (high - low)).clamp(0.0, 1.0);
                plain(i) / factor * interpolated + plain(i) * (1.0 - interpolated)
            };
            (pairs.map(blend).collect(), attention_factor)
        }
        RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_positions } => {
            let original = original_max_positions as f64;
            let banded = |i: usize| {
                let turns = original * plain(i) / (2.0 * PI);
                let keep = ((turns - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0.0, 1.0);
                plain(i) * keep + plain(i) / factor * (1.0 - keep)
            };
            (pairs.map(banded).collect(), 1.0)
        }
    }
}

/// Angles of `rope` over `dims` dimensions for `positions [batch, sequence]`.
pub fn angles(g: &Scope, rope: &Rope, dims: usize, positions: &Value) -> Angles {
    let g = g.scope("rotary");
    let (frequencies, scale) = frequencies(rope, dims);
    let positions = positions.within(&g);
    let frequencies = match rope.scaling {
        RopeScaling::Dynamic { factor, original_max_positions } => {
            dynamic_frequencies(&g, [rope.theta, dims as f64], &positions, factor, original_max_positions)
        }
        _ => g.floats(&frequencies.iter().map(|&f| f as f32).collect::<Vec<_>>()),
    };
    let angle = positions.cast(DType::F32).unsqueeze(2) * frequencies;
    let (cos, sin) = (angle.cos(), angle.sin());
    if (scale - 1.0).abs() < f64::EPSILON {
        return Angles { cos, sin };
    }
    let scale = g.float(scale as f32);
    Angles { cos: cos * &scale, sin: sin * scale }
}

/// Dynamic NTK: the base grows with the largest position once that passes the trained length.
fn dynamic_frequencies(g: &Scope, [theta, d]: [f64; 2], positions: &Value, factor: f64, original: usize) -> Value {
    let length = (positions.max_element() + g.int(1)).maximum(&g.int(original as i64)).cast(DType::F32);
    let growth = length * g.float((factor / original as f64) as f32) - g.float((factor - 1.0) as f32);
    let base = growth.pow(&g.float((d / (d - 2.0)) as f32)) * g.float(theta as f32);
    let exponents: Vec<f32> = (0..(d / 2.0) as usize).map(|i| (-2.0 * i as f64 / d) as f32).collect();
    base.pow(&g.floats(&exponents))
}
