//! `accordion verify`.

mod input;
mod quality;
mod sides;

use self::input::Chosen;
use self::quality::QualityArguments;
use super::Outcome;
use super::bisect::BisectArguments;
use super::compression::parse_width;
use super::engine::EngineArguments;
use super::output::Output;
use super::report::write_aside;
use accordion::bundle::Bundle;
use accordion::environment::Machine;
use accordion::verify::golden::GoldenCase;
use accordion::verify::schema::{Subject, VerifyReport};
use accordion::verify::verdict::Verdict;
use accordion::verify::{Detail, Findings, text};
use accordion_graphs::blocks::Target;
use accordion_graphs::dtype::DType;
use clap::{Args, ValueEnum};
use std::path::{Path, PathBuf};

/// Compare any two of a bundle, the reference, another bundle and a recording, or everything with a golden file, tap by tap
///
/// Exits with 1 if anything is out of bounds, and with 0 if everything is within them or ambiguous: a near-tie between two
/// tokens that was decided differently.
#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// The bundle, or a recording that is held against another one
    #[arg(required_unless_present = "golden", conflicts_with = "golden")]
    bundle: Option<PathBuf>,
    /// What to hold it against: `reference`, the method in plain Rust computed from the same weights; another bundle of the same
    /// model; or a recording (.safetensors or .npz), which also says what is asked
    #[arg(long, value_name = "reference|BUNDLE|FILE", default_value = "reference", value_parser = parse_against, conflicts_with = "golden")]
    against: Against,
    /// Hold the reference and the graphs against the authors' tensors of a golden case: homer_<case>.json, <case>.config.json
    /// (rcc) or case_<case>.json (sharedllm), with the files beside it
    #[arg(long, value_name = "PATH")]
    golden: Option<PathBuf>,
    /// Compare nothing, but write every tap into this file (.safetensors or .npz), to be compared later or elsewhere
    #[arg(long, value_name = "FILE", conflicts_with_all = ["golden", "against", "out"])]
    record: Option<PathBuf>,
    /// Whose taps are written
    #[arg(long, value_enum, default_value_t = Side::Bundle, requires = "record")]
    side: Side,
    /// Text to take the tokens from [default: pseudo-random tokens]
    #[arg(long, value_name = "FILE")]
    text: Option<PathBuf>,
    /// Seed of the pseudo-random tokens
    #[arg(long, value_name = "N", default_value_t = 0, conflicts_with = "text")]
    seed: u64,
    /// Inputs that are compared: windows of the text, or as many seeds. Every tap shows its worst result
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=1024))]
    samples: u16,
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
    /// How closely to compare [default: as the less precise of the bundles computes]
    #[arg(long, value_enum, value_name = "PRECISION")]
    bounds: Option<Precision>,
    /// Give every part of a graph the reference's values, tap by tap, so that one that is wrong does not spoil what follows
    #[arg(long, conflicts_with_all = ["golden", "record", "against", "bisect", "samples"])]
    cumulative: bool,
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

/// What the actual side is held against.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Against {
    Reference,
    Path(PathBuf),
}

fn parse_against(text: &str) -> Result<Against, String> {
    match text {
        "reference" => Ok(Against::Reference),
        path if Path::new(path).exists() => Ok(Against::Path(path.into())),
        _ => Err("there is no such file or folder; expected reference, a bundle, or a recording".to_owned()),
    }
}

/// Whose taps are recorded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Side {
    /// The bundle's
    Bundle,
    /// The reference's
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

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Precision {
    Fp32,
    Fp16,
    Bf16,
}

impl From<Precision> for DType {
    fn from(precision: Precision) -> Self {
        match precision {
            Precision::Fp32 => Self::F32,
            Precision::Fp16 => Self::F16,
            Precision::Bf16 => Self::Bf16,
        }
    }
}

/// Runs the command.
pub(crate) fn run(arguments: &Arguments, output: &Output) -> anyhow::Result<Outcome> {
    if let (true, Some(bundle)) = (arguments.quality.wanted(), &arguments.bundle) {
        return arguments.quality.run(bundle, arguments, output);
    }
    let report = match (&arguments.golden, &arguments.bundle) {
        (Some(golden), _) => against_golden(golden, arguments, output)?,
        (None, Some(file)) if file.is_file() => sides::two_recordings(file, arguments)?,
        (None, Some(dir)) => {
            let mut bundle = Bundle::open(dir)?;
            if !(arguments.bisect.wanted() || arguments.cumulative || arguments.side == Side::Reference) {
                bundle = arguments.engine.observable(bundle, output)?;
            }
            if let Some(file) = &arguments.record {
                return sides::record(&bundle, file, arguments, output);
            }
            if arguments.bisect.wanted() {
                let chosen = Chosen::first(&bundle, arguments, output)?;
                return arguments.bisect.run(&bundle, &chosen.input(), &arguments.engine, output);
            }
            if arguments.cumulative {
                sides::part_by_part(&bundle, arguments, output)?
            } else {
                sides::two_sides(&bundle, arguments, output)?
            }
        }
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

type Environment = Vec<(String, String)>;

fn detail(arguments: &Arguments) -> Detail {
    match arguments.taps {
        Taps::All => Detail::All,
        Taps::Nodes => Detail::Nodes,
        Taps::Result => Detail::Result,
    }
}

fn against_golden(path: &Path, arguments: &Arguments, output: &Output) -> anyhow::Result<VerifyReport> {
    anyhow::ensure!(
        arguments.engine.is_ort_cpu(),
        "--golden needs --engine ort-cpu, and the engine is {}: the graphs of a golden case are made for the occasion",
        arguments.engine.name()
    );
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

fn machine() -> Environment {
    let Machine { os, cpu, cores, .. } = Machine::probe();
    vec![("cpu".to_owned(), format!("{cpu}, {cores} threads")), ("system".to_owned(), os)]
}
