//! What several commands share: settings of the methods, opening a bundle with its engines.

use super::output::Output;
use accordion::bundle::Bundle;
use accordion::pipeline::Engines;
use accordion::runtime::Loader;
use accordion::runtime::locate::{self, LoadOptions, LoadedRuntime};
use accordion::runtime::ort_cpu::{OrtCpu, OrtOptions};
use accordion::runtime::ort_cuda::{self, OrtCudaOptions};
use accordion_graphs::blocks::Target;
use accordion_graphs::dtype::DType;
use accordion_graphs::plan::homer::HomerSettings;
use anyhow::bail;
use clap::{Args, ValueEnum};

/// HOMER's hyper-parameters on the command line.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "HOMER settings")]
pub(crate) struct HomerArguments {
    /// Longest chunk a node processes, prefix and suffix included [default: 2048]
    #[arg(long, value_name = "N")]
    max_chunk_len: Option<usize>,
    /// Longest leaf, if leaves are to be smaller than merged chunks
    #[arg(long, value_name = "N")]
    max_initial_chunk_len: Option<usize>,
    /// Length of the final cache [default: max-chunk-len]
    #[arg(long, value_name = "N")]
    target_len: Option<usize>,
    /// Layers that every leaf runs before the tree's share begins [default: 12, or half the layers if there are fewer]
    #[arg(long, value_name = "N")]
    layers_warmup: Option<usize>,
}

impl HomerArguments {
    /// The settings for a model of `num_layers` layers.
    pub(crate) fn settings(&self, num_layers: usize) -> HomerSettings {
        const MAX_CHUNK_LEN: usize = 2048;
        self.overriding(HomerSettings {
            max_chunk_len: MAX_CHUNK_LEN,
            max_initial_chunk_len: None,
            target_len: MAX_CHUNK_LEN,
            layers_warmup: 12.min(num_layers / 2),
        })
    }

    /// `settings` with those that were given in their place. Another chunk length is another target length too.
    pub(crate) fn overriding(&self, settings: HomerSettings) -> HomerSettings {
        HomerSettings {
            max_chunk_len: self.max_chunk_len.unwrap_or(settings.max_chunk_len),
            max_initial_chunk_len: self.max_initial_chunk_len.or(settings.max_initial_chunk_len),
            target_len: self.target_len.or(self.max_chunk_len).unwrap_or(settings.target_len),
            layers_warmup: self.layers_warmup.unwrap_or(settings.layers_warmup),
        }
    }
}

/// A number of leaves, or max.
pub(crate) fn parse_width(text: &str) -> Result<usize, String> {
    match text.parse() {
        _ if text == "max" => Ok(usize::MAX),
        Ok(width @ 1..) => Ok(width),
        _ => Err("expected a number from 1 on, or max".to_owned()),
    }
}

/// Which kernels run the fused operators.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Operators {
    /// Our kernels
    Fused,
    /// The bodies of the model-local functions: what any other runtime runs
    Portable,
}

/// What runs the graphs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Engine {
    /// ONNX Runtime on the CPU
    OrtCpu,
    /// ONNX Runtime on an NVIDIA GPU, for bundles of --target portable
    OrtCuda,
}

/// How graphs are run.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Engine")]
pub(crate) struct EngineArguments {
    /// What runs the graphs
    #[arg(long, value_enum, default_value_t = Engine::OrtCpu)]
    engine: Engine,
    /// Number of the GPU, as nvidia-smi counts them
    #[arg(long, value_name = "N", default_value_t = 0)]
    gpu: usize,
    /// Let nodes that the GPU has no kernel for run on the CPU, with copies back and forth, instead of refusing the graph
    #[arg(long)]
    allow_fallback: bool,
    /// What runs the operators of the domain ai.accordion
    #[arg(long, value_enum, default_value_t = Operators::Fused)]
    operators: Operators,
}

impl EngineArguments {
    /// Our kernels everywhere.
    pub(crate) fn fused() -> Self {
        Self { engine: Engine::OrtCpu, gpu: 0, allow_fallback: false, operators: Operators::Fused }
    }

    /// The same with other operators, if any are given.
    pub(crate) fn with_operators(&self, operators: Option<Operators>) -> Self {
        let mut changed = self.clone();
        changed.operators = operators.unwrap_or(self.operators);
        changed
    }

    /// Engines for `bundle`.
    pub(crate) fn engines<'b>(&self, bundle: &'b Bundle, output: &Output) -> anyhow::Result<Engines<'b>> {
        Ok(Engines::new(bundle, self.loader(bundle, output)?))
    }

    /// What loads such engines.
    pub(crate) fn loader(&self, bundle: &Bundle, output: &Output) -> anyhow::Result<Box<dyn Loader>> {
        Ok(match self.engine {
            Engine::OrtCpu => Box::new(self.cpu_loader(bundle, output)?),
            Engine::OrtCuda => self.cuda_loader(bundle, output)?,
        })
    }

    /// What loads engines on the CPU, for what can be done only there.
    pub(crate) fn cpu_loader(&self, bundle: &Bundle, output: &Output) -> anyhow::Result<OrtCpu> {
        if self.engine != Engine::OrtCpu {
            bail!("this is done with --engine ort-cpu only");
        }
        let format = bundle.manifest().float16();
        if format == Some(DType::Bf16) {
            bail!(
                "{}: ONNX Runtime's CPU provider does not compute in bf16: export with --emulate to see its numbers on a \
                 CPU, or with --target ort-cpu for weights in bf16",
                bundle.dir().display()
            );
        }
        // Our kernels take fp32.
        let options = OrtOptions { fused_operators: self.operators == Operators::Fused && format.is_none() };
        Ok(OrtCpu::new(runtime(output)?, bundle.weights().clone(), &options)?)
    }

    fn cuda_loader(&self, bundle: &Bundle, output: &Output) -> anyhow::Result<Box<dyn Loader>> {
        if bundle.manifest().target != Target::Portable {
            bail!(
                "{}: exported for a CPU; --engine ort-cuda runs bundles of --target portable",
                bundle.dir().display()
            );
        }
        let fused = self.operators == Operators::Fused;
        let kernels = fused.then(super::selftest::compiled_kernels).transpose()?;
        let options = OrtCudaOptions { device: self.gpu, kernels, allow_fallback: self.allow_fallback };
        Ok(Box::new(ort_cuda::open(runtime(output)?, bundle.weights().clone(), &options)?))
    }

    /// What runs the graphs, as arguments of another process.
    pub(crate) fn engine_flags(&self) -> Vec<String> {
        match self.engine {
            Engine::OrtCpu => Vec::new(),
            Engine::OrtCuda => {
                let gpu = self.gpu.to_string();
                let fallback = self.allow_fallback.then(|| "--allow-fallback".to_owned());
                ["--engine", "ort-cuda", "--gpu", &gpu].map(str::to_owned).into_iter().chain(fallback).collect()
            }
        }
    }

    /// The operators, as arguments of another process.
    pub(crate) fn flags(&self) -> [&'static str; 2] {
        let operators = match self.operators {
            Operators::Fused => "fused",
            Operators::Portable => "portable",
        };
        ["--operators", operators]
    }
}

/// ONNX Runtime, fetched into the cache if it is nowhere else.
pub(crate) fn runtime(output: &Output) -> anyhow::Result<&'static LoadedRuntime> {
    let mut bar = None;
    let mut on_progress = |progress: accordion::fetch::Progress| super::fetch::show(&mut bar, output, progress);
    let options = LoadOptions::fetching(&mut on_progress).with_threads(output.threads());
    Ok(locate::load(options)?)
}
