//! Models by name: what a CHECKPOINT argument may be.

use super::output::Output;
use accordion::checkpoint::Checkpoint;

/// The checkpoint that `argument` names: a folder.
pub(crate) fn open(argument: &str, _output: &Output) -> anyhow::Result<Checkpoint> {
    Ok(Checkpoint::open(argument)?)
}
