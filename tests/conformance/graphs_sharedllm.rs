//! SharedLLM's exported graphs: both calls, the running text, decoding.

use super::compare::Tensors;
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
pub(crate) fn run(case: &SharedLlmCase, engines: &mut Engines<'_>, quirks: Quirks, width: usize) -> Result<Tensors> {
    let plan = plan(case, quirks)?;
    let padded = case.context_mask.iter().any(|&token| !token);
    let mask = padded.then_some(case.context_mask.as_slice());
    let context = Context { ids: &case.context_ids, mask, running: &case.running_ids, query_index: case.query_index };

    let mut taps = Tensors::new();
    inject(engines, &plan, context, width, &mut taps, &mut |_| {})?;
    let mut found = Tensors::new();
    tree(case, &plan, &taps, &mut found)?;
    encoded(case, &plan, &taps, &mut found)?;
    // Without taps, in calls of the row's own width.
    let injected = inject(engines, &plan, context, width, &mut NoTaps, &mut |_| {})?;
    running(case, engines, &injected, quirks, &mut found)?;

    // The authors' `generate` forgets which row is the query.
    let last = Context { query_index: case.running_ids.len() - 1, ..context };
    let injected = inject(engines, &plan, last, width, &mut NoTaps, &mut |_| {})?;
    generate(case, engines, injected, &mut found)?;
    Ok(found)
}

/// The name of a golden tensor that the graphs do not have.
pub(crate) fn omits(case: &SharedLlmCase, name: &str) -> bool {
    // Both rotations of cross attention are one, in the keys. The mask is an input.
    let rotated = name.contains("cross.layer") && matches!(name.rsplit('.').next(), Some("q" | "k"));
    // Of the last layer, only what is kept is computed.
    let last = format!("layer{}", case.model.injected_layers - 1);
    let unused = name.starts_with("enc.") && name.split('.').any(|part| part == last);
    rotated || unused || name.starts_with("pos.cross") || name.ends_with(".encoded_mask")
}

/// What the tree's nodes are.
fn tree(case: &SharedLlmCase, plan: &SharedLlmPlan, taps: &Tensors, found: &mut Tensors) -> Result<()> {
    let parts = [
        ("candidates", "cand_ids"),
        ("vectors", "cand_hidden_last"),
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
    let over = |engines: &Engines<'_>| Sequence::attending_to(engines, injected.clone(), 0);
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
    let mut greedy = argmax(&logits.to_f32()[(count - 1) * arch.vocab_size..]);
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
        found.insert(format!("decode.{step}.input_id"), Tensor::from_i64([1, 1], vec![greedy as i64])?);
        let (logits, tapped) = sequence.forward_tapped(engines, &[id], 1, &cross)?;
        greedy = argmax(&logits.to_f32());
        found.insert(format!("decode.{step}.logits"), batch(logits)?);
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

/// The first of the largest logits.
fn argmax(logits: &[f32]) -> usize {
    (0..logits.len()).rev().max_by(|&a, &b| logits[a].total_cmp(&logits[b])).unwrap_or(0)
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

#[cfg(test)]
mod tests {
    use super::super::Implementation;
    use super::super::compare::{Comparison, SINGLE, Verdict};
    use super::super::graphs::{Graphs, checkpoint};
    use super::super::reference::Reference;
    use super::*;
    use accordion::bundle::MethodSettings;
    use accordion::checkpoint::config_json;
    use accordion_graphs::plan::sharedllm::Keep;
    use safetensors::SafeTensors;
    use safetensors::tensor::TensorView;
    use std::path::Path;

    fn case(name: &str) -> SharedLlmCase {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens/sharedllm");
        SharedLlmCase::open(&folder.join(format!("case_{name}.json"))).unwrap()
    }

    /// Cross attention that adds nothing leaves the model what it was, to the last bit.
    #[test]
    fn a_context_without_output_projections_changes_nothing() {
        let case = case("q4");
        let bytes = std::fs::read(case.weights_path()).unwrap();
        let weights = SafeTensors::deserialize(&bytes).unwrap();
        let silent = |name: &str| name.ends_with("cross_attn.o_proj.weight");
        let views = weights.tensors().into_iter().map(|(name, view)| {
            let data = if silent(&name) { vec![0; view.data().len()] } else { view.data().to_vec() };
            (name, view.dtype(), view.shape().to_vec(), data)
        });
        let views: Vec<_> = views.collect();
        assert_eq!(views.iter().filter(|(name, ..)| silent(name)).count(), case.model.injected_layers);
        let folder = tempfile::tempdir().unwrap();
        let silenced = folder.path().join("silenced.safetensors");
        let views = views
            .iter()
            .map(|(name, dtype, shape, data)| (name.as_str(), TensorView::new(*dtype, shape.clone(), data).unwrap()));
        safetensors::serialize_to_file(views, None, &silenced).unwrap();

        for graphs in Graphs::all() {
            let folder = tempfile::tempdir().unwrap();
            let shared = graphs.sharedllm_bundle(folder.path(), &case, &silenced, Quirks::Faithful).unwrap();
            let mut engines = graphs.engines(&shared).unwrap();
            let (ids, running) = (&case.context_ids, &case.running_ids);
            let context = Context { ids, mask: None, running, query_index: running.len() - 1 };
            let plan = plan(&case, Quirks::Faithful).unwrap();
            let injected = inject(&mut engines, &plan, context, 1, &mut NoTaps, &mut |_| {}).unwrap();
            let mut sequence = Sequence::attending_to(&engines, injected, running.len()).unwrap();
            let with = sequence.forward(&mut engines, running, running.len()).unwrap();
            let folder = tempfile::tempdir().unwrap();
            let plain = checkpoint(folder.path(), &silenced, &config_json(&case.architecture)).unwrap();
            let plain = graphs.bundle(&plain, MethodSettings::Plain).unwrap();
            let mut engines = graphs.engines(&plain).unwrap();
            let mut sequence = Sequence::new(&engines, running.len()).unwrap();
            let without = sequence.forward(&mut engines, running, running.len()).unwrap();
            assert_eq!(with.to_f32(), without.to_f32());
        }
    }

    /// The halves that are compared and the leaves that are joined are those of one entry.
    #[test]
    fn entries_of_a_batch_are_contexts_of_their_own() {
        let case = case("q4");
        for graphs in Graphs::all() {
            let folder = tempfile::tempdir().unwrap();
            let bundle = graphs.sharedllm_bundle(folder.path(), &case, case.weights_path(), Quirks::Faithful).unwrap();
            let mut engines = graphs.engines(&bundle).unwrap();
            let ids = |ids: &[u32]| ids.iter().copied().map(i64::from).collect::<Vec<_>>();
            let contexts = [ids(&case.context_ids), ids(&case.context_ids).into_iter().rev().collect()];
            let runnings = [ids(&case.running_ids), ids(&case.running_ids).into_iter().rev().collect()];
            let mut run = |entries: std::ops::Range<usize>| {
                let count = entries.len();
                let [context, running] = [&contexts, &runnings].map(|all| all[entries.clone()].concat());
                let one = |value: usize| Tensor::from_i64([1], vec![value as i64]).unwrap();
                let tensor = |shape: &[usize], values| Tensor::from_i64(shape, values).unwrap();
                let inputs = [
                    ("context_ids", tensor(&[count, case.chunks(), case.chunk_len], context)),
                    ("running_ids", tensor(&[count, case.running_ids.len()], running)),
                    ("query_index", one(case.query_index)),
                    ("first_chunk", one(0)),
                    ("num_chunks", one(case.chunks())),
                ];
                let inputs: Vec<(&str, &Tensor)> = inputs.iter().map(|(name, tensor)| (*name, tensor)).collect();
                let outputs = ["injected.1.key", "injected.1.value", "injected.1.single_key"];
                let results = engines.get("compress", &[]).unwrap().run(&inputs, &mut [], &outputs).unwrap();
                results.iter().map(Tensor::to_f32).collect::<Vec<_>>()
            };
            let (both, alone) = (run(0..2), [run(0..1), run(1..2)]);
            for (output, both) in both.iter().enumerate() {
                let separate = [alone[0][output].as_slice(), &alone[1][output]].concat();
                let worst = both.iter().zip(&separate).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
                assert!(both.len() == separate.len() && worst <= 1e-5, "output {output} is off by {worst}");
            }
        }
    }

    /// Case q4 with other settings.
    fn variations() -> Vec<(&'static str, SharedLlmCase)> {
        let vary = |name, change: fn(&mut SharedLlmCase)| {
            let mut case = case("q4");
            change(&mut case);
            (name, case)
        };
        vec![
            vary("one layer", |case| case.model.injected_layers = 1),
            vary("one layer, always the right half", |case| {
                case.model.injected_layers = 1;
                case.retrieval = false;
            }),
            vary("a tree of its leaves", |case| {
                case.tree_depth = 1;
                case.retrieval = false;
            }),
            vary("a token over in every leaf's parent", |case| {
                case.chunk_len = 60;
                case.context_ids.truncate(4 * 60);
                case.context_mask.truncate(4 * 60);
            }),
            vary("everything kept", |case| case.keep = Keep::All),
            vary("a running text of one token", |case| {
                case.running_ids.truncate(1);
                case.query_index = 0;
            }),
            vary("a running text as long as there are chunks", |case| {
                case.running_ids.truncate(4);
                case.query_index = 3;
            }),
        ]
    }

    /// Chunks of one token over and over: their halves are equal, and of equals the left one is split further.
    #[test]
    fn of_equal_halves_the_left_one_is_split() {
        let mut case = case("q4");
        case.context_ids.fill(7);
        for quirks in [Quirks::Faithful, Quirks::Fixed] {
            let expected = Reference.sharedllm(&case, quirks).unwrap();
            for mut graphs in Graphs::all() {
                let found = graphs.sharedllm(&case, quirks).unwrap();
                let mut ties = 0;
                for w in 0..case.tree_depth - 1 {
                    let similarity = found[&format!("tree.d{w}.sim")].to_f32();
                    let chosen = found[&format!("tree.d{w}.chosen")].as_i64().unwrap();
                    for (node, &chosen) in chosen.iter().enumerate() {
                        let [left, right] = match quirks {
                            Quirks::Faithful => [2 * node, 2 * node + 1],
                            Quirks::Fixed => [node, case.chunks() + node],
                        };
                        if similarity[left].to_bits() == similarity[right].to_bits() {
                            ties += 1;
                            assert_eq!(chosen, 0, "{quirks:?}, {}", graphs.name());
                        }
                    }
                }
                assert!(ties > 0, "{quirks:?}, {}", graphs.name());
                // Whichever it is, what is kept is the same.
                let mut result = Comparison::new("");
                for name in ["kv.layer1.key", "kv.layer1.value", "prefill.logits", "decode.3.logits"] {
                    result.compare(name, &expected[name], &found, SINGLE);
                }
                let findings: Vec<_> = result.findings().collect();
                assert_eq!(result.verdict(), Verdict::Pass, "{quirks:?}, {}: {findings:?}", graphs.name());
            }
        }
    }

    /// What no golden has: the graphs and the reference agree.
    #[test]
    fn other_settings_agree_with_the_reference() {
        for (what, case) in variations() {
            for quirks in [Quirks::Faithful, Quirks::Fixed] {
                let expected = Reference.sharedllm(&case, quirks).unwrap();
                for mut graphs in Graphs::all() {
                    let found = graphs.sharedllm(&case, quirks).unwrap();
                    let mut result = Comparison::new("");
                    // The released code lists the two nodes of a tree without others apart.
                    let apart = |name: &str| case.tree_depth == 1 && name.starts_with("kv.");
                    let shared =
                        |name: &str| found.contains_key(name) && !apart(name) && !name.starts_with("teacher_forced");
                    for (name, expected) in expected.iter().filter(|(name, _)| shared(name)) {
                        result.compare(name, expected, &found, SINGLE);
                    }
                    let findings: Vec<_> = result.findings().collect();
                    assert_eq!(result.verdict(), Verdict::Pass, "{what}, {quirks:?}, {}: {findings:?}", graphs.name());
                    let needed = ["cross.layer0.o", "prefill.logits", "decode.3.logits"];
                    assert!(needed.iter().all(|name| expected.contains_key(*name) && shared(name)), "{what}");
                }
            }
        }
    }
}
