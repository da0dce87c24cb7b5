//! What is done to the activations of linear layers that are quantized: from a table of their ranges.

use super::choose::{Chosen, Input};
use super::{PrecisionError, RangesUsed, Recipe};
use crate::checkpoint::{Checkpoint, model_identity};
use accordion_calibration::quantize::QuantizeError;
use accordion_calibration::ranges::{RangeTable, Site};
use accordion_calibration::smoothquant;
use accordion_graphs::precision::MatrixForm;
use sha2::{Digest, Sha256};
use std::path::Path;
use std::rc::Rc;

/// Gives the matrices of `chosen` that ask for it what the table `path` says of their inputs, and keeps those as they are
/// whose error is beyond what `recipe` allows.
pub(super) fn choose(
    recipe: &Recipe,
    path: &Path,
    checkpoint: &Checkpoint,
    chosen: &mut Chosen,
) -> Result<(), PrecisionError> {
    let table = RangeTable::load(path).map_err(|error| PrecisionError::Table(Box::new(error)))?;
    table.check_matches(&model_identity(checkpoint)).map_err(PrecisionError::TableMismatch)?;
    for (name, matrix) in chosen.matrices.iter().filter(|(_, matrix)| asks(matrix.form)) {
        table.expect_site(name, matrix.shape[1]).map_err(PrecisionError::TableMismatch)?;
    }
    for site in table.sites() {
        let of_site: Vec<&String> = site
            .weights()
            .iter()
            .filter(|name| chosen.matrices.get(*name).is_some_and(|matrix| asks(matrix.form)))
            .collect();
        if let Some(form) = of_site.first().and_then(|name| chosen.matrices.get(*name)).map(|matrix| matrix.form) {
            decide(recipe, checkpoint, chosen, site, form, &of_site)?;
        }
    }
    chosen.ranges = Some(RangesUsed {
        sha256: format!("{:x}", Sha256::digest(std::fs::read(path).unwrap_or_default())),
        calibrator: recipe.calibrator.to_string(),
        windows: table.windows(),
    });
    Ok(())
}

/// Whether the form depends on the ranges of activations.
fn asks(form: MatrixForm) -> bool {
    matches!(form, MatrixForm::Int8 { .. } | MatrixForm::Int8PerToken { .. } | MatrixForm::Fp8)
}

/// Decides for the matrices `names`, all of the same `form`, that read the rows of `site`.
fn decide(
    recipe: &Recipe,
    checkpoint: &Checkpoint,
    chosen: &mut Chosen,
    site: &Site,
    form: MatrixForm,
    names: &[&String],
) -> Result<(), PrecisionError> {
    let integers = !matches!(form, MatrixForm::Fp8);
    let mut input = Input { factors: None, threshold: site.threshold(recipe.calibrator) };
    let mut error = None;
    if integers && (recipe.smooth || recipe.max_error.is_some()) {
        let tensors =
            names.iter().map(|name| checkpoint.tensor(name).map_err(Box::new)).collect::<Result<Vec<_>, _>>()?;
        let numbers: Vec<Vec<f32>> = tensors.iter().map(crate::tensor::Tensor::to_f32).collect();
        let matrices: Vec<&[f32]> = numbers.iter().map(Vec::as_slice).collect();
        let found = smoothquant::search(site, &matrices, recipe.calibrator)
            .map_err(|source: QuantizeError| PrecisionError::Quantize { name: names[0].clone(), source })?;
        error = Some(if recipe.smooth { found.error } else { found.unsmoothed_error } / names.len() as f64);
        if recipe.smooth && found.alpha.is_some() {
            input = Input { factors: Some(found.factors), threshold: found.threshold };
        }
    }
    let too_much = recipe.max_error.zip(error).filter(|(allowed, error)| error > allowed);
    let (smoothed, input) = (input.factors.is_some(), Rc::new(input));
    for &name in names {
        if let Some((allowed, error)) = too_much {
            chosen.matrices.remove(name);
            chosen
                .kept
                .insert(name.clone(), format!("its relative squared error is {error:.1e}, {allowed:.1e} is allowed"));
        } else if let Some(matrix) = chosen.matrices.get_mut(name) {
            matrix.input = Some(Rc::clone(&input));
            match &mut matrix.form {
                MatrixForm::Int8 { smoothed: flag } | MatrixForm::Int8PerToken { smoothed: flag } => *flag = smoothed,
                MatrixForm::Block { .. } | MatrixForm::Fp8 => {}
            }
        }
    }
    Ok(())
}
