//! Engines of TensorRT and TensorRT-RTX on the command line.

use crate::cli::output::Output;
use crate::cli::selftest::compiled_kernels;
use accordion::bundle::Bundle;
use accordion::cuda::Device;
use accordion::tensorrt::shim::Shim;
use accordion::tensorrt::toolkit::Toolkit;
use accordion::tensorrt::{ExecutionOptions, Flavour, TensorRt};
use accordion_graphs::blocks::Target;
use anyhow::ensure;
use clap::Args;
use std::ffi::OsString;
use std::path::PathBuf;

/// How engines that `accordion build` made are loaded.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "Engines of tensorrt and tensorrt-rtx")]
pub(crate) struct TensorRtArguments {
    /// Folder of NVIDIA's libraries (also in its lib) or headers (also in its include); may be repeated
    #[arg(long, value_name = "DIR")]
    root: Vec<PathBuf>,
    /// Library with Accordion's plugins, if the engines were built with it
    #[arg(long, value_name = "FILE")]
    plugins: Option<PathBuf>,
    /// Load engines and plugins whose hash is not the recorded one. An engine is a program: do you know who built it?
    #[arg(long)]
    trust: bool,
    /// Enqueue the steps of decoding one by one, instead of repeating one that was recorded as a CUDA graph
    #[arg(long)]
    no_cuda_graph: bool,
}

impl TensorRtArguments {
    /// What loads the engines of `bundle`, and tells `output` what is not as fast as it might be.
    pub(crate) fn loader<'b>(
        &self,
        flavour: Flavour,
        bundle: &'b Bundle,
        output: &Output,
    ) -> anyhow::Result<TensorRt<'b>> {
        ensure!(
            bundle.manifest().target == Target::Portable,
            "{}: its graphs are for ONNX Runtime on the CPU; export with --target portable, and build",
            bundle.dir().display()
        );
        // Before NVIDIA's library is asked for anything: it does not survive a machine without a driver.
        let device = Device::open(0)?;
        let shim = Shim::open(&Toolkit::find(flavour, &self.root)?)?;
        let options = ExecutionOptions {
            plugins: self.plugins.clone(),
            trusted: self.trust,
            cuda_graphs: !self.no_cuda_graph,
            kernels: Some(compiled_kernels()?),
        };
        let output = output.clone();
        Ok(TensorRt::new(bundle, shim, device, &options)?.telling(move |notice| output.warning(notice)))
    }

    /// Whether decoding steps are recorded.
    pub(crate) fn records_steps(&self) -> bool {
        !self.no_cuda_graph
    }

    /// Refuses what would be ignored.
    pub(crate) fn check_unused(&self) -> anyhow::Result<()> {
        let given = [
            ("--root", !self.root.is_empty()),
            ("--plugins", self.plugins.is_some()),
            ("--trust", self.trust),
            ("--no-cuda-graph", self.no_cuda_graph),
        ];
        match given.iter().find(|(_, given)| *given) {
            Some((flag, _)) => anyhow::bail!("{flag} is for --engine tensorrt and tensorrt-rtx"),
            None => Ok(()),
        }
    }

    /// The same as arguments of another process.
    pub(crate) fn flags(&self) -> Vec<OsString> {
        let named = |flag: &str, path: &PathBuf| [OsString::from(flag), path.clone().into_os_string()];
        let mut flags: Vec<OsString> = self.root.iter().flat_map(|root| named("--root", root)).collect();
        flags.extend(self.plugins.iter().flat_map(|path| named("--plugins", path)));
        flags.extend(self.trust.then(|| "--trust".into()));
        flags.extend(self.no_cuda_graph.then(|| "--no-cuda-graph".into()));
        flags
    }
}
