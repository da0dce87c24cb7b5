//! `accordion verify`.

use super::Outcome;
use super::output::Output;
use clap::Args;

/// Compare a bundle with the reference or a golden file, tap by tap
#[derive(Debug, Args)]
pub(crate) struct Arguments {}

/// Runs the command.
pub(crate) fn run(_arguments: &Arguments, _output: &Output) -> anyhow::Result<Outcome> {
    anyhow::bail!("not there yet")
}
