//! SharedLLM: the reference's taps under the golden names, which carry a batch axis.

use super::super::{Tensors, VerifyError, batched, missing};
use super::{plan, tree};
use crate::goldens::SharedLlmCase;
use crate::reference::cache::Cache;
use crate::reference::decode::argmax;
use crate::reference::sharedllm::{Injected, Prompt, RunningText, SharedLlm, compress};
use crate::reference::to_tensor;
use crate::taps::NoTaps;
use crate::tensor::Tensor;
use accordion_graphs::plan::sharedllm::Quirks;

type Result<T, E = VerifyError> = std::result::Result<T, E>;

/// Everything of one variant of `case`, by golden name.
pub(super) fn run(case: &SharedLlmCase, quirks: Quirks) -> Result<Tensors> {
    let model = load(case)?;
    let mut taps = Tensors::new();
    let injected = compressed(case, &model, quirks, case.query_index, &mut taps)?;
    let mut found = tree(case, taps)?;
    positions(case, &injected, &mut found)?;

    let mut text = RunningText::new(&model, &injected);
    let mut taps = Tensors::new();
    let logits = text.feed(&model, &case.running_ids, &mut taps)?;
    prefill(case, &taps, &mut found)?;
    found.insert("prefill.logits".into(), batched(&to_tensor(&logits)?)?);
    past(&text.cache, "prefill", &mut found)?;

    let mut greedy = argmax(&logits.row(logits.nrows() - 1));
    for (step, id) in case.decode_ids(quirks).into_iter().enumerate() {
        let single = |number: i64| Tensor::from_i64([1, 1], vec![number]);
        found.insert(format!("decode.{step}.input_id"), single(greedy.into())?);
        found.insert(format!("decode.{step}.position_id"), single(text.next_position())?);
        let mut taps = Tensors::new();
        let logits = text.feed(&model, &[id], &mut taps)?;
        cross(case, &taps, &["q", "o"], &format!("decode.{step}."), &mut found)?;
        found.insert(format!("decode.{step}.logits"), batched(&to_tensor(&logits)?)?);
        greedy = argmax(&logits.row(0));
    }
    past(&text.cache, "decode", &mut found)?;

    let logits = RunningText::new(&model, &injected).feed(&model, &case.teacher_ids, &mut NoTaps)?;
    found.insert("teacher_forced.logits".into(), batched(&to_tensor(&logits)?)?);
    found.insert("generate.tokens".into(), generated(case, &model, quirks)?);
    Ok(found)
}

fn load(case: &SharedLlmCase) -> Result<SharedLlm> {
    Ok(SharedLlm::load(&case.architecture, &case.model, |name| case.weight(name))?)
}

fn compressed(
    case: &SharedLlmCase,
    model: &SharedLlm,
    quirks: Quirks,
    query_index: usize,
    taps: &mut Tensors,
) -> Result<Injected> {
    let prompt =
        Prompt { context: &case.context_ids, mask: &case.context_mask, running: &case.running_ids, query_index };
    Ok(compress(model, &plan(case, quirks)?, prompt, taps)?)
}

/// The running text and what greedy decoding appends, compressed as the authors' `generate` does: for the last token.
fn generated(case: &SharedLlmCase, model: &SharedLlm, quirks: Quirks) -> Result<Tensor> {
    let injected = compressed(case, model, quirks, case.running_ids.len() - 1, &mut Tensors::new())?;
    let mut text = RunningText::new(model, &injected);
    let logits = text.feed(model, &case.running_ids, &mut NoTaps)?;
    let new = text.greedy(model, &logits.row(logits.nrows() - 1), case.generate_steps - 1)?;
    let tokens: Vec<i64> = case.running_ids.iter().chain(&new).map(|&id| i64::from(id)).collect();
    Ok(Tensor::from_i64([1, tokens.len()], tokens)?)
}

fn tap<'a>(taps: &'a Tensors, name: &str) -> Result<&'a Tensor> {
    taps.get(name).ok_or_else(|| missing(name))
}

/// Where cross attention sees the context, and from where.
fn positions(case: &SharedLlmCase, injected: &Injected, found: &mut Tensors) -> Result<()> {
    let positions = injected.key_positions();
    found.insert("pos.cross_key_effective".into(), Tensor::from_i64([1, positions.len()], positions)?);
    let queries = vec![injected.query_position(); case.running_ids.len()];
    found.insert("pos.cross_query_nominal".into(), Tensor::from_i64([1, queries.len()], queries)?);
    Ok(())
}

/// The residual stream after every layer, the last one normed, and what the layers attend to.
fn prefill(case: &SharedLlmCase, taps: &Tensors, found: &mut Tensors) -> Result<()> {
    let layers = case.architecture.num_layers;
    for layer in 0..=layers {
        let hidden = match layer {
            0 => "embed".to_owned(),
            _ if layer == layers => "norm".to_owned(),
            _ => format!("layers.{}.out", layer - 1),
        };
        found.insert(format!("prefill.hidden.{layer}"), batched(tap(taps, &hidden)?)?);
    }
    cross(case, taps, &["q", "k", "v", "o"], "", found)
}

/// What enters and leaves the cross attention of the injected layers, head by head.
fn cross(case: &SharedLlmCase, taps: &Tensors, parts: &[&str], scope: &str, found: &mut Tensors) -> Result<()> {
    let head_dim = case.architecture.head_dim;
    for layer in 0..case.model.injected_layers {
        for part in parts {
            let tensor = tap(taps, &format!("layers.{layer}.cross.{}", if *part == "o" { "out" } else { part }))?;
            let shape = [1, tensor.shape()[0], tensor.shape()[1] / head_dim, head_dim];
            found.insert(format!("{scope}cross.layer{layer}.{part}"), tensor.reshaped(shape)?);
        }
    }
    Ok(())
}

fn past(cache: &Cache, scope: &str, found: &mut Tensors) -> Result<()> {
    for (layer, kv) in cache.layers.iter().enumerate() {
        found.insert(format!("{scope}.past.layer{layer}.key"), batched(&to_tensor(&kv.k)?)?);
        found.insert(format!("{scope}.past.layer{layer}.value"), batched(&to_tensor(&kv.v)?)?);
    }
    Ok(())
}
