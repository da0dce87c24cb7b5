//! Leaving out of a serialised model what nobody asks it for.

use onnx_protobuf::{GraphProto, Message, ModelProto, NodeProto};
use std::borrow::Cow;
use std::collections::HashSet;

/// The model without the nodes that none of its outputs needs, such as those of taps that are not outputs: ONNX Runtime
/// would run them. A model with more outputs appended to it ([`tap_outputs`](super::tap_outputs)) stays whole, and what is
/// not a model is left as it is, for the runtime to say so.
pub fn without_unused(model: &[u8]) -> Cow<'_, [u8]> {
    let unchanged = Cow::Borrowed(model);
    let Ok(mut parsed) = ModelProto::parse_from_bytes(model) else { return unchanged };
    let Some(graph) = parsed.graph.as_mut() else { return unchanged };
    let used = used_nodes(graph);
    if used.iter().all(|&used| used) {
        return unchanged;
    }
    let mut used = used.into_iter();
    graph.node.retain(|_| used.next().unwrap_or(true));
    parsed.write_to_bytes().map_or(unchanged, Cow::Owned)
}

/// Which nodes an output needs. Nodes stand behind those whose results they read.
fn used_nodes(graph: &GraphProto) -> Vec<bool> {
    let mut needed: HashSet<&str> = graph.output.iter().map(|output| output.name.as_str()).collect();
    let mut used: Vec<bool> = graph
        .node
        .iter()
        .rev()
        .map(|node| {
            let used = node.output.iter().any(|output| needed.contains(output.as_str()));
            if used {
                read(node, &mut needed);
            }
            used
        })
        .collect();
    used.reverse();
    used
}

/// Adds the names of all values that a node may read, in the graphs of its attributes too.
fn read<'m>(node: &'m NodeProto, names: &mut HashSet<&'m str>) {
    names.extend(node.input.iter().map(String::as_str));
    for graph in node.attribute.iter().flat_map(|attribute| attribute.g.iter().chain(&attribute.graphs)) {
        names.extend(graph.output.iter().map(|output| output.name.as_str()));
        for node in &graph.node {
            read(node, names);
        }
    }
}
