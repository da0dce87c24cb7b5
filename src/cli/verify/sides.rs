//! The sides that a bundle or a recording can be held against, sample by sample, and recording one.

use super::super::engine::{EngineArguments, runtime};
use super::super::output::Output;
use super::super::{Outcome, bisect};
use super::input::Chosen;
use super::{Against, Arguments, Environment, Side, detail, machine};
use accordion::bundle::Bundle;
use accordion::pipeline::Engines;
use accordion::verify::bundle::{check_same_model, engine_parts, reference_parts};
use accordion::verify::linears::LinearCheck;
use accordion::verify::lockstep::{Cost, Expected, Terms, compare};
use accordion::verify::quantized::weights_of;
use accordion::verify::recording::{Recorder, Recording};
use accordion::verify::schema::{Subject, VerifyReport};
use accordion::verify::verdict::Verdict;
use accordion::verify::weights::finite_weights;
use accordion::verify::{Findings, VerifyError};
use accordion_graphs::blocks::Target;
use accordion_graphs::dtype::DType;
use accordion_graphs::precision::{KvCache, Precision};
use std::path::Path;

/// The other side of a comparison, opened.
enum Other {
    Reference,
    Bundle(Box<Bundle>),
    Recording(Box<Recording>),
}

impl Other {
    fn open(bundle: &Bundle, arguments: &Arguments, output: &Output) -> anyhow::Result<Self> {
        let Arguments { against, engine, .. } = arguments;
        Ok(match against {
            Against::Reference => Self::Reference,
            Against::Path(path) if path.is_file() => Self::Recording(Box::new(Recording::open(path)?)),
            Against::Path(path) => {
                let other = engine.observable(Bundle::open(path)?, output)?;
                check_same_model(bundle, &other)?;
                Self::Bundle(Box::new(other))
            }
        })
    }

    fn described(&self, engine: &EngineArguments) -> String {
        match self {
            Self::Reference => "reference".to_owned(),
            Self::Bundle(other) => format!("{} {}", name_of(other), graphs_of(other, engine)),
            Self::Recording(recording) => recording.path().display().to_string(),
        }
    }

    fn precision(&self) -> DType {
        match self {
            Self::Bundle(other) => precision_of(other),
            Self::Reference | Self::Recording(_) => DType::F32,
        }
    }
}

/// Compares `bundle` with what the arguments name.
pub(super) fn two_sides(bundle: &Bundle, arguments: &Arguments, output: &Output) -> anyhow::Result<VerifyReport> {
    let other = Other::open(bundle, arguments, output)?;
    let bar = output.bar("Reading the weights", bundle.weights().index().stored().map(|(_, w)| w.len).sum());
    let weights = finite_weights(bundle.weights(), |done, _| bar.set_position(done))?;
    bar.finish_and_clear();
    if weights.iter().any(|tap| tap.verdict == Verdict::Fail) {
        return Ok(VerifyReport::in_order(subject(bundle, &other, &arguments.engine, Vec::new()), weights, 0));
    }
    let samples = samples(bundle, &other, arguments, output)?;
    let precision = [precision_of(bundle), other.precision()].into_iter().max_by_key(|&dtype| coarseness(dtype));
    let dtype = arguments.bounds.map(Into::into).or(precision).unwrap_or(DType::F32);
    let mut engines = arguments.engine.engines(bundle, output)?;
    let reference = matches!(other, Other::Reference);
    let terms = match arguments.bounds {
        None if reference => Terms::of(detail(arguments), bundle),
        _ => Terms::new(detail(arguments), dtype),
    };
    // Which values linear layers read and give is not among what engines of a GPU show.
    let linears =
        (reference && arguments.engine.is_ort_cpu()).then(|| LinearCheck::watch(&mut engines, weights_of(bundle)));
    let (mut all, mut total) = (Findings::default(), Cost::default());
    for (number, (prefix, chosen)) in samples.iter().enumerate() {
        let (what, count) = chosen.steps();
        let label = if samples.len() > 1 { format!("Sample {number}: {what}") } else { format!("Comparing {what}") };
        let bar = output.bar(&label, count);
        let input = chosen.input();
        let expected = match &other {
            Other::Reference => Expected::Computed(Box::new(move |parts| reference_parts(bundle, &input, parts))),
            Other::Recording(recording) => Expected::Recorded(recording, prefix),
            Other::Bundle(other) => {
                if arguments.engine.is_ort_cpu() {
                    runtime(output)?;
                }
                Expected::Computed(Box::new(move |parts| {
                    let mut engines = other_engines(other, arguments, output)?;
                    engine_parts(&mut engines, &input, parts, &mut |_| {})
                }))
            }
        };
        let mut on_progress = |done| bar.set_position(done as u64);
        let (findings, cost) =
            compare(&terms, expected, |parts| engine_parts(&mut engines, &input, parts, &mut on_progress))?;
        bar.finish_and_clear();
        if number == 0 {
            all = findings;
        } else {
            all.add_sample(number, findings);
        }
        total += cost;
    }
    let described = samples.first().map(|(_, chosen)| chosen.described()).unwrap_or_default();
    let linears = linears.map(LinearCheck::finish).transpose()?.unwrap_or_default();
    all.taps.splice(0..0, weights.into_iter().chain(linears));
    Ok(VerifyReport::of_samples(subject(bundle, &other, &arguments.engine, described), all, samples.len(), Some(total)))
}

/// Compares every part of the graphs by itself with the reference.
pub(super) fn part_by_part(bundle: &Bundle, arguments: &Arguments, output: &Output) -> anyhow::Result<VerifyReport> {
    let chosen = Chosen::first(bundle, arguments, output)?;
    let (engine, input) = (&arguments.engine, chosen.input());
    let findings = bisect::part_by_part(bundle, &input, detail(arguments), engine, output)?;
    let mut subject = subject(bundle, &Other::Reference, engine, chosen.described());
    subject.expected.push_str(", which every part is given the values of");
    Ok(VerifyReport::of_samples(subject, findings, 1, None))
}

/// The other bundle's engines, in the thread that runs them.
fn other_engines<'b>(other: &'b Bundle, arguments: &Arguments, output: &Output) -> Result<Engines<'b>, VerifyError> {
    arguments.engine.engines(other, output).map_err(|error| VerifyError::Side(format!("{error:#}")))
}

/// What is asked in every sample, and what its names begin with in a recording.
fn samples(
    bundle: &Bundle,
    other: &Other,
    arguments: &Arguments,
    output: &Output,
) -> anyhow::Result<Vec<(String, Chosen)>> {
    let chosen = || Chosen::samples(bundle, arguments, output);
    let Other::Recording(recording) = other else {
        return Ok(chosen()?.into_iter().map(|chosen| (String::new(), chosen)).collect());
    };
    let mut samples = Vec::new();
    for prefix in recording.samples() {
        let Some(input) = recording.input(&prefix)? else {
            // The file is of another program: what was asked is what the arguments say.
            return Ok(recording.samples().into_iter().zip(chosen()?).collect());
        };
        let chosen = Chosen::recorded(bundle, input, recording.path(), arguments.width, output)?;
        samples.push((prefix, chosen));
    }
    Ok(samples)
}

/// Writes what a side computes.
pub(super) fn record(bundle: &Bundle, file: &Path, arguments: &Arguments, output: &Output) -> anyhow::Result<Outcome> {
    let mut recorder = Recorder::create(file, detail(arguments))?;
    let samples = Chosen::samples(bundle, arguments, output)?;
    let mut engines = None;
    for (number, chosen) in samples.iter().enumerate() {
        let input = chosen.input();
        let prefix = if samples.len() > 1 { format!("samples.{number}.") } else { String::new() };
        recorder.begin(&prefix, input.lengths, input.ids)?;
        let (what, count) = chosen.steps();
        let bar = output.bar(&format!("Recording {what}"), count);
        match arguments.side {
            Side::Reference => reference_parts(bundle, &input, &mut recorder)?,
            Side::Bundle => {
                let engines = match &mut engines {
                    Some(engines) => engines,
                    none => none.insert(arguments.engine.engines(bundle, output)?),
                };
                engine_parts(engines, &input, &mut recorder, &mut |done| bar.set_position(done as u64))?;
            }
        }
        bar.finish_and_clear();
    }
    recorder.finish()?;
    output.remark(format!("wrote {}", file.display()));
    Ok(Outcome::Done)
}

/// Compares two recordings; `file` is the actual side.
pub(super) fn two_recordings(file: &Path, arguments: &Arguments) -> anyhow::Result<VerifyReport> {
    let Against::Path(other) = &arguments.against else {
        anyhow::bail!(
            "{} is a recording, which says nothing about the reference: --against another recording",
            file.display()
        )
    };
    if !other.is_file() {
        anyhow::bail!("{} is a recording: give the bundle first, and the recording with --against", file.display());
    }
    let (actual, expected) = (Recording::open(file)?, Recording::open(other)?);
    let terms = Terms::new(detail(arguments), arguments.bounds.map_or(DType::F32, Into::into));
    let (mut all, mut total) = (Findings::default(), Cost::default());
    let samples = actual.samples();
    for (number, prefix) in samples.iter().enumerate() {
        if let (Some(asked), Some(other_asked)) = (actual.input(prefix)?, expected.input(prefix)?)
            && asked != other_asked
        {
            anyhow::bail!("{} and {} were recorded of other tokens", file.display(), other.display());
        }
        let recorded = Expected::Recorded(&expected, prefix);
        let (findings, cost) = compare(&terms, recorded, |parts| actual.parts(prefix, parts))?;
        if number == 0 {
            all = findings;
        } else {
            all.add_sample(number, findings);
        }
        total += cost;
    }
    let subject = Subject {
        model: file.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default(),
        method: "recorded".to_owned(),
        actual: file.display().to_string(),
        expected: other.display().to_string(),
        environment: machine(),
    };
    Ok(VerifyReport::of_samples(subject, all, samples.len(), Some(total)))
}

fn subject(bundle: &Bundle, other: &Other, engine: &EngineArguments, described: Environment) -> Subject {
    Subject {
        model: name_of(bundle),
        method: bundle.manifest().method.name().to_owned(),
        actual: graphs_of(bundle, engine),
        expected: other.described(engine),
        environment: [described, machine()].concat(),
    }
}

fn name_of(bundle: &Bundle) -> String {
    let name = bundle.dir().canonicalize().ok().and_then(|dir| Some(dir.file_name()?.to_string_lossy().into_owned()));
    name.unwrap_or_else(|| bundle.dir().display().to_string())
}

fn graphs_of(bundle: &Bundle, engine: &EngineArguments) -> String {
    let target = match bundle.manifest().target {
        Target::Portable => "portable",
        Target::OrtCpu => "ort-cpu",
    };
    format!("{} {} ({target} graphs)", engine.name(), bundle.manifest().numbers())
}

/// What the graphs of `bundle` compute in, as far as bounds tell it apart: integers are held to those of the coarsest floats.
fn precision_of(bundle: &Bundle) -> DType {
    let manifest = bundle.manifest();
    match manifest.precision {
        _ if manifest.kv_cache == KvCache::Int8 => DType::Bf16,
        Precision::Fp32 => DType::F32,
        Precision::Fp16 => DType::F16,
        _ => DType::Bf16,
    }
}

fn coarseness(dtype: DType) -> u8 {
    match dtype {
        DType::F16 => 1,
        DType::Bf16 => 2,
        _ => 0,
    }
}
