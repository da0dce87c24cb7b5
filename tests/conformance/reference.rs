//! The reference as a row of the table.

mod rcc;
mod sharedllm;

use super::Implementation;
use accordion::goldens::{HomerCase, RccCase, SharedLlmCase};
use accordion::reference::decode::{Continuation, ContinuationOffset, EndOfText};
use accordion::reference::homer::{ContextState, Prompt, compress};
use accordion::reference::llama::Llama;
use accordion::reference::rope::Frequencies;
use accordion::reference::{plain, to_tensor};
use accordion::taps::NoTaps;
use accordion::tensor::Tensor;
use accordion_graphs::plan::homer::HomerPlan;
use accordion_graphs::plan::sharedllm::Quirks;
use anyhow::Result;
use ndarray::{Array2, Axis, Slice, concatenate};
use std::collections::BTreeMap;

pub(crate) struct Reference;

type Tensors = BTreeMap<String, Tensor>;

impl Implementation for Reference {
    fn name(&self) -> &'static str {
        "reference"
    }

    fn homer(&mut self, case: &HomerCase, plan: &HomerPlan) -> Result<Tensors> {
        let model = Llama::load(&case.architecture, |name| case.weight(name))?;
        let mut found = Tensors::new();
        let rope = Frequencies::new(&case.architecture.rope, case.architecture.head_dim, 0);
        found.insert("rope.inv_freq".into(), Tensor::from_f32([rope.inv_freq.len()], rope.inv_freq)?);

        let prompt = Prompt { prefix: &case.prefix_ids, context: &case.context_ids, suffix: &case.suffix_ids };
        let significance = |layer: usize| case.bias.get(layer).map_or(&[][..], Vec::as_slice);
        let context = compress(&model, plan, prompt, &significance, &mut found)?;
        let logits = model.logits(&context.last_hidden);
        found.insert("prefix.logits".into(), to_tensor(&logits)?);
        found.insert("prefix.last_position_id".into(), Tensor::from_i64([1], vec![context.last_position()])?);

        teacher(case, &model, &context, &mut found)?;
        generate(case, &model, &context, &logits, &mut found)?;
        without_homer(case, &model, &mut found)?;
        Ok(found)
    }

    fn rcc(&mut self, case: &RccCase) -> Result<Tensors> {
        rcc::everything(case)
    }

    fn sharedllm(&mut self, case: &SharedLlmCase, quirks: Quirks) -> Result<Tensors> {
        sharedllm::everything(case, quirks)
    }
}

/// The teacher tokens after the context, at once and one by one.
fn teacher(case: &HomerCase, model: &Llama, context: &ContextState, found: &mut Tensors) -> Result<()> {
    let mut at_once = Continuation::new(context, ContinuationOffset::AfterLast);
    let positions: Vec<i64> = (at_once.next_position..).take(case.teacher_ids.len()).collect();
    let logits = at_once.feed(model, &case.teacher_ids, &mut NoTaps)?;
    found.insert("teacher.logits".into(), to_tensor(&logits)?);
    found.insert("teacher.position_ids".into(), Tensor::from_i64([positions.len()], positions)?);

    let mut stepwise = Continuation::new(context, ContinuationOffset::AfterLast);
    let mut rows = Array2::zeros((0, case.architecture.vocab_size));
    for &id in &case.teacher_ids {
        rows = concatenate![Axis(0), rows, stepwise.feed(model, &[id], &mut NoTaps)?];
    }
    found.insert("teacher_step.logits".into(), to_tensor(&rows)?);
    Ok(())
}

/// Greedy decoding along the authors' `generate`, which repeats the last position.
fn generate(
    case: &HomerCase,
    model: &Llama,
    context: &ContextState,
    logits: &Array2<f32>,
    found: &mut Tensors,
) -> Result<()> {
    let mut continuation = Continuation::new(context, ContinuationOffset::RepeatLast);
    let last_row = logits.row(logits.nrows() - 1);
    let generated = continuation.greedy(model, &last_row, case.generate_steps, EndOfText::NEVER, &mut NoTaps)?;
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

/// The last rows of the whole prompt through the plain model, as many as the case has.
fn without_homer(case: &HomerCase, model: &Llama, found: &mut Tensors) -> Result<()> {
    let Some(rows) = case.expected.get("plain.logits").map(|expected| expected.shape()[0]) else { return Ok(()) };
    let ids = [&case.prefix_ids[..], &case.context_ids, &case.suffix_ids].concat();
    let positions: Vec<i64> = (0..ids.len() as i64).collect();
    let hidden = plain::forward(model, &ids, &positions, &mut model.empty_cache(), &mut NoTaps)?;
    let last = hidden.slice_axis(Axis(0), Slice::from(hidden.nrows().saturating_sub(rows)..)).to_owned();
    found.insert("plain.logits".into(), to_tensor(&model.logits(&last))?);
    Ok(())
}
