//! ONNX Runtime's CUDA provider on the command line.

use accordion::bundle::Bundle;
use accordion::runtime::Loader;
use accordion::runtime::locate::LoadedRuntime;
use accordion::runtime::ort_cuda::{self, OrtCudaOptions};
use accordion_graphs::blocks::Target;
use anyhow::ensure;
use clap::Args;
use std::ffi::OsString;

/// How graphs are run on a GPU by ONNX Runtime.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "Engine ort-cuda")]
pub(crate) struct OrtCudaArguments {
    /// Number of the GPU, as nvidia-smi counts them [default: 0]
    #[arg(long, value_name = "N")]
    gpu: Option<usize>,
    /// Let nodes that the GPU has no kernel for run on the CPU, with copies back and forth, instead of refusing the graph
    #[arg(long)]
    allow_fallback: bool,
}

impl OrtCudaArguments {
    /// What loads the graphs of `bundle`, with our kernels if they are to run the fused operators.
    pub(crate) fn loader<'b>(
        &self,
        bundle: &'b Bundle,
        runtime: &'static LoadedRuntime,
        fused: bool,
    ) -> anyhow::Result<Box<dyn Loader + 'b>> {
        ensure!(
            bundle.manifest().target == Target::Portable,
            "{}: exported for a CPU; --engine ort-cuda runs bundles of --target portable",
            bundle.dir().display()
        );
        let kernels = fused.then(crate::cli::selftest::compiled_kernels).transpose()?;
        let options =
            OrtCudaOptions { device: self.gpu.unwrap_or_default(), kernels, allow_fallback: self.allow_fallback };
        Ok(Box::new(ort_cuda::open(runtime, bundle.weights().clone(), &options)?))
    }

    /// Refuses what would be ignored.
    pub(crate) fn check_unused(&self) -> anyhow::Result<()> {
        let given = [("--gpu", self.gpu.is_some()), ("--allow-fallback", self.allow_fallback)];
        match given.iter().find(|(_, given)| *given) {
            Some((flag, _)) => anyhow::bail!("{flag} is for --engine ort-cuda"),
            None => Ok(()),
        }
    }

    /// The same as arguments of another process.
    pub(crate) fn flags(&self) -> Vec<OsString> {
        let gpu = self.gpu.map(|gpu| ["--gpu".into(), gpu.to_string().into()]);
        let mut flags: Vec<OsString> = gpu.into_iter().flatten().collect();
        flags.extend(self.allow_fallback.then(|| "--allow-fallback".into()));
        flags
    }
}
