//! `accordion convert`.

use super::output::Output;
use super::text::bytes;
use super::{Outcome, models};
use accordion::convert::{Converted, CrossAttention, SharedLlmOptions, to_sharedllm};
use accordion_graphs::plan::sharedllm::Keep;
use clap::{Args, Subcommand, ValueEnum};
use serde::Serialize;
use std::path::{Path, PathBuf};
use std::time::Instant;

/// Make a checkpoint for a method that is trained, out of a plain one whose weights it links to
#[derive(Debug, Args)]
pub(crate) struct Arguments {
    #[command(subcommand)]
    method: Method,
}

#[derive(Debug, Subcommand)]
enum Method {
    /// SharedLLM: the lower model is the bottom layers of a Llama, as the paper begins its training
    Sharedllm(SharedLlmArguments),
}

#[derive(Debug, Args)]
struct SharedLlmArguments {
    /// Checkpoint folder, GGUF file, or the name of a model that can be fetched; a Llama without biases
    #[arg(long, value_name = "CHECKPOINT")]
    from: PathBuf,
    /// Bottom layers that attend to the context, and layers of the lower model
    #[arg(long, value_name = "M")]
    layers: usize,
    /// How the output projections of the cross attention begin
    #[arg(long, value_enum, default_value_t = Init::Copy)]
    init: Init,
    /// Tokens kept of every node of the tree: a number, a fraction with a point (0.25), or all
    #[arg(long, value_name = "P", default_value = "32", value_parser = parse_keep)]
    keep: Keep,
    /// Levels of the tree
    #[arg(long, value_name = "D", default_value_t = 3)]
    tree_depth: usize,
    /// Whether the half that is more similar to the running text is split further, rather than always the right one
    #[arg(long, value_name = "BOOL", default_value_t = true, action = clap::ArgAction::Set)]
    retrieval: bool,
    /// Replace a converted checkpoint that is already there
    #[arg(long)]
    force: bool,
    /// The checkpoint folder to write
    out: PathBuf,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Init {
    /// As those of the self attention
    Copy,
    /// As zeros: the model is still exactly the one it is made of
    Zero,
}

#[derive(Serialize)]
struct Summary<'a> {
    schema: &'static str,
    checkpoint: &'a Path,
    method: &'static str,
    injected_layers: usize,
    aliases: usize,
    bytes_written: u64,
    seconds: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    link_failure: Option<&'a str>,
}

/// Runs the command.
pub(crate) fn run(arguments: &Arguments, output: &Output) -> anyhow::Result<Outcome> {
    let Method::Sharedllm(arguments) = &arguments.method;
    let source = models::open(&arguments.from, output)?;
    let start = Instant::now();
    let Converted { bytes_written, aliases, link_failure } =
        to_sharedllm(&source, &arguments.out, &arguments.options())?;
    let summary = Summary {
        schema: "accordion.convert/1",
        checkpoint: &arguments.out,
        method: "sharedllm",
        injected_layers: arguments.layers,
        aliases,
        bytes_written,
        seconds: start.elapsed().as_secs_f64(),
        link_failure: link_failure.as_deref(),
    };
    if let Some(problem) = summary.link_failure {
        output.warning(format!("files were copied because they cannot be linked: {problem}"));
    }
    output.result(&summary, || {
        format!(
            "{}: sharedllm with {} injected layers\n{} written in {:.2} s; {aliases} tensors are others of {} too",
            summary.checkpoint.display(),
            summary.injected_layers,
            bytes(bytes_written),
            summary.seconds,
            arguments.from.display(),
        )
    })?;
    Ok(Outcome::Done)
}

impl SharedLlmArguments {
    fn options(&self) -> SharedLlmOptions {
        SharedLlmOptions {
            layers: self.layers,
            cross_attention: match self.init {
                Init::Copy => CrossAttention::Copy,
                Init::Zero => CrossAttention::Zero,
            },
            keep: self.keep,
            tree_depth: self.tree_depth,
            retrieval: self.retrieval,
            force: self.force,
        }
    }
}

/// A whole number is tokens, a number with a point a fraction.
fn parse_keep(text: &str) -> Result<Keep, String> {
    if text == "all" {
        return Ok(Keep::All);
    }
    let tokens = text.parse().ok().map(Keep::Tokens);
    let fraction = text.parse().ok().map(Keep::Fraction);
    tokens.or(fraction).ok_or_else(|| "expected a number of tokens, a fraction such as 0.25, or all".to_owned())
}
