//! SharedLLM's exported graphs: both calls, the running text, decoding.

use super::compare::Tensors;
use super::graphs::Opened;
use super::sharedllm::plan;
use accordion::goldens::SharedLlmCase;
use accordion::pipeline::decode::{Continuation, DECODER, Sequence};
use accordion::pipeline::sharedllm::{Context, inject};
use accordion::pipeline::{Engines, Injected};
use accordion::taps::NoTaps;
use accordion::tensor::Tensor;
use accordion_graphs::plan::sharedllm::{Quirks, SharedLlmPlan};
use anyhow::{Context as _, Result};

/// Everything of a case that the graphs compute, by golden name. `width` chunks go through one call where that is free.
pub(crate) fn run(opened: &Opened, case: &SharedLlmCase, quirks: Quirks, width: usize) -> Result<Tensors> {
    let mut engines = opened.engines()?;
    let plan = plan(case, quirks)?;
    let padded = case.context_mask.iter().any(|&token| !token);
    let mask = padded.then_some(case.context_mask.as_slice());
    let context = Context { ids: &case.context_ids, mask, running: &case.running_ids, query_index: case.query_index };

    let mut taps = Tensors::new();
    inject(&mut engines, &plan, context, width, &mut taps, &mut |_| {})?;
    let mut found = Tensors::new();
    tree(case, &plan, &taps, &mut found)?;
    encoded(case, &plan, &taps, &mut found)?;
    // Without taps, in calls of the row's own width.
    let injected = inject(&mut engines, &plan, context, width, &mut NoTaps, &mut |_| {})?;
    running(case, &mut engines, &injected, quirks, &mut found)?;

    // The authors' `generate` forgets which row is the query.
    let last = Context { query_index: case.running_ids.len() - 1, ..context };
    let injected = inject(&mut engines, &plan, last, width, &mut NoTaps, &mut |_| {})?;
    generate(case, &mut engines, injected, &mut found)?;
    Ok(found)
}

/// The name of a golden tensor that the graphs do not have.
pub(crate) fn omits(case: &SharedLlmCase, name: &str) -> bool {
    // Both rotations of cross attention are one, in the keys. The mask is an input.
    let rotated = name.contains("cross.layer") && (name.ends_with(".q") || name.ends_with(".k"));
    // Of the last layer, only what is kept is computed.
    let last = format!("layer{}", case.model.injected_layers - 1);
    let unused = name.starts_with("enc.") && name.split('.').any(|part| part == last);
    rotated || unused || name.starts_with("pos.cross") || name.ends_with(".encoded_mask")
}

/// What the tree's nodes are.
fn tree(case: &SharedLlmCase, plan: &SharedLlmPlan, taps: &Tensors, found: &mut Tensors) -> Result<()> {
    let parts = [
        ("candidates", "cand_ids"),
        ("lower.layers.0.out", "cand_hidden_last"),
        ("vectors", "enc_vectors"),
        ("similarity", "sim"),
        ("chosen", "chosen"),
        ("encoded_ids", "encoded_ids"),
    ];
    for (w, level) in plan.levels.iter().enumerate() {
        for (tap, name) in parts {
            let Some(value) = taps.get(&format!("tree.{w}.{tap}")) else { continue };
            let shaped = match tap {
                "encoded_ids" => value.reshaped([case.chunks() * level.nodes, level.node_len])?,
                _ => value.clone(),
            };
            found.insert(format!("tree.d{w}.{name}"), shaped);
        }
        if let Some(query) = taps.get("query.vector") {
            found.insert(format!("tree.d{w}.query_vector"), query.reshaped([1, query.len()])?);
        }
    }
    for layer in 0..case.model.injected_layers {
        for part in ["key", "value"] {
            let tap = format!("kv.{layer}.{part}");
            found.insert(format!("kv.layer{layer}.{part}"), taps.get(&tap).context(tap)?.clone());
        }
    }
    Ok(())
}

/// The keys and values of whole nodes, which all layers but the last have.
fn encoded(case: &SharedLlmCase, plan: &SharedLlmPlan, taps: &Tensors, found: &mut Tensors) -> Result<()> {
    let (groups, width, chunks) = (case.model.lower.num_kv_heads, case.model.lower.head_dim, case.chunks());
    for layer in 0..case.model.injected_layers - 1 {
        for (part, tap) in [("key", "k"), ("value", "v")] {
            let tap = format!("lower.layers.{layer}.attn.{tap}");
            let rows = taps.get(&tap).context(tap)?.to_f32();
            let per_chunk: usize = plan.levels.iter().map(|level| level.nodes * level.node_len).sum();
            let mut start = 0;
            for (w, level) in plan.levels.iter().enumerate() {
                let mut nodes = Vec::new();
                for node in 0..chunks * level.nodes {
                    // As released, the second leaf of chunk `r` is leaf `n + r` of all.
                    let joined = plan.settings.quirks == Quirks::Faithful && level.nodes == 2 && w > 0;
                    let (chunk, side) =
                        if joined { (node % chunks, node / chunks) } else { (node / level.nodes, node % level.nodes) };
                    let first = chunk * per_chunk + start + side * level.node_len;
                    for group in 0..groups {
                        for row in first..first + level.node_len {
                            nodes.extend_from_slice(&rows[(row * groups + group) * width..][..width]);
                        }
                    }
                }
                let shape = [chunks * level.nodes, groups, level.node_len, width];
                found.insert(format!("enc.d{w}.layer{layer}.{part}"), Tensor::from_f32(shape, nodes)?);
                start += level.nodes * level.node_len;
            }
        }
    }
    Ok(())
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
    let over = |engines: &Engines<'_>| Sequence::over(engines, injected.clone(), 0);
    let batch = |tensor: Tensor| {
        let shape = [&[1], tensor.shape()].concat();
        tensor.reshaped(shape)
    };
    let signature = engines.signature(DECODER)?;
    let value = |tap: String| signature.taps.get(&tap).map(|info| info.name.as_str()).context(tap);
    let hidden = (0..arch.num_layers - 1).map(|l| value(format!("layers.{l}.out")));
    let [embed, norm] = ["embed", "final_norm"].map(|tap| value(tap.to_owned()));
    let hidden: Vec<&str> = std::iter::once(embed).chain(hidden).chain([norm]).collect::<Result<_>>()?;
    let cross = (0..case.model.injected_layers).map(|l| value(format!("layers.{l}.cross.out")));
    let cross: Vec<&str> = cross.collect::<Result<_>>()?;

    let mut sequence = over(engines)?;
    let taps = [hidden.as_slice(), &cross].concat();
    found.insert("pos.self_prefill".into(), Tensor::from_i64([1, count], (0..count as i64).collect())?);
    let (logits, tapped) = sequence.forward_tapped(engines, &case.running_ids, count, &taps)?;
    found.insert("prefill.logits".into(), batch(logits)?);
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
        found.insert(format!("decode.{step}.input_id"), Tensor::from_i64([1, 1], vec![i64::from(id)])?);
        let (logits, tapped) = sequence.forward_tapped(engines, &[id], 1, &cross)?;
        found.insert(format!("decode.{step}.logits"), batch(logits)?);
        for (l, out) in tapped.iter().enumerate() {
            let shape = [1, 1, arch.num_heads, arch.head_dim];
            found.insert(format!("decode.{step}.cross.layer{l}.o"), out.reshaped(shape)?);
        }
    }
    past(&sequence, "decode", found)?;

    let ids = case.teacher_ids.iter().copied().map(i64::from).collect::<Vec<_>>();
    found.insert("teacher_forced.input_ids".into(), Tensor::from_i64([1, ids.len()], ids)?);
    let logits = over(engines)?.forward(engines, &case.teacher_ids, case.teacher_ids.len())?;
    found.insert("teacher_forced.logits".into(), batch(logits)?);
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
    let argmax = |logits: &[f32]| (0..logits.len()).rev().max_by(|&a, &b| logits[a].total_cmp(&logits[b])).unwrap_or(0);
    let state = accordion::pipeline::sharedllm::read(engines, injected, &case.running_ids, |_| {})?;
    let mut sequence = Sequence::continue_from(engines, &state, case.generate_steps, Continuation::Next)?;
    let mut tokens = case.running_ids.clone();
    let mut logits = state.logits;
    for step in 0..case.generate_steps {
        tokens.push(argmax(&logits) as u32);
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
    let &[_, groups, rows, width] = tensor.shape() else { anyhow::bail!("{tensor:?}, expected [1, G, rows, d]") };
    let values = tensor.to_f32();
    let row =
        |at: usize| (0..groups).flat_map(move |group| (group * rows + at) * width..(group * rows + at + 1) * width);
    let ordered = (0..rows).flat_map(row).map(|at| values[at]).collect();
    Ok(Tensor::from_f32([1, rows, groups, width], ordered)?)
}
