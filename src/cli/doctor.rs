//! `accordion doctor`.

use super::Outcome;
use super::output::Output;
use super::text::bytes;
use accordion::environment::{Environment, Machine, Nvidia, OnnxRuntime};
use clap::Args;
use serde::Serialize;

/// Say what was found on this machine: runtimes, providers, GPU, cache
///
/// Ends with 1 if there is no ONNX Runtime that can be loaded; nothing else is required.
#[derive(Debug, Args)]
pub(crate) struct Arguments {}

#[derive(Serialize)]
struct Report {
    schema: &'static str,
    /// Whether the commands that run graphs can.
    usable: bool,
    #[serde(flatten)]
    environment: Environment,
}

/// Runs the command.
pub(crate) fn run(_arguments: &Arguments, output: &Output) -> anyhow::Result<Outcome> {
    let environment = Environment::probe();
    let usable = matches!(environment.provenance.onnxruntime, OnnxRuntime::Present { .. });
    let report = Report { schema: "accordion.doctor/1", usable, environment };
    output.result(&report, || in_words(&report.environment, output))?;
    Ok(if usable { Outcome::Done } else { Outcome::CheckFailed })
}

/// The lines of a report: sections, and under each what is there and what is not.
struct Lines<'a> {
    lines: Vec<String>,
    output: &'a Output,
}

impl Lines<'_> {
    fn section(&mut self, title: &str) {
        if !self.lines.is_empty() {
            self.lines.push(String::new());
        }
        self.lines.push(title.to_owned());
    }

    fn found(&mut self, what: &str) {
        self.line("found", "32", what);
    }

    /// Not there, and not needed.
    fn none(&mut self, what: &str) {
        self.line("none", "2", what);
    }

    /// Not there, and needed.
    fn missing(&mut self, what: &str) {
        self.line("missing", "1;31", what);
    }

    fn line(&mut self, word: &str, style: &str, what: &str) {
        let word = self.output.paint_result(&format!("{word:<8}"), style);
        self.lines.push(format!("  {word}{what}"));
    }

    /// More about the line before.
    fn detail(&mut self, what: &str) {
        self.lines.push(format!("          {what}"));
    }
}

fn in_words(environment: &Environment, output: &Output) -> String {
    let provenance = &environment.provenance;
    let mut lines = Lines { lines: Vec::new(), output };
    lines.section(&format!("accordion {}", provenance.accordion));
    machine(&mut lines, &provenance.machine);
    onnx_runtime(&mut lines, &provenance.onnxruntime);
    nvidia(&mut lines, environment);
    cache(&mut lines, environment);
    lines.lines.join("\n")
}

fn machine(lines: &mut Lines<'_>, machine: &Machine) {
    let Machine { os, arch, cpu, cores, simd, memory_bytes } = machine;
    let memory = memory_bytes.map_or_else(|| "memory unknown".to_owned(), bytes);
    let cpu = if cpu.is_empty() { "processor of unknown name" } else { cpu };
    lines.found(&format!("{os}, {arch}"));
    lines.found(&format!("{cpu}: {cores} threads, {memory}"));
    lines.detail(&simd.join(" "));
}

fn onnx_runtime(lines: &mut Lines<'_>, runtime: &OnnxRuntime) {
    lines.section("ONNX Runtime");
    match runtime {
        OnnxRuntime::Absent { reason } => lines.missing(reason),
        OnnxRuntime::Present { version, path, origin, execution_providers, rejected } => {
            lines.found(&format!("{version} in {} ({origin})", path.display()));
            lines.detail(&format!("execution providers: {}", execution_providers.join(", ")));
            for library in rejected {
                lines.detail(&format!("passed over: {}: {}", library.path.display(), library.reason));
            }
        }
    }
}

fn nvidia(lines: &mut Lines<'_>, environment: &Environment) {
    lines.section("NVIDIA (optional)");
    match &environment.provenance.nvidia {
        Nvidia::Absent { reason } => lines.none(&format!("GPU: {reason}")),
        Nvidia::Present { driver, cuda, devices } => {
            lines.found(&format!("driver {driver}, CUDA up to {cuda}"));
            if devices.is_empty() {
                lines.none("GPU");
            }
            for device in devices {
                let memory = bytes(device.memory_bytes);
                lines.found(&format!("{}, compute capability {}, {memory}", device.name, device.compute_capability));
            }
        }
    }
    if environment.tensorrt.is_empty() {
        lines.none("TensorRT library");
    }
    for library in &environment.tensorrt {
        lines.found(&format!("{} {} in {}", library.name, library.version, library.path.display()));
    }
}

fn cache(lines: &mut Lines<'_>, environment: &Environment) {
    lines.section("Fetching models, texts and ONNX Runtime");
    let clients = &environment.clients;
    match (&clients.pip, &clients.python) {
        (Some(pip), _) => lines.found(pip),
        (None, Some(python)) => {
            lines.none(&format!("pip for {python}: install it to fetch, or provide the files by hand"));
        }
        (None, None) => lines.none("Python with pip: install it to fetch, or provide the files by hand"),
    }
    match &clients.npm {
        Some(npm) => lines.found(&format!("npm {npm}")),
        None => lines.none("npm: only some texts and models come by it"),
    }
    let Some(cache) = &environment.cache else {
        return lines.missing("folder for the cache: set ACCORDION_CACHE to one");
    };
    lines.found(&format!("cache {}", cache.folder.display()));
    for asset in &cache.assets {
        let state = match asset.cached_bytes {
            Some(size) => bytes(size),
            None if asset.source.is_empty() => "not published for this machine".to_owned(),
            None => format!("not fetched; accordion fetch {}", asset.name),
        };
        lines.detail(&format!("{:<14}{state}", asset.name));
    }
}
