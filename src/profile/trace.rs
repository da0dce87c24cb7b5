//! Where the time of a run goes, node by node: the runtime's own records, added up by module of the model, and as a
//! trace that Perfetto and other viewers of Chrome's format open.
//!
//! Nodes are named after the module that they compute (`model.layers.3.self_attn.q_proj.Linear/node`), so the module of
//! a record is its name's path. Recording costs time: a traced run is slower than a measured one.

use super::ProfileError;
use accordion_graphs::onnx::{module_path, module_pattern};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

/// What ONNX Runtime appends to the name of a node in the record of its run.
const KERNEL: &str = "_kernel_time";

/// The time of all nodes of one kind in one place of the model, or of all layers of an engine that compute such nodes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct OperatorTime {
    /// The graph.
    pub graph: String,
    /// Path of the module, numbers of layers replaced by `*`.
    pub module: String,
    /// The operator; of a layer that computes several nodes, theirs.
    pub operator: String,
    /// How often it ran.
    pub calls: usize,
    /// Milliseconds in all of them.
    pub total_ms: f64,
}

/// The records of one run.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Trace {
    /// Times by graph, module and operator, the longest first.
    pub operators: Vec<OperatorTime>,
    /// Events of Chrome's trace format, one process per graph.
    pub events: Vec<Value>,
}

impl Trace {
    /// Reads what the sessions of an [`OrtCpu::tracing`](crate::runtime::ort_cpu::OrtCpu::tracing) loader recorded in
    /// `folder`.
    ///
    /// # Errors
    ///
    /// A file cannot be read or is not a trace.
    pub fn read(folder: &Path) -> Result<Self, ProfileError> {
        let failed = |path: &Path, problem: String| ProfileError::Trace { path: path.to_owned(), problem };
        let entries = fs::read_dir(folder).map_err(|e| failed(folder, e.to_string()))?;
        let mut files: Vec<_> = entries.filter_map(|entry| Some(entry.ok()?.path())).collect();
        files.sort();
        let mut trace = Self::default();
        for (process, path) in files.iter().enumerate() {
            let text = fs::read(path).map_err(|e| failed(path, e.to_string()))?;
            let events: Vec<Value> = serde_json::from_slice(&text).map_err(|e| failed(path, e.to_string()))?;
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            let Some((start, graph)) = parse_name(&name) else {
                return Err(failed(path, "the file name does not say which graph it is of".to_owned()));
            };
            trace.add(process, start, graph, events);
        }
        trace.operators.sort_by(|a, b| b.total_ms.total_cmp(&a.total_ms));
        Ok(trace)
    }

    fn add(&mut self, process: usize, start: f64, graph: &str, events: Vec<Value>) {
        let mut times = Vec::new();
        self.events.push(json!({"ph": "M", "name": "process_name", "pid": process, "args": {"name": graph}}));
        for mut event in events {
            if let Some((module, operator)) = node(&event) {
                times.push((module, operator, 1, event["dur"].as_f64().unwrap_or(0.0) / 1e3));
            }
            let moved = event["ts"].as_f64().unwrap_or(0.0) + start;
            event["ts"] = moved.into();
            event["pid"] = process.into();
            self.events.push(event);
        }
        self.operators.extend(by_module(graph, times));
    }
}

/// Adds up times of a graph, as module, operator, calls and milliseconds, those of all layers of the model together.
pub(super) fn by_module(
    graph: &str,
    times: impl IntoIterator<Item = (String, String, usize, f64)>,
) -> Vec<OperatorTime> {
    let mut sums: BTreeMap<(String, String), (usize, f64)> = BTreeMap::new();
    for (module, operator, calls, total_ms) in times {
        let sum = sums.entry((module_pattern(&module), operator)).or_default();
        sum.0 += calls;
        sum.1 += total_ms;
    }
    let graph = || graph.to_owned();
    let time =
        |((module, operator), (calls, total_ms))| OperatorTime { graph: graph(), module, operator, calls, total_ms };
    sums.into_iter().map(time).collect()
}

/// Start and graph of a file that the runtime named `<micros>-<graph>_<date>_<time>_<milliseconds>.json`.
fn parse_name(name: &str) -> Option<(f64, &str)> {
    let (start, rest) = name.split_once('-')?;
    let graph = rest.rsplitn(4, '_').nth(3)?;
    Some((start.parse().ok()?, graph))
}

/// Module and operator of a node's record.
fn node(event: &Value) -> Option<(String, String)> {
    let name = event["name"].as_str()?.strip_suffix(KERNEL)?;
    let operator = event["args"]["op_name"].as_str()?;
    Some((module_path(name, operator).to_owned(), operator.to_owned()))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn kernel(name: &str, operator: &str, ts: u64, dur: u64) -> Value {
        json!({"cat": "Node", "ph": "X", "pid": 77, "tid": 77, "ts": ts, "dur": dur, "name": format!("{name}{KERNEL}"),
            "args": {"op_name": operator}})
    }

    #[test]
    fn layers_of_a_kind_are_added_up_and_times_share_one_origin() {
        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str, events: Value| fs::write(folder.path().join(name), events.to_string()).unwrap();
        let layer = |l: u32, ts| kernel(&format!("model.layers.{l}.mlp.up_proj.Linear/node"), "Linear", ts, 2000);
        let events = json!([layer(0, 5), layer(11, 9), kernel("rows.Cos/node", "Cos", 20, 500),
            {"cat": "Session", "ph": "X", "name": "model_run", "ts": 1, "dur": 9000}]);
        write("100-decoder_2026-01-02_03-04-05_678.json", events);
        write("0-leaf.0-14_2026-01-02_03-04-05_678.json", json!([kernel("rows.Cos/node", "Cos", 1, 100)]));
        let trace = Trace::read(folder.path()).unwrap();
        let found: Vec<_> =
            trace.operators.iter().map(|o| (o.graph.as_str(), o.module.as_str(), o.calls, o.total_ms)).collect();
        let up = ("decoder", "model.layers.*.mlp.up_proj", 2, 4.0);
        assert_eq!(found, [up, ("decoder", "rows", 1, 0.5), ("leaf.0-14", "rows", 1, 0.1)]);
        let first_layer = trace.events.iter().find(|e| e["name"].as_str().unwrap().contains("layers.0")).unwrap();
        assert_eq!((&first_layer["ts"], &first_layer["pid"]), (&json!(105.0), &json!(1)));
    }

    #[test]
    fn names_of_files_come_back() {
        let name = format!("{}_2026-11-20_17-00-00_123.json", crate::runtime::trace_prefix(12, "merge_x.0-1"));
        assert_eq!(parse_name(&name), Some((12.0, "merge_x.0-1")));
    }

    #[test]
    fn what_is_no_trace_is_named() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("0-g_a_b_c.json"), "[").unwrap();
        let error = Trace::read(folder.path()).unwrap_err().to_string();
        assert!(error.contains("0-g_a_b_c.json"), "{error}");
    }
}
