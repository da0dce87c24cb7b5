//! What several evaluations share: who takes part, grids, framing, and the run itself.

use super::super::Outcome;
use super::super::compression::{SplitArguments, TableArguments, own_compression};
use super::super::engine::EngineArguments;
use super::super::homer::HomerArguments;
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
use accordion_graphs::architecture::Architecture;
use anyhow::{Context, ensure};
use clap::Args;
use std::path::{Path, PathBuf};
use std::str::FromStr;

/// What decides which tokens a text becomes.
const TOKENIZER: &str = "tokenizer.json";

/// What every evaluation has.
#[derive(Debug, Args)]
pub(super) struct CommonArguments {
    /// The bundle
    bundle: PathBuf,
    /// What the bundle's method is compared with on the same samples: plain, last:N (plain over the last N tokens only) or
    /// none [default: plain,last:2048]
    #[arg(long, value_name = "NAME,NAME", value_delimiter = ',')]
    against: Option<Vec<Against>>,
    /// Another bundle, whose method takes part too. Beside one of sharedllm, which cannot read a context plainly, it also reads as
    /// --against says. Its tokenizer must be the same, and its model as large
    #[arg(long, value_name = "BUNDLE")]
    compare: Option<PathBuf>,
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
        let other = self.compare.as_deref().map(|path| open_other(path, bundle)).transpose()?;
        let [own, others] = self.contenders(bundle, other.as_ref())?;
        let everyone = || own.iter().chain(&others);
        if everyone().count() == 1 && self.against.is_none() && MethodName::of(bundle) == MethodName::SharedLlm {
            output.remark(
                "only sharedllm is measured: its bundle has no decoder that reads a context plainly; --compare takes one that has",
            );
        }
        let explains = everyone().any(|one| matches!(one.compression(), Compression::Homer(_)));
        ensure!(explains || !explain, "--explain is for homer, and no one here is");
        let model = bundle.manifest().fingerprint.as_str();
        let reads_plainly = MethodName::of(bundle) != MethodName::SharedLlm;
        let mut sessions = vec![Session {
            contenders: &own,
            tokenizer,
            engine: self.settings(bundle)?,
            explain,
            model,
            openings: reads_plainly || other.is_none(),
        }];
        if let Some(other) = &other {
            let mut engine = self.settings(other)?;
            let theirs = other.manifest().fingerprint.clone();
            if theirs != model {
                engine.insert("model".to_owned(), theirs);
            }
            sessions.push(Session { contenders: &others, tokenizer, engine, explain, model, openings: !reads_plainly });
        }
        let mut rows = match &self.out {
            Some(path) => Rows::open(path).with_context(|| format!("--out {}", path.display()))?,
            None => Rows::in_memory(),
        };
        let (mut done, mut known) = (Vec::new(), 0);
        for (session, bundle) in sessions.iter().zip([Some(bundle), other.as_ref()].into_iter().flatten()) {
            let mut engines = self.engine.engines(bundle, output)?;
            let bar = output.bar(task.name(), 0);
            let rows = session.run(task, &mut engines, &mut rows, &mut |progress| {
                known += usize::from(progress.known);
                bar.set_length(progress.total as u64);
                bar.set_position(progress.done as u64);
            });
            bar.finish_and_clear();
            done.extend(rows?);
        }
        if known > 0 {
            output.remark(format!("{known} of {} rows were there already", done.len()));
        }
        let summary = summarise(task, &sessions, &done);
        output.result(&summary, || tables::summary(&summary))?;
        Ok(Outcome::Done)
    }

    /// What of `bundle` and its engine might change a result.
    fn settings(&self, bundle: &Bundle) -> anyhow::Result<Settings> {
        let manifest = bundle.manifest();
        let (engine, operators) = (self.engine.name(), self.engine.operators());
        let target = serde_json::to_value(manifest.target)?;
        Ok(Settings::from([
            ("engine".to_owned(), format!("{engine} {}, {operators} operators", manifest.numbers())),
            ("target".to_owned(), target.as_str().unwrap_or_default().to_owned()),
        ]))
    }

    /// The bundle's method first, then who it is compared with; beside them those of the `other` bundle.
    fn contenders(&self, bundle: &Bundle, other: Option<&Bundle>) -> anyhow::Result<[Vec<Contender>; 2]> {
        let reads_plainly = |bundle: &Bundle| MethodName::of(bundle) != MethodName::SharedLlm;
        let plain = [Some(bundle), other].into_iter().flatten().position(reads_plainly);
        let against = match (&self.against, plain) {
            (Some(given), _) => given.clone(),
            (None, None) => Vec::new(),
            (None, Some(_)) => vec![Against::Plain, Against::Last(2048)],
        };
        let mut contenders = [vec![self.method(bundle)?], Vec::new()];
        if let Some(other) = other {
            let method = self.theirs(other)?;
            let namesake = contenders[0].iter().any(|one| one.name() == method.name())
                || plain == Some(0) && method.name() == MethodName::Plain.name();
            let name =
                if namesake { format!("{} ({})", method.name(), folder(other)) } else { method.name().to_owned() };
            contenders[1].push(method.called(name));
        }
        for other in against {
            let other = match other {
                Against::Nobody => continue,
                Against::Plain => Contender::plain(self.plain_up_to),
                Against::Last(tokens) => Contender::last(tokens),
            };
            let Some(plain) = plain else {
                MethodName::choose(Some(MethodName::Plain), bundle).context("--against")?;
                continue;
            };
            if contenders.iter().flatten().all(|one| one.name() != other.name()) {
                contenders[plain].push(other);
            }
        }
        Ok(contenders)
    }

    /// The method of the bundle that is compared, by its own settings.
    fn theirs(&self, other: &Bundle) -> anyhow::Result<Contender> {
        Ok(match MethodName::of(other) {
            MethodName::Plain => Contender::plain(self.plain_up_to),
            _ => Contender::method(own_compression(other, self.split.width())?),
        })
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

/// The bundle at `path`, if it reads the same tokens as `bundle`, by a model of the same size.
fn open_other(path: &Path, bundle: &Bundle) -> anyhow::Result<Bundle> {
    let named = || format!("--compare {}", path.display());
    let other = Bundle::open(path).with_context(named)?;
    let read = |bundle: &Bundle| {
        let path = bundle.dir().join(TOKENIZER);
        std::fs::read(&path).with_context(|| path.display().to_string())
    };
    ensure!(
        read(bundle)? == read(&other).with_context(named)?,
        "{}: its {TOKENIZER} is another one than that of {}, so that they would not read the same tokens",
        named(),
        bundle.dir().display()
    );
    for (what, size) in [
        ("vocabulary", (|model| model.vocab_size()) as fn(&Architecture) -> usize),
        ("hidden size", |model| model.hidden_size()),
        ("number of layers", |model| model.num_layers()),
    ] {
        let [expected, found] = [bundle, &other].map(|bundle| size(bundle.architecture()));
        ensure!(found == expected, "{}: its model is another one: {what} is {found}, expected {expected}", named());
    }
    Ok(other)
}

fn folder(bundle: &Bundle) -> String {
    let name = bundle.dir().file_name().map(|name| name.to_string_lossy().into_owned());
    name.unwrap_or_else(|| bundle.dir().display().to_string())
}

/// In ascending order, each once.
pub(super) fn distinct(lengths: &[u32]) -> Vec<usize> {
    let mut lengths: Vec<usize> = lengths.iter().map(|&length| length as usize).collect();
    lengths.sort_unstable();
    lengths.dedup();
    lengths
}
