//! `accordion import`.

use super::Outcome;
use super::output::Output;
use super::text::{approximate, bytes};
use accordion::checkpoint::{Checkpoint, import_gguf};
use clap::Args;
use indicatif::ProgressBar;
use serde::Serialize;
use std::path::PathBuf;

/// Turn a GGUF file into a checkpoint folder
///
/// Weights are written as fp32, the tokenizer is rebuilt from the file's metadata. Commands that take a CHECKPOINT accept
/// a GGUF file as well and import it into the cache.
#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// The GGUF file
    #[arg(value_name = "FILE.gguf")]
    file: PathBuf,
    /// The folder to write, which must not exist
    out: PathBuf,
}

#[derive(Serialize)]
struct Imported<'a> {
    schema: &'static str,
    checkpoint: &'a PathBuf,
    parameters: u64,
    weight_bytes: u64,
}

/// Runs the command.
pub(crate) fn run(arguments: &Arguments, output: &Output) -> anyhow::Result<Outcome> {
    let out = &arguments.out;
    let mut bar: Option<ProgressBar> = None;
    let imported = import_gguf(&arguments.file, out, |done, total| {
        bar.get_or_insert_with(|| output.bar("importing", total)).set_position(done);
    });
    if let Some(bar) = bar {
        bar.finish_and_clear();
    }
    imported?;
    let checkpoint = Checkpoint::open(out)?;
    let (parameters, weight_bytes) = (checkpoint.weights().parameter_count(), checkpoint.weights().byte_count());
    let result = Imported { schema: "accordion.import/1", checkpoint: out, parameters, weight_bytes };
    output.result(&result, || {
        format!("{}: {} parameters, {}", out.display(), approximate(parameters), bytes(weight_bytes))
    })?;
    Ok(Outcome::Done)
}
