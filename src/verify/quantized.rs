//! Quantized bundles on the reference's side: the numbers that their integers stand for, and how closely two computations over
//! them agree.

use super::verdict::{Bounds, TapKind};
use crate::bundle::Bundle;
use crate::checkpoint::{CheckpointError, WeightMaps, encoder_tensors};
use crate::precision::{self, InputScale, Quantization};
use crate::reference::quantize::{Numbers, Rounding, Weight};
use crate::tensor::Tensor;
use accordion_graphs::architecture::Compressor;
use accordion_graphs::dtype::DType;
use accordion_graphs::precision::MatrixForm;
use std::collections::BTreeMap;

/// The tensors of `bundle` as the reference takes them, by the names of the checkpoint: of quantized matrices the numbers
/// that their entries stand for, and what is rounded before they are multiplied.
///
/// The reference also computes what reaches no token, and bundles in their own precision do not have the tensors for it: zeros
/// take their place.
pub fn weights_of(bundle: &Bundle) -> impl Fn(&str) -> Result<Weight, CheckpointError> + Clone + Send + use<> {
    let (maps, quantization) = (bundle.weights().clone(), bundle.manifest().quantization.clone());
    let absent = absent(bundle);
    move |name: &str| match (absent.get(name), &quantization) {
        (Some(shape), _) => zeros(name, shape),
        (None, Some(quantization)) => quantized(&maps, quantization, name),
        (None, None) => Ok(maps.tensor(name)?.into()),
    }
}

/// Tensors of the model that `bundle` has left out, with their shapes: they are of the encoder's last layers, and the last map.
fn absent(bundle: &Bundle) -> BTreeMap<String, Vec<usize>> {
    let manifest = bundle.manifest();
    let (Some(quantization), Some(Compressor::Rcc(model))) = (&manifest.quantization, &manifest.compressor) else {
        return BTreeMap::new();
    };
    let encoder = encoder_tensors(&model.encoder).into_iter();
    let encoder = encoder.map(|(name, shape)| (format!("{}.{name}", model.encoder_path), shape));
    let map = format!("{}.{}.weight", model.layer_maps, manifest.architecture.num_layers().saturating_sub(1));
    let map = (map, vec![manifest.architecture.hidden_size(), model.encoder.hidden_size()]);
    let is_there = |name: &String| {
        quantization.matrices.contains_key(name) || bundle.weights().index().get(name).is_some()
    };
    encoder.chain([map]).filter(|(name, _)| !is_there(name)).collect()
}

fn zeros(name: &str, shape: &[usize]) -> Result<Weight, CheckpointError> {
    let tensor = Tensor::from_f32(shape, vec![0.0; shape.iter().product()]);
    tensor.map(Weight::from).map_err(|source| CheckpointError::Tensor { name: name.to_owned(), source })
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
