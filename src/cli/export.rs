//! `accordion export`.

mod precision;

use super::homer::HomerArguments;
use super::output::Output;
use super::text::{bytes, grouped};
use super::{Outcome, models};
use accordion::bundle::{self, ExportOptions, Exported, MethodSettings, WeightStorage};
use accordion::checkpoint::{Checkpoint, parse_rope_scaling};
use accordion_graphs::architecture::Architecture;
use accordion_graphs::blocks;
use accordion_graphs::plan::rcc::RccSettings;
use accordion_graphs::plan::sharedllm::{Keep, Quirks, SharedLlmSettings};
use anyhow::bail;
use clap::{Args, Subcommand, ValueEnum};
use precision::PrecisionArguments;
use serde::Serialize;
use std::path::{Path, PathBuf};
use std::time::Instant;

/// Build a method's graphs for a checkpoint, as a bundle that links to the checkpoint's weights
#[derive(Debug, Args)]
pub(crate) struct Arguments {
    #[command(subcommand)]
    method: Method,
}

#[derive(Debug, Subcommand)]
enum Method {
    /// The baseline: the whole context through the model
    Plain(PlainArguments),
    /// HOMER: chunks, pruned and merged pairwise up a tree
    Homer(Box<TreeArguments>),
    /// RCC: an encoder reads segments, and every r-th position of its layers stands for r tokens in the decoder's
    Rcc(RccArguments),
    /// SharedLLM: a lower model reads chunks as trees, and the upper model attends to what is kept of them
    #[command(name = "sharedllm")]
    SharedLlm(SharedLlmArguments),
}

#[derive(Debug, Args)]
struct PlainArguments {
    #[command(flatten)]
    common: CommonArguments,
}

#[derive(Debug, Args)]
struct TreeArguments {
    #[command(flatten)]
    common: CommonArguments,
    /// Longest context that the bundle has to serve, in tokens
    #[arg(long, value_name = "N", default_value_t = 32_768)]
    context: usize,
    /// Significance table to put into the bundle, from `accordion calibrate significance`
    #[arg(long, value_name = "FILE")]
    table: Option<PathBuf>,
    #[command(flatten)]
    homer: HomerArguments,
}

#[derive(Debug, Args)]
struct RccArguments {
    #[command(flatten)]
    common: CommonArguments,
    /// Tokens of an encoder segment [default: the checkpoint's]
    #[arg(long, value_name = "N")]
    window: Option<usize>,
    /// Tokens per slot, a divisor of the window [default: the checkpoint's]
    #[arg(long, value_name = "N")]
    ratio: Option<usize>,
    /// Whether a decoder layer gets the mean of two encoder states [default: the checkpoint's]
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pairs: Option<bool>,
    /// Whether a Mamba encoder's first state is its embedding [default: the checkpoint's]
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    first_state_is_embedding: Option<bool>,
}

#[derive(Debug, Args)]
struct SharedLlmArguments {
    #[command(flatten)]
    common: CommonArguments,
    /// Tokens of a chunk [default: the checkpoint's]
    #[arg(long, value_name = "N")]
    chunk_len: Option<usize>,
    /// Levels of a chunk's tree [default: the checkpoint's]
    #[arg(long, value_name = "N")]
    tree_depth: Option<usize>,
    /// Tokens to keep of a node: all, a number, or a fraction with a decimal point [default: the checkpoint's]
    #[arg(long, value_name = "all|N|FRACTION", value_parser = parse_keep)]
    keep: Option<Keep>,
    /// Whether the half that is more similar to the running text is split further [default: the checkpoint's]
    #[arg(long, value_name = "BOOL")]
    retrieval: Option<bool>,
    /// Which computation
    #[arg(long, value_enum, default_value_t = QuirksName::Faithful)]
    quirks: QuirksName,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum QuirksName {
    /// That of the released code
    Faithful,
    /// The one that it was meant to be
    Fixed,
}

#[derive(Debug, Args)]
struct CommonArguments {
    /// Checkpoint folder, GGUF file, or the name of a model that can be fetched
    checkpoint: PathBuf,
    /// The bundle folder to write
    out: PathBuf,
    /// What runtime the graphs are for
    #[arg(long, value_enum, default_value_t = Target::OrtCpu)]
    target: Target,
    /// How the weights get into the bundle
    #[arg(long, value_enum, default_value_t = Weights::Link)]
    weights: Weights,
    #[command(flatten)]
    precision: PrecisionArguments,
    /// Rotary scaling instead of the checkpoint's: none, linear=F, dynamic=F[:N] or yarn=F[:N]
    ///
    /// F stretches the range of positions, N is the trained length [default: the checkpoint's]. The base of the
    /// frequencies stays the checkpoint's; the YaRN of HOMER's authors computes with 10000 for every model.
    #[arg(long, value_name = "SCALING")]
    rope_scaling: Option<String>,
    /// Replace a bundle that is already there
    #[arg(long)]
    force: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Target {
    /// Standard operators: any runtime
    Portable,
    /// ONNX Runtime's CPU provider
    OrtCpu,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Weights {
    /// Hard links to the checkpoint's files, or copies where these cannot be made
    Link,
    /// Copies: such a bundle can be moved anywhere
    Copy,
}

#[derive(Serialize)]
struct Summary<'a> {
    schema: &'static str,
    bundle: &'a Path,
    method: &'static str,
    graphs: usize,
    nodes: usize,
    bytes_written: u64,
    seconds: f64,
    weight_files: usize,
    weights: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    link_failure: Option<&'a str>,
    significance: bool,
}

/// Runs the command.
pub(crate) fn run(arguments: &Arguments, output: &Output) -> anyhow::Result<Outcome> {
    let common = match &arguments.method {
        Method::Plain(plain) => &plain.common,
        Method::Homer(tree) => &tree.common,
        Method::Rcc(rcc) => &rcc.common,
        Method::SharedLlm(shared) => &shared.common,
    };
    let folder = models::folder(&common.checkpoint, output)?;
    let start = Instant::now();
    let checkpoint = common.rescaled(Checkpoint::open(folder)?)?;
    let method = match &arguments.method {
        Method::Plain(_) => MethodSettings::Plain,
        Method::Homer(tree) => tree.settings(&checkpoint)?,
        Method::Rcc(rcc) => rcc.settings(&checkpoint)?,
        Method::SharedLlm(shared) => shared.settings(&checkpoint)?,
    };
    let options = ExportOptions {
        method,
        target: common.target.into(),
        weights: common.weights.into(),
        recipe: common.precision.recipe(),
        force: common.force,
    };
    let exported = bundle::export(&checkpoint, &common.out, &options)?;
    let summary = Summary::of(&exported, common, start.elapsed().as_secs_f64());
    if let Some(problem) = summary.link_failure {
        output.warning(format!("files were copied because they cannot be linked: {problem}"));
    }
    output.result(&summary, || summary.in_words())?;
    Ok(Outcome::Done)
}

impl CommonArguments {
    /// The checkpoint under the rotary scaling that was asked for.
    fn rescaled(&self, checkpoint: Checkpoint) -> anyhow::Result<Checkpoint> {
        let (Some(text), Architecture::Llama(model)) = (&self.rope_scaling, checkpoint.architecture()) else {
            return Ok(checkpoint);
        };
        let scaling = parse_rope_scaling(text, model.max_positions)?;
        Ok(checkpoint.with_rope_scaling(scaling))
    }
}

impl TreeArguments {
    fn settings(&self, checkpoint: &Checkpoint) -> anyhow::Result<MethodSettings> {
        let Architecture::Llama(model) = checkpoint.architecture() else {
            anyhow::bail!("{}: only Llama-family models can be exported", checkpoint.dir().display());
        };
        let settings = self.homer.settings(model.num_layers);
        let tree_heights = bundle::tree_heights(model.num_layers, settings, self.context)?;
        Ok(MethodSettings::Homer { settings, tree_heights, significance: self.table.clone() })
    }
}

impl RccArguments {
    fn settings(&self, checkpoint: &Checkpoint) -> anyhow::Result<MethodSettings> {
        let Some(trained) = checkpoint.rcc_settings() else {
            bail!("{}: rcc needs an encoder and maps, and the checkpoint has none", checkpoint.dir().display());
        };
        let settings = RccSettings {
            window: self.window.unwrap_or(trained.window),
            ratio: self.ratio.unwrap_or(trained.ratio),
            pairs: self.pairs.unwrap_or(trained.pairs),
            first_state_is_embedding: self.first_state_is_embedding.unwrap_or(trained.first_state_is_embedding),
        };
        settings.check()?;
        Ok(MethodSettings::Rcc(settings))
    }
}

impl SharedLlmArguments {
    fn settings(&self, checkpoint: &Checkpoint) -> anyhow::Result<MethodSettings> {
        let Some(trained) = checkpoint.sharedllm_settings() else {
            bail!(
                "{}: sharedllm needs a lower model and cross attention, and the checkpoint has none",
                checkpoint.dir().display()
            );
        };
        let settings = SharedLlmSettings {
            chunk_len: self.chunk_len.unwrap_or(trained.chunk_len),
            tree_depth: self.tree_depth.unwrap_or(trained.tree_depth),
            keep: self.keep.unwrap_or(trained.keep),
            retrieval: self.retrieval.unwrap_or(trained.retrieval),
            quirks: match self.quirks {
                QuirksName::Faithful => Quirks::Faithful,
                QuirksName::Fixed => Quirks::Fixed,
            },
        };
        settings.levels()?;
        Ok(MethodSettings::SharedLlm(settings))
    }
}

/// What is kept of a node: a decimal point makes a number a fraction.
fn parse_keep(text: &str) -> Result<Keep, String> {
    let keep = match (text, text.parse::<usize>(), text.parse::<f64>()) {
        ("all", ..) => Some(Keep::All),
        (_, Ok(count @ 1..), _) => Some(Keep::Tokens(count)),
        (_, Err(_), Ok(fraction)) if fraction > 0.0 && fraction <= 1.0 => Some(Keep::Fraction(fraction)),
        _ => None,
    };
    keep.ok_or_else(|| "expected all, a number from 1 on, or a fraction above 0 and up to 1.0".to_owned())
}

impl<'a> Summary<'a> {
    fn of(exported: &'a Exported, common: &'a CommonArguments, seconds: f64) -> Self {
        let manifest = &exported.manifest;
        let copied = manifest.weights.iter().filter(|file| file.sha256.is_some()).count();
        Self {
            schema: "accordion.export/1",
            bundle: &common.out,
            method: manifest.method.name(),
            graphs: manifest.graphs.len(),
            nodes: manifest.graphs.values().map(|graph| graph.signature.nodes).sum(),
            bytes_written: exported.bytes_written,
            seconds,
            weight_files: manifest.weights.len(),
            weights: if copied == 0 { "linked" } else { "copied" },
            link_failure: exported.link_failure.as_deref(),
            significance: manifest.significance.is_some(),
        }
    }

    fn in_words(&self) -> String {
        let Self { method, graphs, nodes, bytes_written, seconds, weight_files, weights, .. } = self;
        let table = if self.significance { ", with significance table" } else { "" };
        format!(
            "{}: {method}, {} of {} nodes{table}\n{} written in {seconds:.2} s; {} {weights}",
            self.bundle.display(),
            counted(*graphs, "graph"),
            grouped(*nodes as u64),
            bytes(*bytes_written),
            counted(*weight_files, "weight file"),
        )
    }
}

fn counted(count: usize, what: &str) -> String {
    format!("{count} {what}{}", if count == 1 { "" } else { "s" })
}

impl From<Target> for blocks::Target {
    fn from(target: Target) -> Self {
        match target {
            Target::Portable => Self::Portable,
            Target::OrtCpu => Self::OrtCpu,
        }
    }
}

impl From<Weights> for WeightStorage {
    fn from(weights: Weights) -> Self {
        match weights {
            Weights::Link => Self::Link,
            Weights::Copy => Self::Copy,
        }
    }
}
