//! The plain decoder: one reading of a prompt from an empty cache.

use super::BisectError;
use super::case::Visit;
use super::decoder::continue_from;
use super::rebuild::Rebuilt;
use crate::reference::decode::Continuation;
use crate::reference::transformer::Transformer;
use std::ops::ControlFlow;

/// The decoder on `ids`, from position 0 on.
///
/// # Errors
///
/// The reference cannot be run, or `visit` fails.
pub fn cases(
    rebuilt: &Rebuilt<'_>,
    reference: &dyn Transformer,
    ids: &[u32],
    visit: &mut Visit<'_>,
) -> Result<ControlFlow<()>, BisectError> {
    continue_from(rebuilt, reference, &Continuation::after(reference.empty_cache()), ("", ids), visit)
}
