//! `accordion profile`.

use super::common::EngineArguments;
use super::compression::{Pruning, SplitArguments};
use super::method::MethodName;
use super::output::Output;
use super::text::{bytes, grouped, table};
use super::{Outcome, report::write_aside};
use accordion::bundle::Bundle;
use accordion::checkpoint::Tokenizer;
use accordion::environment::Provenance;
use accordion::pipeline::Engines;
use accordion::pipeline::compress::Compression;
use accordion::pipeline::prompt::{PromptIds, encode_context, read_text};
use accordion::profile::ceilings::Ceilings;
use accordion::profile::load::busy_share;
use accordion::profile::measure::{Effort, Step, measure, measure_saved, random_tokens, record, work};
use accordion::profile::regression::compare;
use accordion::profile::schema::{Measurement, ProfileReport, ProfileRow, SCHEMA, decoder_in_words};
use accordion::profile::stats::Protocol;
use accordion::profile::trace::OperatorTime;
use accordion::report::{Report, render};
use accordion_graphs::plan::PromptLengths;
use anyhow::{Context, bail, ensure};
use clap::Args;
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

/// Seed of the random tokens that are measured where no text is given.
const SEED: u64 = 1;
/// How long the machine is watched for other work, and the share of it above which times are not to be trusted.
const WATCHED: Duration = Duration::from_millis(300);
const BUSY_ABOVE: f64 = 0.05;

/// Measure latency and memory
#[derive(Debug, Args)]
#[command(
    after_help = "Each method and length is measured in a process of its own, so that peak memory is that of this \
    method alone. Times do not depend on the tokens: they are random unless a text is given."
)]
pub(crate) struct Arguments {
    /// The bundles; give one of each method to see them side by side
    #[arg(required = true, value_name = "BUNDLE")]
    bundles: Vec<PathBuf>,
    /// Context lengths in tokens
    #[arg(long, value_name = "N,N", value_delimiter = ',', default_values_t = [4096, 8192])]
    context: Vec<usize>,
    /// Tokens before the context
    #[arg(long, value_name = "N", default_value_t = 64)]
    prefix: usize,
    /// Tokens behind the context
    #[arg(long, value_name = "N", default_value_t = 64)]
    suffix: usize,
    /// Tokens to decode behind the prompt
    #[arg(long, value_name = "N", default_value_t = 32)]
    new_tokens: usize,
    /// Methods to measure [default: the bundles', and plain to compare with, once for each decoder]
    #[arg(long, value_enum, value_delimiter = ',', value_name = "METHOD,METHOD")]
    methods: Vec<MethodName>,
    /// Longest context to measure plain at [default: all]
    #[arg(long, value_name = "N")]
    plain_up_to: Option<usize>,
    #[command(flatten)]
    split: SplitArguments,
    /// Measure questions about a context that `accordion compress` saved for the first bundle, instead of compressing
    #[arg(long, value_name = "FILE", conflicts_with_all = ["context", "methods", "plain_up_to", "chunks", "text", "trace"])]
    state: Option<PathBuf>,
    /// Take the tokens from a file of text
    #[arg(long, value_name = "FILE")]
    text: Option<String>,
    /// Run everything once more with the runtime recording its nodes: the longest are listed, and all of them written
    /// to this file, which Perfetto opens
    #[arg(long, value_name = "FILE")]
    trace: Option<PathBuf>,
    #[command(flatten)]
    protocol: ProtocolArguments,
    /// Earlier result of this command (--out or --json) to compare with; exits with 1 if anything grew by more than
    /// --max-regress
    #[arg(long, value_name = "FILE")]
    baseline: Option<PathBuf>,
    /// How much slower or larger anything may be than in --baseline, in percent
    #[arg(long, value_name = "PERCENT", default_value = "5", requires = "baseline", value_parser = parse_percent)]
    max_regress: f64,
    /// Write the result as JSON
    #[arg(short, long, value_name = "FILE")]
    out: Option<PathBuf>,
    /// Write the result as a page
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
    #[command(flatten)]
    engine: EngineArguments,
    /// Measure one configuration in this process and print the measurement
    #[arg(long, hide = true)]
    in_process: bool,
}

#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Repetition")]
struct ProtocolArguments {
    /// Least number of times a prefix is built, after one that is not counted
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u16).range(1..))]
    min_runs: u16,
    /// Least time for building prefixes, in seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 3.0, value_parser = parse_seconds)]
    min_time: f64,
    /// Most time for building prefixes of one method and length, in seconds; once is always built
    #[arg(long, value_name = "SECONDS", default_value_t = 60.0, value_parser = parse_seconds)]
    budget: f64,
}

fn parse_percent(text: &str) -> Result<f64, String> {
    let number = text.strip_suffix('%').unwrap_or(text).parse().ok();
    number.filter(|percent| (0.0..=1e6).contains(percent)).ok_or_else(|| "expected a percentage from 0 on".to_owned())
}

fn parse_seconds(text: &str) -> Result<f64, String> {
    let seconds = text.parse().ok().filter(|seconds| (0.0..=1e6).contains(seconds));
    seconds.ok_or_else(|| "expected a number of seconds from 0 to 1000000".to_owned())
}

/// One method of one bundle at one length.
#[derive(Debug)]
struct Case<'b> {
    bundle: &'b Bundle,
    compression: Compression,
    lengths: PromptLengths,
}

/// Runs the command.
pub(crate) fn run(arguments: &Arguments, output: &Output) -> anyhow::Result<Outcome> {
    let bundles: Vec<Bundle> = arguments.bundles.iter().map(Bundle::open).collect::<Result<_, _>>()?;
    if let (Some(path), Some(bundle)) = (&arguments.state, bundles.first()) {
        return arguments.saved(bundle, path, output);
    }
    let cases = arguments.cases(&bundles)?;
    let baseline = arguments.baseline.as_deref().map(read_profile).transpose()?;
    if arguments.in_process {
        let [case] = &cases[..] else { bail!("--in-process measures one method at one length") };
        let measured = arguments.measure_here(case, output)?;
        serde_json::to_writer(std::io::stdout().lock(), &measured)?;
        return Ok(Outcome::Done);
    }
    // A text that cannot be read is found out here, not by the first process that measures.
    for case in &cases {
        arguments.tokens(case.bundle, case.lengths)?;
    }
    let profile = arguments.profile(&bundles, &cases, output)?;
    arguments.finish(&profile, baseline.as_ref(), output)
}

/// A result that this command wrote earlier.
fn read_profile(path: &Path) -> anyhow::Result<ProfileReport> {
    let name = || format!("--baseline {}", path.display());
    let json = std::fs::read(path).with_context(name)?;
    let profile: ProfileReport = serde_json::from_slice(&json).with_context(name)?;
    ensure!(profile.schema == SCHEMA, "{}: schema is '{}', expected '{SCHEMA}'", name(), profile.schema);
    Ok(profile)
}

impl Arguments {
    /// Measures a state of `bundle` that was saved in the file `path`.
    fn saved(&self, bundle: &Bundle, path: &Path, output: &Output) -> anyhow::Result<Outcome> {
        let baseline = self.baseline.as_deref().map(read_profile).transpose()?;
        let suffix = random_tokens(bundle.architecture().vocab_size(), self.suffix, SEED);
        let mut engines = self.engine.engines(bundle, output)?;
        let engine = engine_name(bundle);
        let measured =
            measure_saved(&mut engines, path, &suffix, &self.effort(), (&engine, threads(output)), &mut |_| {})?;
        let profile = ProfileReport::new(model_name(bundle), Provenance::probe().pairs(), &[measured], Vec::new());
        self.finish(&profile, baseline.as_ref(), output)
    }

    fn effort(&self) -> Effort {
        let prefix = Protocol {
            min_runs: usize::from(self.protocol.min_runs),
            min_time: Duration::from_secs_f64(self.protocol.min_time),
            max_time: Some(Duration::from_secs_f64(self.protocol.budget)),
            ..Protocol::default()
        };
        Effort { prefix, new_tokens: self.new_tokens }
    }

    /// Writes and prints what was measured, and holds it against the baseline.
    fn finish(
        &self,
        profile: &ProfileReport,
        baseline: Option<&ProfileReport>,
        output: &Output,
    ) -> anyhow::Result<Outcome> {
        if let Some(path) = &self.out {
            let json = serde_json::to_vec_pretty(profile)?;
            write_aside(path, &json)?;
        }
        if let Some(path) = &self.html {
            let page = Report { profiles: vec![profile.clone()], ..Report::here(&profile.model) };
            write_aside(path, render(&page).as_bytes())?;
        }
        output.result(profile, || rows(profile))?;
        if !output.is_json() {
            profile.warnings.iter().for_each(|warning| output.warning(warning));
        }
        match baseline {
            Some(baseline) => self.gate(baseline, profile, output),
            None => Ok(Outcome::Done),
        }
    }

    /// Says what grew since `baseline`, and whether by too much.
    fn gate(&self, baseline: &ProfileReport, profile: &ProfileReport, output: &Output) -> anyhow::Result<Outcome> {
        let changes = compare(baseline, profile, self.max_regress / 100.0);
        ensure!(!changes.is_empty(), "--baseline has no row that was measured in the same way as any of these");
        for change in changes.iter().filter(|change| change.regressed) {
            output.warning(format!(
                "{} at {} context tokens: {} grew by {:.1} %, more than {} %",
                change.method,
                grouped(change.context as u64),
                change.quantity,
                change.growth * 100.0,
                self.max_regress
            ));
        }
        let regressed = changes.iter().any(|change| change.regressed);
        if !regressed {
            output.remark(format!("nothing grew by more than {} % since the baseline", self.max_regress));
        }
        Ok(if regressed { Outcome::CheckFailed } else { Outcome::Done })
    }

    /// The configurations, each one checked to be possible before any is measured.
    fn cases<'b>(&self, bundles: &'b [Bundle]) -> anyhow::Result<Vec<Case<'b>>> {
        let mut chosen: Vec<(&Bundle, MethodName)> = Vec::new();
        let has_plain = |chosen: &[(&Bundle, MethodName)], bundle: &Bundle| {
            let same = |&&(other, method): &&(&Bundle, MethodName)| {
                method == MethodName::Plain && other.architecture() == bundle.architecture()
            };
            chosen.iter().find(same).is_some()
        };
        for bundle in bundles {
            let own = MethodName::of(bundle);
            let wanted = match &self.methods[..] {
                [] if own == MethodName::SharedLlm => vec![own],
                [] => vec![own, MethodName::Plain],
                // Several bundles share one list: each gives what it has.
                given if bundles.len() > 1 => {
                    let has = |method: &&MethodName| MethodName::choose(Some(**method), bundle).is_ok();
                    given.iter().filter(has).copied().collect()
                }
                given => given.to_vec(),
            };
            for method in wanted {
                let method = MethodName::choose(Some(method), bundle)?;
                if method != MethodName::Plain || !has_plain(&chosen, bundle) {
                    chosen.push((bundle, method));
                }
            }
        }
        ensure!(
            self.split.chunks().is_none() || chosen.iter().any(|(_, method)| *method == MethodName::SharedLlm),
            "--chunks is for sharedllm, and no bundle is measured by that"
        );
        let mut cases = Vec::new();
        for &context in &self.context {
            if context == 0 {
                bail!("--context 0: expected at least 1 token");
            }
            for &(bundle, method) in &chosen {
                if method == MethodName::Plain && self.plain_up_to.is_some_and(|longest| context > longest) {
                    continue;
                }
                let lengths = PromptLengths { prefix: self.prefix, context, suffix: self.suffix };
                // Which tokens are kept makes no difference to the time.
                let compression = self.split.compression(bundle, method, Pruning::uncalibrated(), true)?;
                work(bundle, &compression, lengths)?;
                cases.push(Case { bundle, compression, lengths });
            }
        }
        Ok(cases)
    }

    /// Measures everything, each configuration in its own process.
    fn profile(&self, bundles: &[Bundle], cases: &[Case<'_>], output: &Output) -> anyhow::Result<ProfileReport> {
        let mut warnings = Vec::new();
        if let Some(busy) = busy_share(WATCHED).filter(|&busy| busy > BUSY_ABOVE) {
            let share = (busy * 100.0).round();
            warnings.push(format!("other programs kept {share} % of the processor busy when the measurement began"));
        }
        let threads = threads(output);
        // By decoder and rows.
        let mut ceilings: Vec<((String, usize), Ceilings)> = Vec::new();
        let mut measurements = Vec::new();
        let mut traced = Vec::new();
        for case in cases {
            let Case { bundle, .. } = case;
            let max_positions = bundle.architecture().max_positions();
            let (operations, rows) = work(bundle, &case.compression, case.lengths)?;
            let key = (decoder_in_words(bundle.architecture()), rows);
            let rates = match ceilings.iter().find(|(known, _)| *known == key) {
                Some((_, rates)) => *rates,
                None => Ceilings::measure(&self.engine.loader(bundle, output)?, bundle, rows, threads)?,
            };
            if ceilings.iter().all(|(known, _)| *known != key) {
                ceilings.push((key, rates));
            }
            let mut measured = self.measure_apart(case, &mut traced, output)?;
            let seconds = measured.prefix.median_ms / 1e3;
            measured.floor_fraction = (seconds > 0.0).then(|| rates.floor_seconds(&operations) / seconds);
            let (name, context) = (case.compression.method(), case.lengths.context);
            if measured.floor_fraction.is_some_and(|fraction| fraction > 1.0) {
                warnings.push(format!(
                    "{name} at {context} context tokens was faster than its floor: other programs were running when the \
                     machine's rates were measured"
                ));
            }
            output.remark(format!(
                "{name} at {}: {:.2} s, {} runs, then {:.1} ms per token",
                grouped(context as u64),
                seconds,
                measured.prefix.runs,
                measured.per_token.median_ms
            ));
            let (runs, wanted) = (measured.prefix.runs, usize::from(self.protocol.min_runs));
            if runs < wanted {
                let budget = self.protocol.budget;
                warnings.push(format!(
                    "{name} at {context} context tokens: built {runs} times instead of {wanted}, because --budget is {budget} s"
                ));
            }
            if matches!(case.compression, Compression::Plain { .. }) && case.lengths.total() > max_positions {
                warnings.push(format!(
                    "plain at {context} context tokens is beyond the {max_positions} positions the model was trained \
                     for: its time is real, its text would not be"
                ));
            }
            measurements.push(measured);
        }
        if let Some(path) = &self.trace {
            write_aside(path, &serde_json::to_vec(&traced)?)?;
        }
        let mut environment = Provenance::probe().pairs();
        for ((decoder, rows), rates) in &ceilings {
            environment.push((
                format!("Rates at {rows} rows ({decoder})"),
                format!(
                    "matrix products {:.0} GFLOP/s, causal attention {:.0} GFLOP/s, reading memory {:.1} GB/s",
                    rates.linear_flops / 1e9,
                    rates.attention_flops / 1e9,
                    rates.read_bytes / 1e9
                ),
            ));
        }
        let names: Vec<String> = bundles.iter().map(model_name).collect();
        Ok(ProfileReport::new(names.join(", "), environment, &measurements, warnings))
    }

    /// Measures one configuration in a process of its own: what a runtime's allocator once took it keeps.
    fn measure_apart(&self, case: &Case<'_>, traced: &mut Vec<Value>, output: &Output) -> anyhow::Result<Measurement> {
        let number = |n: usize| n.to_string();
        let width = self.split.width();
        let mut command = Command::new(std::env::current_exe()?);
        command.arg("profile").arg(case.bundle.dir()).args(["--in-process", "--methods", case.compression.method()]);
        for (flag, value) in [
            ("--context", number(case.lengths.context)),
            ("--prefix", number(self.prefix)),
            ("--suffix", number(self.suffix)),
            ("--new-tokens", number(self.new_tokens)),
            ("--width", if width == usize::MAX { "max".to_owned() } else { number(width) }),
            ("--min-runs", self.protocol.min_runs.to_string()),
            ("--min-time", self.protocol.min_time.to_string()),
            ("--budget", self.protocol.budget.to_string()),
            ("--threads", number(threads(output))),
        ] {
            command.arg(flag).arg(value);
        }
        if let Compression::SharedLlm(shared) = &case.compression {
            command.arg("--chunks").arg(shared.policy.to_string());
        }
        if let Some(text) = &self.text {
            command.arg("--text").arg(text);
        }
        let trace = self.trace.as_ref().map(|_| tempfile::NamedTempFile::new()).transpose()?;
        if let Some(file) = &trace {
            command.arg("--trace").arg(file.path());
        }
        command.args(self.engine.flags()).args(output.is_quiet().then_some("--quiet"));
        let (name, context) = (case.compression.method(), case.lengths.context);
        let ended = command.stdout(Stdio::piped()).stderr(Stdio::inherit()).output()?;
        if !ended.status.success() {
            bail!("{name} at {context} context tokens could not be measured ({})", ended.status);
        }
        let unreadable = || format!("{name} at {context} context tokens: the measurement could not be read");
        if let Some(file) = trace {
            let events: Vec<Value> = serde_json::from_slice(&std::fs::read(file.path())?).with_context(unreadable)?;
            add_process(traced, &format!("{name} at {context}"), events);
        }
        serde_json::from_slice(&ended.stdout).with_context(unreadable)
    }

    fn measure_here(&self, case: &Case<'_>, output: &Output) -> anyhow::Result<Measurement> {
        let Case { bundle, .. } = case;
        let mut prefix = self.tokens(bundle, case.lengths)?;
        let mut context = prefix.split_off(case.lengths.prefix);
        let suffix = context.split_off(case.lengths.context);
        let prompt = PromptIds { prefix, context, suffix };
        let mut engines = self.engine.engines(bundle, output)?;
        let engine = engine_name(bundle);
        let bar = output.bar("", 1);
        let mut run = 0;
        let mut on_step = |step| match step {
            Step::Run => {
                run += 1;
                bar.reset();
                let name = case.compression.method();
                bar.set_message(format!("{name} at {}, run {run}", grouped(case.lengths.context as u64)));
            }
            Step::Built { done, total } => {
                bar.set_length(total as u64);
                bar.set_position(done as u64);
            }
        };
        let engine = (engine.as_str(), threads(output));
        let mut measured = measure(&mut engines, &case.compression, &prompt, &self.effort(), engine, &mut on_step)?;
        bar.finish_and_clear();
        if let Some(path) = &self.trace {
            drop(engines);
            let folder = tempfile::tempdir()?;
            let loader = self.engine.loader(bundle, output)?.tracing(folder.path().to_owned());
            let trace = record(Engines::new(bundle, Box::new(loader)), &case.compression, &prompt, folder.path())?;
            write_aside(path, &serde_json::to_vec(&trace.events)?)?;
            measured.operators = trace.operators;
        }
        Ok(measured)
    }

    /// As many tokens as the prompt has: random, or of the text, from the start again where it ends.
    fn tokens(&self, bundle: &Bundle, lengths: PromptLengths) -> anyhow::Result<Vec<u32>> {
        let vocab_size = bundle.architecture().vocab_size();
        let Some(path) = &self.text else { return Ok(random_tokens(vocab_size, lengths.total(), SEED)) };
        let tokenizer = Tokenizer::open(bundle.dir(), vocab_size)?;
        let ids = encode_context(&tokenizer, &read_text(path)?).with_context(|| format!("--text {path}"))?;
        Ok(ids.into_iter().cycle().take(lengths.total()).collect())
    }
}

/// Adds the events of one measurement to `all`, whose processes are numbered through.
fn add_process(all: &mut Vec<Value>, name: &str, events: Vec<Value>) {
    let first = all.iter().filter_map(|event| event["pid"].as_u64()).max().map_or(0, |last| last + 1);
    for mut event in events {
        event["pid"] = (first + event["pid"].as_u64().unwrap_or(0)).into();
        if let Some(graph) = event["args"]["name"].as_str().filter(|_| event["ph"] == "M") {
            event["args"]["name"] = format!("{name}: {graph}").into();
        }
        all.push(event);
    }
}

fn engine_name(bundle: &Bundle) -> String {
    format!("ort-cpu {}", bundle.manifest().precision)
}

/// Threads an operator may use.
fn threads(output: &Output) -> usize {
    output.threads().unwrap_or_else(|| std::thread::available_parallelism().map_or(1, usize::from))
}

/// What the bundle's folder is called.
fn model_name(bundle: &Bundle) -> String {
    let absolute = std::fs::canonicalize(bundle.dir()).unwrap_or_else(|_| bundle.dir().to_owned());
    absolute.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

/// The table on the terminal.
fn rows(profile: &ProfileReport) -> String {
    let header = [
        "method",
        ">context",
        ">kept",
        ">prefix s",
        ">runs",
        ">vs plain",
        ">first ms",
        ">token p50",
        ">p95 ms",
        ">peak",
        ">state/token",
        ">smaller",
        ">of floor",
    ];
    let none = || "-".to_owned();
    let row = |row: &ProfileRow| {
        let measured = &row.measured;
        [
            measured.configuration.method.clone(),
            grouped(measured.prompt.context as u64),
            grouped(measured.tokens_kept as u64),
            format!("{:.2}", measured.prefix.median_ms / 1e3),
            measured.prefix.runs.to_string(),
            row.prefix_speedup.map_or_else(none, |factor| format!("{factor:.1} x")),
            format!("{:.1}", measured.first_token.median_ms),
            format!("{:.1}", measured.per_token.median_ms),
            format!("{:.1}", measured.per_token.p95_ms),
            bytes(measured.peak_resident_bytes),
            row.state_bytes_per_context_token.map_or_else(none, |size| bytes(size as u64)),
            row.state_reduction.map_or_else(none, |factor| format!("{factor:.1} x")),
            measured.floor_fraction.map_or_else(none, |share| format!("{:.0} %", share * 100.0)),
        ]
    };
    let mut text = table(header, &profile.rows.iter().map(row).collect::<Vec<_>>());
    for row in profile.rows.iter().filter(|row| !row.measured.operators.is_empty()) {
        text.push_str(&operators(&row.measured));
    }
    text
}

/// The operators that a traced run spent most of its time in.
fn operators(measured: &Measurement) -> String {
    const SHOWN: usize = 12;
    let total: f64 = measured.operators.iter().map(|operator| operator.total_ms).sum();
    let row = |time: &OperatorTime| {
        [
            format!("  {}", time.graph),
            time.module.clone(),
            time.operator.clone(),
            grouped(time.calls as u64),
            format!("{:.1}", time.total_ms),
            format!("{:.1} %", time.total_ms / total * 100.0),
        ]
    };
    let rows: Vec<_> = measured.operators.iter().take(SHOWN).map(row).collect();
    let header = ["  GRAPH", "MODULE", "OPERATOR", ">CALLS", ">MS", ">SHARE"];
    let (method, context) = (&measured.configuration.method, grouped(measured.prompt.context as u64));
    format!("\n{method} at {context}, one traced run, {total:.0} ms in nodes:\n{}", table(header, &rows))
}
