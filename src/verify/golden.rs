//! The reference and the graphs against what the authors' code computed.

use super::error::VerifyError;
use super::judge::{Detail, Findings, Judge};
use super::order::model_order;
use super::verdict::Bounds;
use crate::bundle::{Bundle, ExportOptions, MethodSettings, WeightStorage, export};
use crate::checkpoint::{Checkpoint, config_json};
use crate::goldens::HomerCase;
use crate::pipeline::decode::{Continuation, Sequence};
use crate::pipeline::{self, Engines};
use crate::reference::decode::ContinuationOffset;
use crate::reference::llama::Llama;
use crate::reference::{self, to_tensor};
use crate::taps::{NoTaps, TapSink};
use crate::tensor::Tensor;
use accordion_graphs::blocks::Target;
use accordion_graphs::plan::homer::HomerPlan;
use ndarray::{Axis, Slice};
use std::collections::BTreeMap;
use std::path::Path;

type Tensors = BTreeMap<String, Tensor>;

/// The plan of `case`.
///
/// # Errors
///
/// There is none, or the authors' code ran other nodes.
pub fn golden_plan(case: &HomerCase) -> Result<HomerPlan, VerifyError> {
    let plan = HomerPlan::new(case.architecture.num_layers, case.lengths(), case.settings)?;
    let planned = plan.nodes.iter().map(|n| (n.tap_scope(), n.layers.clone().collect(), n.in_len, n.out_len));
    let golden = case.nodes.iter().map(|n| (n.key.clone(), n.layers.clone(), n.in_len, n.out_len));
    let (planned, golden): (Vec<(_, Vec<usize>, _, _)>, Vec<_>) = (planned.collect(), golden.collect());
    let other = (0..planned.len().max(golden.len())).find(|&i| planned.get(i) != golden.get(i));
    other.map_or(Ok(plan), |node| {
        let show = |list: &[(String, Vec<usize>, usize, usize)]| {
            list.get(node).map_or("nothing".to_owned(), |(key, layers, from, to)| {
                format!("{key} (layers {layers:?}, {from} to {to} tokens)")
            })
        };
        let (found, expected) = (show(&golden), show(&planned));
        Err(VerifyError::OtherPlan { case: case.name.clone(), node, found, expected })
    })
}

/// Exports the model of `case` for `target` into `folder`, which has to be there.
///
/// # Errors
///
/// The case's model cannot be exported, or the folder not be written.
pub fn export_golden(case: &HomerCase, plan: &HomerPlan, target: Target, folder: &Path) -> Result<Bundle, VerifyError> {
    let failed = |path: &Path| {
        let path = path.to_owned();
        move |source| VerifyError::Io { path, source }
    };
    let checkpoint = folder.join("checkpoint");
    std::fs::create_dir(&checkpoint).map_err(failed(&checkpoint))?;
    let weights = checkpoint.join("model.safetensors");
    std::fs::copy(case.weights_path(), &weights).map_err(failed(&weights))?;
    let config = checkpoint.join("config.json");
    std::fs::write(&config, config_json(&case.architecture).to_string()).map_err(failed(&config))?;
    let method =
        MethodSettings::Homer { settings: case.settings, tree_heights: vec![plan.tree_height], significance: None };
    let options = ExportOptions { method, target, weights: WeightStorage::Link, force: false };
    let out = folder.join("bundle");
    export(&Checkpoint::open(checkpoint).map_err(Box::new)?, &out, &options)?;
    Ok(Bundle::open(out)?)
}

/// Compares the reference with `case`. Taps are called `reference.` and their golden name.
///
/// # Errors
///
/// The reference cannot be run.
pub fn reference_against_golden(case: &HomerCase, plan: &HomerPlan) -> Result<Findings, VerifyError> {
    let model = Llama::load(&case.architecture, |name| case.weight(name))?;
    let (prefix, context, suffix) = (&case.prefix_ids[..], &case.context_ids[..], &case.suffix_ids[..]);
    let prompt = reference::homer::Prompt { prefix, context, suffix };
    let significance = |layer: usize| case.bias.get(layer).map_or(&[][..], Vec::as_slice);
    let mut found = Tensors::new();
    let state = reference::homer::compress(&model, plan, prompt, &significance, &mut found)?;
    found.insert("prefix.logits".to_owned(), to_tensor(&model.logits(&state.last_hidden))?);
    let mut continuation = reference::decode::Continuation::new(&state, ContinuationOffset::AfterLast);
    let logits = continuation.feed(&model, &case.teacher_ids, &mut NoTaps)?;
    found.insert("teacher.logits".to_owned(), to_tensor(&logits)?);
    if let Some(rows) = plain_rows(case) {
        let ids = [prefix, context, suffix].concat();
        let positions: Vec<i64> = (0..ids.len() as i64).collect();
        let hidden = reference::plain::forward(&model, &ids, &positions, &mut model.empty_cache(), &mut NoTaps)?;
        let last = hidden.slice_axis(Axis(0), Slice::from(ids.len().saturating_sub(rows)..)).to_owned();
        found.insert("plain.logits".to_owned(), to_tensor(&model.logits(&last))?);
    }
    Ok(against_golden("reference", case, plan, found))
}

/// Compares `engines`, made for the bundle that [`export_golden`] wrote, with `case`. Taps are called `<name>.` and their
/// golden name.
///
/// # Errors
///
/// A graph cannot be run.
pub fn engine_against_golden(
    name: &str,
    engines: &mut Engines<'_>,
    case: &HomerCase,
    plan: &HomerPlan,
    width: usize,
) -> Result<Findings, VerifyError> {
    let (prefix, context, suffix) = (&case.prefix_ids[..], &case.context_ids[..], &case.suffix_ids[..]);
    let prompt = pipeline::homer::Prompt { prefix, context, suffix };
    let bias: Vec<&[f32]> = case.bias.iter().map(Vec::as_slice).collect();
    let mut found = Tensors::new();
    let state = pipeline::homer::compress(engines, plan, prompt, &bias, width, &mut found, &mut |_| {})?;
    let teacher = &case.teacher_ids;
    let mut sequence = Sequence::continue_from(engines, &state, teacher.len(), Continuation::Next)?;
    found.insert("teacher.logits".to_owned(), sequence.forward(engines, teacher, teacher.len())?);
    if let Some(rows) = plain_rows(case) {
        let ids = [prefix, context, suffix].concat();
        found.insert("plain.logits".to_owned(), Sequence::new(engines, ids.len())?.forward(engines, &ids, rows)?);
    }
    Ok(against_golden(name, case, plan, found))
}

fn plain_rows(case: &HomerCase) -> Option<usize> {
    case.expected.get("plain.logits").and_then(|logits| logits.shape().first().copied())
}

/// Compares what `case` holds of the tree, its result, the teacher's tokens after it and the plain model with `found`.
/// Generated text is left to the teacher's tokens, which take the same way without depending on each other.
fn against_golden(name: &str, case: &HomerCase, plan: &HomerPlan, found: Tensors) -> Findings {
    let dtype = case.dtype;
    let mut judge = Judge::new(Detail::All, move |kind| Bounds::golden(kind, dtype));
    judge.prefix = format!("{name}.");
    for (tap, value) in found {
        // Only what the authors' code recorded is asked for: the graphs have far more.
        if case.expected.contains_key(&tap) && judge.expects(&tap) {
            judge.offer(&tap, value);
        }
    }
    let mut recorded: Vec<&String> = case.expected.keys().filter(|name| judge.expects(name)).collect();
    recorded.sort_by(|a, b| model_order(a, b));
    let mut part = |scope: &str, diverged: bool| {
        judge.begin(diverged);
        for &tap in recorded.iter().filter(|tap| tap.starts_with(scope)) {
            judge.record(tap, case.expected[tap].clone());
        }
        judge.end(scope)
    };
    let mut diverged: Vec<bool> = Vec::with_capacity(plan.nodes.len());
    for node in &plan.nodes {
        let below = node.children.is_some_and(|children| children.iter().any(|&child| diverged[child]));
        diverged.push(part(&format!("{}.", node.tap_scope()), below));
    }
    let diverged = diverged.last().copied().unwrap_or(false);
    for scope in ["prefix.last_hidden", "prefix.logits", "prefix.position_ids", "cache.", "teacher.logits"] {
        part(scope, diverged);
    }
    part("plain.logits", false);
    judge.into_findings()
}
