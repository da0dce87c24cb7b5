//! `accordion eval`.

mod shared;
mod tables;

use super::Outcome;
use super::output::Output;
use accordion::checkpoint::Tokenizer;
use accordion::eval::haystack::Haystack;
use accordion::eval::needle::Needle;
use accordion::eval::passkey::{AuthorsPasskey, Passkey};
use accordion::eval::perplexity::{Perplexity, Protocol};
use accordion::eval::reconstruct::Reconstruct;
use accordion::fetch::{Cache, asset};
use accordion::pipeline::prompt::{leading_ids, read_text};
use anyhow::Context;
use clap::{Args, Subcommand};
use shared::{CommonArguments, FramingArguments, GridArguments, distinct};
use std::path::PathBuf;

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
