//! SharedLLM cases, in the released and in the repaired variant.

mod graphs;
mod reference;

use super::super::judge::Findings;
use super::super::order::model_order;
use super::super::sharedllm::decided_between;
use super::{Held, Tensors, VerifyError, batched, checkpoint, exported};
use crate::bundle::{Bundle, MethodSettings};
use crate::checkpoint::sharedllm_json;
use crate::goldens::SharedLlmCase;
use crate::pipeline::Engines;
use crate::precision::Recipe;
use accordion_graphs::blocks::Target;
use accordion_graphs::dtype::DType;
use accordion_graphs::plan::PromptLengths;
use accordion_graphs::plan::sharedllm::{ChunkPolicy, Quirks, SharedLlmPlan};
use std::path::Path;

/// The plan of `case`.
///
/// # Errors
///
/// There is none.
pub fn plan(case: &SharedLlmCase, quirks: Quirks) -> Result<SharedLlmPlan, VerifyError> {
    let lengths = PromptLengths { prefix: 0, context: case.context_ids.len(), suffix: case.running_ids.len() };
    Ok(SharedLlmPlan::new(lengths, case.settings(quirks), ChunkPolicy::Chunks(case.chunks()))?)
}

/// Exports the model of `case` with the weights in the file `weights` for `target` into `folder`, which has to be there.
///
/// # Errors
///
/// The model cannot be exported, or the folder not be written.
pub fn bundle(
    case: &SharedLlmCase,
    weights: &Path,
    quirks: Quirks,
    target: Target,
    recipe: &Recipe,
    folder: &Path,
) -> Result<Bundle, VerifyError> {
    let settings = case.settings(quirks);
    let config = sharedllm_json(&case.architecture, &case.model, &settings);
    let dir = checkpoint(folder, weights, &[("config.json", config)])?;
    exported(&dir, MethodSettings::SharedLlm(settings), target, recipe)
}

/// Everything that the reference computes of one variant of `case`, by golden name.
///
/// # Errors
///
/// The reference cannot be run.
pub fn reference(case: &SharedLlmCase, quirks: Quirks) -> Result<Tensors, VerifyError> {
    reference::run(case, quirks)
}

/// Everything that `engines`, made for a [`bundle`] of `case`, compute of it, by golden name. `width` chunks go through one
/// call where that is free.
///
/// # Errors
///
/// A graph cannot be run.
pub fn graphs(
    case: &SharedLlmCase,
    engines: &mut Engines<'_>,
    quirks: Quirks,
    width: usize,
) -> Result<Tensors, VerifyError> {
    graphs::run(case, engines, quirks, width)
}

/// Whether the graphs lack the golden tensor `name`.
pub fn not_in_graphs(case: &SharedLlmCase, name: &str) -> bool {
    // Both rotations of cross attention are one, in the keys. The mask is an input.
    let rotated = name.contains("cross.layer") && matches!(name.rsplit('.').next(), Some("q" | "k"));
    // Of the last layer, only what is kept is computed.
    let last = format!("layer{}", case.model.injected_layers.saturating_sub(1));
    let unused = name.starts_with("enc.") && name.split('.').any(|part| part == last);
    rotated || unused || name.starts_with("pos.cross") || name.ends_with(".encoded_mask")
}

/// What the plan decides: lengths and places alone.
pub fn is_planned(name: &str) -> bool {
    name.ends_with(".selected") || name == "pos.self_prefill" || name == "pos.cross_key_nominal"
}

/// Compares what a side found with one variant of `case`, but for what it `omits`. What follows from a half that was chosen
/// otherwise is not comparable.
pub(super) fn compare(
    side: &str,
    case: &SharedLlmCase,
    quirks: Quirks,
    found: &Tensors,
    omits: &dyn Fn(&str) -> bool,
) -> Result<Findings, VerifyError> {
    let plan = plan(case, quirks)?;
    let side = if quirks == Quirks::Fixed { format!("{side} fixed") } else { side.to_owned() };
    let expected = case.expected(quirks);
    let mut names: Vec<&String> = expected.keys().filter(|name| !is_planned(name) && !omits(name)).collect();
    names.sort_by(|a, b| model_order(a, b));
    let mut held = Held::new(&side, found, DType::F32);
    let mut other_token = false;
    for name in names {
        let value = &expected[name];
        if held.judge.diverged() || (other_token && name == "generate.tokens") {
            held.judge.leave_out(1);
        } else if let Some(step) = name.strip_prefix("decode.").and_then(|rest| rest.strip_suffix(".input_id")) {
            // Whatever was chosen, the golden's tokens are fed.
            other_token |= held.compare_ids(name, value, &|_| logits(expected, step.parse().ok()?));
        } else {
            held.compare(name, value, |tensor| decided_between(&plan, name, tensor.clone()));
        }
    }
    Ok(held.judge.into_findings())
}

/// The golden logits that decided the token of decoding step `step`.
fn logits(expected: &Tensors, step: usize) -> Option<Vec<f32>> {
    let decided_by = match step.checked_sub(1) {
        None => "prefill.logits".to_owned(),
        Some(before) => format!("decode.{before}.logits"),
    };
    let logits = expected.get(&decided_by)?;
    let row = logits.to_f32();
    Some(row[row.len().checked_sub(*logits.shape().last()?)?..].to_vec())
}

/// The taps of the tree under golden names. The goldens' `cand_hidden_last` and `enc_vectors` are one.
fn tree(case: &SharedLlmCase, taps: Tensors) -> Result<Tensors, VerifyError> {
    let mut found = Tensors::new();
    for (name, tensor) in taps {
        let parts: Vec<&str> = name.split('.').collect();
        let names = match parts[..] {
            ["tree", w, "candidates"] => vec![format!("tree.d{w}.cand_ids")],
            ["tree", w, "vectors"] => {
                vec![format!("tree.d{w}.cand_hidden_last"), format!("tree.d{w}.enc_vectors")]
            }
            ["tree", w, "similarity"] => vec![format!("tree.d{w}.sim")],
            ["tree", w, part] => vec![format!("tree.d{w}.{part}")],
            ["tree", w, "layers", layer, part] => vec![format!("enc.d{w}.layer{layer}.{part}")],
            ["kv", layer, part] => vec![format!("kv.layer{layer}.{part}")],
            // The authors' code computes it anew at every level.
            ["query", "vector"] => (1..case.tree_depth).map(|w| format!("tree.d{}.query_vector", w - 1)).collect(),
            _ => vec![],
        };
        let value = if name == "query.vector" { batched(&tensor)? } else { tensor };
        found.extend(names.into_iter().map(|name| (name, value.clone())));
    }
    Ok(found)
}
