//! `accordion export`.

use super::Outcome;
use super::output::Output;
use clap::Args;

/// Export a checkpoint as a bundle of ONNX graphs
#[derive(Debug, Args)]
pub(crate) struct Arguments {}

/// Runs the command.
pub(crate) fn run(_arguments: &Arguments, _output: &Output) -> anyhow::Result<Outcome> {
    anyhow::bail!("not there yet")
}
