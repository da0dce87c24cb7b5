//! `accordion calibrate merge`.

use super::ranges::Report;
use crate::cli::Outcome;
use crate::cli::output::Output;
use accordion_calibration::ranges::RangeTable;
use clap::Args;
use std::path::PathBuf;

/// Join range tables of different windows to the one that a single run over all of them makes
///
/// The tables must be of the same model, method, window length and version of the program, and must not have read the same
/// window.
#[derive(Debug, Args)]
pub(super) struct Arguments {
    /// The tables
    #[arg(required = true, num_args = 2..)]
    tables: Vec<PathBuf>,
    /// The file of the table of all windows
    #[arg(long, short, value_name = "FILE")]
    output: PathBuf,
}

/// Runs the command.
pub(super) fn run(arguments: &Arguments, output: &Output) -> anyhow::Result<Outcome> {
    let mut tables = arguments.tables.iter().map(|path| RangeTable::load(path));
    // One after the other, so that two are in memory at most.
    let mut merged = tables.next().transpose()?;
    for table in tables {
        let table = table?;
        merged = Some(match merged {
            Some(merged) => merged.merge(&table)?,
            None => table,
        });
    }
    let Some(merged) = merged else { anyhow::bail!("there are no tables to merge") };
    merged.save(&arguments.output)?;
    Report::new(&arguments.output, &merged, None).print(output)
}
