//! Quantized bundles on the reference's side: the numbers that their integers stand for, and how closely two computations over
//! them agree.

use super::verdict::{Bounds, TapKind};
use crate::bundle::Bundle;
use crate::checkpoint::{CheckpointError, WeightMaps};
use crate::precision::{self, InputScale, Quantization};
use crate::reference::quantize::{Numbers, Rounding, Weight};
use accordion_graphs::dtype::DType;
use accordion_graphs::precision::MatrixForm;

/// The tensors of `bundle` as the reference takes them, by the names of the checkpoint: of quantized matrices the numbers
/// that their entries stand for, and what is rounded before they are multiplied.
pub fn weights_of(bundle: &Bundle) -> impl Fn(&str) -> Result<Weight, CheckpointError> + Clone + Send + use<> {
    let (maps, quantization) = (bundle.weights().clone(), bundle.manifest().quantization.clone());
    move |name: &str| match &quantization {
        Some(quantization) => quantized(&maps, quantization, name),
        None => Ok(maps.tensor(name)?.into()),
    }
}

fn quantized(maps: &WeightMaps, quantization: &Quantization, name: &str) -> Result<Weight, CheckpointError> {
    let rounding = precision::activations(maps, quantization, name)?.map(|activations| Rounding {
        factors: activations.smoothing,
        numbers: match activations.scale {
            InputScale::Int8(scale) => Numbers::Int8(scale),
            InputScale::Int8PerToken => Numbers::Int8PerRow,
            InputScale::Fp8(scale) => Numbers::Float8(scale),
        },
    });
    Ok(Weight { tensor: precision::weight(maps, quantization, name)?, rounding })
}

/// Whether linear layers of `bundle` round what they multiply.
pub fn rounds_activations(bundle: &Bundle) -> bool {
    let forms = bundle.manifest().quantization.iter().flat_map(|quantization| quantization.matrices.values());
    forms.into_iter().any(|form| !matches!(form, MatrixForm::Block { .. }))
}

/// The bounds for taps of `bundle` on the way of a whole computation.
///
/// Over weights in blocks everything is computed in fp32, and agrees as closely. Where activations are rounded, a difference
/// in the last place of a number that lies between two steps becomes a difference of one step, an n-th part of the rounding
/// error of its row; numbers that follow from it are rounded otherwise more often, and a few layers on the two sides are as
/// far apart as two independent roundings. That is a property of the precision and no error, so that these bounds are those
/// of rounding errors as a whole; single linear layers are held to fp32 by [`super::linears`].
pub fn bounds_of(bundle: &Bundle) -> impl Fn(TapKind) -> Bounds + use<> {
    let rounds = rounds_activations(bundle);
    move |kind| match kind {
        _ if !rounds => Bounds::new(kind, DType::F32),
        // Held against their scores as far as these agree.
        TapKind::Selection | TapKind::Choice => Bounds::new(kind, DType::F32),
        TapKind::Value | TapKind::Logits => {
            Bounds { abs: 5e-3, rel: 0.1, norm_rel: 0.1, min_cosine: 0.995, min_top_k: 0.6 }
        }
    }
}
