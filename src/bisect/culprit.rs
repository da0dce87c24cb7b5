//! What is found: the nodes that are to blame, and what they were given and should have made of it.

use super::case::Case;
use crate::tensor::Tensor;
use crate::verify::verdict::{Bounds, TapResult};
use accordion_graphs::onnx::{Part, PartNode, Point};
use serde::Serialize;

/// Where the difference comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Origin {
    /// From the nodes: they are wrong on the reference's values.
    Nodes,
    /// From before them: what they are given is within its bounds, and still too far off.
    Accumulated,
}

/// A node of the graph.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Node {
    /// Its name, as viewers show it.
    pub name: String,
    /// Its operator.
    pub operator: String,
}

/// A value that the nodes read.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Read {
    /// Its name in the graph.
    pub value: String,
    /// The tap that it is; none where it is an input of the graph.
    pub tap: Option<String>,
    /// Its shape in this run.
    pub shape: Vec<usize>,
}

/// What went wrong first.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Culprit {
    /// The graph.
    pub graph: String,
    /// The tree node it ran for; empty where there are none.
    pub place: String,
    /// The first wrong tap or output.
    pub tap: String,
    /// The matrix of the linear layer that is wrong by itself, where every one was looked at.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub matrix: Option<String>,
    /// How wrong.
    pub result: TapResult,
    /// Whether the nodes are wrong by themselves.
    pub origin: Origin,
    /// The modules of the nodes that are to blame, in the order of the computation.
    pub modules: Vec<String>,
    /// The nodes that are to blame.
    pub suspects: Vec<Node>,
    /// The nodes between what is right and what is wrong.
    pub nodes: Vec<Node>,
    /// What these read; the tensors of the checkpoint apart.
    pub reads: Vec<Read>,
    /// The tensors of the checkpoint that these read.
    pub weights: Vec<String>,
    /// Points that the reference has a value for.
    pub points: usize,
    /// Runs that it took.
    pub runs: usize,
}

/// A culprit, and what its nodes were given and should have made of it.
pub struct Found {
    /// What went wrong.
    pub culprit: Culprit,
    /// The nodes, or everything up to the wrong point where the difference was accumulated.
    pub part: Part,
    /// What they read.
    pub inputs: Vec<(String, Tensor)>,
    /// What they should compute.
    pub expected: Tensor,
    /// How closely.
    pub bounds: Bounds,
}

/// A part of a graph that is wrong.
pub(super) struct WrongPart<'a> {
    pub(super) tap: String,
    pub(super) matrix: Option<String>,
    pub(super) result: TapResult,
    pub(super) origin: Origin,
    pub(super) part: &'a Part,
    pub(super) suspects: &'a [PartNode],
    pub(super) inputs: &'a [(String, Tensor)],
}

impl WrongPart<'_> {
    /// Everything about it, found in `case` with its `points` in so many `runs`.
    pub(super) fn culprit(self, case: &Case<'_>, points: &[Point], runs: usize) -> Culprit {
        let nodes = |nodes: &[PartNode]| -> Vec<Node> {
            nodes.iter().map(|n| Node { name: n.name.clone(), operator: n.operator.clone() }).collect()
        };
        let mut modules: Vec<String> = Vec::new();
        for node in self.suspects {
            if !modules.iter().any(|known| known == node.module()) {
                modules.push(node.module().to_owned());
            }
        }
        let tap_of = |value: &str| Some(points.iter().find(|p| p.value.name == value)?.name.clone());
        let read = |(name, value): &(String, Tensor)| Read {
            value: name.clone(),
            tap: tap_of(name),
            shape: value.shape().to_vec(),
        };
        Culprit {
            graph: case.graph.name.clone(),
            place: case.place.clone(),
            tap: self.tap,
            matrix: self.matrix,
            result: self.result,
            origin: self.origin,
            modules,
            suspects: nodes(self.suspects),
            nodes: nodes(&self.part.nodes),
            reads: self.inputs.iter().map(read).collect(),
            weights: self.part.weights.clone(),
            points: points.len(),
            runs,
        }
    }
}
