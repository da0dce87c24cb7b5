//! What several commands share: settings of the methods, opening a bundle with its engines.

use super::ort_cuda::OrtCudaArguments;
use super::output::Output;
use super::tensorrt::TensorRtArguments;
use accordion::bundle::Bundle;
use accordion::pipeline::Engines;
use accordion::runtime::Loader;
use accordion::runtime::locate::{self, LoadOptions, LoadedRuntime};
use accordion::runtime::ort_cpu::{OrtCpu, OrtOptions};
use accordion::tensorrt::{Flavour, TensorRt};
use accordion_graphs::dtype::DType;
use accordion_graphs::onnx::ValueInfo;
use accordion_graphs::plan::homer::HomerSettings;
use anyhow::{bail, ensure};
use clap::{Args, ValueEnum};
use std::ffi::OsString;

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

/// What runs graphs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum EngineName {
    /// ONNX Runtime on the CPU
    OrtCpu,
    /// ONNX Runtime on an NVIDIA GPU
    OrtCuda,
    /// TensorRT on the GPU: engines that accordion build made
    #[value(name = "tensorrt")]
    TensorRt,
    /// TensorRT-RTX on the GPU: engines that accordion build made
    #[value(name = "tensorrt-rtx")]
    TensorRtRtx,
}

impl EngineName {
    /// The word for it in flags, results and JSON.
    pub(crate) fn word(self) -> &'static str {
        match self {
            Self::OrtCpu => "ort-cpu",
            Self::OrtCuda => "ort-cuda",
            Self::TensorRt => Flavour::TensorRt.word(),
            Self::TensorRtRtx => Flavour::TensorRtRtx.word(),
        }
    }

    /// Whose engines it runs, if they were built before.
    fn flavour(self) -> Option<Flavour> {
        match self {
            Self::OrtCpu | Self::OrtCuda => None,
            Self::TensorRt => Some(Flavour::TensorRt),
            Self::TensorRtRtx => Some(Flavour::TensorRtRtx),
        }
    }
}

/// How graphs are run.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Engine")]
pub(crate) struct EngineArguments {
    /// What runs the graphs
    #[arg(long, value_enum, default_value_t = EngineName::OrtCpu)]
    engine: EngineName,
    /// What runs the operators of the domain ai.accordion
    #[arg(long, value_enum, default_value_t = Operators::Fused)]
    operators: Operators,
    #[command(flatten)]
    ort_cuda: OrtCudaArguments,
    #[command(flatten)]
    tensorrt: TensorRtArguments,
}

impl EngineArguments {
    /// ONNX Runtime on the CPU with our kernels everywhere.
    pub(crate) fn fused() -> Self {
        Self {
            engine: EngineName::OrtCpu,
            operators: Operators::Fused,
            ort_cuda: OrtCudaArguments::default(),
            tensorrt: TensorRtArguments::default(),
        }
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
    pub(crate) fn loader<'b>(&self, bundle: &'b Bundle, output: &Output) -> anyhow::Result<Box<dyn Loader + 'b>> {
        Ok(match self.engine {
            EngineName::OrtCpu => Box::new(self.ort_cpu("this", bundle, output)?),
            EngineName::OrtCuda => {
                let fused = self.operators == Operators::Fused;
                self.ort_cuda.loader(bundle, runtime(output)?, fused)?
            }
            EngineName::TensorRt => Box::new(self.tensorrt.loader(Flavour::TensorRt, bundle)?),
            EngineName::TensorRtRtx => Box::new(self.tensorrt.loader(Flavour::TensorRtRtx, bundle)?),
        })
    }

    /// `bundle` with the taps that its engines can show: those that were built in.
    pub(crate) fn observable(&self, mut bundle: Bundle, output: &Output) -> anyhow::Result<Bundle> {
        let Some(flavour) = self.engine.flavour() else { return Ok(bundle) };
        let all = self.tensorrt.loader(flavour, &bundle)?.engines().record().taps;
        if !all {
            output
                .remark("the engines show what their graphs return; accordion build --taps makes them show every tap");
        }
        bundle.keep_taps(|signature, value| {
            let named = |info: &ValueInfo| info.name == value.name;
            signature.outputs.iter().any(named) || all && !signature.inputs.iter().any(named)
        });
        Ok(bundle)
    }

    /// What runs the graphs, in flags, results and JSON.
    pub(crate) fn name(&self) -> &'static str {
        self.engine.word()
    }

    /// Whether graphs are run by ONNX Runtime on the CPU, which can do everything.
    pub(crate) fn is_ort_cpu(&self) -> bool {
        self.engine == EngineName::OrtCpu
    }

    /// Whether graphs are run by engines that were built before.
    pub(crate) fn is_tensorrt(&self) -> bool {
        self.engine.flavour().is_some()
    }

    /// What loads the engines of `bundle`, which alone can do `what`.
    pub(crate) fn tensorrt<'b>(&self, what: &str, bundle: &'b Bundle) -> anyhow::Result<TensorRt<'b>> {
        let Some(flavour) = self.engine.flavour() else {
            bail!("{what} needs --engine tensorrt or tensorrt-rtx, and the engine is {}", self.name());
        };
        self.tensorrt.loader(flavour, bundle)
    }

    /// What runs the operators of our domain, for results.
    pub(crate) fn operators(&self) -> &'static str {
        match self.operators {
            Operators::Fused => "fused",
            Operators::Portable => "portable",
        }
    }

    /// What loads graphs into ONNX Runtime's CPU provider, which alone can do `what`.
    pub(crate) fn ort_cpu(&self, what: &str, bundle: &Bundle, output: &Output) -> anyhow::Result<OrtCpu> {
        ensure!(self.is_ort_cpu(), "{what} needs --engine ort-cpu, and the engine is {}", self.name());
        self.ort_cuda.check_unused()?;
        self.tensorrt.check_unused()?;
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

    /// The same as arguments of another process.
    pub(crate) fn flags(&self) -> Vec<OsString> {
        let mut flags = ["--engine", self.name(), "--operators", self.operators()].map(OsString::from).to_vec();
        flags.extend(self.ort_cuda.flags());
        flags.extend(self.tensorrt.flags());
        flags
    }
}

/// ONNX Runtime, fetched into the cache if it is nowhere else.
pub(crate) fn runtime(output: &Output) -> anyhow::Result<&'static LoadedRuntime> {
    let mut bar = None;
    let mut on_progress = |progress: accordion::fetch::Progress| super::fetch::show(&mut bar, output, progress);
    let options = LoadOptions::fetching(&mut on_progress).with_threads(output.threads());
    Ok(locate::load(options)?)
}
