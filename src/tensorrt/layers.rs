//! What the layers of engines take, and which nodes of a graph they compute.
//!
//! NVIDIA's library reports times by the names of layers, and says of an engine's layers, as JSON, what they were made of: the
//! parser leaves `[ONNX Layer: model.norm.Mul/node]` in a layer's metadata, of a node within a function
//! `[ONNX Layer: Add/node | prune.TopKPrune/node (TopKPrune)]`, and a layer that was fused has those of all its parts.

use serde::Deserialize;
use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// What stands before and behind the names of a node in a layer's metadata.
const NODE: [&str; 2] = ["[ONNX Layer: ", "]"];

/// What stands between a node's name and that of the node whose function it is a part of.
const WITHIN: &str = " | ";

/// The runs of one layer of an engine.
#[derive(Debug, Clone, PartialEq)]
pub struct LayerTime {
    /// The engine's graph.
    pub graph: String,
    /// The layer's name in the engine.
    pub layer: String,
    /// What kind of layer the library says that it is; empty where it does not.
    pub kind: String,
    /// The nodes of the graph that it computes, each once; none where the library does not say.
    pub nodes: Vec<LayerNode>,
    /// How often it ran.
    pub calls: usize,
    /// Milliseconds in all of them.
    pub total_ms: f64,
}

/// A node of a graph.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerNode {
    /// Its name.
    pub name: String,
    /// The function that it calls, if it calls one.
    pub function: Option<String>,
}

/// Collects what the engines of a loader report of their layers.
#[derive(Debug, Default)]
pub struct LayerRecord(Mutex<BTreeMap<String, GraphLayers>>);

#[derive(Debug, Default)]
struct GraphLayers {
    described: BTreeMap<String, Described>,
    /// Runs and milliseconds of each layer.
    times: BTreeMap<String, (usize, f64)>,
}

#[derive(Debug, Default, Clone)]
struct Described {
    kind: String,
    nodes: Vec<LayerNode>,
}

/// What the library says of an engine.
#[derive(Deserialize)]
struct EngineInformation {
    #[serde(rename = "Layers")]
    layers: Vec<Layer>,
}

/// A layer: with what was kept of it, or its name alone.
#[derive(Deserialize)]
#[serde(untagged)]
enum Layer {
    Name(String),
    Detailed {
        #[serde(rename = "Name")]
        name: String,
        #[serde(rename = "LayerType", default)]
        kind: String,
        #[serde(rename = "Metadata", default)]
        metadata: String,
    },
}

impl LayerRecord {
    /// Keeps what the library says, as JSON, of the layers of the engine of `graph`.
    pub(super) fn describe(&self, graph: &str, json: &[u8]) -> Result<(), String> {
        // Names of fused nodes are separated by control characters, which not every version escapes.
        let printable: Vec<u8> = json.iter().map(|&byte| if byte < b' ' { b' ' } else { byte }).collect();
        let information: EngineInformation = serde_json::from_slice(&printable)
            .map_err(|e| format!("what the library says of its layers cannot be read: {e}"))?;
        let described = information.layers.into_iter().map(|layer| match layer {
            Layer::Name(name) => (name, Described::default()),
            Layer::Detailed { name, kind, metadata } => (name, Described { kind, nodes: nodes(&metadata) }),
        });
        self.graphs().entry(graph.to_owned()).or_default().described = described.collect();
        Ok(())
    }

    /// Adds a run of a layer.
    pub(super) fn add(&self, graph: &str, layer: &str, milliseconds: f32) {
        let mut graphs = self.graphs();
        let times = &mut graphs.entry(graph.to_owned()).or_default().times;
        let (calls, total_ms) = times.entry(layer.to_owned()).or_default();
        *calls += 1;
        *total_ms += f64::from(milliseconds);
    }

    /// All layers that ran, by graph.
    pub fn times(&self) -> Vec<LayerTime> {
        let graphs = self.graphs();
        let times = graphs.iter().flat_map(|(graph, layers)| {
            layers.times.iter().map(move |(layer, &(calls, total_ms))| {
                let Described { kind, nodes } = layers.described.get(layer).cloned().unwrap_or_default();
                LayerTime { graph: graph.clone(), layer: layer.clone(), kind, nodes, calls, total_ms }
            })
        });
        times.collect()
    }

    fn graphs(&self) -> MutexGuard<'_, BTreeMap<String, GraphLayers>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The nodes that a layer's metadata names. One within a function stands for the node that calls the function.
fn nodes(metadata: &str) -> Vec<LayerNode> {
    let [before, behind] = NODE;
    let mut found: Vec<LayerNode> = Vec::new();
    for text in metadata.split(before).skip(1) {
        let names = text.split(behind).next().unwrap_or_default();
        let (name, function) = match names.rsplit_once(WITHIN) {
            // `prune.TopKPrune/node (TopKPrune)`
            Some((_, caller)) => match caller.strip_suffix(')').and_then(|caller| caller.rsplit_once(" (")) {
                Some((name, function)) => (name, Some(function.to_owned())),
                None => (caller, None),
            },
            None => (names, None),
        };
        let node = LayerNode { name: name.to_owned(), function };
        if !found.contains(&node) {
            found.push(node);
        }
    }
    found
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn metadata_names_nodes_and_the_callers_of_functions() {
        let found = nodes(
            "[ONNX Layer: model.norm.Mul/node]\u{1f}[ONNX Layer: lm_head.Gemm/node]\u{1e}[ONNX Layer: Add/node | \
             prune.TopKPrune/node (TopKPrune)]\u{1f}[ONNX Layer: Sub/node | prune.TopKPrune/node (TopKPrune)]",
        );
        let found: Vec<_> = found.iter().map(|node| (node.name.as_str(), node.function.as_deref())).collect();
        let expected =
            [("model.norm.Mul/node", None), ("lm_head.Gemm/node", None), ("prune.TopKPrune/node", Some("TopKPrune"))];
        assert_eq!(found, expected);
        assert!(nodes("").is_empty() && nodes("[Other: a]").is_empty());
        assert_eq!(nodes("[ONNX Layer: cut")[0].name, "cut");
    }

    #[test]
    fn layers_have_the_times_of_all_their_runs() {
        let record = LayerRecord::default();
        let json = "{\"Layers\": [{\"Name\": \"fused\", \"LayerType\": \"gemm\", \"Metadata\": \"[ONNX Layer: a/n]\u{1f}\
                    [ONNX Layer: b/n]\"}, \"bare\"], \"Bindings\": [\"x\"]}";
        record.describe("head", json.as_bytes()).unwrap();
        for (layer, ms) in [("fused", 0.5), ("bare", 1.0), ("fused", 0.25), ("unknown", 2.0)] {
            record.add("head", layer, ms);
        }
        let found = record.times();
        let found: Vec<_> =
            found.iter().map(|t| (t.layer.as_str(), t.kind.as_str(), t.nodes.len(), t.calls, t.total_ms)).collect();
        assert_eq!(found, [("bare", "", 0, 1, 1.0), ("fused", "gemm", 2, 2, 0.75), ("unknown", "", 0, 1, 2.0)]);
        for broken in ["", "{}", "[1]", "{\"Layers\": 3}", "{\"Layers\": [{\"Metadata\": \"\"}]}"] {
            assert!(record.describe("head", broken.as_bytes()).unwrap_err().contains("layers"), "{broken}");
        }
    }
}
