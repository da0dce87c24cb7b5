//! `accordion calibrate`.

mod merge;
mod ranges;
mod significance;

use super::Outcome;
use super::output::Output;
use clap::{Args, Subcommand};

/// Estimate tables: the expected significance of tokens by distance, the ranges of activations
#[derive(Debug, Args)]
pub(crate) struct Arguments {
    #[command(subcommand)]
    table: Table,
}

#[derive(Debug, Subcommand)]
enum Table {
    Significance(significance::Arguments),
    Ranges(ranges::Arguments),
    Merge(merge::Arguments),
}

/// Runs the command.
pub(crate) fn run(arguments: &Arguments, output: &Output) -> anyhow::Result<Outcome> {
    match &arguments.table {
        Table::Significance(arguments) => significance::run(arguments, output),
        Table::Ranges(arguments) => ranges::run(arguments, output),
        Table::Merge(arguments) => merge::run(arguments, output),
    }
}
