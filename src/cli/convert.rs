//! `accordion convert`.

use super::output::Output;
use super::text::bytes;
use super::{Outcome, models};
use accordion::convert::{Converted, CrossAttention, RccOptions, SharedLlmOptions, to_rcc, to_sharedllm};
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
    /// RCC without its training: a Llama or GPT-NeoX with itself as the encoder, and maps of constants. The text it makes
    /// means nothing; it is for time, memory and parity
    Rcc(RccArguments),
    /// SharedLLM: the lower model is the bottom layers of a Llama, as the paper begins its training
    Sharedllm(SharedLlmArguments),
}

/// What goes in, and where to.
#[derive(Debug, Args)]
struct Folders {
    /// Checkpoint folder, GGUF file, or the name of a model that can be fetched
    #[arg(long, value_name = "CHECKPOINT")]
    from: PathBuf,
    /// Replace a converted checkpoint that is already there
    #[arg(long)]
    force: bool,
    /// The checkpoint folder to write
    out: PathBuf,
}

#[derive(Debug, Args)]
struct RccArguments {
    #[command(flatten)]
    folders: Folders,
    /// Tokens of an encoder segment
    #[arg(long, value_name = "TOKENS", default_value_t = 2048)]
    window: usize,
    /// Tokens per slot; divides the window
    #[arg(long, value_name = "TOKENS", default_value_t = 32)]
    ratio: usize,
}

#[derive(Debug, Args)]
struct SharedLlmArguments {
    #[command(flatten)]
    folders: Folders,
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
    #[serde(flatten)]
    settings: Settings,
    aliases: usize,
    bytes_written: u64,
    seconds: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    link_failure: Option<&'a str>,
}

/// What was chosen and decides shapes.
#[derive(Serialize)]
#[serde(untagged)]
enum Settings {
    Rcc { window: usize, ratio: usize },
    SharedLlm { injected_layers: usize },
}

impl Settings {
    fn method(&self) -> &'static str {
        match self {
            Self::Rcc { .. } => "rcc",
            Self::SharedLlm { .. } => "sharedllm",
        }
    }

    fn text(&self) -> String {
        match self {
            Self::Rcc { window, ratio } => {
                format!("rcc, untrained, with segments of {window} and {ratio} tokens per slot")
            }
            Self::SharedLlm { injected_layers } => format!("sharedllm with {injected_layers} injected layers"),
        }
    }
}

/// Runs the command.
pub(crate) fn run(arguments: &Arguments, output: &Output) -> anyhow::Result<Outcome> {
    let folders = match &arguments.method {
        Method::Rcc(arguments) => &arguments.folders,
        Method::Sharedllm(arguments) => &arguments.folders,
    };
    let source = models::open(&folders.from, output)?;
    let start = Instant::now();
    let (Converted { bytes_written, aliases, link_failure }, settings) = match &arguments.method {
        Method::Rcc(RccArguments { window, ratio, .. }) => {
            let [window, ratio] = [*window, *ratio];
            let options = RccOptions { window, ratio, force: folders.force };
            (to_rcc(&source, &folders.out, &options)?, Settings::Rcc { window, ratio })
        }
        Method::Sharedllm(arguments) => {
            let settings = Settings::SharedLlm { injected_layers: arguments.layers };
            (to_sharedllm(&source, &folders.out, &arguments.options())?, settings)
        }
    };
    let summary = Summary {
        schema: "accordion.convert/1",
        checkpoint: &folders.out,
        method: settings.method(),
        settings,
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
            "{}: {}\n{} written in {:.2} s; {aliases} tensors are others of {} too",
            summary.checkpoint.display(),
            summary.settings.text(),
            bytes(bytes_written),
            summary.seconds,
            folders.from.display(),
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
            force: self.folders.force,
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
