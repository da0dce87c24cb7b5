//! `accordion eval`.

mod tables;

use super::Outcome;
use super::common::{EngineArguments, HomerArguments, parse_width};
use super::method::MethodName;
use super::output::Output;
use accordion::bundle::{Bundle, Method};
use accordion::checkpoint::Tokenizer;
use accordion::eval::contender::Contender;
use accordion::eval::haystack::{Frame, Grid, Haystack};
use accordion::eval::needle::Needle;
use accordion::eval::passkey::{AuthorsPasskey, Passkey};
use accordion::eval::perplexity::{Perplexity, Protocol};
use accordion::eval::reconstruct::Reconstruct;
use accordion::eval::rows::Rows;
use accordion::eval::session::Session;
use accordion::eval::summary::summarise;
use accordion::eval::task::{Settings, Task};
use accordion::fetch::{Cache, asset};
use accordion::pipeline::compress::{Compression, Homer, Significance};
use accordion::pipeline::prompt::{Framing, leading_ids, read_text};
use accordion::pipeline::rcc::Rcc;
use accordion::pipeline::sharedllm::SharedLlm;
use accordion_calibration::significance::SignificanceTable;
use accordion_graphs::plan::sharedllm::ChunkPolicy;
use anyhow::{Context, ensure};
use clap::{Args, Subcommand};
use std::path::{Path, PathBuf};
use std::str::FromStr;

/// Measure what a method still finds, predicts and reproduces
#[derive(Debug, Args)]
pub(crate) struct Arguments {
    #[command(subcommand)]
    task: TaskArguments,
}

#[derive(Debug, Subcommand)]
enum TaskArguments {
    Passkey(PasskeyArguments),
    Needle(NeedleArguments),
    Perplexity(PerplexityArguments),
    Reconstruct(ReconstructArguments),
}

/// Hide a number in a long text and ask for it
#[derive(Debug, Args)]
#[command(after_help = TEXT_HELP)]
struct PasskeyArguments {
    #[command(flatten)]
    grid: GridArguments,
    #[command(flatten)]
    framing: FramingArguments,
    /// The text to hide in, UTF-8
    #[arg(long, value_name = "FILE")]
    haystack: Option<String>,
    /// Ask the questions of a file of HOMER's authors instead: JSON lines with prefix, context, postfix and target
    #[arg(long, value_name = "FILE", conflicts_with_all = ["haystack", "length", "depth", "new_tokens", "system", "no_chat_template"])]
    data: Option<PathBuf>,
    /// Most tokens to generate; they are part of the length
    #[arg(long, value_name = "N", default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..=4096))]
    new_tokens: u32,
    /// Tell in which node of the tree the number was lost
    #[arg(long)]
    explain: bool,
    #[command(flatten)]
    common: CommonArguments,
}

/// Hide a sentence at every depth of every length and ask about it
#[derive(Debug, Args)]
#[command(after_help = TEXT_HELP)]
struct NeedleArguments {
    #[command(flatten)]
    grid: GridArguments,
    #[command(flatten)]
    framing: FramingArguments,
    /// The text to hide in, UTF-8
    #[arg(long, value_name = "FILE")]
    haystack: Option<String>,
    /// The sentence
    #[arg(long, value_name = "TEXT", default_value = Needle::SENTENCE, requires = "question", requires = "keywords")]
    needle: String,
    /// What is asked about it
    #[arg(long, value_name = "TEXT", default_value = Needle::QUESTION, requires = "needle")]
    question: String,
    /// A part of the sentence that an answer must have; may be given several times
    #[arg(long = "keyword", value_name = "TEXT", id = "keywords", default_values = Needle::KEYWORDS, requires = "needle")]
    keywords: Vec<String>,
    /// Most tokens to generate; they are part of the length
    #[arg(long, value_name = "N", default_value_t = 40, value_parser = clap::value_parser!(u32).range(1..=4096))]
    new_tokens: u32,
    /// Tell in which node of the tree the key words were lost
    #[arg(long)]
    explain: bool,
    #[command(flatten)]
    common: CommonArguments,
}

/// Predict what follows a compressed text
#[derive(Debug, Args)]
#[command(after_help = TEXT_HELP)]
struct PerplexityArguments {
    /// Tokens of the past
    #[arg(long, value_name = "N,N", value_delimiter = ',', default_value = "4096", value_parser = clap::value_parser!(u32).range(1..))]
    length: Vec<u32>,
    /// Read windows of N tokens from their start instead, segment by segment, as HOMER's authors do on PG-19 (N = 16384)
    #[arg(long, value_name = "N", conflicts_with = "length")]
    from_start: Option<u32>,
    /// Tokens to predict behind a past [default: 512; from the start half of the positions the model was trained for]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    segment: Option<u32>,
    /// First and last tokens of the past that are kept whole, as prefix and suffix
    #[arg(long, value_name = "N", default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..))]
    buffer: u32,
    /// Predicted tokens that are averaged together by position
    #[arg(long, value_name = "N", default_value_t = 128, value_parser = clap::value_parser!(u32).range(1..))]
    bucket: u32,
    /// Windows
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    samples: u32,
    /// The text, UTF-8
    #[arg(long, value_name = "FILE")]
    text: Option<String>,
    #[command(flatten)]
    common: CommonArguments,
}

/// Continue a passage of the compressed text from a cue of 10 to 20 tokens
#[derive(Debug, Args)]
#[command(after_help = TEXT_HELP)]
struct ReconstructArguments {
    /// Tokens of the context
    #[arg(long, value_name = "N,N", value_delimiter = ',', default_value = "2048", value_parser = clap::value_parser!(u32).range(1..))]
    length: Vec<u32>,
    /// Tokens to continue by
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=4096))]
    new_tokens: u32,
    /// Passages at every length
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    samples: u32,
    /// The text, UTF-8
    #[arg(long, value_name = "FILE")]
    text: Option<String>,
    #[command(flatten)]
    common: CommonArguments,
}

const TEXT_HELP: &str = "Without a text it is the novel Emma, fetched into the cache. The same seed asks the same questions; \
    with --out, samples that are in the file are not computed again.";

/// What every evaluation has.
#[derive(Debug, Args)]
struct CommonArguments {
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
    seed: u64,
    /// Append one JSON line per sample to this file, and take from it what is there already
    #[arg(short, long, value_name = "FILE")]
    out: Option<PathBuf>,
    /// Significance table [default: the bundle's]; none prunes by uncalibrated scores
    #[arg(long, value_name = "FILE|none")]
    table: Option<PathBuf>,
    /// Leaves to build in one batch: a number, or max; more of them take more memory and less time
    #[arg(long, value_name = "N|max", default_value = "1", value_parser = parse_width)]
    width: usize,
    #[command(flatten)]
    homer: HomerArguments,
    #[command(flatten)]
    engine: EngineArguments,
}

/// Points of a grid.
#[derive(Debug, Args)]
struct GridArguments {
    /// Tokens of prompt and answer
    #[arg(long, value_name = "N,N", value_delimiter = ',', default_value = "4096,8192", value_parser = clap::value_parser!(u32).range(1..))]
    length: Vec<u32>,
    /// Where it is hidden, in percent of the context
    #[arg(long, value_name = "P,P", value_delimiter = ',', default_value = "0,25,50,75,100", value_parser = clap::value_parser!(u8).range(0..=100))]
    depth: Vec<u8>,
    /// Samples at every length and depth
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    samples: u32,
}

/// What is written around the context.
#[derive(Debug, Args)]
struct FramingArguments {
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

/// Runs the command.
pub(crate) fn run(arguments: &Arguments, output: &Output) -> anyhow::Result<Outcome> {
    match &arguments.task {
        TaskArguments::Passkey(arguments) => arguments.run(output),
        TaskArguments::Needle(arguments) => arguments.run(output),
        TaskArguments::Perplexity(arguments) => arguments.run(output),
        TaskArguments::Reconstruct(arguments) => arguments.run(output),
    }
}

impl PasskeyArguments {
    fn run(&self, output: &Output) -> anyhow::Result<Outcome> {
        let (bundle, tokenizer) = self.common.open()?;
        if let Some(path) = &self.data {
            let task = AuthorsPasskey::open(path, &tokenizer, self.grid.samples as usize)
                .with_context(|| format!("--data {}", path.display()))?;
            return self.common.run(&bundle, &tokenizer, &task, self.explain, output);
        }
        let frame = self.framing.frame(&tokenizer, self.new_tokens)?;
        let haystack = text(self.haystack.as_deref(), "--haystack", &tokenizer, output)?;
        let task = Passkey { frame, haystack: &haystack, grid: self.grid.grid(self.common.seed) };
        self.common.run(&bundle, &tokenizer, &task, self.explain, output)
    }
}

impl NeedleArguments {
    fn run(&self, output: &Output) -> anyhow::Result<Outcome> {
        let (bundle, tokenizer) = self.common.open()?;
        let frame = self.framing.frame(&tokenizer, self.new_tokens)?;
        let haystack = text(self.haystack.as_deref(), "--haystack", &tokenizer, output)?;
        let task = Needle {
            frame,
            haystack: &haystack,
            grid: self.grid.grid(self.common.seed),
            sentence: self.needle.clone(),
            question: self.question.clone(),
            keywords: self.keywords.clone(),
        };
        task.check()?;
        self.common.run(&bundle, &tokenizer, &task, self.explain, output)
    }
}

impl PerplexityArguments {
    fn run(&self, output: &Output) -> anyhow::Result<Outcome> {
        const SEGMENT: usize = 512;
        let (bundle, tokenizer) = self.common.open()?;
        let half = (bundle.architecture().max_positions() / 2).max(1);
        let segment = self.segment.map(|segment| segment as usize);
        let (protocol, segment) = match self.from_start {
            Some(window) => (Protocol::FromStart(window as usize), segment.unwrap_or(half)),
            None => (Protocol::Anywhere(distinct(&self.length)), segment.unwrap_or(SEGMENT)),
        };
        let text = text(self.text.as_deref(), "--text", &tokenizer, output)?;
        let task = Perplexity {
            text: &text,
            leading: leading_ids(&tokenizer)?,
            protocol,
            samples: self.samples as usize,
            segment,
            buffer: self.buffer as usize,
            bucket: self.bucket as usize,
            seed: self.common.seed,
        };
        task.check()?;
        self.common.run(&bundle, &tokenizer, &task, false, output)
    }
}

impl ReconstructArguments {
    fn run(&self, output: &Output) -> anyhow::Result<Outcome> {
        let (bundle, tokenizer) = self.common.open()?;
        let text = text(self.text.as_deref(), "--text", &tokenizer, output)?;
        let task = Reconstruct {
            text: &text,
            leading: leading_ids(&tokenizer)?,
            lengths: distinct(&self.length),
            samples: self.samples as usize,
            new_tokens: self.new_tokens as usize,
            seed: self.common.seed,
        };
        self.common.run(&bundle, &tokenizer, &task, false, output)
    }
}

impl GridArguments {
    fn grid(&self, seed: u64) -> Grid {
        let mut depths = self.depth.clone();
        depths.sort_unstable();
        depths.dedup();
        Grid { lengths: distinct(&self.length), depths, samples: self.samples as usize, seed }
    }
}

impl FramingArguments {
    fn frame<'a>(&'a self, tokenizer: &'a Tokenizer, new_tokens: u32) -> anyhow::Result<Frame<'a>> {
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
    fn open(&self) -> anyhow::Result<(Bundle, Tokenizer)> {
        let bundle = Bundle::open(&self.bundle)?;
        let tokenizer = Tokenizer::open(bundle.dir(), bundle.architecture().vocab_size())?;
        Ok((bundle, tokenizer))
    }

    /// Evaluates and prints.
    fn run(
        &self,
        bundle: &Bundle,
        tokenizer: &Tokenizer,
        task: &dyn Task,
        explain: bool,
        output: &Output,
    ) -> anyhow::Result<Outcome> {
        let contenders = self.contenders(bundle)?;
        let explains = contenders.iter().any(|one| matches!(one.compression(), Compression::Homer(_)));
        ensure!(explains || !explain, "--explain is for homer, and no one here is");
        let manifest = bundle.manifest();
        let [_, operators] = self.engine.flags();
        let target = serde_json::to_value(manifest.target)?;
        let engine = Settings::from([
            ("engine".to_owned(), format!("ort-cpu {}, {operators} operators", manifest.precision)),
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
        let exported = &bundle.manifest().method;
        let homer = matches!(exported, Method::Homer { .. });
        ensure!(homer || self.table.is_none(), "--table is for homer, and the method is {}", exported.name());
        let width = self.width;
        Ok(Contender::method(match exported {
            Method::Plain => return Ok(Contender::plain(self.plain_up_to)),
            Method::Homer { settings, .. } => {
                let significance = match &self.table {
                    Some(path) if path == Path::new("none") => Some(Significance::Uncalibrated),
                    Some(path) => Some(Significance::Table(Box::new(SignificanceTable::load(path)?))),
                    None => bundle.significance()?.map(|table| Significance::Table(Box::new(table))),
                };
                Compression::Homer(Homer { settings: self.homer.overriding(*settings), significance, width })
            }
            Method::Rcc { settings } => Compression::Rcc(Rcc { settings: *settings, width }),
            Method::SharedLlm { settings } => {
                Compression::SharedLlm(SharedLlm { settings: *settings, policy: ChunkPolicy::FineTuning, width })
            }
        }))
    }
}

/// The text of a file, or of the novel that is the default.
fn text(file: Option<&str>, flag: &'static str, tokenizer: &Tokenizer, output: &Output) -> anyhow::Result<Haystack> {
    let read = || -> anyhow::Result<String> {
        let Some(file) = file else {
            let mut bar = None;
            let mut on_progress = |progress| super::fetch::show(&mut bar, output, progress);
            let fetched = Cache::from_environment()?.fetch(&asset::EMMA, &mut on_progress)?;
            return Ok(read_text(&fetched.path().to_string_lossy())?);
        };
        Ok(read_text(file)?)
    };
    let text = read().with_context(|| file.map_or(flag.to_owned(), |file| format!("{flag} {file}")))?;
    Ok(Haystack::new(text, tokenizer, flag)?)
}

/// In ascending order, each once.
fn distinct(lengths: &[u32]) -> Vec<usize> {
    let mut lengths: Vec<usize> = lengths.iter().map(|&length| length as usize).collect();
    lengths.sort_unstable();
    lengths.dedup();
    lengths
}
