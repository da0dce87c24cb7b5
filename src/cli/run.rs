//! `accordion run`.

use super::Outcome;
use super::common::{EngineArguments, HomerArguments, parse_width};
use super::method::MethodName;
use super::output::Output;
use accordion::bundle::{Bundle, Method};
use accordion::checkpoint::Tokenizer;
use accordion::pipeline::compress::{Compression, Homer, Significance};
use accordion::pipeline::decode::Continuation;
use accordion::pipeline::generate::{Event, Generation, GenerationSettings, Recompression, generate};
use accordion::pipeline::prompt::{Framing, PromptIds, encode_affixes, encode_context, read_text};
use accordion::pipeline::question::with_suffix;
use accordion::pipeline::rcc::Rcc;
use accordion::pipeline::sampling::SamplingSettings;
use accordion::pipeline::sharedllm::SharedLlm;
use accordion::pipeline::stop::StopReason;
use accordion::pipeline::{ContextState, Engines};
use accordion_calibration::significance::SignificanceTable;
use accordion_graphs::plan::PromptLengths;
use accordion_graphs::plan::sharedllm::ChunkPolicy;
use anyhow::{Context, ensure};
use clap::{Args, ValueEnum};
use serde::Serialize;
use std::path::{Path, PathBuf};
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
    #[arg(long, value_name = "FILE")]
    context: String,
    /// A question about the context; give several to ask them about the same compressed context
    #[arg(long = "prompt", value_name = "TEXT", required = true)]
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

/// What is written around the context.
#[derive(Debug, Args)]
#[command(next_help_heading = "Prompt")]
struct FramingArguments {
    /// System message of the chat template
    #[arg(long, value_name = "TEXT", conflicts_with_all = ["no_chat_template", "prefix"])]
    system: Option<String>,
    /// Put the question behind the context as it is, without the chat template
    #[arg(long)]
    no_chat_template: bool,
    /// Text before the context, where there is no chat template or it is not used
    #[arg(long, value_name = "TEXT")]
    prefix: Option<String>,
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
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum ContinuationName {
    /// Behind the last token of the prompt
    Next,
    /// On the last token of the prompt, as HOMER's published code generates
    OffByOne,
}

/// How the context is compressed, besides the method's own settings.
#[derive(Debug, Args)]
#[command(next_help_heading = "Compression")]
struct CompressionArguments {
    /// Significance table [default: the bundle's]; none prunes by uncalibrated scores
    #[arg(long, value_name = "FILE|none")]
    table: Option<PathBuf>,
    /// Leaves to build in one batch: a number, or max; more of them take more memory and less time
    #[arg(long, value_name = "N|max", default_value = "1", value_parser = parse_width)]
    width: usize,
    /// After every N new tokens compress the whole past anew, for texts longer than the model can see
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    recompress_every: Option<u32>,
    /// Let plain prompts be longer than the model was trained for
    #[arg(long)]
    allow_overlong: bool,
}

/// What `--json` prints for each question.
#[derive(Debug, Serialize)]
struct Report<'a> {
    schema: &'static str,
    method: &'a str,
    lengths: PromptLengths,
    tokens_kept: usize,
    prompt: &'a str,
    text: &'a str,
    tokens: usize,
    token_ids: &'a [u32],
    stop: &'a StopReason,
    sampling: SamplingSettings,
    /// From the prompt's token ids to the state; 0 where that of an earlier question served.
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
    let arch = bundle.architecture();
    let compression = compression(arguments, &bundle)?;
    let max_positions = if arguments.compression.allow_overlong { usize::MAX } else { arch.max_positions() };
    let settings = settings(&arguments.generation, max_positions);
    settings.check()?;
    let tokenizer = Tokenizer::open(bundle.dir(), arch.vocab_size())?;
    let prompts = prompts(arguments, &tokenizer)?;
    check_recompressions(arguments, &bundle, &compression, &prompts)?;

    let mut engines = arguments.engine.engines(&bundle, output)?;
    let bar = output.bar("compressing", 0);
    let started = Instant::now();
    let first = compression.compress(&mut engines, &prompts[0], &mut |done, total| {
        bar.set_length(total as u64);
        bar.set_position(done as u64);
    })?;
    bar.finish_and_clear();
    let compressed = started.elapsed().as_secs_f64();
    output.remark(format!(
        "{}: kept {} of {} tokens, {compressed:.2} s",
        compression.method(),
        first.len(),
        prompts[0].lengths().total()
    ));

    for (number, (question, prompt)) in arguments.prompts.iter().zip(&prompts).enumerate() {
        let started = Instant::now();
        let asked = if number == 0 {
            None
        } else {
            Some(with_suffix(&mut engines, &first, prompts[0].suffix.len(), &prompt.suffix)?)
        };
        let question_seconds = if number == 0 { 0.0 } else { started.elapsed().as_secs_f64() };
        if number > 0 {
            output.remark(format!("question {}: {question}", number + 1));
        }
        let state = asked.as_ref().unwrap_or(&first);
        let recompression = arguments.compression.recompress_every.map(|every| Recompression {
            compression: &compression,
            prompt,
            every: every as usize,
        });
        let generation = answer(&mut engines, &tokenizer, state, &settings, recompression, output)?;
        let report = Report {
            schema: "accordion.run/1",
            method: compression.method(),
            lengths: prompt.lengths(),
            tokens_kept: state.len(),
            prompt: question,
            text: &generation.text,
            tokens: generation.token_ids.len(),
            token_ids: &generation.token_ids,
            stop: &generation.stop,
            sampling: settings.sampling,
            compression_seconds: if number == 0 { compressed } else { 0.0 },
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

/// Generates one text, printing it as it comes unless JSON is wanted.
fn answer(
    engines: &mut Engines<'_>,
    tokenizer: &Tokenizer,
    state: &ContextState,
    settings: &GenerationSettings,
    recompression: Option<Recompression<'_>>,
    output: &Output,
) -> anyhow::Result<Generation> {
    let mut printed = Ok(());
    let mut on_event = |event: Event<'_>| match event {
        Event::Text(piece) if printed.is_ok() => printed = output.piece(piece),
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

/// The method, as the bundle and the flags say.
fn compression(arguments: &Arguments, bundle: &Bundle) -> anyhow::Result<Compression> {
    let CompressionArguments { table, width, recompress_every, allow_overlong } = &arguments.compression;
    let method = MethodName::choose(arguments.method, bundle)?;
    let homer = method == MethodName::Homer;
    ensure!(homer || table.is_none(), "--table is for homer, and the method is {}", method.name());
    ensure!(
        method == MethodName::Plain || !allow_overlong,
        "--allow-overlong is for --method plain: {} keeps positions small by itself",
        method.name()
    );
    ensure!(
        method != MethodName::Plain || recompress_every.is_none(),
        "--recompress-every needs a method that compresses, and the method is plain"
    );
    let width = *width;
    Ok(match &bundle.manifest().method {
        _ if method == MethodName::Plain => Compression::Plain { allow_overlong: *allow_overlong },
        Method::Plain => Compression::Plain { allow_overlong: *allow_overlong },
        Method::Homer { settings, .. } => {
            let significance = match table {
                Some(path) if path == Path::new("none") => Some(Significance::Uncalibrated),
                Some(path) => Some(Significance::Table(Box::new(SignificanceTable::load(path)?))),
                None => bundle.significance()?.map(|table| Significance::Table(Box::new(table))),
            };
            Compression::Homer(Homer { settings: arguments.homer.overriding(*settings), significance, width })
        }
        Method::Rcc { settings } => Compression::Rcc(Rcc { settings: *settings, width }),
        Method::SharedLlm { settings } => {
            Compression::SharedLlm(SharedLlm { settings: *settings, policy: ChunkPolicy::FineTuning, width })
        }
    })
}

fn settings(arguments: &GenerationArguments, max_positions: usize) -> GenerationSettings {
    GenerationSettings {
        sampling: SamplingSettings {
            temperature: arguments.temperature,
            top_k: arguments.top_k,
            top_p: arguments.top_p,
            seed: arguments.seed,
        },
        stop_strings: arguments.stops.clone(),
        max_tokens: arguments.max_tokens,
        continuation: match arguments.continuation {
            ContinuationName::Next => Continuation::Next,
            ContinuationName::OffByOne => Continuation::OffByOne,
        },
        max_positions,
    }
}

/// The token ids of every question with the context before it.
fn prompts(arguments: &Arguments, tokenizer: &Tokenizer) -> anyhow::Result<Vec<PromptIds>> {
    let FramingArguments { system, no_chat_template, prefix } = &arguments.framing;
    let framing = if tokenizer.has_chat_template() && !no_chat_template {
        ensure!(
            prefix.is_none(),
            "--prefix has no place in the chat template; use --system, or add --no-chat-template"
        );
        Framing::Chat { system: system.as_deref() }
    } else {
        ensure!(system.is_none(), "--system needs a chat template, and the bundle's tokenizer has none; use --prefix");
        Framing::Raw { prefix: prefix.as_deref().unwrap_or_default() }
    };
    let text = read_text(&arguments.context)?;
    let context = encode_context(tokenizer, &text).with_context(|| format!("--context {}", arguments.context))?;
    let mut prompts: Vec<PromptIds> = Vec::with_capacity(arguments.prompts.len());
    for question in &arguments.prompts {
        let (prefix, suffix) = encode_affixes(tokenizer, framing, question)?;
        if let Some(first) = prompts.first() {
            ensure!(
                first.prefix == prefix,
                "the chat template writes the question before the context: ask one at a time"
            );
        }
        prompts.push(PromptIds { prefix, context: context.clone(), suffix });
    }
    Ok(prompts)
}

/// Whether everything that will be compressed can be, so that no text breaks off in the middle.
fn check_recompressions(
    arguments: &Arguments,
    bundle: &Bundle,
    compression: &Compression,
    prompts: &[PromptIds],
) -> anyhow::Result<()> {
    compression.check(bundle, prompts[0].lengths())?;
    let Some(every) = arguments.compression.recompress_every else { return Ok(()) };
    for prompt in prompts {
        let lengths = prompt.lengths();
        for generated in (every as usize..arguments.generation.max_tokens).step_by(every as usize) {
            let past = PromptLengths { context: lengths.context.saturating_add(generated), ..lengths };
            compression
                .check(bundle, past)
                .with_context(|| format!("--recompress-every {every}: compressing again after {generated} tokens"))?;
        }
    }
    Ok(())
}
