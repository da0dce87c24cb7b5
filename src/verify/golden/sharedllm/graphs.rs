//! SharedLLM's exported graphs: both calls, the running text, decoding.

use super::super::super::sharedllm::tree_taps;
use super::super::{Tensors, VerifyError, argmax, batched, missing};
use super::{plan, tree};
use crate::goldens::SharedLlmCase;
use crate::pipeline::decode::{Continuation, DECODER, Sequence};
use crate::pipeline::sharedllm::{Context, inject};
use crate::pipeline::{self, Engines, Injected};
use crate::taps::NoTaps;
use crate::tensor::Tensor;
use accordion_graphs::plan::sharedllm::Quirks;

type Result<T, E = VerifyError> = std::result::Result<T, E>;

/// Everything of a case that the graphs compute, by golden name. `width` chunks go through one call where that is free.
pub(super) fn run(case: &SharedLlmCase, engines: &mut Engines<'_>, quirks: Quirks, width: usize) -> Result<Tensors> {
    let plan = plan(case, quirks)?;
    let padded = case.context_mask.iter().any(|&token| !token);
    let mask = padded.then_some(case.context_mask.as_slice());
    let context = Context { ids: &case.context_ids, mask, running: &case.running_ids, query_index: case.query_index };

    let mut found = tree(case, tree_taps(engines, &plan, context, &|_| true)?)?;
    // Without taps, in calls of the width that was asked for.
    let injected = inject(engines, &plan, context, width, &mut NoTaps, &mut |_| {})?;
    running(case, engines, &injected, quirks, &mut found)?;

    // The authors' `generate` forgets which row is the query.
    let last = Context { query_index: case.running_ids.len() - 1, ..context };
    let injected = inject(engines, &plan, last, width, &mut NoTaps, &mut |_| {})?;
    generate(case, engines, injected, &mut found)?;
    Ok(found)
}

/// The running text in one call, then the decoding steps, then both in one call.
fn running(
    case: &SharedLlmCase,
    engines: &mut Engines<'_>,
    injected: &Injected,
    quirks: Quirks,
    found: &mut Tensors,
) -> Result<()> {
    let (arch, count) = (&case.architecture, case.running_ids.len());
    let over = |engines: &Engines<'_>| Sequence::attending_to(engines, injected.clone(), 0);
    let signature = engines.signature(DECODER)?;
    let value = |tap: String| signature.taps.get(&tap).map(|info| info.name.as_str()).ok_or_else(|| missing(&tap));
    let hidden = (0..arch.num_layers - 1).map(|l| value(format!("layers.{l}.out")));
    let [embed, norm] = ["embed", "final_norm"].map(|tap| value(tap.to_owned()));
    let hidden: Vec<&str> = std::iter::once(embed).chain(hidden).chain([norm]).collect::<Result<_>>()?;
    let cross = (0..case.model.injected_layers).map(|l| value(format!("layers.{l}.cross.out")));
    let cross: Vec<&str> = cross.collect::<Result<_>>()?;

    let mut sequence = over(engines)?;
    let taps = [hidden.as_slice(), &cross].concat();
    found.insert("pos.self_prefill".into(), Tensor::from_i64([1, count], (0..count as i64).collect())?);
    let (logits, tapped) = sequence.forward_tapped(engines, &case.running_ids, count, &taps)?;
    let mut greedy = argmax(&logits.rows(count - 1..count).to_f32());
    found.insert("prefill.logits".into(), batched(&logits)?);
    for (l, tensor) in tapped.iter().take(hidden.len()).enumerate() {
        found.insert(format!("prefill.hidden.{l}"), tensor.reshaped([1, count, arch.hidden_size])?);
    }
    for (l, (out, layer)) in tapped[hidden.len()..].iter().zip(&injected.layers).enumerate() {
        found.insert(format!("cross.layer{l}.o"), out.reshaped([1, count, arch.num_heads, arch.head_dim])?);
        found.insert(format!("cross.layer{l}.v"), rows_first(&layer.value)?);
    }
    past(&sequence, "prefill", found)?;

    for (step, id) in case.decode_ids(quirks).into_iter().enumerate() {
        let position = Tensor::from_i64([1, 1], vec![sequence.next_position()])?;
        found.insert(format!("decode.{step}.position_id"), position);
        found.insert(format!("decode.{step}.input_id"), Tensor::from_i64([1, 1], vec![greedy.into()])?);
        let (logits, tapped) = sequence.forward_tapped(engines, &[id], 1, &cross)?;
        greedy = argmax(&logits.to_f32());
        found.insert(format!("decode.{step}.logits"), batched(&logits)?);
        for (l, out) in tapped.iter().enumerate() {
            let shape = [1, 1, arch.num_heads, arch.head_dim];
            found.insert(format!("decode.{step}.cross.layer{l}.o"), out.reshaped(shape)?);
        }
    }
    past(&sequence, "decode", found)?;

    let ids = [case.running_ids.as_slice(), &case.decode_ids(quirks)].concat();
    let at_once = ids.iter().copied().map(i64::from).collect();
    found.insert("teacher_forced.input_ids".into(), Tensor::from_i64([1, ids.len()], at_once)?);
    let logits = over(engines)?.forward(engines, &ids, ids.len())?;
    found.insert("teacher_forced.logits".into(), batched(&logits)?);
    Ok(())
}

/// The upper model's cache.
fn past(sequence: &Sequence, name: &str, found: &mut Tensors) -> Result<()> {
    for (layer, parts) in sequence.cache()?.into_iter().enumerate() {
        for (part, tensor) in ["key", "value"].iter().zip(parts) {
            found.insert(format!("{name}.past.layer{layer}.{part}"), tensor);
        }
    }
    Ok(())
}

/// Greedy decoding.
fn generate(case: &SharedLlmCase, engines: &mut Engines<'_>, injected: Injected, found: &mut Tensors) -> Result<()> {
    let state = pipeline::sharedllm::read(engines, injected, &case.running_ids, |_| {})?;
    let mut sequence = Sequence::continue_from(engines, &state, case.generate_steps, Continuation::Next)?;
    let mut tokens = case.running_ids.clone();
    let mut logits = state.logits;
    for step in 0..case.generate_steps {
        tokens.push(argmax(&logits));
        if step + 1 < case.generate_steps {
            logits = sequence.forward(engines, &tokens[tokens.len() - 1..], 1)?.to_f32();
        }
    }
    let tokens: Vec<i64> = tokens.into_iter().map(i64::from).collect();
    found.insert("generate.tokens".into(), Tensor::from_i64([1, tokens.len()], tokens)?);
    Ok(())
}

/// `[1, G, rows, d]` as `[1, rows, G, d]`.
fn rows_first(tensor: &Tensor) -> Result<Tensor> {
    let &[_, groups, rows, width] = tensor.shape() else { return Ok(tensor.clone()) };
    let values = tensor.to_f32();
    let row =
        |at: usize| (0..groups).flat_map(move |group| (group * rows + at) * width..(group * rows + at + 1) * width);
    let ordered = (0..rows).flat_map(row).map(|at| values[at]).collect();
    Ok(Tensor::from_f32([1, rows, groups, width], ordered)?)
}
