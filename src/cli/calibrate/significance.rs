//! `accordion calibrate significance`.

use crate::cli::output::Output;
use crate::cli::{Outcome, engine, models};
use accordion::pipeline::prompt::read_text;
use accordion::pipeline::significance::{CalibrationSettings, calibrate};
use accordion::runtime::ort_cpu::{OrtCpu, OrtOptions};
use accordion_calibration::significance::{Provenance, Smoothing};
use anyhow::Context;
use clap::Args;
use serde::Serialize;
use std::path::PathBuf;
use std::time::Instant;

/// Measure the attention logits that HOMER expects by layer and distance, on ordinary text
///
/// HOMER prunes the tokens to which the end of a chunk attends least. Attention depends on distance whatever the tokens
/// are, so what is expected at each distance is subtracted first. The table holds for one model; the same text, settings
/// and seed give the same table.
#[derive(Debug, Args)]
pub(super) struct Arguments {
    /// Checkpoint folder, GGUF file, or the name of a model that can be fetched
    checkpoint: PathBuf,
    /// Ordinary text of the kind the model will read, UTF-8; - reads standard input
    #[arg(long, value_name = "FILE")]
    text: String,
    /// The table's file
    #[arg(long, short, value_name = "FILE", default_value = "significance.safetensors")]
    output: PathBuf,
    /// Windows of text to measure
    #[arg(long, value_name = "N", default_value_t = 32)]
    windows: usize,
    /// Tokens per window: the longest chunk of the runs that will use the table
    #[arg(long, value_name = "N", default_value_t = 2048)]
    window_len: usize,
    /// Seed of the choice of windows
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
}

/// What `--json` prints.
#[derive(Debug, Serialize)]
struct Report<'a> {
    schema: &'static str,
    table: &'a PathBuf,
    layers: usize,
    distances: usize,
    windows: u64,
    seconds: f64,
    provenance: &'a Provenance,
}

/// Runs the command.
pub(super) fn run(arguments: &Arguments, output: &Output) -> anyhow::Result<Outcome> {
    let checkpoint = models::open(&arguments.checkpoint, output)?;
    let text = read_text(&arguments.text)?;
    let options = OrtOptions { fused_operators: true };
    let loader = OrtCpu::new(engine::runtime(output)?, checkpoint.maps().clone(), &options)?;
    let settings = CalibrationSettings {
        windows: arguments.windows,
        window_len: arguments.window_len,
        seed: arguments.seed,
        smoothing: Smoothing::default(),
    };
    let started = Instant::now();
    let bar = output.bar("measuring significance", arguments.windows as u64);
    let table = calibrate(&checkpoint, &loader, &text, settings, &mut |done| bar.set_position(done as u64))
        .with_context(|| format!("--text {}", arguments.text))?;
    bar.finish_and_clear();
    table.save(&arguments.output)?;
    let report = Report {
        schema: "accordion.calibrate/1",
        table: &arguments.output,
        layers: table.num_layers(),
        distances: table.num_distances(),
        windows: table.windows(),
        seconds: started.elapsed().as_secs_f64(),
        provenance: table.provenance(),
    };
    output.result(&report, || {
        format!(
            "{}: {} layers, {} distances, from {} windows in {:.1} s",
            report.table.display(),
            report.layers,
            report.distances,
            report.windows,
            report.seconds
        )
    })?;
    Ok(Outcome::Done)
}
