//! `accordion verify`.

use super::Outcome;
use super::bisect::{Asked, BisectArguments};
use super::common::EngineArguments;
use super::output::Output;
use accordion::bundle::{Bundle, Method};
use accordion::checkpoint::Tokenizer;
use accordion::environment::Machine;
use accordion::goldens::HomerCase;
use accordion::reference::homer::Prompt;
use accordion::reference::llama::Llama;
use accordion::verify::golden::{engine_against_golden, export_golden, golden_plan, reference_against_golden};
use accordion::verify::homer::{HomerInput, compare_homer};
use accordion::verify::plain::compare_plain;
use accordion::verify::schema::{Subject, VerifyReport};
use accordion::verify::verdict::Verdict;
use accordion::verify::weights::finite_weights;
use accordion::verify::{Detail, Findings, text};
use accordion_graphs::blocks::Target;
use accordion_graphs::plan::PromptLengths;
use accordion_graphs::plan::homer::{HomerPlan, HomerSettings};
use anyhow::Context;
use clap::{Args, ValueEnum};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};
use std::ops::Range;
use std::path::{Path, PathBuf};

/// Rows of a plain check, unless said otherwise.
const PLAIN_CONTEXT: usize = 512;
/// Longer contexts than any model reads are mistyped.
const MAX_CONTEXT: usize = 1 << 26;

/// Compare a bundle with the reference, or everything with a golden file, tap by tap
///
/// Exits with 1 if anything is out of bounds, and with 0 if everything is within them or ambiguous: a near-tie between two
/// tokens that was decided differently.
#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// The bundle
    #[arg(required_unless_present = "golden", conflicts_with = "golden")]
    bundle: Option<PathBuf>,
    /// What to hold the bundle against
    #[arg(long, value_enum, default_value_t = Against::Reference, conflicts_with = "golden")]
    against: Against,
    /// Hold the reference and the graphs against the authors' tensors in homer_<case>.json and the files beside it
    #[arg(long, value_name = "PATH")]
    golden: Option<PathBuf>,
    /// Text to take the tokens from [default: pseudo-random tokens]
    #[arg(long, value_name = "FILE")]
    text: Option<PathBuf>,
    /// Seed of the pseudo-random tokens
    #[arg(long, value_name = "N", default_value_t = 0, conflicts_with = "text")]
    seed: u64,
    /// Tokens of the context [default: enough for a tree of height 2; 512 for plain]
    #[arg(long, value_name = "N")]
    context: Option<usize>,
    /// Tokens before the context [default: an eighth of a chunk, at most 16]
    #[arg(long, value_name = "N")]
    prefix: Option<usize>,
    /// Tokens after the context [default: an eighth of a chunk, at most 16]
    #[arg(long, value_name = "N")]
    suffix: Option<usize>,
    /// Tokens that both sides are fed after the context
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u16).range(..=1024))]
    steps: u16,
    /// Leaves the engine builds in one batch: a number or max
    #[arg(long, value_name = "N", default_value = "1", value_parser = width)]
    width: usize,
    /// What to compare
    #[arg(long, value_enum, default_value_t = Taps::All)]
    taps: Taps,
    /// Also write the report, as JSON, to this file
    #[arg(long, short, value_name = "FILE")]
    out: Option<PathBuf>,
    #[command(flatten)]
    bisect: BisectArguments,
    #[command(flatten)]
    engine: EngineArguments,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Against {
    /// The method in plain Rust, computed from the same weights
    Reference,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Taps {
    /// Every layer of every node
    All,
    /// What enters and leaves every tree node, and the result
    Nodes,
    /// Which tokens every node keeps, and the result
    Result,
}

fn width(text: &str) -> Result<usize, String> {
    match text {
        "max" => Ok(usize::MAX),
        _ => text.parse().ok().filter(|&n| n > 0).ok_or_else(|| "expected a number above 0, or max".to_owned()),
    }
}

/// Runs the command.
pub(crate) fn run(arguments: &Arguments, output: &Output) -> anyhow::Result<Outcome> {
    if let (true, Some(bundle)) = (arguments.bisect.wanted(), &arguments.bundle) {
        return search(&Bundle::open(bundle)?, arguments, output);
    }
    let report = match (&arguments.golden, &arguments.bundle) {
        (Some(golden), _) => against_golden(golden, arguments, output)?,
        (None, Some(bundle)) => against_reference(bundle, arguments, output)?,
        (None, None) => anyhow::bail!("a bundle or --golden is needed"),
    };
    if let Some(path) = &arguments.out {
        write_aside(path, &report)?;
    }
    output.result(&report, || {
        text::table(&report, &|label, verdict| {
            let style = match verdict {
                Verdict::Pass => "32",
                Verdict::Ambiguous => "1;33",
                Verdict::Fail => "1;31",
            };
            output.paint(label, style)
        })
    })?;
    if report.verdict == Verdict::Ambiguous {
        output.warning(
            "a near-tie was decided differently: neither side is wrong, but what follows from it was not compared",
        );
    }
    Ok(if report.verdict == Verdict::Fail { Outcome::CheckFailed } else { Outcome::Done })
}

fn against_reference(path: &Path, arguments: &Arguments, output: &Output) -> anyhow::Result<VerifyReport> {
    let bundle = Bundle::open(path)?;
    let bar = output.bar("Reading the weights", bundle.weights().index().stored().map(|(_, w)| w.len).sum());
    let weights = finite_weights(bundle.weights(), |done, _| bar.set_position(done))?;
    bar.finish_and_clear();
    if weights.iter().any(|tap| tap.verdict == Verdict::Fail) {
        return Ok(VerifyReport::in_order(subject(&bundle, Vec::new()), weights, 0));
    }
    let (lengths, mut findings) = match bundle.manifest().method.clone() {
        Method::Plain => plain(&bundle, arguments, output)?,
        Method::Homer { settings, tree_heights } => homer(&bundle, settings, &tree_heights, arguments, output)?,
        Method::Rcc { .. } | Method::SharedLlm { .. } => anyhow::bail!("verify does not know this method"),
    };
    findings.taps.splice(0..0, weights);
    let subject = subject(&bundle, lengths);
    Ok(VerifyReport::in_order(subject, findings.taps, findings.not_comparable))
}

/// Looks for the first wrong tap on what would be compared.
fn search(bundle: &Bundle, arguments: &Arguments, output: &Output) -> anyhow::Result<Outcome> {
    let run = |asked: &Asked<'_>| arguments.bisect.run(bundle, asked, &arguments.engine, output);
    match bundle.manifest().method.clone() {
        Method::Plain => {
            let tokens = Tokens::new(bundle, arguments, output)?;
            let ids = tokens.take(tokens.context(arguments.context, PLAIN_CONTEXT, 0)?)?;
            run(&Asked::Plain(&ids))
        }
        Method::Homer { settings, tree_heights } => {
            let tokens = Tokens::new(bundle, arguments, output)?;
            let lengths = homer_lengths(settings, &tree_heights, arguments, &tokens)?;
            let plan = HomerPlan::new(bundle.architecture().num_layers(), lengths, settings)?;
            let ids = tokens.take(lengths.total())?;
            let (before, suffix) = ids.split_at(lengths.prefix + lengths.context);
            let (prefix, context) = before.split_at(lengths.prefix);
            run(&Asked::Homer(&plan, Prompt { prefix, context, suffix }, &significance(bundle, &plan, output)?))
        }
        method => anyhow::bail!("--bisect knows plain and homer, the bundle's method is {}", method.name()),
    }
}

type Environment = Vec<(String, String)>;

fn plain(bundle: &Bundle, arguments: &Arguments, output: &Output) -> anyhow::Result<(Environment, Findings)> {
    let tokens = Tokens::new(bundle, arguments, output)?;
    let length = tokens.context(arguments.context, PLAIN_CONTEXT, 0)?;
    let ids = tokens.take(length)?;
    let reference = Llama::load(bundle.llama()?, |name| bundle.weights().tensor(name))?;
    let mut engines = arguments.engine.engines(bundle, output)?;
    let bar = output.bar("Comparing tokens", length as u64);
    let mut on_progress = |done| bar.set_position(done as u64);
    let findings = compare_plain(&mut engines, &reference, &ids, detail(arguments), &mut on_progress)?;
    bar.finish_and_clear();
    Ok((vec![("tokens".to_owned(), length.to_string()), tokens.source()], findings))
}

fn homer(
    bundle: &Bundle,
    settings: HomerSettings,
    heights: &[usize],
    arguments: &Arguments,
    output: &Output,
) -> anyhow::Result<(Environment, Findings)> {
    let architecture = bundle.llama()?;
    let tokens = Tokens::new(bundle, arguments, output)?;
    let lengths = homer_lengths(settings, heights, arguments, &tokens)?;
    let plan = HomerPlan::new(architecture.num_layers, lengths, settings)?;
    let PromptLengths { prefix, context, suffix } = lengths;
    let ids = tokens.take(lengths.total().saturating_add(arguments.steps.into()))?;
    let part = |range: Range<usize>| &ids[range];
    let rows = significance(bundle, &plan, output)?;
    let bias: Vec<&[f32]> = rows.iter().map(Vec::as_slice).collect();
    let input = HomerInput {
        plan: &plan,
        prefix: part(0..prefix),
        context: part(prefix..prefix + context),
        suffix: part(prefix + context..plan.lengths.total()),
        teacher: part(plan.lengths.total()..ids.len()),
        bias: &bias,
        width: arguments.width,
    };
    let reference = Llama::load(architecture, |name| bundle.weights().tensor(name))?;
    let mut engines = arguments.engine.engines(bundle, output)?;
    let bar = output.bar("Comparing nodes", plan.nodes.len() as u64);
    let mut on_progress = |done| bar.set_position(done as u64);
    let findings = compare_homer(&mut engines, &reference, &input, detail(arguments), &mut on_progress)?;
    bar.finish_and_clear();
    let lengths = format!("{prefix} + {context} + {suffix}, then {}", arguments.steps);
    let tree =
        format!("height {}, {} nodes, width {}", plan.tree_height, plan.nodes.len(), width_name(arguments.width));
    Ok((vec![("tokens".to_owned(), lengths), ("tree".to_owned(), tree), tokens.source()], findings))
}

/// Lengths of the prompt's parts, each as asked for or by default.
fn homer_lengths(
    settings: HomerSettings,
    heights: &[usize],
    arguments: &Arguments,
    tokens: &Tokens,
) -> anyhow::Result<PromptLengths> {
    let chunk = settings.max_initial_chunk_len.unwrap_or(settings.max_chunk_len).min(settings.max_chunk_len);
    let affix = (chunk / 8).clamp(1, 16);
    let (prefix, suffix) = (arguments.prefix.unwrap_or(affix), arguments.suffix.unwrap_or(affix));
    let around = prefix.saturating_add(suffix).saturating_add(arguments.steps.into());
    let room = chunk.saturating_sub(prefix.saturating_add(suffix)).max(1);
    let context = tokens.context(arguments.context, default_context(heights, room), around)?;
    Ok(PromptLengths { prefix, context, suffix })
}

/// A context for the highest tree up to height 2 that there are graphs for (else the lowest), with leaves five eighths full:
/// no affixes change its height then.
fn default_context(heights: &[usize], room: usize) -> usize {
    let low_enough = heights.iter().copied().filter(|&height| height <= 2).max();
    let height = low_enough.or_else(|| heights.iter().copied().min()).unwrap_or(0);
    1_usize.checked_shl(height as u32).and_then(|leaves| leaves.checked_mul(room)).map_or(room, |n| (n / 8 * 5).max(1))
}

fn width_name(width: usize) -> String {
    if width == usize::MAX { "max".to_owned() } else { width.to_string() }
}

fn detail(arguments: &Arguments) -> Detail {
    match arguments.taps {
        Taps::All => Detail::All,
        Taps::Nodes => Detail::Nodes,
        Taps::Result => Detail::Result,
    }
}

/// The table of the bundle, or zeros: both sides subtract the same one, so that parity does not depend on it.
fn significance(bundle: &Bundle, plan: &HomerPlan, output: &Output) -> anyhow::Result<Vec<Vec<f32>>> {
    let (layers, distances) = (bundle.llama()?.num_layers, plan.max_distance() + 1);
    if let Some(table) = bundle.significance()? {
        table.covers(layers, plan.max_distance())?;
        return Ok((0..layers).map(|layer| table.bias(layer).to_vec()).collect());
    }
    output.remark("The bundle has no significance table: zeros are used on both sides, which is enough for parity.");
    Ok(vec![vec![0.0; distances]; layers])
}

/// Where token ids come from.
enum Tokens {
    Text { path: PathBuf, ids: Vec<u32> },
    Random { seed: u64, vocab_size: usize },
}

impl Tokens {
    fn new(bundle: &Bundle, arguments: &Arguments, output: &Output) -> anyhow::Result<Self> {
        let vocab_size = bundle.llama()?.vocab_size;
        let Some(path) = &arguments.text else {
            output.remark("No --text is given: pseudo-random tokens are compared, which suits every vocabulary.");
            return Ok(Self::Random { seed: arguments.seed, vocab_size });
        };
        let bytes = std::fs::read(path).with_context(|| format!("{} cannot be read", path.display()))?;
        let text = String::from_utf8(bytes).with_context(|| format!("{} is not UTF-8 text", path.display()))?;
        let ids = Tokenizer::open(bundle.dir(), vocab_size)?.encode(&text, false)?;
        Ok(Self::Text { path: path.clone(), ids })
    }

    /// The length of the context: as asked for, else `default` or what there is behind `around` other tokens.
    fn context(&self, asked: Option<usize>, default: usize, around: usize) -> anyhow::Result<usize> {
        Ok(match (asked, self) {
            (Some(asked), _) if !(1..=MAX_CONTEXT).contains(&asked) => {
                anyhow::bail!("--context is {asked}, expected 1 to {MAX_CONTEXT} tokens")
            }
            (Some(asked), _) => asked,
            (None, Self::Text { ids, .. }) => default.min(ids.len().saturating_sub(around)).max(1),
            (None, Self::Random { .. }) => default,
        })
    }

    /// The first `count` tokens.
    fn take(&self, count: usize) -> anyhow::Result<Vec<u32>> {
        match self {
            Self::Text { path, ids } => match ids.get(..count) {
                Some(ids) => Ok(ids.to_vec()),
                None => anyhow::bail!("{} has {} tokens, {count} are needed", path.display(), ids.len()),
            },
            Self::Random { seed, vocab_size } => {
                let mut generator = ChaCha8Rng::seed_from_u64(*seed);
                // The bias of the remainder is nothing here.
                let mut next = || (generator.next_u64() % (*vocab_size).max(1) as u64) as u32;
                Ok((0..count).map(|_| next()).collect())
            }
        }
    }

    fn source(&self) -> (String, String) {
        let value = match self {
            Self::Text { path, .. } => path.display().to_string(),
            Self::Random { seed, .. } => format!("pseudo-random, seed {seed}"),
        };
        ("text".to_owned(), value)
    }
}

fn against_golden(path: &Path, arguments: &Arguments, output: &Output) -> anyhow::Result<VerifyReport> {
    let case = HomerCase::open(path)?;
    let plan = golden_plan(&case)?;
    let mut all = reference_against_golden(&case, &plan)?;
    for (name, target) in [("portable", Target::Portable), ("ort-cpu", Target::OrtCpu)] {
        let folder = tempfile::tempdir()?;
        let bundle = export_golden(&case, &plan, target, folder.path())?;
        let mut engines = arguments.engine.engines(&bundle, output)?;
        let found = engine_against_golden(name, &mut engines, &case, &plan, arguments.width)?;
        all.taps.extend(found.taps);
        all.not_comparable += found.not_comparable;
    }
    let subject = Subject {
        model: format!("golden {} ({})", case.name, case.dtype),
        method: "homer".to_owned(),
        actual: "reference, portable and ort-cpu graphs".to_owned(),
        expected: path.display().to_string(),
        environment: machine(),
    };
    Ok(VerifyReport::in_order(subject, all.taps, all.not_comparable))
}

fn subject(bundle: &Bundle, lengths: Environment) -> Subject {
    let manifest = bundle.manifest();
    let name = bundle.dir().canonicalize().ok().and_then(|dir| Some(dir.file_name()?.to_string_lossy().into_owned()));
    let target = match manifest.target {
        Target::Portable => "portable",
        Target::OrtCpu => "ort-cpu",
    };
    Subject {
        model: name.unwrap_or_else(|| bundle.dir().display().to_string()),
        method: manifest.method.name().to_owned(),
        actual: format!("ort-cpu {} ({target} graphs)", manifest.precision),
        expected: "reference".to_owned(),
        environment: [lengths, machine()].concat(),
    }
}

fn machine() -> Environment {
    let Machine { os, cpu, cores, .. } = Machine::probe();
    vec![("cpu".to_owned(), format!("{cpu}, {cores} threads")), ("system".to_owned(), os)]
}

/// Writes beside `path` and renames, so that no reader finds half a report.
fn write_aside(path: &Path, report: &VerifyReport) -> anyhow::Result<()> {
    let mut aside = path.as_os_str().to_owned();
    aside.push(".partial");
    let aside = PathBuf::from(aside);
    let json = serde_json::to_vec_pretty(report)?;
    let written = std::fs::write(&aside, json).and_then(|()| std::fs::rename(&aside, path));
    written
        .inspect_err(|_| drop(std::fs::remove_file(&aside)))
        .with_context(|| format!("{} cannot be written", path.display()))
}
