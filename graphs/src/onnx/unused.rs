//! Leaving out of a serialised model what nobody asks it for.

use super::wire::{attribute, graph, model, node, parts, put_delimited, value_info};
use std::borrow::Cow;
use std::collections::HashSet;

/// Graphs inside of graphs that are looked into.
const DEPTH: usize = 16;

/// The model without the nodes that none of its outputs needs, such as those of taps that are not outputs: ONNX Runtime
/// would run them. What is not a model is left as it is, for the runtime to say so.
pub fn without_unused(bytes: &[u8]) -> Cow<'_, [u8]> {
    shortened(bytes).map_or(Cow::Borrowed(bytes), Cow::Owned)
}

/// Nothing, if nothing is unused or this is no model.
fn shortened(bytes: &[u8]) -> Option<Vec<u8>> {
    let graphs: Vec<&[u8]> = fields(bytes, model::GRAPH).collect::<Option<_>>()?;
    let mut needed = HashSet::new();
    for graph in &graphs {
        add_outputs(graph, &mut needed)?;
    }
    let nodes: Vec<&[u8]> = graphs.iter().flat_map(|graph| fields(graph, graph::NODE)).collect::<Option<_>>()?;
    let mut used = vec![false; nodes.len()];
    for (node, used) in nodes.iter().zip(&mut used).rev() {
        for output in fields(node, node::OUTPUT) {
            *used |= needed.contains(output?);
        }
        if *used {
            add_read(node, DEPTH, &mut needed)?;
        }
    }
    if used.iter().all(|&used| used) {
        return None;
    }
    let mut used = used.into_iter();
    let mut out = Vec::with_capacity(bytes.len());
    for part in parts(bytes) {
        let part = part.ok()?;
        match part.content.filter(|_| part.number == model::GRAPH) {
            None => out.extend_from_slice(part.raw),
            Some(graph) => {
                let mut kept = Vec::with_capacity(graph.len());
                for part in parts(graph) {
                    let part = part.ok()?;
                    if part.content.is_none() || part.number != graph::NODE || used.next()? {
                        kept.extend_from_slice(part.raw);
                    }
                }
                put_delimited(&mut out, model::GRAPH, &kept);
            }
        }
    }
    Some(out)
}

/// The contents of the fields `number` of a message; nothing in the place of what is not one.
fn fields(message: &[u8], number: u64) -> impl Iterator<Item = Option<&[u8]>> {
    let contents = parts(message).map(move |part| part.map(|part| part.content.filter(|_| part.number == number)));
    contents.filter_map(|content| content.map_or(Some(None), |content| content.map(Some)))
}

/// Adds the names of a graph's outputs.
fn add_outputs<'m>(graph: &'m [u8], names: &mut HashSet<&'m [u8]>) -> Option<()> {
    for output in fields(graph, graph::OUTPUT) {
        for name in fields(output?, value_info::NAME) {
            names.insert(name?);
        }
    }
    Some(())
}

/// Adds the names of all values that a node may read, in the graphs of its attributes too.
fn add_read<'m>(node: &'m [u8], depth: usize, names: &mut HashSet<&'m [u8]>) -> Option<()> {
    let depth = depth.checked_sub(1)?;
    for input in fields(node, node::INPUT) {
        names.insert(input?);
    }
    for attribute in fields(node, node::ATTRIBUTE) {
        let attribute = attribute?;
        for graph in fields(attribute, attribute::GRAPH).chain(fields(attribute, attribute::GRAPHS)) {
            let graph = graph?;
            add_outputs(graph, names)?;
            for node in fields(graph, graph::NODE) {
                add_read(node?, depth, names)?;
            }
        }
    }
    Some(())
}
