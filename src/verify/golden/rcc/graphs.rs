//! RCC through the exported graphs, under golden names.

use super::super::{Tensors, VerifyError, argmax, batched, missing};
use crate::goldens::RccCase;
use crate::goldens::rcc::RccRun;
use crate::pipeline::Engines;
use crate::pipeline::decode::Sequence;
use crate::pipeline::rcc::read_slots;
use crate::pipeline::stop::{StopMonitor, StopReason, StopSettings};
use crate::tensor::Tensor;
use accordion_graphs::plan::rcc::RccPlan;

type Result<T, E = VerifyError> = std::result::Result<T, E>;

/// Everything that the graphs compute of the case.
pub(super) fn run(case: &RccCase, engines: &mut Engines<'_>, width: usize) -> Result<Tensors> {
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
        found.insert("eval_no_states/logits".into(), batched(&logits)?);
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
    let batches = || (0..plan.segments).step_by(width.clamp(1, plan.segments.max(1)));
    let tapped = |first: usize, tap: &str| {
        let name = format!("segments.{first}.{tap}");
        taps.get(&name).ok_or_else(|| missing(&name))
    };
    let rows = |tap: &str| -> Result<Vec<f32>> {
        let parts: Vec<Vec<f32>> = batches().map(|first| Ok(tapped(first, tap)?.to_f32())).collect::<Result<_>>()?;
        Ok(parts.concat())
    };
    let live = case.settings.live_states(layers);
    let states: Vec<Vec<f32>> = (0..live).map(|m| rows(&format!("encoder.states.{m}"))).collect::<Result<_>>()?;
    let size = case.model.encoder.hidden_size();
    let by_slot = (0..slots).flat_map(|slot| states.iter().flat_map(move |s| &s[slot * size..(slot + 1) * size]));
    let states = Tensor::from_f32([1, slots, live, size], by_slot.copied().collect())?;
    found.insert(format!("{}[:, :, 0:{live}]", named("rcc_states")), states);

    let width_of_rows = case.decoder.hidden_size();
    let maps: Vec<Vec<f32>> = (0..layers)
        .map(|map| {
            let parts = batches().map(|first| Ok(tapped(first, "maps")?.rows(map..map + 1).to_f32()));
            Ok(parts.collect::<Result<Vec<_>>>()?.concat())
        })
        .collect::<Result<_>>()?;
    found.insert(named("slot_embed"), Tensor::from_f32([1, slots, width_of_rows], maps[0].clone())?);
    let behind = Tensor::from_f32([layers - 1, 1, slots, width_of_rows], maps[1..].concat())?;
    found.insert(format!("{}[0:{}]", named("layer_maps"), layers - 1), behind);
    let raw = (0..layers - 1).map(|l| rows(&format!("layers.{l}.out"))).collect::<Result<Vec<_>>>()?;
    let raw = Tensor::from_f32([layers - 1, 1, slots, width_of_rows], raw.concat())?;
    found.insert(format!("{}[0:{}, :, 0:{slots}]", named("dec_layer_out_raw"), layers - 1), raw);

    let logits = batched(&prompt_logits)?;
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
        match monitor.push(next, "").stop {
            // The authors do not return what ends the text.
            Some(StopReason::Eos) => break,
            Some(_) => {
                ids.push(i64::from(next));
                break;
            }
            None => ids.push(i64::from(next)),
        }
        let logits = sequence.forward(engines, &[next], 1)?.to_f32();
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
