//! What only engines on a GPU are asked for.

use super::super::engine::EngineArguments;
use accordion::profile::decoding::CudaGraph;
use anyhow::ensure;
use clap::{Args, ValueEnum};
use std::ffi::OsString;

/// Layers and CUDA graphs on the command line.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Engines of tensorrt and tensorrt-rtx")]
pub(super) struct GpuArguments {
    /// Run everything once more with TensorRT measuring its layers: those that take longest are listed, by module
    #[arg(long, conflicts_with_all = ["state", "paired", "trace"])]
    layers: bool,
    /// Whether decoding steps are recorded as a CUDA graph and repeated; both measures them in turns [default: on]
    #[arg(long, value_enum, value_name = "WHICH")]
    cuda_graph: Option<CudaGraphName>,
}

/// With or without CUDA graphs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum CudaGraphName {
    /// Recorded and repeated, where the bundle has a graph for that
    On,
    /// Enqueued anew for every token
    Off,
    /// As on, and then both in turns: how much faster is it?
    Both,
}

impl CudaGraphName {
    /// The word for it.
    fn word(self) -> &'static str {
        match self {
            Self::On => "on",
            Self::Off => "off",
            Self::Both => "both",
        }
    }
}

impl From<CudaGraphName> for CudaGraph {
    fn from(name: CudaGraphName) -> Self {
        match name {
            CudaGraphName::On => Self::On,
            CudaGraphName::Off => Self::Off,
            CudaGraphName::Both => Self::Both,
        }
    }
}

impl GpuArguments {
    /// Refuses what `engine` has not, and what cannot be done at once.
    pub(super) fn check(&self, engine: &EngineArguments, paired: bool) -> anyhow::Result<()> {
        let both = self.cuda_graph == Some(CudaGraphName::Both);
        ensure!(!(both && paired), "--cuda-graph both measures in turns by itself: it does not go with --paired");
        if engine.is_tensorrt() {
            let records = matches!(self.cuda_graph, Some(CudaGraphName::On | CudaGraphName::Both));
            ensure!(!records || engine.records_steps(), "--no-cuda-graph contradicts --cuda-graph");
            return Ok(());
        }
        let (needs, name) = ("needs --engine tensorrt or tensorrt-rtx", engine.name());
        ensure!(self.cuda_graph.is_none(), "--cuda-graph {needs}: {name} records no decoding steps");
        ensure!(!self.layers, "--layers {needs}, and the engine is {name}; --trace lists the nodes of ONNX Runtime");
        Ok(())
    }

    /// Whether layers are measured, too.
    pub(super) fn layers(&self) -> bool {
        self.layers
    }

    /// How `engine` decodes, if it has a choice.
    pub(super) fn cuda_graph(&self, engine: &EngineArguments) -> Option<CudaGraph> {
        let default = if engine.records_steps() { CudaGraph::On } else { CudaGraph::Off };
        engine.is_tensorrt().then(|| self.cuda_graph.map_or(default, CudaGraph::from))
    }

    /// The same as arguments of another process.
    pub(super) fn flags(&self) -> Vec<OsString> {
        let mut flags: Vec<OsString> = self.layers.then(|| "--layers".into()).into_iter().collect();
        flags.extend(self.cuda_graph.iter().flat_map(|which| ["--cuda-graph".into(), which.word().into()]));
        flags
    }
}
