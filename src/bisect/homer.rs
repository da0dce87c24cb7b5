//! HOMER's stage graphs, node by node of the tree. Every node is given what the reference's children left, so that a node
//! is not blamed for another one. The head and the decoder, behind the reference's compressed context, come last.

use super::BisectError;
use super::case::{Case, Visit};
use super::decoder::{ROWS, continue_from};
use super::rebuild::Rebuilt;
use crate::pipeline::homer::HEAD;
use crate::reference::decode::{Continuation, ContinuationOffset};
use crate::reference::homer::{Compression, ContextState, Prompt};
use crate::reference::llama::Llama;
use crate::reference::to_tensor;
use crate::tensor::Tensor;
use crate::verify::homer::HomerInput;
use accordion_graphs::methods::homer::graph_name;
use accordion_graphs::plan::homer::{HomerNode, HomerPlan};
use std::collections::BTreeMap;
use std::ops::ControlFlow;

/// The cases of `input`: every node, the head, and the decoder behind the compressed context over the teacher's tokens, or over
/// the first of the context where there are none.
///
/// # Errors
///
/// The reference cannot be run, the bundle lacks a graph of the tree, or `visit` fails.
pub fn cases(
    rebuilt: &Rebuilt<'_>,
    reference: &Llama,
    input: &HomerInput<'_>,
    visit: &mut Visit<'_>,
) -> Result<ControlFlow<()>, BisectError> {
    let &HomerInput { plan, prefix, context, suffix, teacher, bias, .. } = input;
    let prompt = Prompt { prefix, context, suffix };
    let significance = |layer: usize| bias.get(layer).copied().unwrap_or_default();
    let mut compression = Compression::new(reference, plan, prompt, &significance)?;
    let mut finished: Vec<ContextState> = Vec::new();
    for node in &plan.nodes {
        let mut taps = BTreeMap::new();
        compression.step(&mut taps)?;
        let Some(left) = compression.last() else { break };
        let children = node.children.and_then(|_| finished.pop().zip(finished.pop()));
        let graph = rebuilt.graph(&graph_name(node.height, &node.layers))?;
        let case = Case {
            graph: &graph,
            place: node.tap_scope(),
            inputs: inputs(plan, node, prompt, children.as_ref(), &significance)?,
            in_place: Vec::new(),
            expected: expected(node, taps, &left)?,
        };
        if visit(&case)?.is_break() {
            return Ok(ControlFlow::Break(()));
        }
        finished.push(left);
    }
    let Some(root) = finished.pop() else { return Ok(ControlFlow::Continue(())) };
    let graph = rebuilt.graph(HEAD)?;
    let (rows, width) = root.last_hidden.dim();
    let case = Case {
        graph: &graph,
        place: "prefix".to_owned(),
        inputs: vec![("hidden".to_owned(), to_tensor(&root.last_hidden)?.reshaped([1, rows, width])?)],
        in_place: Vec::new(),
        expected: BTreeMap::from([("logits".to_owned(), to_tensor(&reference.logits(&root.last_hidden))?)]),
    };
    if visit(&case)?.is_break() {
        return Ok(ControlFlow::Break(()));
    }
    let ids = if teacher.is_empty() { context } else { teacher };
    let behind = Continuation::new(&root, ContinuationOffset::AfterLast);
    continue_from(rebuilt, reference, &behind, ("teacher", &ids[..ids.len().min(ROWS)]), visit)
}

/// What the graph of `node` is given; `children` are the right one and the left one.
fn inputs<'a>(
    plan: &HomerPlan,
    node: &HomerNode,
    prompt: Prompt<'_>,
    children: Option<&(ContextState, ContextState)>,
    significance: &impl Fn(usize) -> &'a [f32],
) -> Result<Vec<(String, Tensor)>, BisectError> {
    let one = |n: usize| Tensor::from_i64([1], vec![n as i64]);
    let mut inputs = Vec::new();
    if let Some((right, left)) = children {
        for (side, state) in [("left", left), ("right", right)] {
            let (rows, width) = state.last_hidden.dim();
            let hidden = to_tensor(&state.last_hidden)?.reshaped([1, rows, width])?;
            inputs.push((format!("{side}.hidden"), hidden));
            inputs.push((format!("{side}.position_ids"), Tensor::from_i64([1, rows], state.position_ids.clone())?));
            inputs.push((format!("{side}.kv"), stacked(state)?));
        }
    } else {
        let Prompt { prefix, context, suffix } = prompt;
        let ids = [prefix, context.get(node.context.clone()).unwrap_or_default(), suffix].concat();
        let ids: Vec<i64> = ids.into_iter().map(i64::from).collect();
        inputs.push(("input_ids".to_owned(), Tensor::from_i64([1, ids.len()], ids)?));
        let positions = plan.leaf_positions(node);
        inputs.push(("position_ids".to_owned(), Tensor::from_i64([1, positions.len()], positions)?));
    }
    inputs.push(("prefix_length".to_owned(), one(plan.lengths.prefix)?));
    inputs.push(("suffix_length".to_owned(), one(plan.lengths.suffix)?));
    if let Some(last) = node.layers.clone().last() {
        inputs.push(("keep".to_owned(), one(node.out_len)?));
        // Where everything is kept the scores decide nothing, but the graph looks them up.
        let row = if node.removed() > 0 { significance(last).to_vec() } else { vec![0.0; plan.max_distance() + 1] };
        inputs.push(("significance_bias".to_owned(), Tensor::from_f32([row.len()], row)?));
    }
    Ok(inputs)
}

/// The reference's `taps` of `node` and what it `left`, as the graph calls them.
fn expected(
    node: &HomerNode,
    taps: BTreeMap<String, Tensor>,
    left: &ContextState,
) -> Result<BTreeMap<String, Tensor>, BisectError> {
    let scope = format!("{}.", node.tap_scope());
    let mut expected: BTreeMap<String, Tensor> =
        taps.into_iter().filter_map(|(name, value)| Some((name.strip_prefix(&scope)?.to_owned(), value))).collect();
    if let Some(in_kv) = entering_cache(&expected)? {
        expected.insert("in_kv".to_owned(), in_kv);
    }
    for (output, tap) in [("hidden", "out_hidden"), ("kept_position_ids", "out_position_ids")] {
        expected.extend(expected.get(tap).cloned().map(|value| (output.to_owned(), value)));
    }
    expected.insert("kv".to_owned(), stacked(left)?);
    Ok(expected)
}

/// `in_k.<l>` and `in_v.<l>` of all layers as the graphs have them, `[n, 2, G, L, d]`.
fn entering_cache(taps: &BTreeMap<String, Tensor>) -> Result<Option<Tensor>, BisectError> {
    let layers = (0..).map_while(|l| Some([taps.get(&format!("in_k.{l}"))?, taps.get(&format!("in_v.{l}"))?]));
    let planes: Vec<&Tensor> = layers.flatten().collect();
    let Some(first) = planes.first() else { return Ok(None) };
    let shape = [&[planes.len() / 2, 2], first.shape()].concat();
    let mut all = Vec::with_capacity(shape.iter().product());
    for plane in &planes {
        all.extend_from_slice(plane.as_f32()?);
    }
    Ok(Some(Tensor::from_f32(shape, all)?))
}

/// The cache of `state` as the graphs have it, `[1, n, 2, G, L, d]`.
fn stacked(state: &ContextState) -> Result<Tensor, BisectError> {
    let planes = state.cache.layers.iter().flat_map(|kv| [&kv.k, &kv.v]);
    let (groups, rows, width) = state.cache.layers.first().map_or((0, 0, 0), |kv| kv.k.dim());
    let all = planes.flat_map(|plane| plane.iter().copied()).collect();
    Ok(Tensor::from_f32([1, state.cache.layers.len(), 2, groups, rows, width], all)?)
}
