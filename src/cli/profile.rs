//! `accordion profile`.

mod child;
mod show;
mod sides;

use super::compression::{Pruning, SplitArguments};
use super::engine::{EngineArguments, Operators};
use super::method::MethodName;
use super::output::Output;
use super::text::grouped;
use super::{Outcome, report::write_aside};
use accordion::bundle::Bundle;
use accordion::checkpoint::Tokenizer;
use accordion::environment::Provenance;
use accordion::pipeline::Engines;
use accordion::pipeline::compress::Compression;
use accordion::pipeline::decode::PREFILL_ROWS;
use accordion::pipeline::prompt::{encode_context, read_text};
use accordion::profile::ceilings::Ceilings;
use accordion::profile::measure::{Effort, Runner, measure_saved, random_tokens, work};
use accordion::profile::regression::compare;
use accordion::profile::schema::{Measurement, ProfileReport, SCHEMA};
use accordion::profile::stats::Protocol;
use accordion::profile::stopwatch::Stopwatch;
use accordion::report::{Report, render};
use accordion_graphs::plan::PromptLengths;
use anyhow::{Context, bail, ensure};
use clap::Args;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Seed of the random tokens that are measured where no text is given.
const SEED: u64 = 1;

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
    /// Tokens to decode behind the prompt; with several numbers, those between two of them are listed apart, to see what
    /// the growing cache costs
    #[arg(long, value_name = "N,N", value_delimiter = ',', default_values_t = [32])]
    new_tokens: Vec<usize>,
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
    /// Measure two sides alternately, A, B, B, A and so on, and say whether B is faster: two bundles, or one with two
    /// --methods or --against-operators
    #[arg(long, conflicts_with_all = ["state", "trace", "baseline", "plain_up_to", "min_runs", "budget"])]
    paired: bool,
    /// Turns of each side; an even number, so that each begins as often
    #[arg(long, value_name = "N", default_value_t = 10, requires = "paired", value_parser = parse_pairs)]
    pairs: usize,
    /// What runs the operators of the domain ai.accordion on side B [default: as --operators]
    #[arg(long, value_enum, value_name = "OPERATORS", requires = "paired")]
    against_operators: Option<Operators>,
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
    /// Do so once for every line of standard input, with as many turns sharing --min-time
    #[arg(long, hide = true, requires = "in_process")]
    turns: Option<usize>,
}

#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Repetition")]
struct ProtocolArguments {
    /// Least number of times a prefix is built, after one that is not counted
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u16).range(1..))]
    min_runs: u16,
    /// Least time for building prefixes, and for taking first tokens from one, in seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 3.0, value_parser = parse_seconds)]
    min_time: f64,
    /// Most time for building prefixes of one method and length, and for first tokens, in seconds; once is always built
    #[arg(long, value_name = "SECONDS", default_value_t = 60.0, value_parser = parse_seconds)]
    budget: f64,
}

fn parse_pairs(text: &str) -> Result<usize, String> {
    let number = text.parse().ok().filter(|pairs: &usize| (4..=10_000).contains(pairs) && pairs.is_multiple_of(2));
    number.ok_or_else(|| "expected an even number from 4 to 10000".to_owned())
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
    arguments.check_new_tokens()?;
    ensure!(
        arguments.trace.is_none() || arguments.engine.is_ort_cpu(),
        "--trace needs --engine ort-cpu, and the engine is {}",
        arguments.engine.name()
    );
    if let (Some(path), Some(bundle)) = (&arguments.state, bundles.first()) {
        return arguments.saved(bundle, path, output);
    }
    if arguments.paired {
        let profile = arguments.compare_sides(&bundles, output)?;
        return arguments.finish(&profile, None, output);
    }
    let cases = arguments.cases(&bundles)?;
    let baseline = arguments.baseline.as_deref().map(read_profile).transpose()?;
    if arguments.in_process {
        let [case] = &cases[..] else { bail!("--in-process measures one method at one length") };
        return arguments.measure_here(case, output).map(|()| Outcome::Done);
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
        let runner = runner(bundle, &self.engine, output);
        let mut engines = Engines::new(bundle, runner.stopwatch.watch(self.engine.loader(bundle, output)?));
        let measured = measure_saved(&mut engines, path, &suffix, &self.effort(), &runner, &mut |_| {})?;
        drop(engines);
        let rows = measured.prompt.total().min(PREFILL_ROWS);
        let measured = match self.ceilings(bundle, rows, output)? {
            Some(rates) => measured.bounded_by(rates),
            None => measured,
        };
        let profile = ProfileReport::new(model_name(bundle), Provenance::probe().pairs(), &[measured], Vec::new());
        self.finish(&profile, baseline.as_ref(), output)
    }

    /// The rates of the machine on products of `rows` rows; those of a GPU are not measured.
    fn ceilings(&self, bundle: &Bundle, rows: usize, output: &Output) -> anyhow::Result<Option<Ceilings>> {
        if !self.engine.is_ort_cpu() {
            return Ok(None);
        }
        let loader = self.engine.loader(bundle, output)?;
        Ok(Some(Ceilings::measure(&loader, bundle, rows, threads(output))?))
    }

    fn effort(&self) -> Effort {
        let first_token = Protocol {
            min_time: Duration::from_secs_f64(self.protocol.min_time),
            max_time: Some(Duration::from_secs_f64(self.protocol.budget)),
            ..Protocol::default()
        };
        let prefix = Protocol { min_runs: usize::from(self.protocol.min_runs), ..first_token };
        Effort { prefix, first_token, new_tokens: self.new_tokens.clone() }
    }

    fn check_new_tokens(&self) -> anyhow::Result<()> {
        let ascending = self.new_tokens.is_sorted_by(|a, b| a < b) && self.new_tokens.first() != Some(&0);
        ensure!(ascending, "--new-tokens: expected numbers from 1 on, each larger than the one before");
        Ok(())
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
        output.result(profile, || show::text(profile))?;
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
                let compression = self.compression(bundle, method)?;
                work(bundle, &compression, lengths)?;
                cases.push(Case { bundle, compression, lengths });
            }
        }
        Ok(cases)
    }

    /// What `method` does to a context with the settings of `bundle`. Which tokens are kept makes no difference to the time.
    fn compression(&self, bundle: &Bundle, method: MethodName) -> anyhow::Result<Compression> {
        self.split.compression(bundle, method, Pruning::uncalibrated(), true)
    }

    /// Measures everything, each configuration in its own process.
    fn profile(&self, bundles: &[Bundle], cases: &[Case<'_>], output: &Output) -> anyhow::Result<ProfileReport> {
        let mut warnings = Vec::new();
        let mut measurements: Vec<Measurement> = Vec::new();
        let mut traced = Vec::new();
        for case in cases {
            let measured = self.measure_apart(case, &mut traced, output)?;
            output.remark(format!(
                "{} at {}: {:.2} s, {} runs, then {:.1} ms per token",
                case.compression.method(),
                grouped(case.lengths.context as u64),
                measured.prefix.median_ms / 1e3,
                measured.prefix.runs,
                measured.per_token.median_ms
            ));
            warnings.extend(self.reservations(case, &measured));
            measurements.push(measured);
        }
        if let Some(path) = &self.trace {
            write_aside(path, &serde_json::to_vec(&traced)?)?;
        }
        let mut environment = Provenance::probe().pairs();
        for measured in &measurements {
            let name = format!("Rates ({})", measured.configuration.decoder);
            if let Some(rates) =
                measured.details.ceilings.filter(|_| environment.iter().all(|(known, _)| *known != name))
            {
                environment.push((name, show::rates(&rates)));
            }
        }
        Ok(ProfileReport::new(model_names(bundles), environment, &measurements, warnings))
    }

    /// What has to be known to read `measured` rightly.
    fn reservations(&self, case: &Case<'_>, measured: &Measurement) -> Vec<String> {
        let (name, context) = (case.compression.method(), case.lengths.context);
        let mut found = Vec::new();
        let limits = [("", measured.details.prefix_limit), ("a token of ", measured.details.token_limit)];
        for (what, _) in limits.iter().filter(|(_, limit)| limit.is_some_and(|limit| limit.fraction > 1.0)) {
            found.push(format!(
                "{what}{name} at {context} context tokens was faster than its limit: other programs were running when the \
                 machine's rates were measured"
            ));
        }
        let (runs, wanted) = (measured.prefix.runs, usize::from(self.protocol.min_runs));
        if runs < wanted {
            let budget = self.protocol.budget;
            found.push(format!(
                "{name} at {context} context tokens: built {runs} times instead of {wanted}, because --budget is {budget} s"
            ));
        }
        let max_positions = case.bundle.architecture().max_positions();
        if matches!(case.compression, Compression::Plain { .. }) && case.lengths.total() > max_positions {
            found.push(format!(
                "plain at {context} context tokens is beyond the {max_positions} positions the model was trained \
                 for: its time is real, its text would not be"
            ));
        }
        found
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

/// What `bundle` runs on, with a stopwatch of its own.
fn runner(bundle: &Bundle, engine: &EngineArguments, output: &Output) -> Runner {
    let engine = format!("{} {}", engine.name(), bundle.manifest().numbers());
    Runner { engine, threads: threads(output), stopwatch: Stopwatch::default() }
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

/// What the bundles' folders are called.
fn model_names(bundles: &[Bundle]) -> String {
    bundles.iter().map(model_name).collect::<Vec<_>>().join(", ")
}
