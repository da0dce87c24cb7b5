//! `accordion compress`.

use super::Outcome;
use super::compression::CompressionArguments;
use super::engine::EngineArguments;
use super::framing::{FramingArguments, context_ids};
use super::method::MethodName;
use super::output::Output;
use super::report::write_aside;
use super::text::{bytes, grouped};
use accordion::bundle::Bundle;
use accordion::checkpoint::Tokenizer;
use accordion::eval::kept::KeptText;
use accordion::eval::trace::KeptRows;
use accordion::pipeline::compress::Compression;
use accordion::pipeline::prompt::PromptIds;
use accordion::pipeline::state_file::{Origin, SavedState};
use accordion::pipeline::state_precision::StatePrecision;
use accordion_graphs::plan::PromptLengths;
use accordion_graphs::precision::KvCache;
use anyhow::ensure;
use clap::{Args, ValueEnum};
use serde::Serialize;
use std::path::{Path, PathBuf};
use std::time::Instant;

/// Compress a context into a file that questions can be asked about
///
/// `accordion run --state FILE` continues from it as if the context had been compressed just then. plain and rcc keep the
/// same of a context whatever is asked; homer and sharedllm compress it for a question, which --prompt has to give.
#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// The exported bundle
    bundle: PathBuf,
    /// The context, UTF-8 text; - reads standard input
    #[arg(long, value_name = "FILE")]
    context: String,
    /// The question to compress for, or to have read already behind the context
    #[arg(long, value_name = "TEXT")]
    prompt: Option<String>,
    /// The file to write
    #[arg(long, short, value_name = "FILE")]
    out: PathBuf,
    /// What numbers keys and values are stored in; int8 takes a quarter of the room, and loses a little
    #[arg(long, value_enum, default_value_t = StatePrecisionName::Fp32)]
    state_precision: StatePrecisionName,
    /// Also write the text with what every level of the tree kept of it, for `accordion report`; for homer
    #[arg(long, value_name = "FILE", requires = "prompt")]
    kept: Option<PathBuf>,
    /// What happens to the context [default: the method of the bundle]
    #[arg(long, value_enum)]
    method: Option<MethodName>,
    #[command(flatten)]
    framing: FramingArguments,
    #[command(flatten)]
    compression: CompressionArguments,
    #[command(flatten)]
    engine: EngineArguments,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum StatePrecisionName {
    /// As computed
    Fp32,
    /// 8-bit integers with a scale per head and channel
    Int8,
}

#[derive(Debug, Serialize)]
struct Report<'a> {
    schema: &'static str,
    state: &'a Path,
    method: &'a str,
    lengths: PromptLengths,
    tokens_kept: usize,
    /// Of keys and values, injected ones included.
    cache_bytes: u64,
    /// From token ids to the state.
    seconds: f64,
}

/// Runs the command.
pub(crate) fn run(arguments: &Arguments, output: &Output) -> anyhow::Result<Outcome> {
    let Arguments { framing, prompt: question, .. } = arguments;
    let bundle = Bundle::open(&arguments.bundle)?;
    let method = MethodName::choose(arguments.method, &bundle)?;
    framing.check(method, usize::from(question.is_some()))?;
    arguments.compression.check(method)?;
    ensure!(
        question.is_some() || framing.instruction().is_none(),
        "--instruction compresses the question with the context: give it with --prompt"
    );
    ensure!(
        method == MethodName::Homer || arguments.kept.is_none(),
        "--kept is for homer, and the method is {}",
        method.name()
    );
    let compression = arguments.compression.compression(method, None, &bundle)?;
    let tokenizer = Tokenizer::open(bundle.dir(), bundle.architecture().vocab_size())?;
    let text = framing.text(&arguments.context, question.as_deref())?;
    let context = context_ids(&tokenizer, &text, &arguments.context)?;
    let (prefix, mut suffixes) = match question {
        Some(question) => framing.affixes(&tokenizer, method, std::slice::from_ref(question))?,
        None => (framing.prefix(&tokenizer, method)?, Vec::new()),
    };
    arguments.compression.truncate(&bundle, &mut suffixes, output);
    let prompt = PromptIds { prefix, context, suffix: suffixes.pop().unwrap_or_default() };
    match question {
        Some(_) => compression.check(&bundle, prompt.lengths())?,
        None => compression.check_context(&bundle, prompt.lengths())?,
    }

    let mut engines = arguments.engine.engines(&bundle, output)?;
    let bar = output.bar("compressing", 0);
    let mut on_progress = |done, total| {
        bar.set_length(total as u64);
        bar.set_position(done as u64);
    };
    let started = Instant::now();
    let mut rows = KeptRows::default();
    let state = match (&compression, question, &arguments.kept) {
        (Compression::Homer(homer), Some(_), Some(_)) => {
            homer.compress(&mut engines, &prompt, &mut rows, &mut on_progress)?
        }
        (_, Some(_), _) => compression.compress(&mut engines, &prompt, &mut on_progress)?,
        (_, None, _) => compression.read_context(&mut engines, &prompt, &mut on_progress)?,
    };
    bar.finish_and_clear();
    let seconds = started.elapsed().as_secs_f64();
    let kept = match (&compression, question, &arguments.kept) {
        (Compression::Homer(homer), Some(question), Some(path)) => {
            let plan = homer.plan(&bundle, prompt.lengths())?;
            let model = &bundle.manifest().fingerprint;
            let kept = KeptText::new(&plan, &rows, &tokenizer, &prompt, question, model)?;
            Some((path, serde_json::to_vec(&kept)?))
        }
        _ => None,
    };
    let stored_as = match arguments.state_precision {
        StatePrecisionName::Fp32 => StatePrecision::Fp32,
        StatePrecisionName::Int8 => StatePrecision::Int8,
    };
    // A decoder that keeps 8-bit integers has made it of them already.
    let stored_as = match bundle.manifest().kv_cache {
        KvCache::Int8 => StatePrecision::Int8,
        KvCache::Fp32 => stored_as,
    };
    let origin = Origin { stored_as, ..Origin::new(&bundle, (&compression).into(), &text, prompt.lengths()) };
    let report = Report {
        schema: "accordion.compress/1",
        state: &arguments.out,
        method: compression.method(),
        lengths: prompt.lengths(),
        tokens_kept: state.tokens_kept(),
        cache_bytes: state.cache_bytes(),
        seconds,
    };
    SavedState { state, prefix_ids: prompt.prefix, suffix_ids: prompt.suffix, origin }.save(&arguments.out)?;
    if let Some((path, kept)) = kept {
        write_aside(path, &kept)?;
    }
    output.result(&report, || {
        format!(
            "{}: {}, kept {} of {} tokens, {} of keys and values, {seconds:.2} s",
            report.state.display(),
            report.method,
            grouped(report.tokens_kept as u64),
            grouped(report.lengths.total() as u64),
            bytes(report.cache_bytes),
        )
    })?;
    Ok(Outcome::Done)
}
