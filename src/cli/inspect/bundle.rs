//! What a bundle holds.

use super::quantization::Forms;
use super::{Described, architecture, compressor, facts};
use crate::cli::text::{bytes, grouped, table};
use accordion::bundle::{Bundle, GraphEntry, Method};
use accordion_graphs::architecture::{Architecture, Compressor};
use accordion_graphs::blocks::Target;
use accordion_graphs::onnx::{GraphSignature, ValueInfo, module_pattern};
use accordion_graphs::plan::sharedllm::Quirks;
use accordion_graphs::precision::KvCache;
use serde::Serialize;
use std::fmt::Write as _;
use std::path::Path;

/// Facts about an exported bundle.
#[derive(Serialize)]
pub(super) struct Description<'b> {
    kind: &'static str,
    producer: &'b str,
    method: &'b Method,
    target: Target,
    precision: &'b str,
    kv_cache: KvCache,
    #[serde(skip)]
    numbers: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    quantization: Option<Forms<'b>>,
    architecture: &'b Architecture,
    #[serde(skip_serializing_if = "Option::is_none")]
    compressor: Option<&'b Compressor>,
    fingerprint: &'b str,
    weights: Vec<Weights<'b>>,
    significance: Option<Table>,
    graphs: Vec<Graph<'b>>,
}

#[derive(Serialize)]
struct Weights<'b> {
    file: &'b str,
    bytes: u64,
    /// Whether the file has other names; `None` where the system does not say.
    linked: Option<bool>,
}

#[derive(Serialize)]
struct Table {
    layers: usize,
    distances: usize,
    measured_distance: usize,
    windows: u64,
}

/// A graph from outside.
#[derive(Serialize)]
pub(super) struct Graph<'b> {
    pub(super) name: &'b str,
    file: &'b str,
    bytes: u64,
    nodes: usize,
    linked_tensors: usize,
    taps: usize,
    inputs: &'b [ValueInfo],
    outputs: &'b [ValueInfo],
}

impl<'b> Graph<'b> {
    /// Describes the graph `name` of `bundle`; its file is checked on the way.
    pub(super) fn of(bundle: &Bundle, name: &'b str, entry: &'b GraphEntry) -> anyhow::Result<Self> {
        let GraphSignature { inputs, outputs, weights, taps, nodes, .. } = &entry.signature;
        Ok(Self {
            name,
            file: &entry.file,
            bytes: bundle.graph(name)?.len() as u64,
            nodes: *nodes,
            linked_tensors: weights.len(),
            taps: taps.len(),
            inputs,
            outputs,
        })
    }

    /// What stands behind its name, and its inputs and outputs.
    pub(super) fn in_words(&self) -> String {
        let Self { bytes: size, nodes, linked_tensors, taps, .. } = self;
        format!(
            "{} nodes, {linked_tensors} linked tensors, {taps} taps, {}\n{}",
            grouped(*nodes as u64),
            bytes(*size),
            interface(self.inputs, self.outputs),
        )
    }

    /// Its file in the bundle.
    pub(super) fn file(&self) -> &str {
        self.file
    }
}

/// Describes an open bundle; every file of it is checked on the way.
pub(super) fn describe(bundle: &Bundle) -> anyhow::Result<Description<'_>> {
    let manifest = bundle.manifest();
    let weights = manifest.weights.iter();
    let weights = weights.map(|file| Weights {
        file: &file.file,
        bytes: file.size,
        linked: is_linked(&bundle.dir().join(&file.file)),
    });
    let significance = bundle.significance()?.map(|table| Table {
        layers: table.num_layers(),
        distances: table.num_distances(),
        measured_distance: table.measured_distance(),
        windows: table.windows(),
    });
    let graphs = manifest.graphs.iter().map(|(name, entry)| Graph::of(bundle, name, entry));
    Ok(Description {
        kind: "bundle",
        producer: &manifest.producer,
        method: &manifest.method,
        target: manifest.target,
        precision: manifest.precision.name(),
        kv_cache: manifest.kv_cache,
        numbers: manifest.numbers(),
        quantization: manifest.quantization.as_ref().map(|quantization| Forms::of(bundle, quantization)),
        architecture: &manifest.architecture,
        compressor: manifest.compressor.as_ref(),
        fingerprint: &manifest.fingerprint,
        weights: weights.collect(),
        significance,
        graphs: graphs.collect::<anyhow::Result<_>>()?,
    })
}

#[cfg(unix)]
fn is_linked(path: &Path) -> Option<bool> {
    use std::os::unix::fs::MetadataExt as _;
    path.metadata().ok().map(|meta| meta.nlink() > 1)
}

#[cfg(not(unix))]
fn is_linked(_: &Path) -> Option<bool> {
    None
}

impl Described for Description<'_> {
    fn in_words(&self) -> String {
        let mut rows = vec![("method", method(self.method))];
        let target = match self.target {
            Target::Portable => "any runtime",
            Target::OrtCpu => "ONNX Runtime's CPU provider",
        };
        rows.push(("graphs for", format!("{target}, {}", self.numbers)));
        rows.extend(architecture(self.architecture));
        rows.extend(self.compressor.iter().flat_map(|compressor| compressor::rows(compressor, self.architecture)));
        for file in &self.weights {
            let how = match file.linked {
                Some(true) => ", linked",
                Some(false) => ", no other link",
                None => "",
            };
            rows.push(("weights", format!("{}, {}{how}", file.file, bytes(file.bytes))));
        }
        if let Method::Homer { .. } = self.method {
            rows.push(("significance", self.significance.as_ref().map_or("no table".to_owned(), Table::in_words)));
        }
        rows.push(("written by", self.producer.to_owned()));
        rows.push(("fingerprint", self.fingerprint.to_owned()));
        let mut text = format!("bundle\n{}", facts(&rows));
        if let Some(forms) = &self.quantization {
            let _ = write!(text, "\n{}", forms.in_words());
        }
        for graph in &self.graphs {
            let _ = write!(text, "\n{}: {}", graph.name, graph.in_words());
        }
        text
    }
}

impl Table {
    fn in_words(&self) -> String {
        let Self { layers, distances, measured_distance, windows } = self;
        format!("{layers} layers, {distances} distances, measured up to {measured_distance} in {windows} windows")
    }
}

/// A method and its settings.
pub(super) fn method(method: &Method) -> String {
    match method {
        Method::Plain => "plain".to_owned(),
        Method::Homer { settings, tree_heights } => {
            let heights: Vec<String> = tree_heights.iter().map(usize::to_string).collect();
            let initial = settings.max_initial_chunk_len.map(|len| format!(", leaves {len}")).unwrap_or_default();
            format!(
                "homer: chunks {}{initial}, target {}, warm-up {} layers, tree heights {}",
                settings.max_chunk_len,
                settings.target_len,
                settings.layers_warmup,
                heights.join(", ")
            )
        }
        Method::Rcc { settings } => {
            let pairs = if settings.pairs { ", pairs of encoder layers" } else { "" };
            format!("rcc: windows of {}, {} tokens per slot{pairs}", settings.window, settings.ratio)
        }
        Method::SharedLlm { settings } => {
            let kept = settings.kept_per_chunk().map_or_else(|_| "?".to_owned(), |kept| kept.to_string());
            let [policy, quirks] = [
                if settings.retrieval { "the half nearer to the query is split" } else { "the right half is split" },
                match settings.quirks {
                    Quirks::Faithful => "as released",
                    Quirks::Fixed => "repaired",
                },
            ];
            format!(
                "sharedllm: chunks of {}, tree depth {}, {kept} tokens kept per chunk, {policy}, {quirks}",
                settings.chunk_len, settings.tree_depth
            )
        }
    }
}

/// Inputs and outputs, those that differ only by a layer's number on one line.
pub(super) fn interface(inputs: &[ValueInfo], outputs: &[ValueInfo]) -> String {
    let mut rows: Vec<([String; 4], usize)> = Vec::new();
    for (direction, values) in [("in", inputs), ("out", outputs)] {
        for value in values {
            let row = [
                format!("  {direction}"),
                module_pattern(&value.name),
                value.dtype.to_string(),
                value.shape.join(" x "),
            ];
            match rows.iter_mut().find(|(known, _)| *known == row) {
                Some((_, count)) => *count += 1,
                None => rows.push((row, 1)),
            }
        }
    }
    let rows: Vec<[String; 4]> = rows
        .into_iter()
        .map(|([direction, name, dtype, shape], count)| {
            let name = if count > 1 { format!("{name} ({count} of them)") } else { name };
            [direction, name, dtype, shape]
        })
        .collect();
    table(["", "", "", ""], &rows)
}
