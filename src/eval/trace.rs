//! Where HOMER's tree lost the answer: which of its tokens survived each node.

use crate::taps::TapSink;
use crate::tensor::Tensor;
use accordion_graphs::plan::homer::HomerPlan;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

/// The nodes that held tokens of the answer, in execution order.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Survival {
    /// Tokens of the answer in the context.
    pub tokens: usize,
    /// The first node that dropped one: `node.h1.i0`.
    pub first_loss: Option<String>,
    /// What each node did.
    pub nodes: Vec<NodeSurvival>,
}

/// What one node did.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeSurvival {
    /// The node: `node.h1.i0`.
    pub node: String,
    /// 0 for leaves.
    pub height: usize,
    /// The layers it ran; it prunes in the last one.
    pub layers: Range<usize>,
    /// Rows that entered and rows that left.
    pub rows: [usize; 2],
    /// Tokens of the answer that entered.
    pub entered: usize,
    /// Tokens of the answer that left.
    pub left: usize,
}

/// Records which rows every node kept, and nothing else.
#[derive(Debug, Clone, Default)]
pub struct KeptRows(BTreeMap<String, Vec<i64>>);

const KEPT: &str = ".prune.keep_idx";

impl TapSink for KeptRows {
    fn wants(&self, name: &str) -> bool {
        name.ends_with(KEPT)
    }

    fn record(&mut self, name: &str, value: Tensor) {
        if let (Some(node), Ok(rows)) = (name.strip_suffix(KEPT), value.as_i64()) {
            self.0.insert(node.to_owned(), rows.to_vec());
        }
    }
}

/// Which token of the context each row of a node is, before and behind it; rows of the affixes are none.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct NodeRows {
    pub(super) entering: Vec<Option<usize>>,
    pub(super) leaving: Vec<Option<usize>>,
}

/// The rows of all nodes of `plan`, in its order.
pub(super) fn follow(plan: &HomerPlan, kept: &KeptRows) -> Vec<NodeRows> {
    let (prefix, suffix) = (plan.lengths.prefix, plan.lengths.suffix);
    let mut followed: Vec<NodeRows> = Vec::with_capacity(plan.nodes.len());
    for node in &plan.nodes {
        let inner = |child: usize| {
            let rows = &followed[child].leaving;
            rows.get(prefix..rows.len().saturating_sub(suffix)).unwrap_or_default()
        };
        let context = match node.children {
            None => node.context.clone().map(Some).collect(),
            Some([left, right]) => [inner(left), inner(right)].concat(),
        };
        let entering = [vec![None; prefix], context, vec![None; suffix]].concat();
        let leaving = match kept.0.get(&node.tap_scope()) {
            // The affixes are kept by every plan; a node without layers keeps everything.
            Some(kept) => kept.iter().filter_map(|&row| entering.get(usize::try_from(row).ok()?).copied()).collect(),
            None => entering.clone(),
        };
        followed.push(NodeRows { entering, leaving });
    }
    followed
}

/// Follows the tokens at `marked` (indices in the context) through the tree of `plan`.
pub fn survival(plan: &HomerPlan, kept: &KeptRows, marked: &[usize]) -> Survival {
    let marked: BTreeSet<usize> = marked.iter().copied().collect();
    let count = |rows: &[Option<usize>]| rows.iter().flatten().filter(|token| marked.contains(token)).count();
    let mut nodes = Vec::new();
    for (node, NodeRows { entering, leaving }) in plan.nodes.iter().zip(follow(plan, kept)) {
        if count(&entering) > 0 {
            nodes.push(NodeSurvival {
                node: node.tap_scope(),
                height: node.height,
                layers: node.layers.clone(),
                rows: [entering.len(), leaving.len()],
                entered: count(&entering),
                left: count(&leaving),
            });
        }
    }
    let first_loss = nodes.iter().find(|node| node.left < node.entered).map(|node| node.node.clone());
    Survival { tokens: marked.len(), first_loss, nodes }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use accordion_graphs::plan::PromptLengths;
    use accordion_graphs::plan::homer::HomerSettings;

    #[test]
    fn tokens_are_followed_to_the_node_that_drops_them() {
        let lengths = PromptLengths { prefix: 1, context: 16, suffix: 1 };
        let settings =
            HomerSettings { max_chunk_len: 10, max_initial_chunk_len: None, target_len: 8, layers_warmup: 0 };
        let plan = HomerPlan::new(4, lengths, settings).unwrap();
        let outs: Vec<_> = plan.nodes.iter().map(|n| (n.tap_scope(), n.in_len, n.out_len)).collect();
        assert_eq!(
            outs,
            [("node.h0.i0".into(), 10, 6), ("node.h0.i1".into(), 10, 6), ("node.h1.i0".into(), 10, 8)]
                as [(String, _, _); 3]
        );
        let mut kept = KeptRows::default();
        assert!(kept.wants("node.h0.i0.prune.keep_idx") && !kept.wants("node.h0.i0.prune.scores"));
        // Context tokens are rows 1..9 of a leaf. The second leaf keeps tokens 8, 10, 11, 15; the root drops 10 and 0.
        for (node, rows) in [
            ("node.h0.i0", vec![0, 1, 2, 3, 4, 9]),
            ("node.h0.i1", vec![0, 1, 3, 4, 8, 9]),
            ("node.h1.i0", vec![0, 2, 3, 4, 5, 7, 8, 9]),
        ] {
            kept.record(&format!("{node}.prune.keep_idx"), Tensor::from_i64([rows.len()], rows).unwrap());
        }
        let found = survival(&plan, &kept, &[9, 10, 11]);
        let nodes: Vec<_> = found.nodes.iter().map(|n| (n.node.as_str(), n.entered, n.left)).collect();
        assert_eq!(nodes, [("node.h0.i1", 3, 2), ("node.h1.i0", 2, 1)]);
        assert_eq!(found.first_loss.as_deref(), Some("node.h0.i1"));
        let late = survival(&plan, &kept, &[10]);
        assert_eq!((late.first_loss.as_deref(), late.tokens), (Some("node.h1.i0"), 1));
        assert_eq!(survival(&plan, &kept, &[11]).first_loss, None);
        assert_eq!(survival(&plan, &KeptRows::default(), &[9, 10, 11]).nodes[1].left, 3);
    }
}
