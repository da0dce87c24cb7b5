//! The lower model over the nodes of a tree, and what is kept of them.

use super::super::array::Scope;
use super::super::attention::attend_among;
use super::super::cache::KeyValue;
use super::super::llama::Llama;
use super::super::{ReferenceError, Result, expect_length};
use super::cross::{key_positions, query_position};
use super::tree::{Node, grow};
use super::{Prompt, SharedLlm};
use crate::taps::TapSink;
use accordion_graphs::plan::sharedllm::{Quirks, SharedLlmPlan};
use ndarray::{Array3, Array4};

/// What the upper model's bottom layers attend to.
#[derive(Debug, Clone)]
pub struct Injected {
    /// Per injected layer and chunk what was kept, the deepest level first; keys are rotated by their place in the node.
    pub layers: Vec<Vec<KeyValue>>,
    /// Which computation goes on with it.
    pub quirks: Quirks,
}

impl Injected {
    /// Chunks \[n\]. As released, a tree of one level makes two of every chunk.
    pub fn chunks(&self) -> usize {
        self.layers.first().map_or(0, Vec::len)
    }

    /// Tokens kept per chunk \[C\].
    pub fn kept_per_chunk(&self) -> usize {
        self.layers.first().and_then(|chunks| chunks.first()).map_or(0, KeyValue::rows)
    }

    /// The position from which every token of the running text looks at the context.
    pub fn query_position(&self) -> i64 {
        query_position(self.chunks())
    }

    /// The positions of the kept tokens, chunk after chunk, as they are looked at.
    pub fn key_positions(&self) -> Vec<i64> {
        key_positions(self.chunks(), self.kept_per_chunk(), self.quirks)
    }

    /// All chunks of a layer, one after the other, `[G, n * C, d]`.
    pub(super) fn rows(&self, layer: usize) -> KeyValue {
        let (chunks, kept) = (&self.layers[layer], self.kept_per_chunk());
        let flat = |part: fn(&KeyValue) -> &Array3<f32>| {
            let (heads, _, width) = chunks.first().map_or((0, 0, 0), |chunk| part(chunk).dim());
            Array3::from_shape_fn((heads, chunks.len() * kept, width), |(head, row, i)| {
                part(&chunks[row / kept])[[head, row % kept, i]]
            })
        };
        KeyValue::new(flat(|kv| &kv.k), flat(|kv| &kv.v))
    }
}

/// Compresses the context of `prompt` as `plan` says.
///
/// # Errors
///
/// The plan is for other lengths, the query is outside the running text, token ids are outside the vocabulary, or halves
/// are to be compared by models of different widths.
pub fn compress(
    model: &SharedLlm,
    plan: &SharedLlmPlan,
    prompt: Prompt<'_>,
    taps: &mut dyn TapSink,
) -> Result<Injected> {
    expect_length("context tokens", prompt.context.len(), plan.compressed().len())?;
    expect_length("context mask", prompt.mask.len(), prompt.context.len())?;
    expect_length("running tokens", prompt.running.len(), plan.running)?;
    if prompt.query_index >= prompt.running.len() {
        return Err(ReferenceError::Query { row: prompt.query_index, running: prompt.running.len() });
    }
    let mut taps = Scope::new(taps, "");
    let tree = grow(model, plan, prompt, &mut taps)?;
    // By level, node and layer.
    let mut encoded = Vec::with_capacity(tree.len());
    for (w, nodes) in tree.iter().enumerate() {
        let encoded_nodes = nodes
            .iter()
            .enumerate()
            .map(|(i, node)| encode(&model.lower, node, &mut taps.within(&format!("tree.{w}.nodes.{i}."))));
        let level = encoded_nodes.collect::<Result<Vec<_>>>()?;
        for layer in 0..model.cross.len() {
            let nodes: Vec<&KeyValue> = level.iter().map(|layers| &layers[layer]).collect();
            tap_stacked(&mut taps.within(&format!("tree.{w}.layers.{layer}.")), &nodes)?;
        }
        encoded.push(level);
    }
    let layers: Vec<Vec<KeyValue>> = (0..model.cross.len()).map(|layer| pack(plan, &encoded, layer)).collect();
    for (layer, chunks) in layers.iter().enumerate() {
        tap_stacked(&mut taps.within(&format!("kv.{layer}.")), &chunks.iter().collect::<Vec<_>>())?;
    }
    Ok(Injected { layers, quirks: plan.settings.quirks })
}

/// Keys and values of `node` in every layer, `[G, l, d]`. Padded rows have some too.
fn encode(lower: &Llama, node: &Node, taps: &mut Scope<'_>) -> Result<Vec<KeyValue>> {
    let rotary = lower.rotary(&(0..node.ids.len() as i64).collect::<Vec<_>>());
    let tokens: Vec<usize> = (0..node.ids.len()).filter(|&row| node.mask[row]).collect();
    let mut hidden = lower.embed(&node.ids)?;
    let mut layers = Vec::new();
    for layer in 0..lower.architecture().num_layers {
        let mut taps = taps.within(&format!("layers.{layer}."));
        let [q, k, v] = lower.project(layer, &hidden);
        let (attended, kv) = attend_among(&tokens, &q, &k, v, &rotary, &mut taps)?;
        let residual = lower.add_attended(layer, &hidden, &attended, &mut taps)?;
        hidden = lower.mlp_half(layer, &residual, &mut taps)?;
        layers.push(kv);
    }
    Ok(layers)
}

/// What is kept of every chunk in `layer`: of each of its nodes every `step`-th token, the deepest level first.
fn pack(plan: &SharedLlmPlan, encoded: &[Vec<Vec<KeyValue>>], layer: usize) -> Vec<KeyValue> {
    let last = plan.levels.len() - 1;
    let faithful = plan.settings.quirks == Quirks::Faithful;
    // As released, the leaves of a tree without other nodes are not joined: each counts as a chunk.
    let chunks = if faithful && last == 0 { 2 * plan.chunks } else { plan.chunks };
    let nodes_of = |chunk: usize, w: usize| match (w == last, faithful) {
        (true, true) if last > 0 => vec![chunk, plan.chunks + chunk], // the leaves of two chunks (Q2)
        (true, false) => vec![2 * chunk, 2 * chunk + 1],
        _ => vec![chunk],
    };
    let kept = |chunk: usize| {
        let mut nodes = (0..=last).rev().flat_map(|w| {
            let level = &plan.levels[w];
            let rows: Vec<usize> = (0..level.node_len).step_by(level.step).collect();
            nodes_of(chunk, w).into_iter().map(move |node| encoded[w][node][layer].select(&rows))
        });
        let first = nodes.next();
        first.map(|first| {
            nodes.fold(first, |mut kept, node| {
                kept.append(&node);
                kept
            })
        })
    };
    (0..chunks).filter_map(kept).collect()
}

/// Taps parts of equal length as `key` and `value`, `[parts, G, l, d]`.
fn tap_stacked(taps: &mut Scope<'_>, parts: &[&KeyValue]) -> Result<()> {
    let Some(first) = parts.first() else { return Ok(()) };
    let (heads, rows, width) = first.k.dim();
    let shape = (parts.len(), heads, rows, width);
    taps.tap("key", &Array4::from_shape_fn(shape, |(part, head, row, i)| parts[part].k[[head, row, i]]))?;
    taps.tap("value", &Array4::from_shape_fn(shape, |(part, head, row, i)| parts[part].v[[head, row, i]]))
}
