//! How a context is compressed, on the command line.

use super::common::{HomerArguments, parse_width};
use super::method::MethodName;
use super::output::Output;
use accordion::bundle::{Bundle, Method};
use accordion::pipeline::compress::{Compression, Homer, Significance};
use accordion::pipeline::rcc::Rcc;
use accordion::pipeline::sharedllm::SharedLlm;
use accordion_calibration::significance::SignificanceTable;
use accordion_graphs::plan::sharedllm::ChunkPolicy;
use anyhow::ensure;
use clap::Args;
use std::path::{Path, PathBuf};

/// How the context is compressed, besides the method's own settings.
#[derive(Debug, Args)]
#[command(next_help_heading = "Compression")]
pub(crate) struct CompressionArguments {
    /// Significance table [default: the bundle's]; none prunes by uncalibrated scores
    #[arg(long, value_name = "FILE|none")]
    table: Option<PathBuf>,
    /// Leaves, segments or chunks to run in one batch: a number, or max; more take more memory and less time
    #[arg(long, value_name = "N|max", default_value = "1", value_parser = parse_width)]
    width: usize,
    /// Let plain prompts be longer than the model was trained for
    #[arg(long)]
    allow_overlong: bool,
    /// Cut prompts that are longer than rcc takes (600 times its ratio), as the published code does, instead of refusing
    #[arg(long)]
    truncate_prompt: bool,
}

impl CompressionArguments {
    /// Whether plain prompts may be longer than the model was trained for.
    pub(crate) fn allow_overlong(&self) -> bool {
        self.allow_overlong
    }

    /// Whether the flags fit the method.
    pub(crate) fn check(&self, method: MethodName) -> anyhow::Result<()> {
        let name = method.name();
        ensure!(method == MethodName::Homer || self.table.is_none(), "--table is for homer, and the method is {name}");
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
        let &Self { width, allow_overlong, .. } = self;
        Ok(match &bundle.manifest().method {
            _ if method == MethodName::Plain => Compression::Plain { allow_overlong },
            Method::Plain => Compression::Plain { allow_overlong },
            Method::Homer { settings, .. } => {
                let significance = match &self.table {
                    Some(path) if path == Path::new("none") => Some(Significance::Uncalibrated),
                    Some(path) => Some(Significance::Table(Box::new(SignificanceTable::load(path)?))),
                    None => bundle.significance()?.map(|table| Significance::Table(Box::new(table))),
                };
                let settings = homer.map_or(*settings, |flags| flags.overriding(*settings));
                Compression::Homer(Homer { settings, significance, width })
            }
            Method::Rcc { settings } => Compression::Rcc(Rcc { settings: *settings, width }),
            Method::SharedLlm { settings } => {
                Compression::SharedLlm(SharedLlm { settings: *settings, policy: ChunkPolicy::FineTuning, width })
            }
        })
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
