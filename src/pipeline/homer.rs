//! Walking a HOMER plan over the stage graphs.
//!
//! The batch axis is the memory knob: subtrees of up to `width` leaves are built level by level, all nodes of a level
//! that have the same lengths in one call; above them the walk is depth first, so that only one finished child per
//! level is alive. `width` 1 is the order of the paper.

use super::decode::token_tensor;
use super::{ContextState, Engines, PipelineError};
use crate::taps::TapSink;
use crate::tensor::{Tensor, TensorError};
use accordion_graphs::architecture::Architecture;
use accordion_graphs::methods::homer::graph_name;
use accordion_graphs::onnx::ValueInfo;
use accordion_graphs::plan::homer::{HomerNode, HomerPlan};

/// Name of the graph that turns hidden states into logits.
pub const HEAD: &str = "head";

/// The three parts of a prompt.
#[derive(Debug, Clone, Copy)]
pub struct Prompt<'a> {
    /// Before the context; kept whole.
    pub prefix: &'a [u32],
    /// What is compressed.
    pub context: &'a [u32],
    /// Behind the context; kept whole, and what significance is measured against.
    pub suffix: &'a [u32],
}

/// The significance table: for each layer the expected score by distance.
pub type Bias<'a> = &'a [&'a [f32]];

/// A finished node: hidden `[1, L, D]`, positions `[1, L]`, cache `[1, n, 2, G, L, d]`.
struct Finished {
    hidden: Tensor,
    positions: Tensor,
    kv: Tensor,
}

struct Walk<'a, 'e, 'b> {
    engines: &'e mut Engines<'b>,
    arch: &'a Architecture,
    plan: &'a HomerPlan,
    prompt: Prompt<'a>,
    bias: Bias<'a>,
    width: usize,
    taps: &'a mut dyn TapSink,
    on_node: &'a mut dyn FnMut(&HomerNode),
}

/// Compresses `prompt` as `plan` says. `width` is the number of leaves that may be built in one batch; `on_node` is told
/// every finished node.
///
/// # Errors
///
/// The prompt is not the one planned for, the table is too short, the bundle lacks a graph, or a graph fails.
#[allow(clippy::too_many_arguments)] // each is one independent choice of the caller
pub fn compress(
    engines: &mut Engines<'_>,
    plan: &HomerPlan,
    prompt: Prompt<'_>,
    bias: Bias<'_>,
    width: usize,
    taps: &mut dyn TapSink,
    on_node: &mut dyn FnMut(&HomerNode),
) -> Result<ContextState, PipelineError> {
    let bundle = engines.bundle();
    let arch = bundle.architecture();
    check_window(plan, arch)?;
    check_table(plan, bias)?;
    let root = plan.nodes.len() - 1;
    let mut walk = Walk { engines, arch, plan, prompt, bias, width: width.max(1), taps, on_node };
    let finished = walk.subtree(root)?;
    walk.into_state(&finished)
}

fn check_window(plan: &HomerPlan, arch: &Architecture) -> Result<(), PipelineError> {
    let length = plan.nodes.iter().map(|n| n.in_len).max().unwrap_or(0);
    match arch.sliding_window() {
        Some(window) if length > window => Err(PipelineError::SlidingWindow { length, window }),
        _ => Ok(()),
    }
}

fn check_table(plan: &HomerPlan, bias: Bias<'_>) -> Result<(), PipelineError> {
    let expected = plan.max_distance() + 1;
    for node in plan.nodes.iter().filter(|n| n.removed() > 0) {
        let layer = node.layers.end - 1;
        let found = bias.get(layer).map_or(0, |row| row.len());
        if found < expected {
            return Err(PipelineError::ShortTable { layer, found, expected });
        }
    }
    Ok(())
}

impl Walk<'_, '_, '_> {
    /// Builds the node at `root` of the plan's nodes, and everything below it.
    fn subtree(&mut self, root: usize) -> Result<Finished, PipelineError> {
        let node = &self.plan.nodes[root];
        match node.children {
            Some([left, right]) if 1 << node.height > self.width => {
                let left = self.subtree(left)?;
                let right = self.subtree(right)?;
                let mut merged = self.run(&[root], vec![[left, right]])?;
                Ok(merged.swap_remove(0))
            }
            _ => self.by_level(root),
        }
    }

    /// Builds a subtree level by level.
    fn by_level(&mut self, root: usize) -> Result<Finished, PipelineError> {
        let height = self.plan.nodes[root].height;
        let mut levels = vec![vec![root]];
        for level in 0..height {
            let below = levels[level].iter().filter_map(|&n| self.plan.nodes[n].children).flatten().collect();
            levels.push(below);
        }
        let mut finished: Vec<Finished> = Vec::new();
        for nodes in levels.into_iter().rev() {
            let plan = self.plan;
            let mut children = finished.into_iter();
            finished = Vec::with_capacity(nodes.len());
            for same in nodes.chunk_by(|&a, &b| call_lengths(plan, a) == call_lengths(plan, b)) {
                let pairs = if self.plan.nodes[same[0]].children.is_none() {
                    Vec::new()
                } else {
                    same.iter().filter_map(|_| Some([children.next()?, children.next()?])).collect()
                };
                finished.extend(self.run(same, pairs)?);
            }
        }
        Ok(finished.swap_remove(0))
    }

    /// Runs nodes of one level and the same lengths in one call; `children` is empty for leaves.
    fn run(&mut self, nodes: &[usize], children: Vec<[Finished; 2]>) -> Result<Vec<Finished>, PipelineError> {
        let plan = self.plan;
        let first = &plan.nodes[nodes[0]];
        let name = graph_name(first.height, &first.layers);
        let Some(signature) = self.engines.bundle().signature(&name) else {
            let (context, height) = (plan.lengths.context, plan.tree_height);
            return Err(PipelineError::NotExported { graph: name, context, height });
        };
        let wanted: Vec<(&str, &ValueInfo)> = signature
            .taps
            .iter()
            .filter(|(tap, _)| nodes.iter().any(|&n| self.wants(&plan.nodes[n], tap)))
            .map(|(tap, value)| (tap.as_str(), value))
            .collect();
        // What a leaf is given is known; an input cannot be an output too.
        let (given, computed): (Vec<_>, Vec<_>) =
            wanted.into_iter().partition(|(_, value)| signature.inputs.iter().any(|input| input.name == value.name));
        let tap_values: Vec<&str> = computed.iter().map(|(_, value)| value.name.as_str()).collect();
        // Taps that are outputs already need not be declared again.
        let declared: Vec<&str> =
            tap_values.iter().copied().filter(|name| !signature.outputs.iter().any(|o| o.name == *name)).collect();

        let scalar = |n: usize| Tensor::from_i64([1], vec![n as i64]);
        let mut owned: Vec<(&str, Tensor)> = if children.is_empty() {
            self.leaf_inputs(nodes)?
        } else {
            let (left, right) = (stack(&children, 0)?, stack(&children, 1)?);
            drop(children);
            vec![
                ("left.hidden", left.hidden),
                ("left.position_ids", left.positions),
                ("left.kv", left.kv),
                ("right.hidden", right.hidden),
                ("right.position_ids", right.positions),
                ("right.kv", right.kv),
            ]
        };
        owned.push(("prefix_length", scalar(plan.lengths.prefix)?));
        owned.push(("suffix_length", scalar(plan.lengths.suffix)?));
        if !first.layers.is_empty() {
            owned.push(("keep", scalar(first.out_len)?));
            let row = if first.removed() > 0 {
                self.bias.get(first.layers.end - 1).map_or_else(Vec::new, |row| row.to_vec())
            } else {
                // Everything is kept: the scores decide nothing, but the graph looks them up.
                vec![0.0; plan.max_distance() + 1]
            };
            owned.push(("significance_bias", Tensor::from_f32([row.len()], row)?));
        }
        let inputs: Vec<(&str, &Tensor)> = owned.iter().map(|(name, tensor)| (*name, tensor)).collect();
        let mut outputs = vec!["hidden", "kept_position_ids", "kv"];
        outputs.extend(&tap_values);
        let mut results = self.engines.get(&name, &declared)?.run(&inputs, &mut [], &outputs)?;
        for (tap, info) in given {
            if let Some((_, value)) = inputs.iter().find(|(name, _)| *name == info.name) {
                self.record(nodes, tap, info, value)?;
            }
        }
        drop(owned);
        let tapped = results.split_off(3);
        for ((tap, info), value) in computed.iter().zip(&tapped) {
            self.record(nodes, tap, info, value)?;
        }
        for (i, &n) in nodes.iter().enumerate() {
            let node = &plan.nodes[n];
            let scope = node.tap_scope();
            for (tap, value) in [("out_hidden", &results[0]), ("out_position_ids", &results[1])] {
                let name = format!("{scope}.{tap}");
                if self.taps.wants(&name) {
                    self.taps.record(&name, entry(value, i)?);
                }
            }
            (self.on_node)(node);
        }
        let [hidden, positions, kv] = [0, 1, 2].map(|i: usize| results[i].clone());
        drop(results);
        Ok((0..nodes.len())
            .map(|i| Finished {
                hidden: hidden.rows(i..i + 1),
                positions: positions.rows(i..i + 1),
                kv: kv.rows(i..i + 1),
            })
            .collect())
    }

    fn leaf_inputs(&self, nodes: &[usize]) -> Result<Vec<(&'static str, Tensor)>, PipelineError> {
        let Prompt { prefix, context, suffix } = self.prompt;
        let length = self.plan.nodes[nodes[0]].in_len;
        let mut ids = Vec::with_capacity(nodes.len() * length);
        let mut positions = Vec::with_capacity(nodes.len() * length);
        for &n in nodes {
            let leaf = &self.plan.nodes[n];
            ids.extend_from_slice(prefix);
            ids.extend_from_slice(&context[leaf.context.clone()]);
            ids.extend_from_slice(suffix);
            positions.extend(self.plan.leaf_positions(leaf));
        }
        let ids = token_tensor(&ids, self.arch.vocab_size())?.reshaped([nodes.len(), length])?;
        Ok(vec![("input_ids", ids), ("position_ids", Tensor::from_i64([nodes.len(), length], positions)?)])
    }

    /// Whether the sink wants `tap` of `node`. The graphs have the children's cache as one tensor.
    fn wants(&self, node: &HomerNode, tap: &str) -> bool {
        let tap = if tap == "in_kv" { "in_k.0" } else { tap };
        self.taps.wants(&format!("{}.{tap}", node.tap_scope()))
    }

    /// Hands the part of a batched tap that belongs to each node to the sink.
    fn record(&mut self, nodes: &[usize], tap: &str, info: &ValueInfo, value: &Tensor) -> Result<(), PipelineError> {
        let batched = info.shape.first().is_some_and(|dim| dim == "batch");
        for (i, &n) in nodes.iter().enumerate() {
            let node = &self.plan.nodes[n];
            if !self.wants(node, tap) {
                continue;
            }
            let part = if batched {
                entry(value, i)?
            } else {
                let rows = value.shape().first().copied().unwrap_or(0) / nodes.len();
                value.rows(i * rows..(i + 1) * rows)
            };
            let scope = node.tap_scope();
            if tap == "in_kv" {
                for layer in 0..node.layers.start {
                    let planes = part.rows(layer..layer + 1);
                    let planes = planes.reshaped(&planes.shape()[1..])?;
                    for (name, plane) in [("in_k", 0), ("in_v", 1)] {
                        self.taps.record(&format!("{scope}.{name}.{layer}"), entry(&planes, plane)?);
                    }
                }
            } else {
                self.taps.record(&format!("{scope}.{tap}"), part);
            }
        }
        Ok(())
    }

    /// The root's survivors as a context state.
    fn into_state(self, root: &Finished) -> Result<ContextState, PipelineError> {
        let rows = root.hidden.shape()[1];
        let all = self.taps.wants("prefix.logits");
        let hidden = if all { root.hidden.clone() } else { last_row(&root.hidden)? };
        let logits = self.engines.get(HEAD, &[])?.run(&[("hidden", &hidden)], &mut [], &["logits"])?.swap_remove(0);
        let logits = logits.on_host()?;
        let logits = entry(&logits, 0)?;
        let cache: Vec<[Tensor; 2]> = {
            let kv = entry(&root.kv, 0)?;
            let shape = [&[1], &kv.shape()[2..]].concat();
            let layer = |l: usize| -> Result<[Tensor; 2], PipelineError> {
                let planes = entry(&kv, l)?;
                Ok([planes.rows(0..1).reshaped(shape.as_slice())?, planes.rows(1..2).reshaped(shape.as_slice())?])
            };
            (0..self.arch.num_layers()).map(layer).collect::<Result<_, _>>()?
        };
        if self.taps.wants("prefix.last_hidden") {
            self.taps.record("prefix.last_hidden", entry(&root.hidden, 0)?);
        }
        if all {
            self.taps.record("prefix.logits", logits.clone());
        }
        if self.taps.wants("prefix.position_ids") {
            self.taps.record("prefix.position_ids", entry(&root.positions, 0)?);
        }
        for (l, [key, value]) in cache.iter().enumerate() {
            for (part, tensor) in [("k", key), ("v", value)] {
                let name = format!("cache.{part}.{l}");
                if self.taps.wants(&name) {
                    self.taps.record(&name, entry(tensor, 0)?);
                }
            }
        }
        let last = logits.shape()[0] - 1;
        let position_ids = root.positions.as_i64()?.to_vec();
        debug_assert_eq!(position_ids.len(), rows);
        Ok(ContextState {
            cache,
            last_position: position_ids.last().copied().unwrap_or(0),
            position_ids,
            logits: logits.rows(last..last + 1).to_f32(),
            injected: None,
            scales: None,
        })
    }
}

/// What has to agree for two nodes of a level to share a call.
fn call_lengths(plan: &HomerPlan, node: usize) -> (usize, usize, Option<[usize; 2]>) {
    let node = &plan.nodes[node];
    let children = node.children.map(|c| c.map(|child| plan.nodes[child].out_len));
    (node.in_len, node.out_len, children)
}

/// Entry `i` of the first dimension, which disappears.
fn entry(tensor: &Tensor, i: usize) -> Result<Tensor, PipelineError> {
    let row = tensor.rows(i..i + 1);
    Ok(row.reshaped(&row.shape()[1..])?)
}

/// The last row of `[1, L, D]` as `[1, 1, D]`.
fn last_row(hidden: &Tensor) -> Result<Tensor, PipelineError> {
    let rows = entry(hidden, 0)?;
    let last = rows.shape()[0] - 1;
    let width = rows.shape()[1];
    Ok(rows.rows(last..last + 1).reshaped([1, 1, width])?)
}

/// One child of every pair, joined along the batch axis; that of a single pair is not copied.
fn stack(children: &[[Finished; 2]], side: usize) -> Result<Finished, TensorError> {
    let join = |part: fn(&Finished) -> &Tensor| {
        Tensor::concat(&children.iter().map(|pair| part(&pair[side])).collect::<Vec<_>>(), 0)
    };
    Ok(Finished { hidden: join(|n| &n.hidden)?, positions: join(|n| &n.positions)?, kv: join(|n| &n.kv)? })
}
