//! One engine in a process of its own: where NVIDIA's code meets what it did not expect, it ends the process it is in.
//!
//! The child gets the command line of its parent and three flags more, and answers on standard output, one JSON value per line.

use super::super::Outcome;
use super::super::output::Output;
use accordion::bundle::Bundle;
use accordion::tensorrt::shim::{Observer, Shim};
use accordion::tensorrt::toolkit::Toolkit;
use accordion::tensorrt::{BuildOptions, BuiltProfile, build_graph, try_to_load};
use anyhow::{Context, bail};
use clap::Args;
use indicatif::ProgressBar;
use serde::{Deserialize, Serialize};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;

/// What the parent asks of a child; not for people.
#[derive(Debug, Args)]
pub(super) struct InProcess {
    /// The graph to build in this process
    #[arg(long = "in-process", hide = true, value_name = "GRAPH", requires = "plan")]
    pub(super) graph: Option<String>,
    /// Its plan
    #[arg(long, hide = true, value_name = "FILE")]
    plan: Option<PathBuf>,
    /// The timing cache, read and replaced; without one the plan is loaded instead of built
    #[arg(long, hide = true, value_name = "FILE")]
    timing_cache: Option<PathBuf>,
}

/// What a child says.
#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
enum Event {
    /// A step of the build is done.
    Progress { phase: String, step: usize, steps: usize },
    /// The library warns.
    Warning { message: String },
    /// The plan is written, or loaded.
    Done { profiles: Vec<BuiltProfile> },
    /// It could not be done.
    Failed { message: String },
}

/// Says what happens on standard output.
struct Teller;

impl Teller {
    fn tell(event: &Event) {
        // Nobody listens any more if this fails; the build then ends for that reason.
        if let Ok(line) = serde_json::to_string(event) {
            let _ = writeln!(std::io::stdout().lock(), "{line}");
        }
    }
}

impl Observer for Teller {
    fn log(&self, severity: i32, message: &str) {
        const WARNING: i32 = 2;
        if severity == WARNING {
            Self::tell(&Event::Warning { message: message.to_owned() });
        }
    }

    fn progress(&self, phase: &str, step: usize, steps: usize) -> bool {
        Self::tell(&Event::Progress { phase: phase.to_owned(), step, steps });
        true
    }
}

impl InProcess {
    /// Builds or loads the engine of `graph` in this process.
    pub(super) fn run(&self, graph: &str, bundle: &Bundle, toolkit: &Toolkit, options: &BuildOptions) -> Outcome {
        let event = match self.engine(graph, bundle, toolkit, options) {
            Ok(profiles) => Event::Done { profiles },
            Err(error) => Event::Failed { message: format!("{error:#}") },
        };
        Teller::tell(&event);
        Outcome::Done
    }

    fn engine(
        &self,
        graph: &str,
        bundle: &Bundle,
        toolkit: &Toolkit,
        options: &BuildOptions,
    ) -> anyhow::Result<Vec<BuiltProfile>> {
        let path = self.plan.as_deref().context("--plan is missing")?;
        let shim = Shim::open(toolkit)?;
        let Some(timing_path) = &self.timing_cache else {
            if let Some(plugins) = &options.plugins {
                shim.load_plugins(plugins)?;
            }
            try_to_load(Arc::new(shim), graph, &read(path)?, &Teller)?;
            return Ok(Vec::new());
        };
        let measured = if timing_path.is_file() { read(timing_path)? } else { Vec::new() };
        let built = build_graph(&shim, bundle, graph, options, &measured, &Teller)?;
        write(path, &built.plan.plan)?;
        if !built.plan.timing_cache.is_empty() {
            write(timing_path, &built.plan.timing_cache)?;
        }
        Ok(built.profiles)
    }
}

/// An engine to be built or loaded by another process.
pub(super) struct Child<'a> {
    /// The graph.
    pub(super) graph: &'a str,
    /// Where its plan is, or is to be written.
    pub(super) plan: &'a Path,
    /// Where measurements are and will be; `None` loads the plan.
    pub(super) timing_cache: Option<&'a Path>,
}

impl Child<'_> {
    /// Runs it to its end and returns the profiles that were built; shows the library's warnings if `verbose`.
    pub(super) fn run(&self, verbose: bool, output: &Output) -> anyhow::Result<Vec<BuiltProfile>> {
        let mut command = Command::new(std::env::current_exe()?);
        command.args(std::env::args_os().skip(1)).arg("--in-process").arg(self.graph).arg("--plan").arg(self.plan);
        if let Some(path) = self.timing_cache {
            command.arg("--timing-cache").arg(path);
        }
        let mut process = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn()?;
        let answers = process.stdout.take().context("the process has no output")?;
        let bar = output.bar(self.graph, 0);
        let mut last = None;
        for line in BufReader::new(answers).lines() {
            // NVIDIA's code may print lines of its own.
            match serde_json::from_str(&line?) {
                Ok(Event::Progress { phase, step, steps }) => self.show(&bar, &phase, step, steps),
                Ok(Event::Warning { message }) => {
                    if verbose {
                        bar.suspend(|| output.warning(format!("{}: {message}", self.graph)));
                    }
                }
                Ok(event) => last = Some(event),
                Err(_) => {}
            }
        }
        bar.finish_and_clear();
        let status = process.wait()?;
        match last {
            Some(Event::Done { profiles }) if status.success() => Ok(profiles),
            Some(Event::Failed { message }) => bail!("{message}"),
            _ => bail!("graph '{}': the process that works on it ended ({status})", self.graph),
        }
    }

    fn show(&self, bar: &ProgressBar, phase: &str, step: usize, steps: usize) {
        bar.set_message(format!("{}: {phase}", self.graph));
        bar.set_length(steps as u64);
        bar.set_position(step as u64);
    }
}

fn read(path: &Path) -> anyhow::Result<Vec<u8>> {
    std::fs::read(path).with_context(|| path.display().to_string())
}

fn write(path: &Path, content: &[u8]) -> anyhow::Result<()> {
    std::fs::write(path, content).with_context(|| path.display().to_string())
}
