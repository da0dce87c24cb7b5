//! `accordion demo`: the other commands in a row, on a real model, and what came of them on one page.
//!
//! Each step is one command that a user could type, run as a process of its own; the answer alone is generated here, so
//! that it can be streamed and put on the page too.

use super::Outcome;
use super::engine::EngineArguments;
use super::output::Output;
use super::report::write_aside;
use super::text::grouped;
use accordion::bundle::Bundle;
use accordion::checkpoint::Tokenizer;
use accordion::pipeline::Engines;
use accordion::pipeline::compress::{Compression, Homer, Significance};
use accordion::pipeline::decode::Continuation;
use accordion::pipeline::generate::{Event, Generation, GenerationSettings, generate};
use accordion::pipeline::prompt::{Framing, PromptIds, encode_affixes, encode_context, read_text};
use accordion::pipeline::sampling::SamplingSettings;
use accordion::profile::schema::{ProfileReport, describe};
use accordion::report::{GenerationRecord, PlanSummary, Report, render};
use accordion::verify::schema::VerifyReport;
use accordion::verify::verdict::Verdict;
use anyhow::{Context, bail};
use clap::Args;
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::time::Instant;

const MODEL: &str = "smollm2-135m";
const TEXT: &str = "demo-text";
const QUESTION: &str = "Who are the Bennet sisters, and what happens to them? Answer in a few sentences.";
const REMARK: &str = "A model of 135 million parameters does not answer well about so long a text. What the demo shows is that \
    the graphs are right, fast and small.";

/// Fetch a real model, export, verify, generate, profile, and write report.html
#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// Folder for everything that is made; what is there from an earlier demo is replaced
    #[arg(long, value_name = "DIR", default_value = "accordion-demo")]
    out: PathBuf,
    /// Tokens of the context that the model answers after
    #[arg(long, value_name = "N", default_value_t = 16_384, value_parser = context_length)]
    context: usize,
    /// Do less of everything: a check that it works, not a measurement
    #[arg(long)]
    quick: bool,
}

fn context_length(text: &str) -> Result<usize, String> {
    let length = text.parse().ok().filter(|length| (64..=131_072).contains(length));
    length.ok_or_else(|| "expected a number of tokens from 64 to 131072".to_owned())
}

/// How much each step does.
struct Extent {
    calibration_windows: usize,
    verified_context: usize,
    profiled_contexts: Vec<usize>,
    runs: usize,
    budget_seconds: usize,
    answer_tokens: usize,
}

impl Extent {
    fn of(arguments: &Arguments) -> Self {
        if arguments.quick {
            return Self {
                calibration_windows: 2,
                verified_context: 2100,
                profiled_contexts: vec![2048],
                runs: 1,
                budget_seconds: 1,
                answer_tokens: 16,
            };
        }
        let profiled = [4096, 8192, arguments.context].into_iter().filter(|&context| context <= arguments.context);
        let mut profiled: Vec<usize> = profiled.collect();
        profiled.dedup();
        Self {
            calibration_windows: 8,
            verified_context: 4096,
            profiled_contexts: profiled,
            runs: 3,
            budget_seconds: 20,
            answer_tokens: 64,
        }
    }
}

/// What `--json` prints.
#[derive(Debug, Serialize)]
struct Summary<'a> {
    schema: &'static str,
    page: &'a Path,
    bundle: &'a Path,
    verdict: Verdict,
    seconds: f64,
}

/// Runs the command.
pub(crate) fn run(arguments: &Arguments, output: &Output) -> anyhow::Result<Outcome> {
    let started = Instant::now();
    let extent = Extent::of(arguments);
    let mut demo = Demo::new(arguments, output)?;

    let (model, text) = demo.fetch()?;
    demo.calibrate(&model, &text, &extent)?;
    demo.export(&model, &extent)?;
    let verified = demo.verify(&text, &extent)?;
    let (plan, answer) = demo.answer(&text, &extent)?;
    let profile = demo.profile(&extent)?;

    let verdict = verified.verdict;
    let report = Report {
        verifications: vec![verified],
        profiles: vec![profile],
        plans: vec![plan],
        generations: vec![answer],
        ..Report::here("Accordion demo: HOMER on SmolLM2-135M")
    };
    let page = demo.path("report.html");
    write_aside(&page, render(&report).as_bytes())?;
    let seconds = started.elapsed().as_secs_f64();
    let summary = Summary { schema: "accordion.demo/1", page: &page, bundle: &demo.bundle, verdict, seconds };
    output.result(&summary, || demo.next(&page, seconds))?;
    Ok(if verdict == Verdict::Fail { Outcome::CheckFailed } else { Outcome::Done })
}

/// The demo's folder and what is in it.
struct Demo<'a> {
    arguments: &'a Arguments,
    output: &'a Output,
    bundle: PathBuf,
    table: PathBuf,
    steps: usize,
}

impl<'a> Demo<'a> {
    fn new(arguments: &'a Arguments, output: &'a Output) -> anyhow::Result<Self> {
        let out = &arguments.out;
        std::fs::create_dir_all(out).with_context(|| out.display().to_string())?;
        let [bundle, table] = ["homer", "significance.safetensors"].map(|name| out.join(name));
        Ok(Self { arguments, output, bundle, table, steps: 0 })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.arguments.out.join(name)
    }

    /// The model's checkpoint folder and the text's file.
    fn fetch(&mut self) -> anyhow::Result<(PathBuf, PathBuf)> {
        #[derive(serde::Deserialize)]
        struct Fetched {
            fetched: Vec<Asset>,
        }
        #[derive(serde::Deserialize)]
        struct Asset {
            paths: Vec<PathBuf>,
        }
        let step = self.step(&format!("fetch {MODEL} {TEXT}"));
        let found: Fetched = self.command(&[&"fetch", &MODEL, &TEXT, &"onnxruntime"])?;
        let mut first = found.fetched.into_iter().filter_map(|asset| asset.paths.into_iter().next());
        let (Some(model), Some(text)) = (first.next(), first.next()) else { bail!("nothing was fetched") };
        self.done(step, "in the cache, hashes checked");
        Ok((model, text))
    }

    fn calibrate(&mut self, model: &Path, text: &Path, extent: &Extent) -> anyhow::Result<()> {
        let windows = extent.calibration_windows;
        let step = self.step(&format!("calibrate significance {MODEL} --windows {windows}"));
        if self.table.is_file() {
            self.done(step, "the table of an earlier demo is used again");
            return Ok(());
        }
        let count = windows.to_string();
        let arguments: [&dyn AsRef<OsStr>; 9] =
            [&"calibrate", &"significance", &model, &"--text", &text, &"--output", &self.table, &"--windows", &count];
        let _: serde_json::Value = self.command(&arguments)?;
        self.done(step, &format!("{windows} windows of 2,048 tokens; 32 or more make a smoother table"));
        Ok(())
    }

    fn export(&mut self, model: &Path, extent: &Extent) -> anyhow::Result<()> {
        #[derive(serde::Deserialize)]
        struct Exported {
            graphs: usize,
            bytes_written: u64,
        }
        let others = extent.profiled_contexts.iter().copied().chain([extent.verified_context]);
        let longest = others.fold(self.arguments.context, usize::max).to_string();
        let step = self.step(&format!("export homer {MODEL} {} --context {longest}", self.bundle.display()));
        let arguments: [&dyn AsRef<OsStr>; 9] =
            [&"export", &"homer", &model, &self.bundle, &"--force", &"--context", &longest, &"--table", &self.table];
        let found: Exported = self.command(&arguments)?;
        let megabytes = found.bytes_written as f64 / 1e6;
        self.done(step, &format!("{} graphs, {megabytes:.1} MB beside the linked weights", found.graphs));
        Ok(())
    }

    fn verify(&mut self, text: &Path, extent: &Extent) -> anyhow::Result<VerifyReport> {
        let context = extent.verified_context.to_string();
        let step = self.step(&format!("verify {} --context {context}", self.bundle.display()));
        let report: VerifyReport =
            self.command(&[&"verify", &self.bundle, &"--text", &text, &"--context", &context])?;
        let (pass, all) = (report.counts.pass, report.counts.total());
        self.done(step, &format!("{}: {pass} of {all} tensors agree with the reference", report.verdict));
        Ok(report)
    }

    /// The text's first tokens and a question, through the graphs to an answer.
    fn answer(&mut self, text: &Path, extent: &Extent) -> anyhow::Result<(PlanSummary, GenerationRecord)> {
        let step = self.step(&format!("run {} --context ... --prompt \"{QUESTION}\"", self.bundle.display()));
        let bundle = Bundle::open(&self.bundle)?;
        let arch = bundle.architecture();
        let tokenizer = Tokenizer::open(bundle.dir(), arch.vocab_size())?;
        let mut context = encode_context(&tokenizer, &read_text(&text.to_string_lossy())?)?;
        context.truncate(self.arguments.context);
        let (prefix, suffix) = encode_affixes(&tokenizer, Framing::Chat { system: None }, QUESTION)?;
        let prompt = PromptIds { prefix, context, suffix };

        let accordion::bundle::Method::Homer { settings, .. } = bundle.manifest().method.clone() else {
            bail!("{} is not the demo's bundle", self.bundle.display())
        };
        let significance = bundle.significance()?.map(|table| Significance::Table(Box::new(table)));
        let homer = Homer { settings, significance, width: 1 };
        let plan = homer.plan(&bundle, prompt.lengths())?;
        let mut engines = EngineArguments::fused().engines(&bundle, self.output)?;
        let bar = self.output.bar("compressing the context", 1);
        let began = Instant::now();
        let state = Compression::Homer(homer).compress(&mut engines, &prompt, &mut |done, total| {
            bar.set_length(total as u64);
            bar.set_position(done as u64);
        })?;
        bar.finish_and_clear();
        let compressed = began.elapsed().as_secs_f64();
        let (total, kept) = (prompt.lengths().total(), state.tokens_kept());
        self.output.remark(format!(
            "  {} tokens, in a model trained for {}, compressed to {} in {compressed:.1} s; it answers:",
            grouped(total as u64),
            grouped(arch.max_positions() as u64),
            grouped(kept as u64)
        ));
        let generation = self.stream(&mut engines, &tokenizer, &state, extent)?;
        let rate = generation.tokens_per_second().map_or(String::new(), |rate| format!(", {rate:.1} a second"));
        self.done(step, &format!("{} tokens{rate}. {REMARK}", generation.token_ids.len()));
        let record = GenerationRecord {
            schema: GenerationRecord::SCHEMA.to_owned(),
            method: "homer".to_owned(),
            context_tokens: prompt.context.len(),
            tokens_kept: kept,
            prompt: QUESTION.to_owned(),
            tokens: generation.token_ids.len(),
            text: generation.text,
            settings: describe(&settings),
            seed: None,
            remark: Some(REMARK.to_owned()),
        };
        Ok((PlanSummary::from(&plan), record))
    }

    fn stream(
        &self,
        engines: &mut Engines<'_>,
        tokenizer: &Tokenizer,
        state: &accordion::pipeline::ContextState,
        extent: &Extent,
    ) -> anyhow::Result<Generation> {
        let settings = GenerationSettings {
            sampling: SamplingSettings { temperature: 0.0, top_k: None, top_p: 1.0, seed: 0 },
            stop_strings: Vec::new(),
            max_tokens: extent.answer_tokens,
            keep_first: false,
            continuation: Continuation::Next,
            max_positions: engines.bundle().architecture().max_positions(),
        };
        let mut on_event = |event: Event<'_>| {
            if let Event::Text(piece) = event {
                self.output.aside(piece);
            }
        };
        let generation = generate(engines, tokenizer, state, &settings, None, &mut on_event)?;
        self.output.aside("\n");
        Ok(generation)
    }

    fn profile(&mut self, extent: &Extent) -> anyhow::Result<ProfileReport> {
        let list = extent.profiled_contexts.iter().map(usize::to_string).collect::<Vec<_>>().join(",");
        let step = self.step(&format!("profile {} --context {list} --plain-up-to 8192", self.bundle.display()));
        let [runs, budget] = [extent.runs, extent.budget_seconds].map(|n| n.to_string());
        let report: ProfileReport = self.command(&[
            &"profile",
            &self.bundle,
            &"--context",
            &list,
            &"--plain-up-to",
            &"8192",
            &"--min-time",
            &"0",
            &"--min-runs",
            &runs,
            &"--budget",
            &budget,
        ])?;
        let compared = report.rows.iter().filter_map(|row| Some((row.prefix_speedup?, row.measured.prompt.context)));
        let best = compared.max_by_key(|(_, context)| *context);
        let found = best.map_or_else(String::new, |(factor, context)| {
            format!("a context of {} tokens is ready {factor:.1} times sooner than by plain", grouped(context as u64))
        });
        self.done(step, &found);
        Ok(report)
    }

    /// Announces a step as the command that it is.
    fn step(&mut self, command: &str) -> Instant {
        self.steps += 1;
        let number = self.steps;
        self.output.remark(format!("[{number}/6] {}", self.output.paint(&format!("accordion {command}"), "1")));
        Instant::now()
    }

    fn done(&self, started: Instant, result: &str) {
        self.output.remark(format!("      {:.1} s: {result}", started.elapsed().as_secs_f64()));
    }

    /// Runs a command of this program and reads its result.
    fn command<T: DeserializeOwned>(&self, arguments: &[&dyn AsRef<OsStr>]) -> anyhow::Result<T> {
        let mut command = Command::new(std::env::current_exe()?);
        command.arg("--json").args(arguments.iter().map(AsRef::as_ref));
        command.args(self.output.threads().map(|threads| format!("--threads={threads}")));
        command.args(self.output.is_quiet().then_some("--quiet"));
        let name = arguments.first().map(|name| name.as_ref().to_string_lossy()).unwrap_or_default();
        let ended = command.stdout(Stdio::piped()).stderr(Stdio::inherit()).output()?;
        if !(ended.status.success() || is_answer(ended.status)) {
            bail!("accordion {name} failed ({})", ended.status);
        }
        serde_json::from_slice(&ended.stdout).with_context(|| format!("the result of accordion {name}"))
    }

    /// Where the page is and what to try next.
    fn next(&self, page: &Path, seconds: f64) -> String {
        let (page, bundle) = (page.display(), self.bundle.display());
        format!(
            "\nDone in {seconds:.0} s. The page with everything: {page}\n\nNext:\n  \
             accordion run {bundle} --context YOUR.txt --prompt \"What is this about?\"\n  \
             accordion inspect {bundle}\n  \
             accordion profile {bundle} --context 4096,16384,32768 --html profile.html\n  \
             accordion --help"
        )
    }
}

/// Whether a command ended with a result that says no: the page shows it.
fn is_answer(status: ExitStatus) -> bool {
    status.code() == Some(1)
}
