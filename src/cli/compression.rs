//! How a context is compressed, on the command line.

use super::homer::HomerArguments;
use super::method::MethodName;
use super::output::Output;
use accordion::bundle::{Bundle, Method};
use accordion::pipeline::compress::{Compression, Homer, Significance};
use accordion::pipeline::rcc::Rcc;
use accordion::pipeline::sharedllm::SharedLlm;
use accordion_calibration::significance::SignificanceTable;
use accordion_graphs::plan::homer::HomerSettings;
use accordion_graphs::plan::sharedllm::ChunkPolicy;
use anyhow::ensure;
use clap::Args;
use std::path::{Path, PathBuf};

/// How the context is compressed, besides the method's own settings.
#[derive(Debug, Args)]
#[command(next_help_heading = "Compression")]
pub(crate) struct CompressionArguments {
    #[command(flatten)]
    table: TableArguments,
    #[command(flatten)]
    split: SplitArguments,
    /// Let plain prompts be longer than the model was trained for
    #[arg(long)]
    allow_overlong: bool,
    /// Cut prompts that are longer than rcc takes (600 times its ratio), as the published code does, instead of refusing
    #[arg(long)]
    truncate_prompt: bool,
}

/// What HOMER prunes by.
#[derive(Debug, Args)]
#[command(next_help_heading = "Compression")]
pub(crate) struct TableArguments {
    /// Significance table [default: the bundle's]; none prunes by uncalibrated scores
    #[arg(long, value_name = "FILE|none")]
    table: Option<PathBuf>,
}

/// The pieces that a context is compressed in.
#[derive(Debug, Args)]
#[command(next_help_heading = "Compression")]
pub(crate) struct SplitArguments {
    /// Leaves, segments or chunks to run in one batch: a number, or max; more take more memory and less time
    #[arg(long, value_name = "N|max", default_value = "1", value_parser = parse_width)]
    width: usize,
    /// What sharedllm compresses of the prompt: sft (one chunk less than fit), longbench[:N] (all chunks before the last N
    /// tokens, 3584 if not given) or N chunks; at least one [default: sft]
    #[arg(long, value_name = "sft|longbench[:N]|N")]
    chunks: Option<ChunkPolicy>,
}

/// A number of leaves, or max.
pub(crate) fn parse_width(text: &str) -> Result<usize, String> {
    match text.parse() {
        _ if text == "max" => Ok(usize::MAX),
        Ok(width @ 1..) => Ok(width),
        _ => Err("expected a number from 1 on, or max".to_owned()),
    }
}

/// What of HOMER a command leaves to its user.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Pruning<'a> {
    /// Settings in the place of the bundle's.
    settings: Option<&'a HomerArguments>,
    /// A table in the place of the bundle's, or `none`.
    table: Option<&'a Path>,
}

impl Pruning<'_> {
    /// The bundle's settings and table.
    pub(crate) fn of_bundle() -> Self {
        Self { settings: None, table: None }
    }

    /// The bundle's settings, and scores as they are: for when it makes no difference which tokens are kept.
    pub(crate) fn uncalibrated() -> Self {
        Self { settings: None, table: Some(Path::new("none")) }
    }

    fn homer(self, bundle: &Bundle, settings: HomerSettings, width: usize) -> anyhow::Result<Homer> {
        let significance = match self.table {
            Some(path) if path == Path::new("none") => Some(Significance::Uncalibrated),
            Some(path) => Some(Significance::Table(Box::new(SignificanceTable::load(path)?))),
            None => bundle.significance()?.map(|table| Significance::Table(Box::new(table))),
        };
        let settings = self.settings.map_or(settings, |flags| flags.overriding(settings));
        Ok(Homer { settings, significance, width })
    }
}

impl TableArguments {
    /// Whether the flag fits the method.
    pub(crate) fn check(&self, method: MethodName) -> anyhow::Result<()> {
        let homer = method == MethodName::Homer;
        ensure!(homer || self.table.is_none(), "--table is for homer, and the method is {}", method.name());
        Ok(())
    }

    /// The flag, beside those of HOMER's settings.
    pub(crate) fn pruning<'a>(&'a self, settings: Option<&'a HomerArguments>) -> Pruning<'a> {
        Pruning { settings, table: self.table.as_deref() }
    }
}

impl SplitArguments {
    /// Leaves, segments or chunks in one batch.
    pub(crate) fn width(&self) -> usize {
        self.width
    }

    /// How a prompt is split for sharedllm, if that was given.
    pub(crate) fn chunks(&self) -> Option<ChunkPolicy> {
        self.chunks
    }

    /// Whether the flags fit the method.
    pub(crate) fn check(&self, method: MethodName) -> anyhow::Result<()> {
        let shared = method == MethodName::SharedLlm;
        ensure!(shared || self.chunks.is_none(), "--chunks is for sharedllm, and the method is {}", method.name());
        Ok(())
    }

    /// What `method` does to a context, as `bundle` and the flags say.
    ///
    /// `method` is the bundle's, or plain.
    pub(crate) fn compression(
        &self,
        bundle: &Bundle,
        method: MethodName,
        pruning: Pruning<'_>,
        allow_overlong: bool,
    ) -> anyhow::Result<Compression> {
        let width = self.width;
        Ok(match bundle.manifest().method {
            _ if method == MethodName::Plain => Compression::Plain { allow_overlong },
            Method::Plain => Compression::Plain { allow_overlong },
            Method::Homer { settings, .. } => Compression::Homer(pruning.homer(bundle, settings, width)?),
            Method::Rcc { settings } => Compression::Rcc(Rcc { settings, width }),
            Method::SharedLlm { settings } => {
                let policy = self.chunks.unwrap_or(ChunkPolicy::FineTuning);
                Compression::SharedLlm(SharedLlm { settings, policy, width })
            }
        })
    }
}

/// What the method of `bundle` does to a context by the bundle's own settings and table, however long it is.
pub(crate) fn own_compression(bundle: &Bundle, width: usize) -> anyhow::Result<Compression> {
    let own = Pruning { settings: None, table: None };
    SplitArguments { width, chunks: None }.compression(bundle, MethodName::of(bundle), own, true)
}

impl CompressionArguments {
    /// Whether plain prompts may be longer than the model was trained for.
    pub(crate) fn allow_overlong(&self) -> bool {
        self.allow_overlong
    }

    /// Whether the flags fit the method.
    pub(crate) fn check(&self, method: MethodName) -> anyhow::Result<()> {
        let name = method.name();
        self.table.check(method)?;
        self.split.check(method)?;
        ensure!(
            method == MethodName::Plain || !self.allow_overlong,
            "--allow-overlong is for --method plain: {name} keeps positions small by itself"
        );
        ensure!(
            method == MethodName::Rcc || !self.truncate_prompt,
            "--truncate-prompt is for rcc, and the method is {name}"
        );
        Ok(())
    }

    /// The method, as the bundle and the flags say. HOMER's settings are those of the bundle where `homer` does not
    /// override them.
    pub(crate) fn compression(
        &self,
        method: MethodName,
        homer: Option<&HomerArguments>,
        bundle: &Bundle,
    ) -> anyhow::Result<Compression> {
        self.split.compression(bundle, method, self.table.pruning(homer), self.allow_overlong)
    }

    /// Cuts prompts that rcc does not take, if that is wanted.
    pub(crate) fn truncate(&self, bundle: &Bundle, prompts: &mut [Vec<u32>], output: &Output) {
        let Method::Rcc { settings } = &bundle.manifest().method else { return };
        let longest = settings.longest_prompt();
        for prompt in prompts.iter_mut().filter(|prompt| self.truncate_prompt && prompt.len() > longest) {
            output.warning(format!("a prompt of {} tokens is cut to its first {longest}", prompt.len()));
            prompt.truncate(longest);
        }
    }
}
