//! `accordion profile`.

use super::Outcome;
use super::output::Output;
use clap::Args;

/// Measure latency and memory
#[derive(Debug, Args)]
pub(crate) struct Arguments {}

/// Runs the command.
pub(crate) fn run(_arguments: &Arguments, _output: &Output) -> anyhow::Result<Outcome> {
    anyhow::bail!("not there yet")
}
