//! `accordion calibrate ranges`.

use crate::cli::Outcome;
use crate::cli::compression::{Pruning, SplitArguments};
use crate::cli::engine::EngineArguments;
use crate::cli::method::MethodName;
use crate::cli::output::Output;
use accordion::bundle::Bundle;
use accordion::pipeline::prompt::read_text;
use accordion::pipeline::ranges::{Part, RangeSettings, Text, calibrate, default_window_len};
use accordion_calibration::ranges::{Provenance, RangeTable};
use clap::Args;
use serde::Serialize;
use std::path::{Path, PathBuf};
use std::time::Instant;

/// Measure the ranges of activations while a bundle reads ordinary text, for --precision int8
///
/// What goes into every linear layer is measured: the range of each channel, how often magnitudes occur, and a few rows as
/// they are. The table holds for the checkpoint: one that was measured with one method serves the others where they have
/// the same layers. The same text, settings and seed give the same table. Windows can be shared among machines with --part;
/// accordion calibrate merge joins their tables to exactly the one of a single run.
#[derive(Debug, Args)]
pub(super) struct Arguments {
    /// The exported bundle, in fp32
    bundle: PathBuf,
    /// Ordinary texts of the kind the model will read, UTF-8; - reads standard input
    #[arg(long, value_name = "FILE", required = true, num_args = 1..)]
    text: Vec<String>,
    /// The table's file
    #[arg(long, short, value_name = "FILE", default_value = "ranges.safetensors")]
    output: PathBuf,
    /// Windows of text to read, spread over all texts
    #[arg(long, value_name = "N", default_value_t = 32)]
    windows: usize,
    /// Tokens per window [default: 2048, or as many as the method needs to do all that it does]
    #[arg(long, value_name = "N")]
    window_len: Option<usize>,
    /// Seed of the choice of windows
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// Read only every N-th window, from the K-th on
    #[arg(long, value_name = "K/N", default_value = "1/1")]
    part: Part,
    /// Also measure every tap: what half precision would make infinite or zero
    #[arg(long)]
    taps: bool,
    #[command(flatten)]
    split: SplitArguments,
    #[command(flatten)]
    engine: EngineArguments,
}

/// What `--json` prints.
#[derive(Debug, Serialize)]
pub(super) struct Report<'a> {
    schema: &'static str,
    table: &'a Path,
    sites: usize,
    taps: usize,
    windows: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    seconds: Option<f64>,
    provenance: &'a Provenance,
}

impl<'a> Report<'a> {
    /// About a table that was written to `path`, and the time that measuring it took.
    pub(super) fn new(path: &'a Path, table: &'a RangeTable, seconds: Option<f64>) -> Self {
        Self {
            schema: "accordion.calibrate.ranges/1",
            table: path,
            sites: table.sites().len(),
            taps: table.taps().len(),
            windows: table.windows(),
            seconds,
            provenance: table.provenance(),
        }
    }

    pub(super) fn print(&self, output: &Output) -> anyhow::Result<Outcome> {
        output.result(self, || {
            let taps = if self.taps > 0 { format!(" and {} taps", self.taps) } else { String::new() };
            let time = self.seconds.map(|seconds| format!(" in {seconds:.1} s")).unwrap_or_default();
            let (table, sites, windows) = (self.table.display(), self.sites, self.windows);
            let length = self.provenance.window_tokens;
            format!("{table}: the inputs of {sites} groups of linear layers{taps}, from {windows} windows of {length} tokens{time}")
        })?;
        Ok(Outcome::Done)
    }
}

/// Runs the command.
pub(super) fn run(arguments: &Arguments, output: &Output) -> anyhow::Result<Outcome> {
    let bundle = Bundle::open(&arguments.bundle)?;
    let method = MethodName::choose(None, &bundle)?;
    arguments.split.check(method)?;
    // Which tokens are pruned changes the ranges of those that are left by little.
    let pruning = match bundle.manifest().significance {
        Some(_) => Pruning::of_bundle(),
        None => Pruning::uncalibrated(),
    };
    let compression = arguments.split.compression(&bundle, method, pruning, false)?;
    let read = |name: &String| Ok(Text { name: format!("--text {name}"), content: read_text(name)? });
    let texts = arguments.text.iter().map(read).collect::<anyhow::Result<Vec<_>>>()?;
    let settings = RangeSettings {
        windows: arguments.windows,
        window_len: arguments.window_len.unwrap_or_else(|| default_window_len(&bundle)),
        seed: arguments.seed,
        part: arguments.part,
        taps: arguments.taps,
    };
    let loader = arguments.engine.ort_cpu("calibrate", &bundle, output)?;
    let started = Instant::now();
    let bar = output.bar("measuring ranges", 0);
    let mut on_window = |done, total| {
        bar.set_length(total as u64);
        bar.set_position(done as u64);
    };
    let table = calibrate(&bundle, Box::new(loader), &compression, &texts, settings, &mut on_window)?;
    bar.finish_and_clear();
    table.save(&arguments.output)?;
    Report::new(&arguments.output, &table, Some(started.elapsed().as_secs_f64())).print(output)
}
