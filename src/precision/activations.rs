//! What is done to the activations of linear layers that are quantized: from a table of their ranges.

use super::choose::{Chosen, Input};
use super::{PrecisionError, RangesUsed, Recipe};
use crate::checkpoint::{Checkpoint, model_identity};
use crate::tensor::Tensor;
use accordion_calibration::quantize::QuantizeError;
use accordion_calibration::ranges::{RangeTable, Site};
use accordion_calibration::sensitivity::{self, Rounding};
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
    let (table, used) = read_table(recipe, path, checkpoint)?;
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
    chosen.ranges = Some(used);
    Ok(())
}

/// The range table `path`, which must be the model's, and what is told of it.
pub(super) fn read_table(
    recipe: &Recipe,
    path: &Path,
    checkpoint: &Checkpoint,
) -> Result<(RangeTable, RangesUsed), PrecisionError> {
    let (table, bytes) = RangeTable::load_with_bytes(path).map_err(|error| PrecisionError::Table(Box::new(error)))?;
    table.check_matches(&model_identity(checkpoint)).map_err(PrecisionError::TableMismatch)?;
    let used = RangesUsed {
        sha256: format!("{:x}", Sha256::digest(bytes)),
        calibrator: recipe.calibrator.to_string(),
        windows: table.windows(),
    };
    Ok((table, used))
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
    let tensors = names.iter().map(|name| checkpoint.tensor(name).map_err(Box::new)).collect::<Result<Vec<_>, _>>()?;
    let numbers: Vec<Vec<f32>> = tensors.iter().map(Tensor::to_f32).collect();
    let matrices: Vec<&[f32]> = numbers.iter().map(Vec::as_slice).collect();
    let mut input = Input { factors: None, threshold: site.threshold(recipe.calibrator) };
    if recipe.smooth && form != MatrixForm::Fp8 {
        let found = smoothquant::search(site, &matrices, recipe.calibrator).map_err(problem_of(names[0]))?;
        if found.alpha.is_some() {
            input = Input { factors: Some(found.factors), threshold: found.threshold };
        }
    }
    let rounding = match form {
        MatrixForm::Int8 { .. } => Some(Rounding::PerTensor(input.threshold)),
        MatrixForm::Int8PerToken { .. } => Some(Rounding::PerRow),
        MatrixForm::Fp8 | MatrixForm::Block { .. } => None,
    };
    let input = Rc::new(input);
    for (&name, matrix) in names.iter().zip(&matrices) {
        let factors = input.factors.as_deref();
        if let (Some(allowed), Some(rounding)) = (recipe.max_error, rounding) {
            let error = sensitivity::worst_row(site, matrix, factors, rounding).map_err(problem_of(name))?;
            if error > allowed {
                chosen.matrices.remove(name);
                let reason =
                    format!("a row comes out with a relative squared error of {error:.1e}, {allowed:.1e} is allowed");
                chosen.kept.insert(name.clone(), reason);
                continue;
            }
        }
        if let Some(matrix) = chosen.matrices.get_mut(name) {
            matrix.input = Some(Rc::clone(&input));
            if let MatrixForm::Int8 { smoothed } | MatrixForm::Int8PerToken { smoothed } = &mut matrix.form {
                *smoothed = input.factors.is_some();
            }
        }
    }
    Ok(())
}

fn problem_of(name: &str) -> impl FnOnce(QuantizeError) -> PrecisionError + '_ {
    move |source| PrecisionError::Quantize { name: name.to_owned(), source }
}
