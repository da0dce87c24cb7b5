//! One graph of a bundle through the builder.

use super::model::with_plugins;
use super::ranges::{InputRange, Workload, profiles};
use super::shim::{Observer, Plan, Request, Shim};
use super::{Flavour, TensorRtError};
use crate::bundle::{Bundle, BundleError};
use crate::environment::{Device, Nvidia};
use accordion_graphs::onnx::{GraphSignature, ValueInfo, typed_outputs};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

/// What engines are built for, and how.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BuildOptions {
    /// The prompts.
    pub workload: Workload,
    /// The library with our plugins, if they shall replace the functions of the graphs.
    pub plugins: Option<PathBuf>,
    /// Most device memory that a layer may take while it runs, in bytes; 0 leaves it to the library.
    pub workspace_bytes: usize,
    /// Whether products of fp32 may be rounded to TF32, which is faster and no longer fp32.
    pub allow_tf32: bool,
    /// Whether taps are outputs, which keeps layers from being fused across them.
    pub taps: bool,
}

/// An optimization profile as it was built in.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BuiltProfile {
    /// What it is for: `read` several tokens, `step` by one, or `all`.
    pub name: String,
    /// Every input of the graph.
    pub inputs: Vec<InputRange>,
}

/// An engine, and what it was built for.
#[derive(Debug, Clone)]
pub struct Built {
    /// The engine and what was measured for it.
    pub plan: Plan,
    /// Its profiles, in the order of their numbers.
    pub profiles: Vec<BuiltProfile>,
}

/// The devices to build for: `TensorRT` measures on them. `TensorRT-RTX` needs none.
///
/// # Errors
///
/// There is none, and the flavour needs one.
pub fn devices(flavour: Flavour) -> Result<Vec<Device>, TensorRtError> {
    let lacking = |reason: String| match flavour {
        Flavour::TensorRt => Err(TensorRtError::NoDevice { flavour, reason }),
        Flavour::TensorRtRtx => Ok(Vec::new()),
    };
    match Nvidia::probe() {
        Nvidia::Absent { reason } => lacking(reason),
        Nvidia::Present { devices, .. } if devices.is_empty() => lacking("the NVIDIA driver has no device".to_owned()),
        Nvidia::Present { devices, .. } => Ok(devices),
    }
}

/// The values behind the taps of a graph that are neither inputs nor outputs of it.
fn further_outputs(signature: &GraphSignature) -> Vec<&ValueInfo> {
    let known: BTreeSet<&str> =
        signature.inputs.iter().chain(&signature.outputs).map(|value| value.name.as_str()).collect();
    let taps: BTreeMap<&str, &ValueInfo> = signature.taps.values().map(|value| (value.name.as_str(), value)).collect();
    taps.into_iter().filter(|(name, _)| !known.contains(name)).map(|(_, value)| value).collect()
}

/// Builds graph `name` of `bundle`. `timing_cache` is what an earlier build measured, or empty.
///
/// NVIDIA's code ends the process where it meets what it did not expect: run this in a process that may end.
///
/// # Errors
///
/// There is no such graph, no plan for the workload, or the library refuses the graph.
pub fn build_graph(
    shim: &Shim,
    bundle: &Bundle,
    name: &str,
    options: &BuildOptions,
    timing_cache: &[u8],
    observer: &dyn Observer,
) -> Result<Built, TensorRtError> {
    let missing = || BundleError::MissingGraph { dir: bundle.dir().to_owned(), name: name.to_owned() };
    let entry = bundle.manifest().graphs.get(name).ok_or_else(missing)?;
    let mut model = bundle.graph(name)?;
    if options.taps {
        model.extend(typed_outputs(&further_outputs(&entry.signature)));
    }
    if let Some(plugins) = &options.plugins {
        shim.load_plugins(plugins)?;
        model = with_plugins(name, &model)?;
    }
    let mut built = Vec::new();
    for profile in profiles(bundle.manifest(), name, &options.workload)? {
        let inputs = profile.inputs(name, &entry.signature)?;
        built.push(BuiltProfile { name: profile.name.to_owned(), inputs });
    }
    let ranges: Vec<Vec<InputRange>> = built.iter().map(|profile| profile.inputs.clone()).collect();
    let request = Request {
        graph: name,
        model: &model,
        model_path: &bundle.dir().join(&entry.file),
        profiles: &ranges,
        timing_cache,
        workspace_bytes: options.workspace_bytes,
        allow_tf32: options.allow_tf32,
    };
    Ok(Built { plan: shim.build(&request, observer)?, profiles: built })
}
