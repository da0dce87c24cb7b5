//! The linear layers of a graph: nodes that multiply rows by a matrix of the checkpoint.

use super::scope::{GraphData, NodeData};
use super::{DOMAIN, QuantizedLinear, Scope};
use crate::functions::{LINEAR, LINEAR_BIAS};
use std::collections::{BTreeMap, HashMap};

/// One of them.
pub(super) struct Linear<'g> {
    /// Name of the matrix, `[out, in]`.
    pub(super) weight: &'g str,
    /// The value that holds the rows, `[rows, in]`.
    pub(super) input: usize,
}

impl Scope {
    /// Every linear layer of the graph, over matrices in whatever precision: those over integers first.
    pub fn linear_layers(&self) -> Vec<QuantizedLinear> {
        let graph = self.graph.borrow();
        let matrices = graph.matrices();
        let of_node = |node: &NodeData| {
            let linear = node.linear(&matrices)?;
            let bias = node.inputs.get(2).copied().flatten().and_then(|bias| matrices.get(&bias));
            let &[product] = &node.outputs[..] else { return None };
            Some(QuantizedLinear {
                matrix: linear.weight.to_owned(),
                bias: bias.map(|&name| name.to_owned()),
                rows: graph.values[linear.input].name.clone(),
                product: graph.values[product].name.clone(),
                format: None,
            })
        };
        let nodes: Vec<QuantizedLinear> = graph.nodes.iter().filter_map(of_node).collect();
        let mut layers = graph.quantized_linears();
        // A layer in 16 bits is still a node of its own.
        layers.retain(|layer| !nodes.iter().any(|node| node.matrix == layer.matrix));
        layers.extend(nodes);
        layers
    }
}

impl GraphData {
    /// Values that are a tensor of the checkpoint, as stored or cast, and its name.
    pub(super) fn matrices(&self) -> HashMap<usize, &str> {
        let mut names: HashMap<usize, &str> = self.linked.iter().map(|(name, (id, _))| (*id, name.as_str())).collect();
        for node in self.nodes.iter().filter(|node| node.domain.is_empty() && node.op == "Cast") {
            if let (&[Some(stored)], &[cast]) = (&node.inputs[..], &node.outputs[..])
                && let Some(&name) = names.get(&stored)
            {
                names.insert(cast, name);
            }
        }
        names
    }

    /// Matrix by matrix, the names of the values that are multiplied by it.
    pub(super) fn linear_inputs(&self) -> BTreeMap<String, Vec<String>> {
        let matrices = self.matrices();
        let mut inputs: BTreeMap<String, Vec<String>> = BTreeMap::new();
        for linear in self.nodes.iter().filter_map(|node| node.linear(&matrices)) {
            let input = &self.values[linear.input].name;
            let of_matrix = inputs.entry(linear.weight.to_owned()).or_default();
            if !of_matrix.contains(input) {
                of_matrix.push(input.clone());
            }
        }
        inputs
    }
}

impl NodeData {
    /// What the node is if it is a linear layer; `matrices` are those of the graph.
    pub(super) fn linear<'g>(&self, matrices: &HashMap<usize, &'g str>) -> Option<Linear<'g>> {
        let known = match self.domain {
            "" => self.op == "Gemm",
            DOMAIN => [LINEAR.name, LINEAR_BIAS.name].contains(&self.op.as_str()),
            _ => false,
        };
        match self.inputs[..] {
            [Some(input), Some(weight), ..] if known => matrices.get(&weight).map(|weight| Linear { weight, input }),
            _ => None,
        }
    }
}
