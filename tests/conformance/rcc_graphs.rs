//! RCC through the exported graphs, under golden names.

use super::compare::Tensors;
use accordion::checkpoint::{RCC_FILE, architecture_json, rcc_json};
use accordion::goldens::RccCase;
use accordion::goldens::rcc::RccRun;
use accordion::pipeline::Engines;
use accordion::pipeline::decode::Sequence;
use accordion::pipeline::rcc::read_slots;
use accordion::pipeline::stop::{StopMonitor, StopReason, StopSettings};
use accordion::tensor::Tensor;
use accordion_graphs::plan::rcc::RccPlan;
use anyhow::Result;
use safetensors::tensor::{Dtype, TensorView};
use std::path::{Path, PathBuf};

/// What reaches nothing, or is the inside of what is compared: hidden states of rows that are not slots, of the decoder
/// behind the slots, and training.
pub(crate) fn omits(name: &str) -> bool {
    ["/enc_hidden", "/dec_hidden", "/step_hidden"].iter().any(|part| name.ends_with(part))
        || name.starts_with("train_b2/")
}

/// The case's model as a checkpoint in `folder`.
pub(crate) fn checkpoint(case: &RccCase, folder: &Path) -> Result<PathBuf> {
    let checkpoint = folder.join("checkpoint");
    std::fs::create_dir(&checkpoint)?;
    let weights: Vec<(&String, Vec<usize>, Vec<u8>)> = case
        .weights()
        .iter()
        .map(|(name, weight)| {
            (name, weight.shape().to_vec(), weight.to_f32().iter().flat_map(|x| x.to_le_bytes()).collect())
        })
        .collect();
    let views: Vec<(&String, TensorView<'_>)> = weights
        .iter()
        .map(|(name, shape, data)| Ok((*name, TensorView::new(Dtype::F32, shape.clone(), data)?)))
        .collect::<Result<_>>()?;
    safetensors::serialize_to_file(views, None, &checkpoint.join("model.safetensors"))?;
    std::fs::write(checkpoint.join("config.json"), architecture_json(&case.decoder).to_string())?;
    std::fs::write(checkpoint.join(RCC_FILE), rcc_json(&case.model.encoder, case.settings).to_string())?;
    Ok(checkpoint)
}

/// Everything that the graphs compute of the case.
pub(crate) fn run(case: &RccCase, engines: &mut Engines<'_>, width: usize) -> Result<Tensors> {
    let mut found = Tensors::new();
    for run in &case.runs {
        one_run(case, run, engines, width, &mut found)?;
    }
    for stop in &case.stops {
        if let Some(run) = case.runs.iter().find(|run| run.name == stop.run) {
            let generated = greedy(case, run, engines, width, Some(stop.eos_token_id))?.ids;
            found.insert(stop.name.clone(), Tensor::from_i64([1, generated.len()], generated)?);
        }
    }
    if let Some(ids) = &case.plain_ids {
        let logits = Sequence::new(engines, ids.len())?.forward(engines, ids, ids.len())?;
        found.insert("eval_no_states/logits".into(), logits.reshaped([&[1], logits.shape()].concat())?);
    }
    Ok(found)
}

fn one_run(case: &RccCase, run: &RccRun, engines: &mut Engines<'_>, width: usize, found: &mut Tensors) -> Result<()> {
    let layers = case.decoder.num_layers();
    let generation = greedy(case, run, engines, width, None)?;
    let Generation { plan, taps, ids, step_logits, caches: [prefilled, last], prompt_logits } = generation;
    let slots = plan.slots;
    let named = |part: &str| format!("{}/{part}", run.name);

    // Rows of all batches, by tap.
    let rows = |tap: &str| -> Vec<f32> {
        let starts = (0..plan.segments).step_by(width.min(plan.segments));
        starts.flat_map(|first| taps[&format!("segments.{first}.{tap}")].to_f32()).collect()
    };
    let live = case.settings.live_states(layers);
    let states: Vec<Vec<f32>> = (0..live).map(|m| rows(&format!("encoder.states.{m}"))).collect();
    let size = case.model.encoder.hidden_size();
    let by_slot = (0..slots).flat_map(|slot| states.iter().flat_map(move |s| &s[slot * size..(slot + 1) * size]));
    let states = Tensor::from_f32([1, slots, live, size], by_slot.copied().collect())?;
    found.insert(format!("{}[:, :, 0:{live}]", named("rcc_states")), states);

    let width_of_rows = case.decoder.hidden_size();
    let maps: Vec<Vec<f32>> = (0..layers)
        .map(|map| {
            let starts = (0..plan.segments).step_by(width.min(plan.segments));
            starts.flat_map(|first| taps[&format!("segments.{first}.maps")].rows(map..map + 1).to_f32()).collect()
        })
        .collect();
    found.insert(named("slot_embed"), Tensor::from_f32([1, slots, width_of_rows], maps[0].clone())?);
    let behind = Tensor::from_f32([layers - 1, 1, slots, width_of_rows], maps[1..].concat())?;
    found.insert(format!("{}[0:{}]", named("layer_maps"), layers - 1), behind);
    let raw: Vec<f32> = (0..layers - 1).flat_map(|l| rows(&format!("layers.{l}.out"))).collect();
    let raw = Tensor::from_f32([layers - 1, 1, slots, width_of_rows], raw)?;
    found.insert(format!("{}[0:{}, :, 0:{slots}]", named("dec_layer_out_raw"), layers - 1), raw);

    let logits = prompt_logits.reshaped([&[1], prompt_logits.shape()].concat())?;
    found.insert(format!("{}[:, {slots}:]", named("prefill_logits")), logits);
    found.insert(named("prefill_kv"), prefilled);
    found.insert(named("final_kv"), last);
    let steps = ids.len() - 1;
    found.insert(named("step_ids"), Tensor::from_i64([1, steps], ids[..steps].to_vec())?);
    found.insert(named("generated"), Tensor::from_i64([1, ids.len()], ids)?);
    found.insert(named("step_logits"), Tensor::from_f32([1, steps, case.decoder.vocab_size()], step_logits)?);
    Ok(())
}

struct Generation {
    plan: RccPlan,
    taps: Tensors,
    ids: Vec<i64>,
    /// Of all steps behind the prompt.
    step_logits: Vec<f32>,
    /// `[L, 2, 1, G, rows, d]` behind the prompt and at the end.
    caches: [Tensor; 2],
    /// `[P, V]`
    prompt_logits: Tensor,
}

/// Slots, prompt, and one token after the other.
fn greedy(
    case: &RccCase,
    run: &RccRun,
    engines: &mut Engines<'_>,
    width: usize,
    eos: Option<u32>,
) -> Result<Generation> {
    let argmax = |logits: &[f32]| (0..logits.len()).rev().max_by(|&a, &b| logits[a].total_cmp(&logits[b])).unwrap_or(0);
    let plan = RccPlan::new(run.lengths(), case.settings)?;
    let mut taps = Tensors::new();
    let mut sequence = read_slots(engines, &plan, &run.text_ids, width, &mut taps, &mut |_| {})?;
    let prompt_logits = sequence.forward(engines, &run.prompt_ids, run.prompt_ids.len())?;
    let prefilled = stacked(&sequence)?;
    let mut monitor = StopMonitor::new(StopSettings {
        eos_token_ids: eos.into_iter().collect(),
        keep_first: true,
        max_tokens: run.max_new_tokens,
        room: usize::MAX,
        ..StopSettings::default()
    })?;
    let (mut ids, mut step_logits) = (Vec::new(), Vec::new());
    let mut next = argmax(&prompt_logits.rows(run.prompt_ids.len() - 1..run.prompt_ids.len()).to_f32());
    loop {
        match monitor.push(next as u32, "").stop {
            // The authors do not return what ends the text.
            Some(StopReason::Eos) => break,
            Some(_) => {
                ids.push(next as i64);
                break;
            }
            None => ids.push(next as i64),
        }
        let logits = sequence.forward(engines, &[next as u32], 1)?.to_f32();
        next = argmax(&logits);
        step_logits.extend(logits);
    }
    let caches = [prefilled, stacked(&sequence)?];
    Ok(Generation { plan, taps, ids, step_logits, caches, prompt_logits })
}

fn stacked(sequence: &Sequence) -> Result<Tensor> {
    let cache = sequence.cache()?;
    let shape = [&[cache.len(), 2], cache[0][0].shape()].concat();
    Ok(Tensor::from_f32(shape, cache.iter().flatten().flat_map(Tensor::to_f32).collect())?)
}
