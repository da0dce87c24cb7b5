//! Precision of a bundle: which matrices of a model are quantized and how, their numbers, and the file they go into.
//!
//! The graphs of a method are built in fp32. `apply` decides for every tensor they link to, writes all of them in the new
//! precision into one file, and has the graphs rewritten over it.

mod activations;
mod check;
mod choose;
mod dequantize;
mod error;
mod float16;
mod store;

pub(crate) use check::{check_forms, check_scales};
pub use dequantize::{Activations, InputScale, activations, weight};
pub use error::PrecisionError;
pub use float16::{Basis, Rounding};

use crate::checkpoint::{Checkpoint, NamedShape};
use crate::staging::Staging;
use accordion_calibration::ranges::Calibrator;
use accordion_graphs::blocks::Target;
use accordion_graphs::dtype::DType;
use accordion_graphs::methods::Graphs;
use accordion_graphs::precision::{self, KvCache, MatrixForm, Precision};
use accordion_graphs::weights::WeightIndex;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::rc::Rc;

/// Name of the tensors' file in a bundle whose precision is not the checkpoint's.
pub(crate) const WEIGHTS_FILE: &str = "weights.safetensors";

/// What precision to export in.
#[derive(Debug, Clone)]
pub struct Recipe {
    /// The precision.
    pub precision: Precision,
    /// Entries of a weight row that share a scale, where weights are in blocks; `None` for what suits the precision.
    pub block: Option<usize>,
    /// Matrices that stay as they are: those whose names contain one of these words.
    pub keep: Vec<String>,
    /// File of the ranges of activations.
    pub ranges: Option<PathBuf>,
    /// How clipping values are taken from ranges.
    pub calibrator: Calibrator,
    /// Whether activations are smoothed where that makes the error smaller.
    pub smooth: bool,
    /// The largest squared error, relative to the square of the output, that a linear layer alone may have when it is
    /// quantized: those above it stay as they are.
    pub max_error: Option<f64>,
    /// Whether graphs of a 16-bit precision compute in fp32 and only round to its numbers, for runtimes that cannot compute
    /// in it.
    pub emulated: bool,
    /// What numbers the decoder's cache holds behind a context.
    pub kv_cache: KvCache,
}

impl Recipe {
    /// The weights as the checkpoint has them.
    pub fn fp32() -> Self {
        Self::of(Precision::Fp32)
    }

    /// A precision with what suits it best, without ranges.
    pub fn of(precision: Precision) -> Self {
        Self {
            precision,
            block: None,
            keep: Vec::new(),
            ranges: None,
            calibrator: Calibrator::MinMax,
            smooth: true,
            max_error: None,
            emulated: false,
            kv_cache: KvCache::Fp32,
        }
    }

    /// # Errors
    ///
    /// Something that other precisions or targets have is asked for.
    pub(crate) fn check(&self, target: Target) -> Result<(), PrecisionError> {
        let emulates = float16::format(self.precision).is_some() && target == Target::Portable;
        if self.emulated && !emulates { Err(PrecisionError::Emulated { precision: self.precision }) } else { Ok(()) }
    }
}

/// How the tensors of a bundle differ from the checkpoint's.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Quantization {
    /// The matrices that are quantized.
    pub matrices: BTreeMap<String, MatrixForm>,
    /// Matrices of linear layers that are not, and why; in 16-bit floating point, what of the graphs is in fp32, and why.
    pub kept: BTreeMap<String, String>,
    /// Where the ranges of activations come from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ranges: Option<RangesUsed>,
    /// How graphs compute in 16-bit floating point, if they do.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rounding: Option<Rounding>,
}

/// The range table that a bundle was quantized with.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RangesUsed {
    /// SHA-256 of the file.
    pub sha256: String,
    /// How clipping values were taken from it.
    pub calibrator: String,
    /// Windows of text it has seen.
    pub windows: usize,
}

/// Puts `graphs` into the precision of `recipe`: `tensors` are all that the bundle needs, and go into [`WEIGHTS_FILE`] of
/// `staging`.
///
/// # Errors
///
/// The recipe does not fit the model, or the file cannot be written.
pub(crate) fn apply(
    recipe: &Recipe,
    checkpoint: &Checkpoint,
    tensors: &[NamedShape],
    graphs: &Graphs,
    target: Target,
    staging: &mut Staging,
) -> Result<Quantization, PrecisionError> {
    if let Some(format) = float16::format(recipe.precision) {
        return float16::apply(recipe, format, checkpoint, tensors, graphs, target, staging);
    }
    let chosen = choose::choose(recipe, checkpoint, graphs)?;
    let index = Rc::new(store::write(checkpoint, tensors, &chosen, staging)?);
    let forms = chosen.matrices.iter().map(|(name, matrix)| (name.clone(), (matrix.form, matrix.shape))).collect();
    for graph in graphs.values() {
        precision::quantize(graph, target, &forms, &index);
    }
    let matrices = chosen.matrices.into_iter().map(|(name, matrix)| (name, matrix.form)).collect();
    Ok(Quantization { matrices, kept: chosen.kept, ranges: chosen.ranges, rounding: None })
}

impl Quantization {
    /// Puts `graphs`, as they are built in fp32, into this precision once more: over the tensors of `weights`, of the bundle
    /// that has `tensors` in it.
    pub(crate) fn again(&self, graphs: &Graphs, tensors: &[NamedShape], target: Target, weights: &Rc<WeightIndex>) {
        if let Some(rounding) = &self.rounding {
            return float16::again(rounding, graphs, target, weights);
        }
        let form = |(name, shape): &NamedShape| match (self.matrices.get(name), &shape[..]) {
            (Some(&form), &[out, inner]) => Some((name.clone(), (form, [out, inner]))),
            _ => None,
        };
        let forms = tensors.iter().filter_map(form).collect();
        for graph in graphs.values() {
            precision::quantize(graph, target, &forms, weights);
        }
    }

    /// The tensors that a bundle in this precision has in place of `tensors`, with their types where these are other than the
    /// checkpoint's.
    pub(crate) fn stored(&self, tensors: Vec<NamedShape>) -> Vec<(NamedShape, Option<DType>)> {
        let mut stored = Vec::with_capacity(tensors.len());
        for (name, shape) in tensors {
            if let (Some(form), &[out, inner]) = (self.matrices.get(&name), &shape[..]) {
                let parts = form.parts([out, inner]).into_iter();
                stored.extend(parts.map(|(part, dtype, shape)| ((form.part_name(&name, part), shape), Some(dtype))));
            } else {
                let rounded = self.rounding.as_ref().filter(|rounding| rounding.tensors.contains(&name));
                stored.push(((name, shape), rounded.map(|rounding| rounding.format)));
            }
        }
        stored
    }
}
