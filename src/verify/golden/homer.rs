//! The reference and the graphs against what the authors' code computed.

use super::super::judge::{Detail, Findings, Judge};
use super::super::order::model_order;
use super::super::verdict::{Bounds, TapResult};
use super::{Tensors, VerifyError, argmax, checkpoint, exported};
use crate::bundle::{Bundle, MethodSettings};
use crate::checkpoint::config_json;
use crate::goldens::HomerCase;
use crate::pipeline::decode::{Continuation, Sequence};
use crate::pipeline::{self, ContextState, Engines};
use crate::precision::Recipe;
use crate::reference::decode::{ContinuationOffset, EndOfText};
use crate::reference::llama::Llama;
use crate::reference::rope::Frequencies;
use crate::reference::{self, plain, to_tensor};
use crate::taps::NoTaps;
use crate::tensor::Tensor;
use accordion_graphs::blocks::{Target, rope};
use accordion_graphs::plan::homer::HomerPlan;
use ndarray::{Array2, Axis, Slice};
use std::path::Path;
use std::rc::Rc;

type Result<T, E = VerifyError> = std::result::Result<T, E>;

/// The plan of `case`.
///
/// # Errors
///
/// There is none, or the authors' code ran other nodes.
pub fn plan(case: &HomerCase) -> Result<HomerPlan> {
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
pub fn bundle(case: &HomerCase, plan: &HomerPlan, target: Target, recipe: &Recipe, folder: &Path) -> Result<Bundle> {
    let dir = checkpoint(folder, case.weights_path(), &[("config.json", config_json(&case.architecture))])?;
    let tree_heights = vec![plan.tree_height];
    exported(&dir, MethodSettings::Homer { settings: case.settings, tree_heights, significance: None }, target, recipe)
}

/// Everything that the reference computes of `case`, by golden name.
///
/// # Errors
///
/// The reference cannot be run.
pub fn reference(case: &HomerCase, plan: &HomerPlan) -> Result<Tensors> {
    let model = Llama::load(&case.architecture, |name| case.weight(name))?;
    let mut found = Tensors::new();
    let rope = Frequencies::new(&case.architecture.rope, case.architecture.head_dim, 0);
    found.insert("rope.inv_freq".into(), Tensor::from_f32([rope.inv_freq.len()], rope.inv_freq)?);
    let (prefix, context, suffix) = (&case.prefix_ids[..], &case.context_ids[..], &case.suffix_ids[..]);
    let prompt = reference::homer::Prompt { prefix, context, suffix };
    let significance = |layer: usize| case.bias.get(layer).map_or(&[][..], Vec::as_slice);
    let state = reference::homer::compress(&model, plan, prompt, &significance, &mut found)?;
    let logits = model.logits(&state.last_hidden);
    found.insert("prefix.logits".into(), to_tensor(&logits)?);
    found.insert("prefix.last_position_id".into(), Tensor::from_i64([1], vec![state.last_position()])?);
    reference_teacher(case, &model, &state, &mut found)?;
    reference_generation(case, &model, &state, &logits, &mut found)?;
    if let Some(rows) = plain_rows(case) {
        let ids = [prefix, context, suffix].concat();
        let positions: Vec<i64> = (0..ids.len() as i64).collect();
        let hidden = plain::forward(&model, &ids, &positions, &mut model.empty_cache(), &mut NoTaps)?;
        let last = hidden.slice_axis(Axis(0), Slice::from(ids.len().saturating_sub(rows)..)).to_owned();
        found.insert("plain.logits".into(), to_tensor(&model.logits(&last))?);
    }
    Ok(found)
}

/// The teacher tokens after the context, at once and one by one.
fn reference_teacher(
    case: &HomerCase,
    model: &Llama,
    state: &reference::homer::ContextState,
    found: &mut Tensors,
) -> Result<()> {
    let (count, vocab) = (case.teacher_ids.len(), case.architecture.vocab_size);
    let mut at_once = reference::decode::Continuation::new(state, ContinuationOffset::AfterLast);
    let positions: Vec<i64> = (at_once.next_position..).take(count).collect();
    found.insert("teacher.position_ids".into(), Tensor::from_i64([count], positions)?);
    let logits = at_once.feed(model, &case.teacher_ids, &mut NoTaps)?;
    found.insert("teacher.logits".into(), to_tensor(&logits)?);
    let mut stepwise = reference::decode::Continuation::new(state, ContinuationOffset::AfterLast);
    let mut rows = Vec::with_capacity(count * vocab);
    for &id in &case.teacher_ids {
        rows.extend(stepwise.feed(model, &[id], &mut NoTaps)?);
    }
    found.insert("teacher_step.logits".into(), Tensor::from_f32([count, vocab], rows)?);
    Ok(())
}

/// Greedy decoding along the authors' `generate`, which repeats the last position.
fn reference_generation(
    case: &HomerCase,
    model: &Llama,
    state: &reference::homer::ContextState,
    logits: &Array2<f32>,
    found: &mut Tensors,
) -> Result<()> {
    let mut continuation = reference::decode::Continuation::new(state, ContinuationOffset::RepeatLast);
    let last = logits.row(logits.nrows().saturating_sub(1));
    let generated = continuation.greedy(model, &last, case.generate_steps, EndOfText::NEVER, &mut NoTaps)?;
    let tokens: Vec<i64> = generated.tokens.iter().map(|&id| i64::from(id)).collect();
    found.insert("generate.tokens".into(), Tensor::from_i64([tokens.len()], tokens)?);
    found.insert("generate.step_logits".into(), to_tensor(&generated.step_logits)?);
    let positions = generated.position_ids;
    found.insert("generate.position_ids".into(), Tensor::from_i64([positions.len()], positions)?);
    for (layer, kv) in continuation.cache.layers.iter().enumerate() {
        found.insert(format!("generate.cache.k.{layer}"), to_tensor(&kv.k)?);
        found.insert(format!("generate.cache.v.{layer}"), to_tensor(&kv.v)?);
    }
    Ok(())
}

/// Everything that `engines`, made for a [`bundle`] of `case`, compute of it, by golden name. `width` leaves go through
/// one call.
///
/// # Errors
///
/// A graph cannot be run.
pub fn graphs(case: &HomerCase, plan: &HomerPlan, engines: &mut Engines<'_>, width: usize) -> Result<Tensors> {
    let mut found = Tensors::new();
    let (frequencies, _) = rope::frequencies(&case.architecture.rope, case.architecture.head_dim);
    let frequencies: Vec<f32> = frequencies.into_iter().map(|f| f as f32).collect();
    found.insert("rope.inv_freq".into(), Tensor::from_f32([frequencies.len()], frequencies)?);
    let (prefix, context, suffix) = (&case.prefix_ids[..], &case.context_ids[..], &case.suffix_ids[..]);
    let prompt = pipeline::homer::Prompt { prefix, context, suffix };
    let bias: Vec<&[f32]> = case.bias.iter().map(Vec::as_slice).collect();
    let state = pipeline::homer::compress(engines, plan, prompt, &bias, width, &mut found, &mut |_| {})?;
    found.insert("prefix.last_position_id".into(), Tensor::from_i64([1], vec![state.last_position])?);
    graphs_teacher(case, engines, &state, &mut found)?;
    graphs_generation(case, engines, &state, &mut found)?;
    if let Some(rows) = plain_rows(case) {
        let ids = [prefix, context, suffix].concat();
        found.insert("plain.logits".into(), Sequence::new(engines, ids.len())?.forward(engines, &ids, rows)?);
    }
    Ok(found)
}

fn graphs_teacher(
    case: &HomerCase,
    engines: &mut Engines<'_>,
    state: &ContextState,
    found: &mut Tensors,
) -> Result<()> {
    let count = case.teacher_ids.len();
    let mut at_once = Sequence::continue_from(engines, state, count, Continuation::Next)?;
    let positions: Vec<i64> = (at_once.next_position()..).take(count).collect();
    found.insert("teacher.position_ids".into(), Tensor::from_i64([count], positions)?);
    found.insert("teacher.logits".into(), at_once.forward(engines, &case.teacher_ids, count)?);
    // Without reserved room the cache has to grow on the way.
    let mut stepwise = Sequence::continue_from(engines, state, 0, Continuation::Next)?;
    let mut rows = Vec::new();
    for &id in &case.teacher_ids {
        rows.extend(stepwise.forward(engines, &[id], 1)?.to_f32());
    }
    found.insert("teacher_step.logits".into(), Tensor::from_f32([count, case.architecture.vocab_size], rows)?);
    Ok(())
}

fn graphs_generation(
    case: &HomerCase,
    engines: &mut Engines<'_>,
    state: &ContextState,
    found: &mut Tensors,
) -> Result<()> {
    let steps = case.generate_steps;
    let mut sequence = Sequence::continue_from(engines, state, steps, Continuation::OffByOne)?;
    let mut token = argmax(&state.logits);
    let (mut tokens, mut positions, mut step_logits) = (vec![i64::from(token)], Vec::new(), Vec::new());
    for _ in 0..steps {
        positions.push(sequence.next_position());
        let logits = sequence.forward(engines, &[token], 1)?.to_f32();
        token = argmax(&logits);
        tokens.push(i64::from(token));
        step_logits.extend(logits);
    }
    found.insert("generate.tokens".into(), Tensor::from_i64([steps + 1], tokens)?);
    found.insert("generate.position_ids".into(), Tensor::from_i64([steps], positions)?);
    found.insert("generate.step_logits".into(), Tensor::from_f32([steps, case.architecture.vocab_size], step_logits)?);
    for (layer, cache) in sequence.cache()?.into_iter().enumerate() {
        for (part, tensor) in ["k", "v"].iter().zip(cache) {
            found.insert(format!("generate.cache.{part}.{layer}"), tensor.reshaped(&tensor.shape()[1..])?);
        }
    }
    Ok(())
}

fn plain_rows(case: &HomerCase) -> Option<usize> {
    case.expected.get("plain.logits").and_then(|logits| logits.shape().first().copied())
}

/// Compares what `case` holds of the tree, its result, the teacher's tokens after it and the plain model with `found`.
/// Generated text is left to the teacher's tokens, which take the same way without depending on each other.
pub(super) fn compare(name: &str, case: &HomerCase, plan: &HomerPlan, found: &Tensors) -> Findings {
    let dtype = case.dtype;
    let mut judge = Judge::new(Rc::new(move |_, kind| Bounds::golden(kind, dtype)));
    judge.prefix = format!("{name}.");
    // Only what the authors' code recorded is asked for: the graphs have far more.
    let mut recorded: Vec<&String> = case.expected.keys().filter(|name| Detail::All.includes(name)).collect();
    recorded.sort_by(|a, b| model_order(a, b));
    let mut part = |scope: &str, diverged: bool| {
        judge.begin(diverged);
        for &tap in recorded.iter().filter(|tap| tap.starts_with(scope)) {
            let expected = &case.expected[tap];
            match found.get(tap) {
                _ if judge.diverged() => judge.leave_out(1),
                Some(found) => judge.compare(tap, found, expected),
                None => judge.tell(TapResult::missing(&format!("{name}.{tap}"), expected.shape(), "the actual side")),
            }
        }
        judge.diverged()
    };
    let mut diverged: Vec<bool> = Vec::with_capacity(plan.nodes.len());
    for node in &plan.nodes {
        let below = node.children.is_some_and(|children| children.iter().any(|&child| diverged[child]));
        diverged.push(part(&format!("{}.", node.tap_scope()), below));
    }
    let diverged = diverged.last().copied().unwrap_or(false);
    for scope in ["prefix.last_hidden", "prefix.logits", "prefix.position_ids", "cache.", "teacher.", "teacher_step."] {
        part(scope, diverged);
    }
    part("plain.logits", false);
    judge.into_findings()
}
