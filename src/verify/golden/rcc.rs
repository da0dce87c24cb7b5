//! RCC cases: a model and the texts it was run on.

mod graphs;
mod reference;

use super::super::judge::Findings;
use super::super::order::model_order;
use super::{Held, Tensors, VerifyError, describe, exported, failed};
use crate::bundle::{Bundle, MethodSettings};
use crate::checkpoint::{RCC_FILE, architecture_json, rcc_json};
use crate::goldens::RccCase;
use crate::pipeline::Engines;
use crate::precision::Recipe;
use crate::tensor::Tensor;
use accordion_graphs::blocks::Target;
use accordion_graphs::dtype::DType;
use safetensors::tensor::{Dtype, TensorView};
use std::path::Path;

/// Exports the model of `case` for `target` into `folder`, which has to be there.
///
/// # Errors
///
/// The model cannot be exported, or the folder not be written.
pub fn bundle(case: &RccCase, target: Target, recipe: &Recipe, folder: &Path) -> Result<Bundle, VerifyError> {
    let dir = folder.join("checkpoint");
    std::fs::create_dir(&dir).map_err(failed(&dir))?;
    let file = dir.join("model.safetensors");
    // The case's own files may hold weights in another precision than it has.
    let weights = case.weights().iter().map(|(name, weight)| {
        let bytes: Vec<u8> = weight.to_f32().iter().flat_map(|x| x.to_le_bytes()).collect();
        (name, weight.shape().to_vec(), bytes)
    });
    let weights: Vec<_> = weights.collect();
    let views = weights
        .iter()
        .map(|(name, shape, data)| TensorView::new(Dtype::F32, shape.clone(), data).map(|view| (*name, view)));
    let written = views.collect::<Result<Vec<_>, _>>().and_then(|v| safetensors::serialize_to_file(v, None, &file));
    written.map_err(|source| failed(&file)(std::io::Error::other(source)))?;
    let rcc = rcc_json(&case.model.encoder, case.settings);
    describe(&dir, &[("config.json", architecture_json(&case.decoder)), (RCC_FILE, rcc)])?;
    exported(&dir, MethodSettings::Rcc(case.settings), target, recipe)
}

/// Everything that the reference computes of `case`, by golden name.
///
/// # Errors
///
/// The reference cannot be run.
pub fn reference(case: &RccCase) -> Result<Tensors, VerifyError> {
    reference::run(case)
}

/// Everything that `engines`, made for a [`bundle`] of `case`, compute of it, by golden name or as [parts](super::part) of it.
/// `width` segments go through one call.
///
/// # Errors
///
/// A graph cannot be run.
pub fn graphs(case: &RccCase, engines: &mut Engines<'_>, width: usize) -> Result<Tensors, VerifyError> {
    graphs::run(case, engines, width)
}

/// Whether the graphs lack the golden tensor `name`. They lack what reaches nothing, or is the inside of what is compared:
/// hidden states of rows that are not slots, of the decoder behind the slots, and training.
pub fn not_in_graphs(name: &str) -> bool {
    ["/enc_hidden", "/dec_hidden", "/step_hidden"].iter().any(|part| name.ends_with(part))
        || name.starts_with("train_b2/")
}

/// What the plan decides: lengths and places alone.
pub fn is_planned(name: &str) -> bool {
    name.ends_with("/padded_id") || (name.ends_with("/dec_input_ids") && !name.starts_with("train"))
}

/// Compares what a side found with `case`, but for what it `omits`. Where it generated another id by a near-tie, the rest of
/// that run is not comparable.
pub(super) fn compare(side: &str, case: &RccCase, found: &Tensors, omits: &dyn Fn(&str) -> bool) -> Findings {
    let mut names: Vec<&String> = case.expected.keys().filter(|name| !is_planned(name) && !omits(name)).collect();
    let dotted = |name: &str| name.replace('/', ".");
    names.sort_by(|a, b| model_order(&dotted(a), &dotted(b)));
    let mut all = Findings::default();
    for names in names.chunk_by(|a, b| run_of(a) == run_of(b)) {
        let mut held = Held::new(side, found, names.first().map_or(DType::F32, |name| case.dtype_of(name)));
        let mut other = false;
        for &name in names {
            let expected = &case.expected[name];
            let part = name.rsplit('/').next().unwrap_or_default();
            match part {
                _ if other && ["step_ids", "step_logits", "step_hidden", "final_kv"].contains(&part) => {
                    held.judge.leave_out(1);
                }
                "generated" => {
                    let run = run_of(name);
                    other = held.compare_ids(name, expected, &|step| logits(case, run, step));
                }
                _ => held.compare(name, expected, |tensor| Ok(tensor.clone())),
            }
        }
        let found = held.judge.into_findings();
        all.taps.extend(found.taps);
        all.not_comparable += found.not_comparable;
    }
    all
}

fn run_of(name: &str) -> &str {
    name.split('/').next().unwrap_or(name)
}

/// The golden logits that decided generated id number `step` of `run`.
fn logits(case: &RccCase, run: &str, step: usize) -> Option<Vec<f32>> {
    let row = |tensor: &Tensor, row: usize| {
        let width = *tensor.shape().last()?;
        Some(tensor.to_f32().chunks_exact(width.max(1)).nth(row)?.to_vec())
    };
    let tensor = |part: &str| case.expected.get(&format!("{run}/{part}"));
    if let Some(step) = step.checked_sub(1) {
        return row(tensor("step_logits")?, step);
    }
    let prompt = tensor("prefill_logits")?;
    row(prompt, prompt.shape().get(1)?.checked_sub(1)?)
}
