//! Layers of engines as the modules of a model: the same rows as ONNX Runtime's nodes.
//!
//! A layer that computes several nodes belongs to the longest path of modules that all of them have in common: one of
//! `model.layers.3.mlp.up_proj.Gemm/node` and `model.layers.3.mlp.Mul/node` to `model.layers.3.mlp`.

use super::trace::{OperatorTime, by_module};
use crate::tensorrt::layers::{LayerNode, LayerTime};
use accordion_graphs::onnx::module_path;
use std::collections::BTreeMap;

/// Operators of a fused layer that are named.
const NAMED: usize = 3;

/// Times by graph, module and operators, the longest first.
pub fn operators(layers: &[LayerTime]) -> Vec<OperatorTime> {
    let mut graphs: BTreeMap<&str, Vec<&LayerTime>> = BTreeMap::new();
    for layer in layers {
        graphs.entry(&layer.graph).or_default().push(layer);
    }
    let of_graph = |(graph, layers): (&str, Vec<&LayerTime>)| {
        let times = layers.into_iter().map(|layer| {
            let (module, operator) = place(layer);
            (module, operator, layer.calls, layer.total_ms)
        });
        by_module(graph, times)
    };
    let mut found: Vec<OperatorTime> = graphs.into_iter().flat_map(of_graph).collect();
    found.sort_by(|a, b| b.total_ms.total_cmp(&a.total_ms));
    found
}

/// The module that a layer computes, and with which operators.
fn place(layer: &LayerTime) -> (String, String) {
    let named = named(&layer.layer);
    let nodes = if layer.nodes.is_empty() { &named } else { &layer.nodes };
    let mut operators: Vec<&str> = Vec::new();
    let mut common: Option<Vec<&str>> = None;
    for node in nodes {
        let operator = operator(&node.name);
        let module: Vec<&str> = module_path(&node.name, operator).split('.').collect();
        common = Some(match common {
            None => module,
            Some(path) => path.into_iter().zip(module).take_while(|(a, b)| a == b).map(|(a, _)| a).collect(),
        });
        let operator = node.function.as_deref().unwrap_or(operator);
        if !operators.contains(&operator) {
            operators.push(operator);
        }
    }
    let more = if operators.len() > NAMED { " + …" } else { "" };
    operators.truncate(NAMED);
    let operators = if operators.is_empty() { layer.kind.clone() } else { operators.join(" + ") + more };
    (common.unwrap_or_default().join("."), operators)
}

/// The nodes that the name of a layer consists of, of which the library says nothing else: those of engines that were built to
/// keep the names of layers only.
fn named(layer: &str) -> Vec<LayerNode> {
    let words = layer.split(['{', '}', '[', ']', '(', ')', ',', '+', ' ']).flat_map(|word| word.split("..."));
    let nodes = words.filter(|word| word.contains('/'));
    nodes.map(|name| LayerNode { name: name.to_owned(), function: None }).collect()
}

/// The operator of a node: `Gemm` of `model.layers.3.mlp.up_proj.Gemm/node`.
fn operator(node: &str) -> &str {
    let path = node.split('/').next().unwrap_or(node);
    path.rsplit('.').next().unwrap_or(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layer(graph: &str, name: &str, nodes: &[&str], total_ms: f64) -> LayerTime {
        let node = |name: &&str| match name.split_once(' ') {
            Some((name, function)) => LayerNode { name: name.to_owned(), function: Some(function.to_owned()) },
            None => LayerNode { name: (*name).to_owned(), function: None },
        };
        let (graph, layer, kind) = (graph.to_owned(), name.to_owned(), "kgen".to_owned());
        LayerTime { graph, layer, kind, nodes: nodes.iter().map(node).collect(), calls: 2, total_ms }
    }

    fn found(layers: &[LayerTime]) -> Vec<(String, String, usize, f64)> {
        operators(layers).into_iter().map(|o| (o.module, o.operator, o.calls, o.total_ms)).collect()
    }

    fn row(module: &str, operator: &str, calls: usize, ms: f64) -> (String, String, usize, f64) {
        (module.to_owned(), operator.to_owned(), calls, ms)
    }

    #[test]
    fn a_fused_layer_belongs_to_what_its_nodes_have_in_common() {
        let layers = [
            layer("d", "a", &["model.layers.0.mlp.up_proj.Gemm/node", "model.layers.0.mlp.Mul/node_2"], 1.0),
            layer("d", "b", &["model.layers.1.mlp.up_proj.Gemm/node", "model.layers.1.mlp.Mul/node"], 2.0),
            layer("d", "c", &["model.layers.0.mlp.down_proj.Gemm/node"], 5.0),
            layer("d", "d", &["model.layers.0.Add/node", "model.layers.1.input_layernorm.Mul/node"], 0.5),
            layer("d", "e", &["Shape/node", "model.norm.Mul/node"], 0.25),
            layer("d", "f", &["prune.TopKPrune/node TopKPrune"], 0.125),
            layer("d", "g", &["m.A/n", "m.B/n", "m.C/n", "m.D/n", "m.D/n_2"], 0.0625),
        ];
        let expected = [
            row("model.layers.*.mlp.down_proj", "Gemm", 2, 5.0),
            row("model.layers.*.mlp", "Gemm + Mul", 4, 3.0),
            row("model.layers", "Add + Mul", 2, 0.5),
            row("", "Shape + Mul", 2, 0.25),
            row("prune", "TopKPrune", 2, 0.125),
            row("m", "A + B + C + …", 2, 0.0625),
        ];
        assert_eq!(found(&layers), expected);
    }

    #[test]
    fn names_of_layers_serve_where_nothing_else_is_known() {
        let layers = [
            layer("d", "model.layers.0.mlp.up_proj.Gemm/node + (model.layers.0.mlp.Mul/node)", &[], 2.0),
            layer("d", "{ForeignNode[model.layers.0.Shape/node...model.norm.Mul/node]}", &[], 1.0),
            layer("d", "Reformatting CopyNode for Input Tensor 0", &[], 0.5),
        ];
        let expected = [
            row("model.layers.*.mlp", "Gemm + Mul", 2, 2.0),
            row("model", "Shape + Mul", 2, 1.0),
            row("", "kgen", 2, 0.5),
        ];
        assert_eq!(found(&layers), expected);
    }
}
