//! SharedLLM's graphs: the lower model over the tree of all chunks, then the decoder over the running text that attends to
//! what the reference kept of it.
//!
//! The graph runs all nodes of all chunks at once, the reference one by one: its taps are put together as the graph has
//! them. The graph's keys carry the whole rotation between a key and the query that looks at it.

use super::BisectError;
use super::case::{Case, PAIRS, Visit};
use super::decoder::{DecoderCall, ROWS, batched};
use super::rebuild::Rebuilt;
use crate::reference::cache::KeyValue;
use crate::reference::rope::Frequencies;
use crate::reference::sharedllm::{Injected, Prompt, RunningText, SharedLlm, compress};
use crate::reference::to_tensor;
use crate::reference::transformer::Transformer;
use crate::tensor::Tensor;
use crate::verify::sharedllm::{SharedLlmInput, decided_between};
use accordion_graphs::plan::sharedllm::{Level, Quirks, SharedLlmPlan};
use ndarray::Array3;
use std::collections::BTreeMap;
use std::ops::ControlFlow;

const COMPRESS: &str = "compress";

/// The cases of `input`, of which the teacher's tokens are left out.
///
/// # Errors
///
/// The reference cannot be run, the bundle lacks a graph, or `visit` fails.
pub fn cases(
    rebuilt: &Rebuilt<'_>,
    reference: &SharedLlm,
    input: &SharedLlmInput<'_>,
    visit: &mut Visit<'_>,
) -> Result<ControlFlow<()>, BisectError> {
    let &SharedLlmInput { plan, context, running, .. } = input;
    let query_index = running.len().saturating_sub(1);
    let mask = vec![true; context.len()];
    let mut taps = BTreeMap::new();
    let injected = compress(reference, plan, Prompt { context, mask: &mask, running, query_index }, &mut taps)?;
    let given = placed(reference, &injected)?;

    let ids = |ids: &[u32], shape: &[usize]| Tensor::from_i64(shape, ids.iter().map(|&id| i64::from(id)).collect());
    let one = |n: usize| Tensor::from_i64([1], vec![n as i64]);
    let mut inputs = vec![
        ("context_ids".to_owned(), ids(context, &[1, plan.chunks, plan.settings.chunk_len])?),
        ("first_chunk".to_owned(), one(0)?),
        ("num_chunks".to_owned(), one(plan.chunks)?),
    ];
    if plan.settings.retrieval {
        inputs.push(("running_ids".to_owned(), ids(running, &[1, running.len()])?));
        inputs.push(("query_index".to_owned(), one(query_index)?));
    }
    let mut expected = expected(plan, &taps, query_index)?;
    expected.extend(given.iter().cloned());
    let graph = rebuilt.graph(COMPRESS)?;
    let place = "tree".to_owned();
    if visit(&Case { graph: &graph, place, inputs, in_place: Vec::new(), expected })?.is_break() {
        return Ok(ControlFlow::Break(()));
    }

    let ids = &running[..running.len().min(ROWS)];
    let single = ids.len() == 1;
    let mut text = RunningText::new(reference, &injected);
    let before = text.cache.clone();
    let mut expected = BTreeMap::new();
    let logits = text.feed(reference, ids, &mut expected)?;
    expected.insert("logits".to_owned(), to_tensor(&logits)?);
    let cache = [&before, &text.cache];
    let injected = for_rows(given, single);
    DecoderCall { place: "running", ids, first: 0, cache, injected, expected }.visit(rebuilt, visit)
}

/// What the decoder takes of the keys and values `given`: a single token has keys of its own where there are some.
fn for_rows(given: Vec<(String, Tensor)>, single: bool) -> Vec<(String, Tensor)> {
    let mut inputs: BTreeMap<String, Tensor> = BTreeMap::new();
    for (name, value) in given {
        match name.strip_suffix("single_key") {
            Some(layer) if single => drop(inputs.insert(format!("{layer}key"), value)),
            Some(_) => {}
            None => drop(inputs.entry(name).or_insert(value)),
        }
    }
    inputs.into_iter().collect()
}

/// The keys and values that the decoder attends to, by the names of the graph's outputs, `[1, G, rows, d]`.
fn placed(reference: &SharedLlm, injected: &Injected) -> Result<Vec<(String, Tensor)>, BisectError> {
    let upper = reference.upper();
    let query = injected.query_position();
    let positions = injected.key_positions();
    let relative: Vec<i64> = positions.iter().map(|position| position - query).collect();
    let (relative, own) = (Transformer::rotary(upper, &relative), Transformer::rotary(upper, &positions));
    let mut named = Vec::new();
    for (layer, chunks) in injected.layers.iter().enumerate() {
        let [keys, values] = [flat(chunks, |kv| &kv.k), flat(chunks, |kv| &kv.v)];
        let mut put = |part: &str, rows: &Array3<f32>| {
            named.push((format!("injected.{layer}.{part}"), batched(rows)?));
            Ok::<_, BisectError>(())
        };
        if injected.quirks == Quirks::Faithful {
            // As released, a single query is turned by one angle in all pairs of dimensions, which comes first here so that
            // it is looked for last.
            let arch = upper.architecture();
            let Frequencies { inv_freq, .. } = Frequencies::new(&arch.rope, arch.head_dim, query);
            let angle = query as f32 * inv_freq[(injected.chunks() + 1) % inv_freq.len().max(1)];
            put("single_key", &turned_back(&own.apply(&keys), angle))?;
        }
        put("key", &relative.apply(&keys))?;
        put("value", &values)?;
    }
    Ok(named)
}

/// All chunks of a layer, one after the other, `[G, n * C, d]`.
fn flat(chunks: &[KeyValue], part: fn(&KeyValue) -> &Array3<f32>) -> Array3<f32> {
    let views: Vec<_> = chunks.iter().map(|chunk| part(chunk).view()).collect();
    // All of them are of one model.
    ndarray::concatenate(ndarray::Axis(1), &views).unwrap_or_default()
}

/// `x [G, rows, d]` with every pair of dimensions turned back by `angle`.
fn turned_back(x: &Array3<f32>, angle: f32) -> Array3<f32> {
    let (half, (sin, cos)) = (x.dim().2 / 2, angle.sin_cos());
    Array3::from_shape_fn(x.dim(), |(g, row, i)| {
        if i < half {
            x[[g, row, i]] * cos + x[[g, row, i + half]] * sin
        } else {
            x[[g, row, i]] * cos - x[[g, row, i - half]] * sin
        }
    })
}

/// The reference's `taps` as the graph has them.
fn expected(
    plan: &SharedLlmPlan,
    taps: &BTreeMap<String, Tensor>,
    query_index: usize,
) -> Result<BTreeMap<String, Tensor>, BisectError> {
    let layout = Layout { plan, taps };
    let mut expected = BTreeMap::new();
    for (name, value) in taps {
        if let Some(tap) = name.strip_prefix("query.layers.") {
            expected.insert(format!("query.layers.{tap}"), value.rows(query_index..query_index + 1));
        } else if let Some((level, tap)) = name.split_once(".halves.0.") {
            expected.insert(format!("{level}.lower.{tap}"), layout.last_of_halves(level, tap)?);
        } else if let Some(tap) = name.strip_prefix("tree.0.nodes.0.") {
            expected.insert(format!("lower.{tap}"), layout.of_nodes(tap)?);
        } else if name.ends_with(".encoded_ids") {
            let leaves = value.shape().first() == Some(&(2 * plan.chunks));
            let value = match value.shape().last() {
                Some(&length) if leaves => value.reshaped([plan.chunks, 2, length])?,
                _ => value.clone(),
            };
            expected.insert(name.clone(), value);
        } else if name.starts_with("kv.") {
            expected.insert(name.clone(), layout.kept(value)?);
        } else if !name.contains(".nodes.") && !name.contains(".halves.") {
            if let Some(level) = name.strip_suffix("similarity") {
                expected.insert(format!("{level}{PAIRS}"), decided_between(plan, name, value.clone())?);
            }
            expected.insert(name.clone(), value.clone());
        }
    }
    Ok(expected)
}

/// Where the graph has what the reference computes node by node.
struct Layout<'a> {
    plan: &'a SharedLlmPlan,
    taps: &'a BTreeMap<String, Tensor>,
}

impl Layout<'_> {
    /// The last row of every half at `level`, `[2 * n, width]`.
    fn last_of_halves(&self, level: &str, tap: &str) -> Result<Tensor, BisectError> {
        let mut rows = Vec::new();
        for half in 0..2 * self.plan.chunks {
            let Some(value) = self.taps.get(&format!("{level}.halves.{half}.{tap}")) else { continue };
            let count = value.shape().first().copied().unwrap_or(0);
            rows.extend(value.rows(count.saturating_sub(1)..count).to_f32());
        }
        let width = rows.len() / (2 * self.plan.chunks).max(1);
        Ok(Tensor::from_f32([2 * self.plan.chunks, width], rows)?)
    }

    /// The rows of all nodes of all chunks, `[n, rows, width]`, or only those that are kept, where only those go on.
    fn of_nodes(&self, tap: &str) -> Result<Tensor, BisectError> {
        let layers = self.layers();
        let layer: usize =
            tap.strip_prefix("layers.").and_then(|rest| rest.split('.').next()?.parse().ok()).unwrap_or(0);
        // Of the last layer only keys and values are computed, and so what the one before leaves only where they are kept.
        let behind_attention = tap.ends_with(".mlp.out") || tap.ends_with(&format!("layers.{layer}.out"));
        let picked = layer + 2 == layers && behind_attention || layer + 1 == layers;
        let (mut all, mut count) = (Vec::new(), 0);
        for chunk in 0..self.plan.chunks {
            let mut rows = Vec::new();
            for (w, level) in self.plan.levels.iter().enumerate() {
                for node in self.nodes_of(chunk, w, level) {
                    let Some(value) = self.taps.get(&format!("tree.{w}.nodes.{node}.{tap}")) else { continue };
                    rows.extend((0..level.node_len).map(|row| value.rows(row..row + 1).to_f32()));
                }
            }
            let kept = if picked { kept_rows(&self.plan.levels) } else { (0..rows.len()).collect() };
            count += kept.len();
            all.extend(kept.into_iter().filter_map(|row| rows.get(row)).flatten());
        }
        let width = all.len() / count.max(1);
        Ok(Tensor::from_f32([self.plan.chunks, count / self.plan.chunks.max(1), width], all)?)
    }

    /// Layers of the lower model.
    fn layers(&self) -> usize {
        self.taps.keys().filter(|tap| tap.starts_with("tree.0.nodes.0.") && tap.ends_with(".attn.k")).count()
    }

    /// The nodes of `chunk` at level `w`: as released, the leaves of two chunks are joined, unless they are the whole tree.
    fn nodes_of(&self, chunk: usize, w: usize, level: &Level) -> Vec<usize> {
        match (level.nodes, self.plan.settings.quirks) {
            (2, Quirks::Faithful) if w > 0 => vec![chunk, self.plan.chunks + chunk],
            (nodes, _) => (0..nodes).map(|node| chunk * nodes + node).collect(),
        }
    }

    /// What is kept of every chunk, `[n, G, C, d]`: as released, the two leaves that are a whole tree count as chunks, `[2 * n, G,
    /// C / 2, d]`.
    fn kept(&self, value: &Tensor) -> Result<Tensor, BisectError> {
        let &[entries, groups, rows, width] = value.shape() else { return Ok(value.clone()) };
        let parts = entries / self.plan.chunks.max(1);
        if parts < 2 {
            return Ok(value.clone());
        }
        let values = value.to_f32();
        let mut joined = Vec::with_capacity(values.len());
        for chunk in 0..self.plan.chunks {
            for group in 0..groups {
                for part in 0..parts {
                    let first = ((chunk * parts + part) * groups + group) * rows * width;
                    joined.extend(values.iter().skip(first).take(rows * width));
                }
            }
        }
        Ok(Tensor::from_f32([self.plan.chunks, groups, parts * rows, width], joined)?)
    }
}

/// The kept rows among those of a chunk's nodes, level by level from the root on; the deepest level's come first.
fn kept_rows(levels: &[Level]) -> Vec<usize> {
    let mut end: usize = levels.iter().map(|level| level.nodes * level.node_len).sum();
    let mut kept = Vec::new();
    for level in levels.iter().rev() {
        end -= level.nodes * level.node_len;
        for node in 0..level.nodes {
            let start = end + node * level.node_len;
            kept.extend((start..start + level.node_len).step_by(level.step.max(1)));
        }
    }
    kept
}
