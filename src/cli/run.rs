//! `accordion run`.

mod start;

use super::Outcome;
use super::compression::CompressionArguments;
use super::engine::EngineArguments;
use super::framing::FramingArguments;
use super::homer::HomerArguments;
use super::method::MethodName;
use super::output::Output;
use accordion::bundle::Bundle;
use accordion::checkpoint::Tokenizer;
use accordion::pipeline::decode::Continuation;
use accordion::pipeline::generate::{Event, Generation, GenerationSettings, Recompression, generate};
use accordion::pipeline::instruction::Instruction;
use accordion::pipeline::question::with_suffix;
use accordion::pipeline::sampling::SamplingSettings;
use accordion::pipeline::stop::StopReason;
use accordion::pipeline::{ContextState, Engines};
use accordion_graphs::plan::PromptLengths;
use anyhow::ensure;
use clap::{Args, ValueEnum};
use serde::Serialize;
use start::{Past, Questions, Source};
use std::path::PathBuf;
use std::time::Instant;

/// Generate text after a context
///
/// The context is compressed for the first question. Each further question takes the place of the first one behind the
/// same compressed context: what the first one still decides is which tokens of the context were kept.
#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// The exported bundle
    bundle: PathBuf,
    /// The context, UTF-8 text; - reads standard input
    #[arg(long, value_name = "FILE", required_unless_present = "state")]
    context: Option<String>,
    /// A context compressed before, from `accordion compress`, instead
    #[arg(long, value_name = "FILE", conflicts_with_all = [
        "context", "method", "table", "width", "chunks", "recompress_every", "HomerArguments",
    ])]
    state: Option<PathBuf>,
    /// A question about the context; give several to ask them about the same compressed context [default with --state: the
    /// question it was compressed for]
    #[arg(long = "prompt", value_name = "TEXT", required_unless_present = "state")]
    prompts: Vec<String>,
    /// What happens to the context [default: the method of the bundle]
    #[arg(long, value_enum)]
    method: Option<MethodName>,
    #[command(flatten)]
    framing: FramingArguments,
    #[command(flatten)]
    generation: GenerationArguments,
    #[command(flatten)]
    compression: CompressionArguments,
    #[command(flatten)]
    homer: HomerArguments,
    #[command(flatten)]
    engine: EngineArguments,
}

/// How text is generated.
#[derive(Debug, Args)]
#[command(next_help_heading = "Generation")]
struct GenerationArguments {
    /// Most tokens to generate
    #[arg(long, value_name = "N", default_value_t = 128)]
    max_tokens: usize,
    /// Sampling temperature; 0 always takes the most likely token
    #[arg(long, value_name = "T", default_value_t = 0.0, allow_negative_numbers = true)]
    temperature: f32,
    /// Sample only from the K most likely tokens
    #[arg(long, value_name = "K")]
    top_k: Option<usize>,
    /// Sample only from the most likely tokens that have this probability together
    #[arg(long, value_name = "P", default_value_t = 1.0, allow_negative_numbers = true)]
    top_p: f32,
    /// Seed of the sampling
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// End the text before this string; may be given several times
    #[arg(long = "stop", value_name = "TEXT")]
    stops: Vec<String>,
    /// Position of the first new token
    #[arg(long, value_enum, default_value_t = ContinuationName::Next)]
    continuation: ContinuationName,
    /// Whether the first token may end the text; for rcc [default: faithful]
    #[arg(long, value_enum)]
    eos: Option<EosName>,
    /// After every N new tokens compress the whole past anew, for texts longer than the model can see
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    recompress_every: Option<u32>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum EosName {
    /// It may not, as in RCC's published code
    Faithful,
    /// It may
    Repaired,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum ContinuationName {
    /// Behind the last token of the prompt
    Next,
    /// On the last token of the prompt, as HOMER's published code generates
    OffByOne,
}

/// What `--json` prints for each question.
#[derive(Debug, Serialize)]
struct Report<'a> {
    schema: &'static str,
    method: &'a str,
    lengths: PromptLengths,
    tokens_kept: usize,
    /// As it was asked; empty where it was read with the context.
    prompt: &'a str,
    text: &'a str,
    tokens: usize,
    token_ids: &'a [u32],
    stop: &'a StopReason,
    sampling: SamplingSettings,
    /// From the prompt's token ids to the state; 0 where it was there already.
    compression_seconds: f64,
    /// Reading a further question behind the compressed context.
    question_seconds: f64,
    /// Per token; those where the past was compressed anew include that.
    token_seconds: &'a [f64],
    tokens_per_second: Option<f64>,
}

/// Runs the command.
pub(crate) fn run(arguments: &Arguments, output: &Output) -> anyhow::Result<Outcome> {
    let bundle = Bundle::open(&arguments.bundle)?;
    let saved = arguments.state.as_deref().map(|path| ContextState::load(path, &bundle)).transpose()?;
    let method = match &saved {
        Some(saved) => MethodName::of_state(&saved.origin.method),
        None => MethodName::choose(arguments.method, &bundle)?,
    };
    arguments.check(method)?;
    let settings = arguments.settings(method, &bundle);
    settings.check()?;
    let tokenizer = Tokenizer::open(bundle.dir(), bundle.architecture().vocab_size())?;
    let model = (&bundle, &tokenizer);
    let questions = Questions::new(arguments, model, method, saved.as_ref(), output)?;
    let source = match saved {
        Some(saved) => Source::saved(saved, &questions, &bundle)?,
        None => Source::context(arguments, model, method, &questions)?,
    };

    let mut engines = arguments.engine.engines(&bundle, output)?;
    let start = source.start(&mut engines, output)?;
    if method == MethodName::Rcc {
        start.warn_of_positions(&bundle, &questions, output);
    }
    let instruction = arguments.framing.instruction();
    for (number, (question, suffix)) in questions.texts.iter().zip(&questions.suffixes).enumerate() {
        if number > 0 {
            output.remark(format!("question {}: {question}", number + 1));
        }
        let started = Instant::now();
        let asked = if *suffix == start.suffix {
            None
        } else {
            Some(with_suffix(&mut engines, &start.state, start.suffix.len(), suffix)?)
        };
        let question_seconds = if asked.is_some() { started.elapsed().as_secs_f64() } else { 0.0 };
        let state = asked.as_ref().unwrap_or(&start.state);
        let past = arguments.generation.recompress_every.and_then(|every| source.past(suffix, every));
        let recompression = past.as_ref().map(Past::recompression);
        let streamed = instruction.is_none();
        let mut generation = answer(&mut engines, &tokenizer, state, &settings, recompression, streamed, output)?;
        if !streamed {
            generation.text = Instruction::answer(&generation.text).to_owned();
            output.piece(&generation.text)?;
        }
        let report = Report {
            schema: "accordion.run/1",
            method: method.name(),
            lengths: PromptLengths { suffix: suffix.len(), ..start.lengths },
            tokens_kept: state.tokens_kept(),
            prompt: question,
            text: &generation.text,
            tokens: generation.token_ids.len(),
            token_ids: &generation.token_ids,
            stop: &generation.stop,
            sampling: settings.sampling,
            compression_seconds: if number == 0 { start.seconds } else { 0.0 },
            question_seconds,
            token_seconds: &generation.seconds,
            tokens_per_second: generation.tokens_per_second(),
        };
        // The text itself has been printed.
        output.result(&report, String::new)?;
        remark_end(&generation, output);
    }
    Ok(Outcome::Done)
}

impl Arguments {
    /// Whether the flags fit the method.
    fn check(&self, method: MethodName) -> anyhow::Result<()> {
        self.framing.check(method, self.prompts.len())?;
        self.compression.check(method)?;
        ensure!(
            method != MethodName::Plain || self.generation.recompress_every.is_none(),
            "--recompress-every needs a method that compresses, and the method is plain"
        );
        ensure!(
            method == MethodName::Rcc || self.generation.eos.is_none(),
            "--eos is for rcc, and the method is {}",
            method.name()
        );
        Ok(())
    }

    fn settings(&self, method: MethodName, bundle: &Bundle) -> GenerationSettings {
        let generation = &self.generation;
        let rcc = method == MethodName::Rcc;
        GenerationSettings {
            sampling: SamplingSettings {
                temperature: generation.temperature,
                top_k: generation.top_k,
                top_p: generation.top_p,
                seed: generation.seed,
            },
            stop_strings: generation.stops.clone(),
            max_tokens: generation.max_tokens,
            keep_first: rcc && generation.eos != Some(EosName::Repaired),
            continuation: match generation.continuation {
                ContinuationName::Next => Continuation::Next,
                ContinuationName::OffByOne => Continuation::OffByOne,
            },
            // RCC's decoder is used beyond its trained positions, as its authors do; a warning says so.
            max_positions: if rcc || self.compression.allow_overlong() {
                usize::MAX
            } else {
                bundle.architecture().max_positions()
            },
        }
    }
}

/// Generates one text; if `streamed`, it is printed as it comes unless JSON is wanted.
fn answer(
    engines: &mut Engines<'_>,
    tokenizer: &Tokenizer,
    state: &ContextState,
    settings: &GenerationSettings,
    recompression: Option<Recompression<'_>>,
    streamed: bool,
    output: &Output,
) -> anyhow::Result<Generation> {
    let mut printed = Ok(());
    let mut on_event = |event: Event<'_>| match event {
        Event::Text(piece) if streamed && printed.is_ok() => printed = output.piece(piece),
        Event::Recompressing { generated, done, total } if done == total => {
            output.remark(format!("compressed the past again after {generated} tokens"));
        }
        Event::Text(_) | Event::Recompressing { .. } => {}
    };
    let generation = generate(engines, tokenizer, state, settings, recompression, &mut on_event)?;
    printed?;
    Ok(generation)
}

fn remark_end(generation: &Generation, output: &Output) {
    let why = match &generation.stop {
        StopReason::Eos => "the model ended it".to_owned(),
        StopReason::StopString(text) => format!("stop string {text:?}"),
        StopReason::MaxTokens => "as many as asked for".to_owned(),
        StopReason::ContextFull => "no position is left in the model's range".to_owned(),
        other => format!("{other:?}"),
    };
    let rate = generation.tokens_per_second().map_or(String::new(), |rate| format!(", {rate:.1} tokens/s"));
    output.remark(format!("{} tokens ({why}){rate}", generation.token_ids.len()));
}
