//! What runs graphs, on the command line.

mod ort_cpu;
mod ort_cuda;
mod tensorrt;

pub(crate) use ort_cpu::runtime;

use super::output::Output;
use accordion::bundle::Bundle;
use accordion::pipeline::Engines;
use accordion::runtime::Loader;
use accordion::runtime::ort_cpu::OrtCpu;
use accordion::tensorrt::{Flavour, TensorRt};
use accordion_graphs::onnx::ValueInfo;
use anyhow::{anyhow, ensure};
use clap::{Args, ValueEnum};
use ort_cuda::OrtCudaArguments;
use std::ffi::OsString;
use tensorrt::TensorRtArguments;

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
        self.check_unused()?;
        let fused = self.operators == Operators::Fused;
        Ok(match self.engine {
            EngineName::OrtCpu => Box::new(ort_cpu::loader(bundle, fused, output)?),
            EngineName::OrtCuda => self.ort_cuda.loader(bundle, runtime(output)?, fused)?,
            EngineName::TensorRt => Box::new(self.tensorrt.loader(Flavour::TensorRt, bundle, output)?),
            EngineName::TensorRtRtx => Box::new(self.tensorrt.loader(Flavour::TensorRtRtx, bundle, output)?),
        })
    }

    /// `bundle` with the taps that its engines can show: those that were built in.
    pub(crate) fn observable(&self, mut bundle: Bundle, output: &Output) -> anyhow::Result<Bundle> {
        let Some(flavour) = self.engine.flavour() else { return Ok(bundle) };
        let all = self.tensorrt.loader(flavour, &bundle, output)?.engines().record().taps;
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

    /// Whether these engines record decoding steps.
    pub(crate) fn records_steps(&self) -> bool {
        self.is_tensorrt() && self.tensorrt.records_steps()
    }

    /// What loads the engines of `bundle`, which alone can do `what`.
    pub(crate) fn tensorrt<'b>(&self, what: &str, bundle: &'b Bundle, output: &Output) -> anyhow::Result<TensorRt<'b>> {
        let needs = || anyhow!("{what} needs --engine tensorrt or tensorrt-rtx, and the engine is {}", self.name());
        let flavour = self.engine.flavour().ok_or_else(needs)?;
        self.check_unused()?;
        self.tensorrt.loader(flavour, bundle, output)
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
        self.check_unused()?;
        ort_cpu::loader(bundle, self.operators == Operators::Fused, output)
    }

    /// Refuses what would be ignored.
    fn check_unused(&self) -> anyhow::Result<()> {
        let flavour = self.engine.flavour();
        if self.engine != EngineName::OrtCuda {
            self.ort_cuda.check_unused()?;
        }
        if flavour.is_none() {
            self.tensorrt.check_unused()?;
        }
        ensure!(
            flavour.is_none() || self.operators == Operators::Fused,
            "--operators is for ONNX Runtime: engines have the operators that they were built with (accordion build --plugins)"
        );
        Ok(())
    }

    /// The same as arguments of another process.
    pub(crate) fn flags(&self) -> Vec<OsString> {
        let mut flags = ["--engine", self.name(), "--operators", self.operators()].map(OsString::from).to_vec();
        flags.extend(self.ort_cuda.flags());
        flags.extend(self.tensorrt.flags());
        flags
    }
}
