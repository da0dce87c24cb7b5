//! Quantized bundles on the reference's side: the numbers that their integers stand for, and how closely two computations over
//! them agree.

use super::verdict::{Bounds, TapKind};
use crate::bundle::{Bundle, Method};
use crate::checkpoint::{CheckpointError, WeightMaps, encoder_tensors};
use crate::precision::{self, InputScale, Quantization};
use crate::reference::quantize::{Numbers, Rounding, Weight};
use crate::tensor::Tensor;
use accordion_graphs::architecture::Compressor;
use accordion_graphs::dtype::DType;
use accordion_graphs::precision::{KvCache, MatrixForm, Precision};
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
    let is_there =
        |name: &String| quantization.matrices.contains_key(name) || bundle.weights().index().get(name).is_some();
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

/// The bounds for taps of `bundle` on the way of a whole computation.
///
/// Over weights in blocks everything is computed in fp32, and agrees as closely. Where activations are rounded, a difference
/// in the last place of a number that lies between two steps becomes a difference of one step. With differences of a share
/// `d` of a step, a share `d` of all numbers is rounded otherwise, so that they grow to `sqrt(d)` of a step with every layer,
/// and after a few layers two correct sides are as far apart as two independent roundings. Single numbers may then be
/// anything; the norm of the difference stays that of rounding errors. (SmolLM2, int8 with a scale per row, graphs and
/// reference, up to 0.22, with cosines from 0.982 on; the steps of 8-bit floats are twice as coarse.) That is a property of the
/// precision and no error, so that only gross faults show here; single linear layers are held to fp32 by [`super::linears`].
///
/// A cache of 8-bit integers is rounded as well, but most of it once, from numbers that agree closely: it differs by the few
/// entries that lie between two steps, and what is computed over it by what attention makes of these. (SmolLM2, graphs and
/// reference, 256 to 512 tokens of a novel and at random: the cache up to 1.4e-3 of its norm, attention behind it 7.2e-3.) A scale that is 2 %
/// off shows in the cache.
pub fn bounds_of(bundle: &Bundle) -> impl Fn(&str, TapKind) -> Bounds + use<> {
    let forms: Vec<MatrixForm> = bundle
        .manifest()
        .quantization
        .iter()
        .flat_map(|quantization| quantization.matrices.values().copied())
        .collect();
    let rounded =
        |norm_rel, min_cosine| Bounds { abs: 5e-3, rel: 2.0, norm_rel, min_cosine, min_top_k: 0.5, max_ulps: None };
    let rounded = if forms.contains(&MatrixForm::Fp8) {
        Some(rounded(0.6, 0.85))
    } else if forms.iter().any(|form| !matches!(form, MatrixForm::Block { .. })) {
        Some(rounded(0.35, 0.95))
    } else {
        None
    };
    let dtype = activation_type(bundle);
    let kv_int8 = bundle.manifest().kv_cache == KvCache::Int8;
    // Of homer, that is the cache of the context as it was computed.
    let cache_rounded = !matches!(bundle.manifest().method, Method::Homer { .. });
    move |name, kind| {
        let bounds = match (kind, rounded) {
            (TapKind::Value | TapKind::Logits, Some(bounds)) => bounds,
            // Choices are held against their scores as far as these agree.
            _ => Bounds::new(kind, dtype),
        };
        let behind = ["teacher.", "steps."].iter().any(|part| name.starts_with(part));
        match kv_int8 {
            true if behind => bounds.or(&BEHIND_KV_INT8),
            true if cache_rounded && name.starts_with("cache.") => bounds.or(&KV_INT8),
            _ => bounds,
        }
    }
}

/// What may differ of a cache of 8-bit integers, as the numbers that it stands for.
const KV_INT8: Bounds =
    Bounds { abs: 1e-3, rel: 2e-2, norm_rel: 5e-3, min_cosine: 0.9999, min_top_k: 0.8, max_ulps: None };
/// What may differ of what is computed over it.
const BEHIND_KV_INT8: Bounds = Bounds { norm_rel: 1.5e-2, min_cosine: 0.9998, ..KV_INT8 };

/// The numbers that activations of `bundle` are in between operators.
pub fn activation_type(bundle: &Bundle) -> DType {
    match bundle.manifest().precision {
        Precision::Fp16 => DType::F16,
        Precision::Bf16 => DType::Bf16,
        _ => DType::F32,
    }
}
