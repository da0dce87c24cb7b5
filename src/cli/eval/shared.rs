//! What several evaluations share: who takes part, grids, framing, and the run itself.

use super::super::Outcome;
use super::super::common::{EngineArguments, HomerArguments};
use super::super::compression::{SplitArguments, TableArguments};
use super::super::method::MethodName;
use super::super::output::Output;
use super::tables;
use accordion::bundle::Bundle;
use accordion::checkpoint::Tokenizer;
use accordion::eval::contender::Contender;
use accordion::eval::haystack::{Frame, Grid};
use accordion::eval::rows::Rows;
use accordion::eval::session::Session;
use accordion::eval::summary::summarise;
use accordion::eval::task::{Settings, Task};
use accordion::pipeline::compress::Compression;
use accordion::pipeline::prompt::Framing;
use anyhow::{Context, ensure};
use clap::Args;
use std::path::PathBuf;
use std::str::FromStr;

/// What every evaluation has.
#[derive(Debug, Args)]
pub(super) struct CommonArguments {
    /// The bundle
    bundle: PathBuf,
    /// What the bundle's method is compared with on the same samples: plain, last:N (plain over the last N tokens only) or
    /// none [default: plain,last:2048]
    #[arg(long, value_name = "NAME,NAME", value_delimiter = ',')]
    against: Option<Vec<Against>>,
    /// Longest cases in which plain takes part [default: all]
    #[arg(long, value_name = "N")]
    plain_up_to: Option<usize>,
    /// Seed of everything random
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub(super) seed: u64,
    /// Append one JSON line per sample to this file, and take from it what is there already
    #[arg(short, long, value_name = "FILE")]
    out: Option<PathBuf>,
    #[command(flatten)]
    table: TableArguments,
    #[command(flatten)]
    split: SplitArguments,
    #[command(flatten)]
    homer: HomerArguments,
    #[command(flatten)]
    engine: EngineArguments,
}

/// Points of a grid.
#[derive(Debug, Args)]
pub(super) struct GridArguments {
    /// Tokens of prompt and answer
    #[arg(long, value_name = "N,N", value_delimiter = ',', default_value = "4096,8192", value_parser = clap::value_parser!(u32).range(1..))]
    length: Vec<u32>,
    /// Where it is hidden, in percent of the context
    #[arg(long, value_name = "P,P", value_delimiter = ',', default_value = "0,25,50,75,100", value_parser = clap::value_parser!(u8).range(0..=100))]
    depth: Vec<u8>,
    /// Samples at every length and depth
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub(super) samples: u32,
}

/// What is written around the context.
#[derive(Debug, Args)]
pub(super) struct FramingArguments {
    /// System message of the chat template
    #[arg(long, value_name = "TEXT", conflicts_with = "no_chat_template")]
    system: Option<String>,
    /// Put the question behind the context as it is, without the chat template
    #[arg(long)]
    no_chat_template: bool,
}

/// Who the bundle's method is compared with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Against {
    Nobody,
    Plain,
    Last(usize),
}

impl FromStr for Against {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let last = || text.strip_prefix("last:")?.parse().ok().filter(|&tokens| tokens > 0).map(Self::Last);
        match text {
            "none" => Ok(Self::Nobody),
            "plain" => Ok(Self::Plain),
            _ => last().ok_or_else(|| "expected plain, last:N or none".to_owned()),
        }
    }
}

impl GridArguments {
    pub(super) fn grid(&self, seed: u64) -> Grid {
        let mut depths = self.depth.clone();
        depths.sort_unstable();
        depths.dedup();
        Grid { lengths: distinct(&self.length), depths, samples: self.samples as usize, seed }
    }
}

impl FramingArguments {
    pub(super) fn frame<'a>(&'a self, tokenizer: &'a Tokenizer, new_tokens: u32) -> anyhow::Result<Frame<'a>> {
        let framing = if tokenizer.has_chat_template() && !self.no_chat_template {
            Framing::Chat { system: self.system.as_deref() }
        } else {
            ensure!(self.system.is_none(), "--system needs a chat template, and the bundle's tokenizer has none");
            Framing::Raw { prefix: "" }
        };
        Ok(Frame { tokenizer, framing, new_tokens: new_tokens as usize })
    }
}

impl CommonArguments {
    pub(super) fn open(&self) -> anyhow::Result<(Bundle, Tokenizer)> {
        let bundle = Bundle::open(&self.bundle)?;
        let tokenizer = Tokenizer::open(bundle.dir(), bundle.architecture().vocab_size())?;
        Ok((bundle, tokenizer))
    }

    /// Evaluates and prints.
    pub(super) fn run(
        &self,
        bundle: &Bundle,
        tokenizer: &Tokenizer,
        task: &dyn Task,
        explain: bool,
        output: &Output,
    ) -> anyhow::Result<Outcome> {
        let contenders = self.contenders(bundle)?;
        if self.against.is_none() && MethodName::of(bundle) == MethodName::SharedLlm {
            output.remark("only sharedllm is measured: its bundle has no decoder that reads a context plainly");
        }
        let explains = contenders.iter().any(|one| matches!(one.compression(), Compression::Homer(_)));
        ensure!(explains || !explain, "--explain is for homer, and no one here is");
        let manifest = bundle.manifest();
        let (engine, operators) = (self.engine.name(), self.engine.operators());
        let target = serde_json::to_value(manifest.target)?;
        let engine = Settings::from([
            ("engine".to_owned(), format!("{engine} {}, {operators} operators", manifest.numbers())),
            ("target".to_owned(), target.as_str().unwrap_or_default().to_owned()),
        ]);
        let session = Session { contenders: &contenders, tokenizer, engine, explain };
        let mut rows = match &self.out {
            Some(path) => Rows::open(path).with_context(|| format!("--out {}", path.display()))?,
            None => Rows::in_memory(),
        };
        let mut engines = self.engine.engines(bundle, output)?;
        let bar = output.bar(task.name(), 0);
        let mut known = 0;
        let done = session.run(task, &mut engines, &mut rows, &mut |progress| {
            known += usize::from(progress.known);
            bar.set_length(progress.total as u64);
            bar.set_position(progress.done as u64);
        });
        bar.finish_and_clear();
        let done = done?;
        if known > 0 {
            output.remark(format!("{known} of {} rows were there already", done.len()));
        }
        let summary = summarise(task, &session, &manifest.fingerprint, &done);
        output.result(&summary, || tables::summary(&summary))?;
        Ok(Outcome::Done)
    }

    /// The bundle's method first, then who it is compared with.
    fn contenders(&self, bundle: &Bundle) -> anyhow::Result<Vec<Contender>> {
        let no_plain = MethodName::of(bundle) == MethodName::SharedLlm;
        let against = match &self.against {
            Some(given) => given.clone(),
            None if no_plain => Vec::new(),
            None => vec![Against::Plain, Against::Last(2048)],
        };
        let mut contenders = vec![self.method(bundle)?];
        for other in against {
            let other = match other {
                Against::Nobody => continue,
                _ if no_plain => {
                    MethodName::choose(Some(MethodName::Plain), bundle).context("--against")?;
                    continue;
                }
                Against::Plain => Contender::plain(self.plain_up_to),
                Against::Last(tokens) => Contender::last(tokens),
            };
            if contenders.iter().all(|one| one.name() != other.name()) {
                contenders.push(other);
            }
        }
        Ok(contenders)
    }

    /// The bundle's method, as the flags say.
    fn method(&self, bundle: &Bundle) -> anyhow::Result<Contender> {
        let method = MethodName::of(bundle);
        self.table.check(method)?;
        self.split.check(method)?;
        if method == MethodName::Plain {
            return Ok(Contender::plain(self.plain_up_to));
        }
        let pruning = self.table.pruning(Some(&self.homer));
        Ok(Contender::method(self.split.compression(bundle, method, pruning, true)?))
    }
}

/// In ascending order, each once.
pub(super) fn distinct(lengths: &[u32]) -> Vec<usize> {
    let mut lengths: Vec<usize> = lengths.iter().map(|&length| length as usize).collect();
    lengths.sort_unstable();
    lengths.dedup();
    lengths
}
