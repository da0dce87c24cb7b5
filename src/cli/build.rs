//! `accordion build`.

mod child;

use super::Outcome;
use super::compression::SplitArguments;
use super::output::Output;
use super::text::bytes;
use accordion::bundle::Bundle;
use accordion::environment::driver_library;
use accordion::tensorrt::engines::{Engines, EnginesWriter, Record, sha256};
use accordion::tensorrt::ranges::Workload;
use accordion::tensorrt::shim::Shim;
use accordion::tensorrt::toolkit::Toolkit;
use accordion::tensorrt::{BuildOptions, Flavour, devices};
use accordion_graphs::blocks::Target;
use accordion_graphs::plan::PromptLengths;
use accordion_graphs::plan::sharedllm::ChunkPolicy;
use anyhow::{Context, bail, ensure};
use child::{Child, InProcess};
use clap::{Args, ValueEnum};
use serde::Serialize;
use std::path::{Path, PathBuf};
use std::time::Instant;

/// Build the engines of a bundle with NVIDIA's TensorRT or TensorRT-RTX
#[derive(Debug, Args)]
#[command(
    after_help = "The bundle is one exported with --target portable. NVIDIA's libraries come from NVIDIA's package index or \
    its archives, the headers from the archives or system packages; a small C++ source is compiled with them. The engines are \
    written to BUNDLE/engines, with their hashes."
)]
pub(crate) struct Arguments {
    /// The bundle
    bundle: PathBuf,
    /// What the engines are for
    #[arg(long, value_enum)]
    runtime: Runtime,
    /// Folder of NVIDIA's libraries (also in its lib) or headers (also in its include); may be repeated
    #[arg(long, value_name = "DIR")]
    root: Vec<PathBuf>,
    /// Graphs to build, all others are left out [default: all]
    #[arg(long, value_name = "NAME,NAME", value_delimiter = ',')]
    graphs: Vec<String>,
    /// Library with Accordion's plugins, compiled for the GPU: its kernels take the place of functions in the graphs
    #[arg(long, value_name = "FILE")]
    plugins: Option<PathBuf>,
    /// Most device memory that a layer may take while it runs, in MiB [default: the library's own limit]
    #[arg(long, value_name = "MIB")]
    workspace: Option<usize>,
    /// Let products of fp32 be rounded to TF32
    #[arg(long)]
    tf32: bool,
    /// Make every tap an output, for `accordion verify`; layers are not fused across them then
    #[arg(long)]
    taps: bool,
    /// Replace engines that are already there
    #[arg(long)]
    force: bool,
    /// Build nothing: check the engines that are there, and load them where there is a GPU
    #[arg(long, conflicts_with_all = ["graphs", "plugins", "workspace", "tf32", "taps", "force"])]
    check: bool,
    /// Load engines whose hash is not the recorded one. An engine is a program: do you know who built it?
    #[arg(long, requires = "check")]
    trust: bool,
    /// Print NVIDIA's warnings too
    #[arg(long)]
    verbose: bool,
    #[command(flatten)]
    lengths: LengthArguments,
    #[command(flatten)]
    split: SplitArguments,
    #[command(flatten)]
    in_process: InProcess,
}

/// The longest prompt to serve; engines are tuned for it.
#[derive(Debug, Args)]
#[command(next_help_heading = "Lengths")]
struct LengthArguments {
    /// Longest context, in tokens
    #[arg(long, value_name = "N", default_value_t = 8192)]
    context: usize,
    /// Most tokens before the context
    #[arg(long, value_name = "N", default_value_t = 64)]
    prefix: usize,
    /// Most tokens behind the context
    #[arg(long, value_name = "N", default_value_t = 64)]
    suffix: usize,
    /// Most tokens to decode
    #[arg(long, value_name = "N", default_value_t = 1024)]
    new_tokens: usize,
    /// Let the decoder also read whole prompts, for --method plain and what `profile` compares with; for homer and rcc
    #[arg(long)]
    plain: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Runtime {
    /// TensorRT 10 or 11: builds on the GPU that it is for
    #[value(name = "tensorrt")]
    TensorRt,
    /// TensorRT-RTX 1: builds anywhere, for graphics cards
    #[value(name = "tensorrt-rtx")]
    TensorRtRtx,
}

impl From<Runtime> for Flavour {
    fn from(runtime: Runtime) -> Self {
        match runtime {
            Runtime::TensorRt => Self::TensorRt,
            Runtime::TensorRtRtx => Self::TensorRtRtx,
        }
    }
}

#[derive(Serialize)]
struct Summary<'a> {
    schema: &'static str,
    bundle: &'a Path,
    engines: &'a Path,
    /// How long building took; absent where nothing was built.
    #[serde(skip_serializing_if = "Option::is_none")]
    seconds: Option<f64>,
    record: &'a Record,
}

impl<'a> Summary<'a> {
    fn show(
        bundle: &'a Bundle,
        engines: &'a Path,
        record: &'a Record,
        seconds: Option<f64>,
        output: &Output,
    ) -> anyhow::Result<()> {
        let summary = Self { schema: "accordion.build/1", bundle: bundle.dir(), engines, seconds, record };
        output.result(&summary, || summary.in_words())
    }

    fn in_words(&self) -> String {
        let Record { flavour, version, engines, devices, .. } = self.record;
        let mut lines: Vec<String> =
            engines.iter().map(|(name, engine)| format!("  {name:<16} {}", bytes(engine.bytes))).collect();
        let place = self.engines.display();
        let on = devices.first().map(|device| format!(", on {device}")).unwrap_or_default();
        lines.insert(
            0,
            match self.seconds {
                Some(seconds) => {
                    format!("built {} engines in {seconds:.1} s: {flavour} {version}{on}, {place}", engines.len())
                }
                None => {
                    format!("{} engines are the ones that were built: {flavour} {version}{on}, {place}", engines.len())
                }
            },
        );
        lines.join("\n")
    }
}

/// Runs the command.
pub(crate) fn run(arguments: &Arguments, output: &Output) -> anyhow::Result<Outcome> {
    let flavour = Flavour::from(arguments.runtime);
    let bundle = Bundle::open(&arguments.bundle)?;
    let target = bundle.manifest().target;
    ensure!(
        target == Target::Portable,
        "{}: its graphs are for ONNX Runtime on the CPU; export with --target portable",
        arguments.bundle.display()
    );
    ensure!(
        flavour == Flavour::TensorRt || arguments.plugins.is_none(),
        "--plugins is for tensorrt: TensorRT-RTX has no plugins, and runs the functions of the graphs"
    );
    let options = arguments.options()?;
    options.workload.check(bundle.manifest())?;
    let toolkit = Toolkit::find(flavour, &arguments.root)?;
    if let Some(graph) = &arguments.in_process.graph {
        return Ok(arguments.in_process.run(graph, &bundle, &toolkit, &options));
    }
    let version = Shim::open(&toolkit)?.version().to_string();
    let goal = Engines::dir(&bundle, flavour, &version);
    if arguments.check {
        return arguments.check_engines(&bundle, &goal, output);
    }
    arguments.build(&bundle, &goal, version, &options, output)
}

impl Arguments {
    fn options(&self) -> anyhow::Result<BuildOptions> {
        let LengthArguments { context, prefix, suffix, new_tokens, plain } = self.lengths;
        let lengths = PromptLengths { prefix, context, suffix };
        let workload = Workload {
            lengths,
            new_tokens,
            width: self.split.width(),
            policy: self.split.chunks().unwrap_or(ChunkPolicy::FineTuning),
            plain,
        };
        let workspace_bytes =
            self.workspace.unwrap_or_default().checked_mul(1 << 20).context("--workspace is too large")?;
        let plugins = self.plugins.as_ref().map(std::path::absolute).transpose()?;
        Ok(BuildOptions { workload, plugins, workspace_bytes, allow_tf32: self.tf32, taps: self.taps })
    }

    fn build(
        &self,
        bundle: &Bundle,
        goal: &Path,
        version: String,
        options: &BuildOptions,
        output: &Output,
    ) -> anyhow::Result<Outcome> {
        let flavour = Flavour::from(self.runtime);
        let start = Instant::now();
        let graphs = &bundle.manifest().graphs;
        if let Some(unknown) = self.graphs.iter().find(|name| !graphs.contains_key(*name)) {
            let known: Vec<&str> = graphs.keys().map(String::as_str).collect();
            bail!("--graphs: {} has no graph '{unknown}'; it has {}", bundle.dir().display(), known.join(", "));
        }
        let devices = devices(flavour)?.into_iter().map(|device| device.name).collect();
        let mut record = Record::new(flavour, version, devices, options.workload, options.allow_tf32);
        record.taps = options.taps;
        if let Some(path) = &options.plugins {
            let library = std::fs::read(path).with_context(|| path.display().to_string())?;
            record.plugins_sha256 = Some(sha256(&library));
        }
        let measured = Engines::open(goal).map(|engines| engines.timing_cache()).unwrap_or_default();
        let mut writer = EnginesWriter::create(goal.to_owned(), record, self.force)?;
        if !measured.is_empty() {
            std::fs::write(writer.timing_path(), measured)?;
        }
        for (name, entry) in graphs.iter().filter(|(name, _)| self.graphs.is_empty() || self.graphs.contains(name)) {
            let child = Child { graph: name, plan: &writer.path(name), timing_cache: Some(&writer.timing_path()) };
            let profiles = child.run(self.verbose, output)?;
            writer.add(name, entry.sha256.clone(), profiles)?;
        }
        let record = writer.publish()?;
        Summary::show(bundle, goal, &record, Some(start.elapsed().as_secs_f64()), output)?;
        Ok(Outcome::Done)
    }

    /// Checks every engine that is recorded, and loads it if there is a GPU to load it on.
    fn check_engines(&self, bundle: &Bundle, goal: &Path, output: &Output) -> anyhow::Result<Outcome> {
        let engines = Engines::open(goal)?;
        engines.check_graphs(bundle)?;
        for name in engines.record().engines.keys() {
            engines.plan(name, self.trust)?;
        }
        match driver_library() {
            Err(reason) => output.warning(format!("the engines were not loaded: {reason}")),
            Ok(()) => {
                for (name, engine) in &engines.record().engines {
                    Child { graph: name, plan: &goal.join(&engine.file), timing_cache: None }
                        .run(self.verbose, output)?;
                }
            }
        }
        Summary::show(bundle, goal, engines.record(), None, output)?;
        Ok(Outcome::Done)
    }
}
