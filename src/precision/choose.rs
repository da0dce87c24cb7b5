//! Which matrices are quantized, and into which form.

use super::error::{MAX_BLOCK, MIN_BLOCK};
use super::{PrecisionError, RangesUsed, Recipe, activations};
use crate::checkpoint::Checkpoint;
use accordion_graphs::methods::Graphs;
use accordion_graphs::onnx::{Scope, Uses};
use accordion_graphs::precision::{MatrixForm, Precision};
use std::collections::BTreeMap;
use std::rc::Rc;

/// What was decided.
#[derive(Default)]
pub(super) struct Chosen {
    /// The matrices that are quantized.
    pub(super) matrices: BTreeMap<String, Matrix>,
    /// Why others are not.
    pub(super) kept: BTreeMap<String, String>,
    /// Where the ranges of activations come from.
    pub(super) ranges: Option<RangesUsed>,
}

/// A matrix that is quantized.
pub(super) struct Matrix {
    /// How.
    pub(super) form: MatrixForm,
    /// `[out, in]`.
    pub(super) shape: [usize; 2],
    /// What is known of the activations that it is multiplied with, where the form asks for it.
    pub(super) input: Option<Rc<Input>>,
}

/// Activations that linear layers share.
pub(super) struct Input {
    /// What their channels are multiplied by first; the columns of the matrices are divided by it.
    pub(super) factors: Option<Vec<f32>>,
    /// The magnitude at which they are clipped then.
    pub(super) threshold: f32,
}

/// Decides for every matrix that `graphs` use in linear layers or look up rows of.
pub(super) fn choose(recipe: &Recipe, checkpoint: &Checkpoint, graphs: &Graphs) -> Result<Chosen, PrecisionError> {
    let block = recipe.block.unwrap_or(default_block(recipe.precision));
    if !(MIN_BLOCK..=MAX_BLOCK).contains(&block) || !block.is_power_of_two() {
        return Err(PrecisionError::Block { found: block });
    }
    let mut uses: BTreeMap<String, Uses> = BTreeMap::new();
    for (name, found) in graphs.values().flat_map(Scope::weight_uses) {
        let all = uses.entry(name).or_default();
        all.linear |= found.linear;
        all.gather |= found.gather;
        all.other |= found.other;
    }
    if let Some(word) = recipe.keep.iter().find(|word| !uses.keys().any(|name| name.contains(word.as_str()))) {
        return Err(PrecisionError::UnknownKeep { word: word.clone() });
    }
    let mut chosen = Chosen::default();
    let vocabulary = checkpoint.architecture().vocab_size();
    for (name, uses) in uses.iter().filter(|(_, uses)| uses.linear || uses.gather) {
        let Some(&[out, inner]) = checkpoint.weights().get(name).map(|weight| &weight.shape[..]) else { continue };
        let of_tokens = uses.gather || out == vocabulary;
        let form = if recipe.keep.iter().any(|word| name.contains(word.as_str())) {
            Err("asked for".to_owned())
        } else {
            form(recipe.precision, block, inner, *uses, of_tokens)
        };
        match form {
            Ok(form) => {
                chosen.matrices.insert(name.clone(), Matrix { form, shape: [out, inner], input: None });
            }
            Err(reason) => {
                chosen.kept.insert(name.clone(), reason);
            }
        }
    }
    match &recipe.ranges {
        Some(path) => activations::choose(recipe, path, checkpoint, &mut chosen)?,
        None if recipe.precision.needs_ranges() => {
            return Err(PrecisionError::NoRanges { precision: recipe.precision });
        }
        None => {}
    }
    Ok(chosen)
}

/// The form of a matrix with rows of `inner` entries, or why it stays as it is.
fn form(precision: Precision, block: usize, inner: usize, uses: Uses, of_tokens: bool) -> Result<MatrixForm, String> {
    if uses.other {
        return Err("it is used for more than linear layers".to_owned());
    }
    // The largest part of the block that divides the row.
    let block = block.min(1 << inner.trailing_zeros());
    let blocks = |bits| {
        if block < MIN_BLOCK {
            return Err(format!("its rows of {inner} are not a multiple of {MIN_BLOCK}"));
        }
        Ok(MatrixForm::Block { bits, block })
    };
    match precision {
        // Tokens are looked up and scored row by row, few at a time: what counts is the size, and 4 bits cost too much there.
        Precision::Int8 | Precision::Int8PerToken | Precision::WeightInt4 | Precision::WeightInt8 if of_tokens => {
            blocks(8)
        }
        Precision::WeightInt8 => blocks(8),
        Precision::WeightInt4 => blocks(4),
        Precision::Int8 => Ok(MatrixForm::Int8 { smoothed: false }),
        Precision::Int8PerToken => Ok(MatrixForm::Int8PerToken { smoothed: false }),
        Precision::Fp8 if of_tokens => Err("tokens are looked up and scored in fp32".to_owned()),
        Precision::Fp8 => Ok(MatrixForm::Fp8),
        Precision::Fp32 | Precision::Fp16 | Precision::Bf16 => Err("the precision has no integers".to_owned()),
    }
}

/// Weights that share a scale: small blocks where there are few levels.
fn default_block(precision: Precision) -> usize {
    if precision == Precision::WeightInt4 { 32 } else { 64 }
}
