//! The HOMER tree: which leaf holds which tokens, which node runs which layers, and to what length it shrinks.

use super::{OperationCount, PlanError, PromptLengths};
use crate::architecture::Architecture;
use serde::{Deserialize, Serialize};
use std::ops::Range;

/// The hyper-parameters of the method. Chunk lengths include the affixes (prefix and suffix).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct HomerSettings {
    /// Longest chunk a node may process \[M\].
    pub max_chunk_len: usize,
    /// Longest leaf, if leaves are to be smaller than merged chunks \[M0\].
    pub max_initial_chunk_len: Option<usize>,
    /// Length of the final cache \[Tgt\].
    pub target_len: usize,
    /// Layers every leaf runs before the tree's share of layers begins \[W\].
    pub layers_warmup: usize,
}

/// One node of the tree.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HomerNode {
    /// 0 for leaves; the root has the tree's height.
    pub height: usize,
    /// Left to right among the nodes of its height.
    pub index: usize,
    /// Positions of the two children in [`HomerPlan::nodes`]; `None` for a leaf.
    pub children: Option<[usize; 2]>,
    /// The context tokens below this node.
    pub context: Range<usize>,
    /// The layers this node runs; empty when the model has fewer layers than the tree has levels.
    pub layers: Range<usize>,
    /// Tokens that enter.
    pub in_len: usize,
    /// Tokens that may leave.
    pub target_len: usize,
    /// Tokens that do leave: `in_len - removed()`.
    pub out_len: usize,
}

impl HomerNode {
    /// Tokens dropped in the node's last layer.
    pub fn removed(&self) -> usize {
        self.in_len - self.out_len
    }

    /// The name under which the node's taps are known: `node.h1.i0`.
    pub fn tap_scope(&self) -> String {
        format!("node.h{}.i{}", self.height, self.index)
    }
}

/// The whole schedule for one prompt.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HomerPlan {
    /// What was asked for.
    pub settings: HomerSettings,
    /// The prompt.
    pub lengths: PromptLengths,
    /// Height of the tree \[T\]; it has `2^T` leaves.
    pub tree_height: usize,
    /// Context tokens per leaf; only the last leaf may hold fewer \[e\].
    pub leaf_context: usize,
    /// Layers of each height, `0 ..= tree_height`.
    pub layers: Vec<Range<usize>>,
    /// All nodes in execution order: depth first, left before right, children before their parent.
    pub nodes: Vec<HomerNode>,
}

/// Most leaves a plan may have. The longest contexts that are evaluated anywhere need a few thousand; the limit keeps a
/// mistyped length from asking for a list that fits into no memory.
pub const MAX_LEAVES: usize = 1 << 16;

fn out_of_range(what: &'static str, found: usize, expected: impl Into<String>) -> PlanError {
    PlanError::OutOfRange { what, found: found.to_string(), expected: expected.into() }
}

impl HomerPlan {
    /// Plans `lengths` for a model of `num_layers` layers.
    ///
    /// # Errors
    ///
    /// An empty context or suffix, affixes that leave no room in a chunk, a target that would cut the affixes, more
    /// warm-up layers than layers, a context that cannot fill the leaves the formula asks for, or more than
    /// [`MAX_LEAVES`] of them.
    pub fn new(num_layers: usize, lengths: PromptLengths, settings: HomerSettings) -> Result<Self, PlanError> {
        let PromptLengths { prefix, context, suffix } = lengths;
        let affixes = prefix.saturating_add(suffix);
        if affixes.checked_add(context).is_none() {
            return Err(out_of_range("context length", context, "a prompt whose length fits into a machine word"));
        }
        if context == 0 {
            return Err(out_of_range("context length", 0, "at least 1 token"));
        }
        if suffix == 0 {
            return Err(out_of_range(
                "suffix length",
                0,
                "at least 1 token: significance is measured from the last one",
            ));
        }
        let room = |what, chunk: usize| {
            chunk.checked_sub(affixes).filter(|&n| n > 0).ok_or_else(|| {
                out_of_range(what, chunk, format!("more than prefix + suffix = {prefix} + {suffix} = {affixes}"))
            })
        };
        let capacity = room("max_chunk_len", settings.max_chunk_len)?;
        let leaf_capacity = match settings.max_initial_chunk_len {
            Some(len) => room("max_initial_chunk_len", len)?,
            None => capacity,
        };
        if settings.target_len < affixes {
            return Err(out_of_range(
                "target_len",
                settings.target_len,
                format!("at least prefix + suffix = {affixes}"),
            ));
        }
        let leaves = context.div_ceil(leaf_capacity);
        if leaves > MAX_LEAVES {
            return Err(out_of_range(
                "context length",
                context,
                format!("at most {MAX_LEAVES} leaves of {leaf_capacity} tokens"),
            ));
        }
        let leaves = leaves.next_power_of_two();
        let tree_height = leaves.ilog2() as usize;
        let leaf_context = context.div_ceil(leaves);
        if (leaves - 1) * leaf_context > context {
            return Err(PlanError::EmptyLeaves { context, leaves, leaf_len: leaf_context });
        }

        let layers = Self::stage_layers(num_layers, settings.layers_warmup, tree_height)?;
        let mut plan =
            Self { settings, lengths, tree_height, leaf_context, layers, nodes: Vec::with_capacity(2 * leaves - 1) };
        let root_target = settings.target_len.min(lengths.total());
        plan.push_subtree(tree_height, 0, root_target, capacity);
        Ok(plan)
    }

    /// The layers of each height of a tree, `0 ..= tree_height`. Layers that do not divide evenly go to the leaves,
    /// together with the warm-up.
    ///
    /// # Errors
    ///
    /// More warm-up layers than layers.
    pub fn stage_layers(num_layers: usize, warmup: usize, tree_height: usize) -> Result<Vec<Range<usize>>, PlanError> {
        let tree_layers = num_layers
            .checked_sub(warmup)
            .ok_or_else(|| out_of_range("layers_warmup", warmup, format!("at most the model's {num_layers} layers")))?;
        let per_height = tree_layers / (tree_height + 1);
        let base = num_layers - per_height * (tree_height + 1);
        let range =
            |h: usize| if h == 0 { 0..base + per_height } else { base + per_height * h..base + per_height * (h + 1) };
        Ok((0..=tree_height).map(range).collect())
    }

    /// Appends the subtree whose root is node `index` of `height` and returns the position of that root.
    fn push_subtree(&mut self, height: usize, index: usize, target_len: usize, capacity: usize) -> usize {
        let affixes = self.lengths.prefix + self.lengths.suffix;
        let leaf_start = |leaf: usize| (leaf * self.leaf_context).min(self.lengths.context);
        let context = leaf_start(index << height)..leaf_start((index + 1) << height);
        let (children, in_len) = if height == 0 {
            (None, affixes + context.len())
        } else {
            // The first leaf of the right half decides: if it already fits below the default, it keeps everything and
            // its left sibling takes the room that is free. (One leaf is looked at even where the half has several.)
            let right_leaf = (2 * index + 1) << (height - 1);
            let right_len = affixes + leaf_start(right_leaf + 1) - leaf_start(right_leaf);
            let default = affixes + capacity / 2;
            let (left_target, right_target) = if right_len < default {
                (self.settings.max_chunk_len - (right_len - affixes), right_len)
            } else {
                (default, default)
            };
            let left = self.push_subtree(height - 1, 2 * index, left_target, capacity);
            let right = self.push_subtree(height - 1, 2 * index + 1, right_target, capacity);
            (Some([left, right]), self.nodes[left].out_len + self.nodes[right].out_len - affixes)
        };
        let layers = self.layers[height].clone();
        let out_len = if layers.is_empty() { in_len } else { in_len.min(target_len) };
        self.nodes.push(HomerNode { height, index, children, context, layers, in_len, target_len, out_len });
        self.nodes.len() - 1
    }

    /// Number of leaves.
    pub fn leaves(&self) -> usize {
        1 << self.tree_height
    }

    /// The last node executed, whose survivors are the compressed context.
    ///
    /// # Panics
    ///
    /// Never: a plan has at least one node.
    pub fn root(&self) -> &HomerNode {
        &self.nodes[self.nodes.len() - 1]
    }

    /// Position ids of a leaf's rows: prefix, context, suffix. Every leaf reuses the same range, and the suffix sits at
    /// the same place in all of them, so a short last leaf has a gap before its suffix.
    pub fn leaf_positions(&self, leaf: &HomerNode) -> Vec<i64> {
        let PromptLengths { prefix, suffix, .. } = self.lengths;
        let suffix_start = prefix + self.leaf_context;
        (0..prefix + leaf.context.len()).chain(suffix_start..suffix_start + suffix).map(|p| p as i64).collect()
    }

    /// Position id of the last suffix token, the same in every node; a continuation starts after it.
    pub fn last_position(&self) -> usize {
        self.lengths.prefix + self.leaf_context + self.lengths.suffix - 1
    }

    /// The largest distance from the last token back to another one. A significance table needs one entry more per
    /// layer, because distances start at 0.
    pub fn max_distance(&self) -> usize {
        self.last_position()
    }

    /// Operations of the whole prefix construction, including the output projection of the last row.
    pub fn operations(&self, arch: &Architecture) -> OperationCount {
        let mut total = OperationCount::lm_head(arch, 1);
        for node in &self.nodes {
            for layer in node.layers.clone() {
                let mlp_tokens = if layer + 1 == node.layers.end { node.out_len } else { node.in_len };
                total += OperationCount::layer(arch, node.in_len, mlp_tokens);
            }
        }
        total
    }
}

#[cfg(test)]
mod tests;
