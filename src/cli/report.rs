//! `accordion report`.

use super::Outcome;
use super::output::Output;
use clap::Args;

/// Write one HTML page from JSON results
#[derive(Debug, Args)]
pub(crate) struct Arguments {}

/// Runs the command.
pub(crate) fn run(_arguments: &Arguments, _output: &Output) -> anyhow::Result<Outcome> {
    anyhow::bail!("not there yet")
}
