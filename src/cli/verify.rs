//! `accordion verify`.

mod input;
mod quality;

use self::input::Chosen;
use self::quality::QualityArguments;
use super::Outcome;
use super::bisect::{Asked, BisectArguments};
use super::common::{EngineArguments, parse_width};
use super::output::Output;
use super::report::write_aside;
use accordion::bundle::Bundle;
use accordion::environment::Machine;
use accordion::reference::homer::Prompt;
use accordion::verify::bundle::{Input, Plan, compare_bundle};
use accordion::verify::golden::GoldenCase;
use accordion::verify::linears::LinearCheck;
use accordion::verify::quantized::weights_of;
use accordion::verify::schema::{Subject, VerifyReport};
use accordion::verify::verdict::Verdict;
use accordion::verify::weights::finite_weights;
use accordion::verify::{Detail, Findings, text};
use accordion_graphs::blocks::Target;
use clap::{Args, ValueEnum};
use std::path::{Path, PathBuf};

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
    /// Hold the reference and the graphs against the authors' tensors of a golden case: homer_<case>.json, <case>.config.json
    /// (rcc) or case_<case>.json (sharedllm), with the files beside it
    #[arg(long, value_name = "PATH")]
    golden: Option<PathBuf>,
    /// Text to take the tokens from [default: pseudo-random tokens]
    #[arg(long, value_name = "FILE")]
    text: Option<PathBuf>,
    /// Seed of the pseudo-random tokens
    #[arg(long, value_name = "N", default_value_t = 0, conflicts_with = "text")]
    seed: u64,
    /// Tokens of the context [default: plain, 512; homer, enough for a tree of height 2; rcc, two windows and a half;
    /// sharedllm, three chunks; fewer where these are long]
    #[arg(long, value_name = "N")]
    context: Option<usize>,
    /// Tokens before the context [default: none; homer, an eighth of a chunk, at most 16]
    #[arg(long, value_name = "N")]
    prefix: Option<usize>,
    /// Tokens after the context [default: plain, none; an eighth of a chunk or segment, at most 16]
    #[arg(long, value_name = "N")]
    suffix: Option<usize>,
    /// Tokens that both sides are fed after the context
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u16).range(..=1024))]
    steps: u16,
    /// Leaves or chunks that the engine takes in one batch: a number or max
    #[arg(long, value_name = "N", default_value = "1", value_parser = parse_width)]
    width: usize,
    /// What to compare
    #[arg(long, value_enum, default_value_t = Taps::All)]
    taps: Taps,
    /// Also write the report, as JSON, to this file
    #[arg(long, short, value_name = "FILE")]
    out: Option<PathBuf>,
    #[command(flatten)]
    quality: QualityArguments,
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
    /// What enters and leaves every tree node or segment, and the result
    Nodes,
    /// Which tokens every node keeps or which half is split further, and the result
    Result,
}

/// Runs the command.
pub(crate) fn run(arguments: &Arguments, output: &Output) -> anyhow::Result<Outcome> {
    if let (true, Some(bundle)) = (arguments.quality.wanted(), &arguments.bundle) {
        return arguments.quality.run(bundle, arguments, output);
    }
    if let (true, Some(bundle)) = (arguments.bisect.wanted(), &arguments.bundle) {
        return search(&Bundle::open(bundle)?, arguments, output);
    }
    let report = match (&arguments.golden, &arguments.bundle) {
        (Some(golden), _) => against_golden(golden, arguments, output)?,
        (None, Some(bundle)) => against_reference(bundle, arguments, output)?,
        (None, None) => anyhow::bail!("a bundle or --golden is needed"),
    };
    if let Some(path) = &arguments.out {
        write_aside(path, &serde_json::to_vec_pretty(&report)?)?;
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
    let chosen = Chosen::new(&bundle, arguments, output)?;
    let mut engines = arguments.engine.engines(&bundle, output)?;
    let linears = LinearCheck::watch(&mut engines, weights_of(&bundle));
    let (what, count) = chosen.steps();
    let bar = output.bar(&format!("Comparing {what}"), count);
    let mut on_progress = |done| bar.set_position(done as u64);
    let findings = compare_bundle(&mut engines, &chosen.input(), detail(arguments), &mut on_progress)?;
    bar.finish_and_clear();
    let taps = [weights, linears.finish()?, findings.taps].concat();
    Ok(VerifyReport::in_order(subject(&bundle, chosen.described()), taps, findings.not_comparable))
}

/// Looks for the first wrong tap on what would be compared.
fn search(bundle: &Bundle, arguments: &Arguments, output: &Output) -> anyhow::Result<Outcome> {
    let chosen = Chosen::new(bundle, arguments, output)?;
    let Input { plan, lengths, ids, .. } = chosen.input();
    let (prompt, _) = ids.split_at(lengths.total());
    let run = |asked: &Asked<'_>| arguments.bisect.run(bundle, asked, &arguments.engine, output);
    match plan {
        Plan::Plain => run(&Asked::Plain(prompt)),
        Plan::Homer(plan, bias) => {
            let (before, suffix) = prompt.split_at(lengths.prefix + lengths.context);
            let (prefix, context) = before.split_at(lengths.prefix);
            run(&Asked::Homer(plan, Prompt { prefix, context, suffix }, bias))
        }
        Plan::Rcc(_) | Plan::SharedLlm(_) => {
            let method = bundle.manifest().method.name();
            anyhow::bail!("--bisect knows plain and homer, and the bundle's method is {method}")
        }
    }
}

type Environment = Vec<(String, String)>;

fn detail(arguments: &Arguments) -> Detail {
    match arguments.taps {
        Taps::All => Detail::All,
        Taps::Nodes => Detail::Nodes,
        Taps::Result => Detail::Result,
    }
}

fn against_golden(path: &Path, arguments: &Arguments, output: &Output) -> anyhow::Result<VerifyReport> {
    let cases = GoldenCase::open(path)?;
    let mut all = Findings::default();
    let mut found = |findings: Findings| {
        all.taps.extend(findings.taps);
        all.not_comparable += findings.not_comparable;
    };
    for case in &cases {
        found(case.compare_reference()?);
        for (name, target) in [("portable", Target::Portable), ("ort-cpu", Target::OrtCpu)] {
            let folder = tempfile::tempdir()?;
            let bundle = case.bundle(target, folder.path())?;
            let mut engines = arguments.engine.engines(&bundle, output)?;
            found(case.compare_engines(name, &mut engines, arguments.width)?);
        }
    }
    let of = |what: fn(&GoldenCase) -> String| cases.first().map(what).unwrap_or_default();
    let subject = Subject {
        model: format!("golden {}", of(GoldenCase::described)),
        method: of(|case| case.method().to_owned()),
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
