//! `accordion fetch`.

use super::Outcome;
use super::output::Output;
use clap::Args;

/// Fetch a pinned, hash-checked model, text or runtime into the cache
#[derive(Debug, Args)]
pub(crate) struct Arguments {}

/// Runs the command.
pub(crate) fn run(_arguments: &Arguments, _output: &Output) -> anyhow::Result<Outcome> {
    anyhow::bail!("not there yet")
}

/// Shows the progress of a fetch in `bar`, which is made when it is first needed.
pub(crate) fn show(bar: &mut Option<indicatif::ProgressBar>, output: &Output, progress: accordion::fetch::Progress) {
    let bar = bar.get_or_insert_with(|| output.bar(progress.asset, progress.total));
    bar.set_length(progress.total);
    bar.set_position(progress.done);
}
