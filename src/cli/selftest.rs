//! `accordion selftest`.

mod child;
mod show;

use self::child::Effort;
use super::Outcome;
use super::method::MethodName;
use super::output::Output;
use accordion::cuda::{Device, Origin};
use accordion::fetch::Cache;
use accordion::selftest::methods::{self, Wanted};
use accordion::selftest::models::{Maker, Scale};
use accordion::selftest::{Options, Report, run as run_selftest};
use accordion_graphs::precision::Precision;
use anyhow::{Context as _, ensure};
use clap::{Args, Subcommand, ValueEnum};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Try kernels and methods on this machine's hardware
#[derive(Debug, Args)]
pub(crate) struct Arguments {
    #[command(subcommand)]
    hardware: Hardware,
}

#[derive(Debug, Subcommand)]
enum Hardware {
    Gpu(Gpu),
}

/// Compare the CUDA kernels' results with the CPU's, and what they and the methods cost
///
/// Needs an NVIDIA GPU and its driver, and for products cuBLASLt; no model, no network and no CUDA toolkit, if compiled
/// kernels are at hand. With ONNX Runtime's CUDA provider also compares the fused operators with the standard ones they stand
/// for, and every method with plain, in fp16 over random weights. Ends in minutes: with 0 if all results are the same, with 1 if
/// not. What cannot be tried is listed.
#[derive(Debug, Args)]
struct Gpu {
    /// Number of the GPU, as nvidia-smi counts them
    #[arg(long, value_name = "N", default_value_t = 0)]
    device: usize,
    /// Folder of compiled kernels [default: "kernels" beside this program; without one, NVRTC compiles them]
    ///
    /// Methods are measured in processes of their own, which take the default.
    #[arg(long, value_name = "FOLDER")]
    kernels: Option<PathBuf>,
    /// Compare results with the CPU's only
    #[arg(long, conflicts_with_all = ["methods", "shape", "context", "quick"])]
    no_times: bool,
    #[command(flatten)]
    methods: MethodsArguments,
    /// Write the results as JSON to a file, too
    #[arg(long, short, value_name = "FILE")]
    output: Option<PathBuf>,
}

/// What is measured of methods.
#[derive(Debug, Args)]
#[command(next_help_heading = "Methods")]
struct MethodsArguments {
    /// Methods to measure; others are compared with plain
    #[arg(long, value_enum, value_delimiter = ',', value_name = "METHOD,METHOD",
          default_values_t = [MethodName::Plain, MethodName::Homer, MethodName::SharedLlm, MethodName::Rcc])]
    methods: Vec<MethodName>,
    /// Measure no method
    #[arg(long, conflicts_with_all = ["methods", "shape", "context", "quick"])]
    no_methods: bool,
    /// Sizes of the models
    #[arg(long, value_enum, default_value_t = ShapeName::Large)]
    shape: ShapeName,
    /// Tokens of the context that methods are compared at [default: 32768; tiny, 4096]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    context: Option<u32>,
    /// Build every prefix once, decode a few tokens, and leave out RCC's longest context
    #[arg(long)]
    quick: bool,
    /// Most time for all methods together, in seconds: what is left then is left out
    #[arg(long, value_name = "SECONDS", default_value_t = 600)]
    budget: u64,
    /// Folder for models and bundles, which are removed in the end; up to 6 GB [default: the system's for temporary files]
    #[arg(long, value_name = "FOLDER")]
    work_dir: Option<PathBuf>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum ShapeName {
    /// Llama-2-7B with HOMER's M = 4096, and RCC's pair of Pythia-1.4b, also at a million tokens
    #[value(name = "7b")]
    Large,
    /// SmolLM2-135M with HOMER's M = 2048, and RCC's pair of Pythia-70m
    #[value(name = "smollm2")]
    Small,
    /// Models of kilobytes: whether everything runs
    Tiny,
}

impl From<ShapeName> for Scale {
    fn from(name: ShapeName) -> Self {
        match name {
            ShapeName::Large => Self::Large,
            ShapeName::Small => Self::Small,
            ShapeName::Tiny => Self::Tiny,
        }
    }
}

/// Runs the command.
pub(crate) fn run(arguments: &Arguments, output: &Output) -> anyhow::Result<Outcome> {
    let Hardware::Gpu(gpu) = &arguments.hardware;
    if let Some(folder) = &gpu.methods.work_dir {
        ensure!(folder.is_dir(), "--work-dir {}: there is no such folder", folder.display());
    }
    let kernels = gpu.kernels.clone().map_or_else(compiled_kernels, |folder| Ok(Origin::Folder(folder)))?;
    let options = Options { device: gpu.device, kernels, times: !gpu.no_times };
    let bar = output.bar("opening the GPU", 0);
    let report = run_selftest(&options, &mut |step| {
        bar.set_length(step.of as u64);
        bar.set_position(step.done as u64);
        bar.set_message(step.what.to_owned());
    });
    bar.finish_and_clear();
    let mut report = report?;
    if report.runtime.is_some() && !gpu.methods.no_methods {
        gpu.measure_methods(&mut report, output)?;
    }
    if let Some(path) = &gpu.output {
        write(path, &report).with_context(|| path.display().to_string())?;
    }
    output.result(&report, || show::text(&report))?;
    Ok(if report.passed { Outcome::Done } else { Outcome::CheckFailed })
}

impl Gpu {
    /// Adds what methods cost, and what of them could not be measured.
    fn measure_methods(&self, report: &mut Report, output: &Output) -> anyhow::Result<()> {
        let MethodsArguments { methods, shape, context, quick, budget, work_dir, .. } = &self.methods;
        let sizes = Scale::from(*shape).sizes();
        let context = context.map_or(sizes.context, |context| context as usize);
        let folder = match work_dir {
            Some(folder) => tempfile::tempdir_in(folder)?,
            None => tempfile::tempdir()?,
        };
        let device = Device::open(self.device)?;
        let wanted = Wanted {
            methods: methods.iter().map(|method| method.name()).collect(),
            context,
            longest: (!quick).then_some(sizes.longest.max(context)),
            free_bytes: Some(device.free_bytes()?),
            budget: Duration::from_secs(*budget),
        };
        let maker = Maker { folder: folder.path(), sizes, precision: Precision::Fp16, context };
        let effort = if *quick { Effort::QUICK } else { Effort::USUAL };
        let bar = output.bar("methods", 0);
        report.methods = methods::run(
            &maker,
            &wanted,
            &mut |case, left| child::measure(case, effort, self.device, &device, left).map_err(|e| format!("{e:#}")),
            &mut report.missing,
            &mut |what| bar.set_message(what.to_owned()),
        );
        bar.finish_and_clear();
        Ok(())
    }
}

/// Where compiled kernels come from, unless somebody says: the folder beside this program, or NVRTC.
pub(super) fn compiled_kernels() -> anyhow::Result<Origin> {
    let beside = Some(std::env::current_exe()?.with_file_name("kernels")).filter(|folder| folder.is_dir());
    Ok(match beside {
        Some(folder) => Origin::Folder(folder),
        None => Origin::Compiler(Cache::from_environment()?.folder().join("kernels")),
    })
}

/// Aside and renamed: nothing is left half-written.
fn write(path: &Path, report: &Report) -> anyhow::Result<()> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let mut aside = tempfile::NamedTempFile::new_in(folder)?;
    serde_json::to_writer_pretty(&mut aside, report)?;
    writeln!(aside)?;
    aside.persist(path)?;
    Ok(())
}
