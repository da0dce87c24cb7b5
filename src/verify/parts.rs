//! What a side computes, part by part: a tree node, a segment, some rows. A side is whatever walks through its parts and
//! records their taps; two sides of the same model and input have the same parts, but not always in the same order.

use super::error::VerifyError;
use super::order::{model_order, scope};
use crate::taps::TapSink;
use crate::tensor::Tensor;
use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};

/// The taps of one part, by name.
pub type Part = BTreeMap<String, Tensor>;

/// What has no other place: the context state at the end, and the logits that follow from it.
pub(super) const RESULT: &str = "result";

/// Where a side records what it computes.
pub trait Parts: TapSink {
    /// Every tap of the part called `name` has been recorded.
    ///
    /// # Errors
    ///
    /// What is done with parts went wrong: the side is to stop.
    fn end_part(&mut self, name: &str) -> Result<(), VerifyError>;
}

/// A sink that a pipeline records into while one of its callbacks ends parts. A pipeline cannot be stopped from inside: what
/// went wrong waits here.
pub(super) struct Shared<'p> {
    inner: RefCell<(&'p mut dyn Parts, Option<VerifyError>)>,
}

impl<'p> Shared<'p> {
    pub(super) fn new(parts: &'p mut dyn Parts) -> Self {
        Self { inner: RefCell::new((parts, None)) }
    }

    pub(super) fn wants(&self, name: &str) -> bool {
        let (parts, failed) = &*self.inner.borrow();
        failed.is_none() && parts.wants(name)
    }

    pub(super) fn record(&self, name: &str, value: Tensor) {
        self.inner.borrow_mut().0.record(name, value);
    }

    pub(super) fn end_part(&self, name: &str) {
        let (parts, failed) = &mut *self.inner.borrow_mut();
        if failed.is_none() {
            *failed = parts.end_part(name).err();
        }
    }

    /// Keeps what went wrong, unless something has already.
    pub(super) fn note<T>(&self, result: Result<T, impl Into<VerifyError>>) {
        let failed = &mut self.inner.borrow_mut().1;
        *failed = failed.take().or(result.err().map(Into::into));
    }

    /// The sink, or what went wrong.
    pub(super) fn finish(self) -> Result<&'p mut dyn Parts, VerifyError> {
        match self.inner.into_inner() {
            (parts, None) => Ok(parts),
            (_, Some(error)) => Err(error),
        }
    }
}

/// The part that a tap belongs to, as far as its name says: what parts are called where they come out of a file.
pub(super) fn part_of(tap: &str) -> &str {
    let scope = scope(tap);
    let first = scope.split('.').next().unwrap_or_default();
    match first {
        "node" | "segments" | "steps" | "rows" | "teacher" | "running" | "prompt" => scope,
        "query" | "tree" | "kv" => "tree",
        "prefix" | "cache" => RESULT,
        _ => "",
    }
}

/// `names` in the order in which a part computes its taps. Pruning happens inside the last of a node's layers.
pub(super) fn computed_order<'n>(names: impl IntoIterator<Item = &'n String>) -> Vec<&'n str> {
    let mut names: Vec<(String, &str)> = names.into_iter().map(|name| (name.clone(), name.as_str())).collect();
    let last = names.iter().filter_map(|(name, _)| layer_of_node(name)).max();
    if let Some(last) = last {
        for (key, _) in &mut names {
            if let Some(at) = key.find(".prune.") {
                key.insert_str(at, &format!(".layers.{last}"));
            }
        }
    }
    names.sort_by(|(a, _), (b, _)| model_order(a, b));
    names.into_iter().map(|(_, name)| name).collect()
}

/// The layer that a tap of a tree node belongs to.
fn layer_of_node(name: &str) -> Option<usize> {
    let rest = name.strip_prefix(scope(name).get(..).filter(|scope| scope.starts_with("node."))?)?;
    rest.strip_prefix(".layers.")?.split('.').next()?.parse().ok()
}

/// Which parts follow from another choice than the expected one.
#[derive(Debug, Default)]
pub(super) struct Lineage {
    diverged: BTreeSet<String>,
}

impl Lineage {
    /// Whether what enters part `name` differs already: a tree node follows from its two children, everything else from all
    /// that was before.
    pub(super) fn diverged_before(&self, name: &str) -> bool {
        match children(name) {
            Some(children) => children.iter().any(|child| self.diverged.contains(child)),
            None => !self.diverged.is_empty(),
        }
    }

    pub(super) fn note(&mut self, name: &str, diverged: bool) {
        if diverged {
            self.diverged.insert(name.to_owned());
        }
    }
}

/// The tree nodes that node `name`, `node.h<height>.i<index>`, is merged from; none of a leaf. `None` if it is no tree node.
fn children(name: &str) -> Option<Vec<String>> {
    let (height, index) = name.strip_prefix("node.h")?.split_once(".i")?;
    let (height, index): (usize, usize) = (height.parse().ok()?, index.parse().ok()?);
    let Some(below) = height.checked_sub(1) else { return Some(Vec::new()) };
    let left = index.checked_mul(2)?;
    Some([left, left.checked_add(1)?].map(|child| format!("node.h{below}.i{child}")).into())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use accordion_graphs::plan::PromptLengths;
    use accordion_graphs::plan::homer::{HomerPlan, HomerSettings};

    #[test]
    fn children_are_those_of_the_plan() {
        let settings =
            HomerSettings { max_chunk_len: 20, max_initial_chunk_len: None, target_len: 16, layers_warmup: 1 };
        let plan = HomerPlan::new(6, PromptLengths { prefix: 2, context: 100, suffix: 2 }, settings).unwrap();
        assert!(plan.tree_height > 2);
        for node in &plan.nodes {
            let expected: Vec<String> =
                node.children.iter().flatten().map(|&child| plan.nodes[child].tap_scope()).collect();
            assert_eq!(children(&node.tap_scope()).unwrap(), expected);
        }
        assert_eq!(children("segments.1"), None);
        assert_eq!(children(&format!("node.h1.i{}", usize::MAX)), None);
    }

    #[test]
    fn divergence_goes_up_the_tree_and_into_the_result() {
        let mut lineage = Lineage::default();
        lineage.note("node.h0.i0", false);
        lineage.note("node.h0.i1", true);
        let before = ["node.h0.i2", "node.h1.i0", "node.h1.i1", RESULT].map(|part| lineage.diverged_before(part));
        assert_eq!(before, [false, true, false, true]);
    }

    #[test]
    fn pruning_stands_inside_the_last_layer() {
        let expected = [
            "node.h0.i0.in_hidden",
            "node.h0.i0.layers.9.out",
            "node.h0.i0.layers.10.attn.q",
            "node.h0.i0.layers.10.attn_residual",
            "node.h0.i0.prune.scores",
            "node.h0.i0.prune.keep_idx",
            "node.h0.i0.layers.10.mlp.out",
            "node.h0.i0.out_hidden",
        ]
        .map(str::to_owned);
        let mut names = expected.clone();
        names.sort_unstable();
        assert_ne!(names, expected);
        assert_eq!(computed_order(&names), expected);
    }

    #[test]
    fn taps_say_which_part_they_are_of() {
        for (tap, part) in [
            ("node.h1.i0.layers.3.attn.q", "node.h1.i0"),
            ("segments.2.encoder.layers.0.out", "segments.2"),
            ("prompt.rows.512.logits", "prompt"),
            ("steps.3.layers.0.out", "steps.3"),
            ("tree.0.chosen", "tree"),
            ("cache.k.3", RESULT),
            ("layers.0.attn.q", ""),
        ] {
            assert_eq!(part_of(tap), part, "{tap}");
        }
    }
}
