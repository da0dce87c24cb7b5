//! One configuration in a process of its own: what a runtime's allocator once took it keeps.

use super::super::engine::EngineArguments;
use super::super::output::Output;
use super::super::report::write_aside;
use super::super::text::grouped;
use super::{Arguments, Case, runner, threads};
use accordion::pipeline::Engines;
use accordion::pipeline::compress::Compression;
use accordion::pipeline::prompt::PromptIds;
use accordion::profile::ceilings::Ceilings;
use accordion::profile::measure::{Effort, Step, measure, record, work};
use accordion::profile::schema::Measurement;
use anyhow::{Context, bail};
use serde::de::DeserializeOwned;
use serde_json::Value;
use std::io::{BufRead, BufReader, Write};
use std::process::{ChildStdin, ChildStdout, Command, Stdio};
use std::time::Duration;

/// What a process is asked for that holds one side of a comparison.
const TURN: &str = "turn";
const RATES: &str = "rates";

impl Arguments {
    /// The command line that measures `case` in its own process.
    fn command(&self, case: &Case<'_>, engine: &EngineArguments, output: &Output) -> anyhow::Result<Command> {
        let number = |n: usize| n.to_string();
        let width = self.split.width();
        let mut command = Command::new(std::env::current_exe()?);
        command.arg("profile").arg(case.bundle.dir()).args(["--in-process", "--methods", case.compression.method()]);
        let new_tokens: Vec<String> = self.new_tokens.iter().map(usize::to_string).collect();
        for (flag, value) in [
            ("--context", number(case.lengths.context)),
            ("--prefix", number(self.prefix)),
            ("--suffix", number(self.suffix)),
            ("--new-tokens", new_tokens.join(",")),
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
        command.args(engine.flags()).args(output.is_quiet().then_some("--quiet"));
        command.stdout(Stdio::piped()).stderr(Stdio::inherit());
        Ok(command)
    }

    /// Measures one configuration in a process of its own.
    pub(super) fn measure_apart(
        &self,
        case: &Case<'_>,
        traced: &mut Vec<Value>,
        output: &Output,
    ) -> anyhow::Result<Measurement> {
        let mut command = self.command(case, &self.engine, output)?;
        let trace = self.trace.as_ref().map(|_| tempfile::NamedTempFile::new()).transpose()?;
        if let Some(file) = &trace {
            command.arg("--trace").arg(file.path());
        }
        let (name, context) = (case.compression.method(), case.lengths.context);
        let ended = command.output()?;
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

    /// Measures `case` in this process and prints the measurement, or one per line of standard input.
    pub(super) fn measure_here(&self, case: &Case<'_>, output: &Output) -> anyhow::Result<()> {
        let Case { bundle, .. } = case;
        let mut prefix = self.tokens(bundle, case.lengths)?;
        let mut context = prefix.split_off(case.lengths.prefix);
        let suffix = context.split_off(case.lengths.context);
        let prompt = PromptIds { prefix, context, suffix };
        let runner = runner(bundle, &self.engine, output);
        let mut engines = Engines::new(bundle, runner.stopwatch.watch(self.engine.loader(bundle, output)?));
        let mut out = std::io::stdout().lock();
        if let Some(turns) = self.turns {
            let min_time = Duration::from_secs_f64(self.protocol.min_time / turns.max(1) as f64);
            let effort = Effort::turn(min_time, self.new_tokens.last().copied().unwrap_or(1));
            for line in std::io::stdin().lock().lines() {
                if line?.as_str() == RATES {
                    serde_json::to_writer(&mut out, &self.rates(case, output)?)?;
                } else {
                    let turn = measure(&mut engines, &case.compression, &prompt, &effort, &runner, &mut |_| {})?;
                    serde_json::to_writer(&mut out, &turn)?;
                }
                out.write_all(b"\n")?;
                out.flush()?;
            }
            return Ok(());
        }
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
        let mut measured = measure(&mut engines, &case.compression, &prompt, &self.effort(), &runner, &mut on_step)?;
        bar.finish_and_clear();
        drop(engines);
        // Now, on the machine as it has just been.
        if let Some(rates) = self.rates(case, output)? {
            measured = measured.bounded_by(rates);
        }
        if let Some(path) = &self.trace {
            let folder = tempfile::tempdir()?;
            let loader = self.engine.ort_cpu("--trace", bundle, output)?.tracing(folder.path().to_owned());
            let trace = record(Engines::new(bundle, Box::new(loader)), &case.compression, &prompt, folder.path())?;
            write_aside(path, &serde_json::to_vec(&trace.events)?)?;
            measured.operators = trace.operators;
        }
        serde_json::to_writer(&mut out, &measured)?;
        Ok(())
    }

    /// The machine's rates in this process, for the rows that `case` has; those of a GPU are not measured.
    fn rates(&self, case: &Case<'_>, output: &Output) -> anyhow::Result<Option<Ceilings>> {
        let (_, rows) = work(case.bundle, &case.compression, case.lengths)?;
        self.ceilings(case.bundle, rows, output)
    }

    /// Starts a process that measures `case` whenever it is asked to.
    pub(super) fn start(&self, case: &Case<'_>, engine: &EngineArguments, output: &Output) -> anyhow::Result<Side> {
        let mut command = self.command(case, engine, output)?;
        command.arg("--turns").arg(self.pairs.to_string());
        let name = format!("{} at {} context tokens", case.compression.method(), case.lengths.context);
        let mut process = command.stdin(Stdio::piped()).spawn()?;
        let (Some(asks), Some(answers)) = (process.stdin.take(), process.stdout.take().map(BufReader::new)) else {
            bail!("{name} could not be measured: its process has no input or output");
        };
        Ok(Side { name, process, asks: Some(asks), answers })
    }
}

/// A process that holds one side of a comparison, loaded and warm.
pub(super) struct Side {
    name: String,
    process: std::process::Child,
    asks: Option<ChildStdin>,
    answers: BufReader<ChildStdout>,
}

impl Side {
    /// Measures one turn.
    pub(super) fn measure(&mut self) -> anyhow::Result<Measurement> {
        self.ask(TURN)
    }

    /// Measures the machine's rates.
    pub(super) fn rates(&mut self) -> anyhow::Result<Option<Ceilings>> {
        self.ask(RATES)
    }

    fn ask<T: DeserializeOwned>(&mut self, what: &str) -> anyhow::Result<T> {
        // A process that is gone says why on standard error; here only that it is gone is known.
        let asked = self.asks.as_mut().map(|asks| writeln!(asks, "{what}").and_then(|()| asks.flush()));
        let mut answer = String::new();
        let read = self.answers.read_line(&mut answer)?;
        if read == 0 || !matches!(asked, Some(Ok(()))) {
            self.asks = None;
            bail!("{} could not be measured ({})", self.name, self.process.wait()?);
        }
        serde_json::from_str(&answer).with_context(|| format!("{}: the measurement could not be read", self.name))
    }
}

impl Drop for Side {
    fn drop(&mut self) {
        // The end of its input ends the process.
        self.asks = None;
        let _ = self.process.wait();
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
