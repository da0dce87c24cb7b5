//! How closely a part of a graph computes what the reference does of the same values, in the precision of its bundle.
//!
//! - fp32, and weights in blocks: as closely as any two computations in fp32.
//! - 16 bits: no closer than the format's rounding of a few values in a row.
//! - Where activations are rounded to integers or 8-bit floats, a number that lies between two steps may be rounded either
//!   way, and what follows of its row is off by a step. That happens to few rows: at least half of them agree closely, and
//!   none may be further off than a whole computation. Linear layers are held to fp32 on the rows that the graph itself gives
//!   them, so that nothing hides there.

use super::BisectError;
use super::case::{Case, bounds};
use crate::bundle::Bundle;
use crate::checkpoint::CheckpointError;
use crate::reference::Linear;
use crate::reference::quantize::Weight;
use crate::tensor::Tensor;
use crate::verify::linears::{self, layer};
use crate::verify::quantized::{activation_type, bounds_of, weights_of};
use crate::verify::verdict::{Bounds, TapKind, TapResult, Verdict, judge};
use accordion_graphs::dtype::DType;
use accordion_graphs::onnx::QuantizedLinear;
use accordion_graphs::precision::MatrixForm;

type Source<'a> = dyn Fn(&str) -> Result<Weight, CheckpointError> + 'a;
type BoundsOf<'a> = dyn Fn(&str, TapKind) -> Bounds + 'a;

/// What the parts of a bundle's graphs are held to.
pub struct Terms<'a> {
    source: Box<Source<'a>>,
    rounds: Rounds,
    whole: Box<BoundsOf<'a>>,
    /// Whether linear layers are looked at one by one.
    pub(super) linears: bool,
}

/// What graphs round between one operator and the next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Rounds {
    /// To fp32 only.
    Nothing,
    /// Every value to 16 bits.
    Values(DType),
    /// What quantized matrices multiply.
    Activations,
}

/// Fewest rows of which half may be left out.
const FEW_ROWS: usize = 4;

/// The half of the rows in which nothing was rounded otherwise, or little.
const CLOSER_HALF: Bounds =
    Bounds { abs: 1e-4, rel: 1e-2, norm_rel: 5e-3, min_cosine: 0.9999, min_top_k: 0.6, max_ulps: None };

impl<'a> Terms<'a> {
    /// Those for `bundle` and its own weights.
    pub fn of(bundle: &'a Bundle) -> Self {
        Self::over(bundle, weights_of(bundle))
    }

    /// Those for `bundle`, linear layers being those over the tensors of `source`.
    pub fn over(bundle: &'a Bundle, source: impl Fn(&str) -> Result<Weight, CheckpointError> + 'a) -> Self {
        let quantization = bundle.manifest().quantization.as_ref();
        let forms = || quantization.into_iter().flat_map(|quantization| quantization.matrices.values());
        let rounds = match activation_type(bundle) {
            DType::F32 if forms().any(|form| !matches!(form, MatrixForm::Block { .. })) => Rounds::Activations,
            DType::F32 => Rounds::Nothing,
            half => Rounds::Values(half),
        };
        let whole = Box::new(bounds_of(bundle));
        Self { source: Box::new(source), rounds, whole, linears: quantization.is_some() }
    }

    /// The bounds at the point `name`.
    pub(super) fn bounds(&self, name: &str) -> Bounds {
        match (self.rounds, TapKind::of(name)) {
            (Rounds::Values(half), TapKind::Value | TapKind::Logits) => match half {
                DType::F16 => {
                    Bounds { abs: 1e-5, rel: 1e-2, norm_rel: 4e-3, min_cosine: 0.9999, min_top_k: 0.6, max_ulps: None }
                }
                _ => Bounds { abs: 1e-4, rel: 8e-2, norm_rel: 2e-2, min_cosine: 0.999, min_top_k: 0.6, max_ulps: None },
            },
            (Rounds::Values(half), kind) => Bounds::new(kind, half),
            (Rounds::Activations, TapKind::Value | TapKind::Logits) => CLOSER_HALF,
            _ => bounds(name),
        }
    }

    /// Whether the part that computes the point `name` of `case` found what the reference has there.
    pub(super) fn judge(&self, case: &Case<'_>, name: &str, found: &Tensor) -> Option<TapResult> {
        let (bounds, whole) = (self.bounds(name), (self.whole)(name, TapKind::of(name)));
        case.judge_by(name, found, &|name, found, expected, scores| {
            let rounded = self.rounds == Rounds::Activations && scores.is_none() && found.dtype().is_float();
            if !rounded || found.shape() != expected.shape() {
                return judge(name, found, expected, scores, &bounds);
            }
            let all = judge(name, found, expected, None, &whole);
            match closer_half(found, expected) {
                Some([found, expected]) if all.verdict != Verdict::Fail => {
                    let half = judge(name, &found, &expected, None, &bounds);
                    let reason = format!("in the closer half of the rows: {}", half.reason);
                    TapResult { shape: all.shape, reason, ..half }
                }
                _ => all,
            }
        })
    }

    /// The reference's layer of `linear`.
    pub(super) fn layer(&self, linear: &QuantizedLinear) -> Result<Linear, BisectError> {
        Ok(layer(linear, &*self.source)?)
    }

    /// How closely a linear layer by itself computes the same.
    pub(super) fn linear_bounds(&self) -> Bounds {
        match self.rounds {
            // The product is rounded once.
            Rounds::Values(DType::F16) => Bounds { rel: 2e-3, norm_rel: 1e-3, ..linears::BOUNDS },
            Rounds::Values(_) => Bounds { rel: 1.6e-2, norm_rel: 8e-3, min_cosine: 0.9999, ..linears::BOUNDS },
            Rounds::Nothing | Rounds::Activations => linears::BOUNDS,
        }
    }
}

/// The half of the rows of two tensors of one shape, `[rows, n]`, that differ least; `None` where there are few. A tensor of
/// one axis has rows of one number.
fn closer_half(found: &Tensor, expected: &Tensor) -> Option<[Tensor; 2]> {
    let width = match expected.shape() {
        [.., _, width] => *width,
        _ => 1,
    };
    let rows = expected.len().checked_div(width)?;
    if rows < FEW_ROWS {
        return None;
    }
    let [found, expected] = [found, expected].map(Tensor::to_f32);
    let mut order: Vec<(f32, usize)> = (found.chunks(width).zip(expected.chunks(width)))
        .map(|(found, expected)| {
            let sum = |numbers: &mut dyn Iterator<Item = f32>| numbers.map(|x| x * x).sum::<f32>();
            let difference = sum(&mut found.iter().zip(expected).map(|(a, b)| a - b));
            difference / sum(&mut expected.iter().copied()).max(f32::MIN_POSITIVE)
        })
        .zip(0..)
        .collect();
    order.sort_by(|a, b| a.0.total_cmp(&b.0));
    let kept = order.len() - order.len() / 2;
    order.truncate(kept);
    let half = |numbers: &[f32]| {
        let rows = order.iter().flat_map(|&(_, row)| &numbers[row * width..(row + 1) * width]);
        Tensor::from_f32([kept, width], rows.copied().collect()).ok()
    };
    Some([half(&found)?, half(&expected)?])
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn the_rows_that_differ_least_are_the_closer_half() {
        let tensor = |numbers: [f32; 8]| Tensor::from_f32([1, 4, 2], numbers.to_vec()).unwrap();
        let expected = tensor([1.0, 1.0, 2.0, 2.0, 3.0, 3.0, 4.0, 4.0]);
        let found = tensor([1.5, 1.0, 2.0, 2.0, 3.0, f32::NAN, 4.0, 4.1]);
        let [found, expected] = closer_half(&found, &expected).unwrap();
        assert_eq!((found.to_f32(), expected.to_f32()), (vec![2.0, 2.0, 4.0, 4.1], vec![2.0, 2.0, 4.0, 4.0]));
        let few = Tensor::from_f32([3, 2], vec![0.0; 6]).unwrap();
        assert!(closer_half(&few, &few).is_none());
    }
}
