//! The baseline: the whole prompt through the decoder.

pub use super::decode::PREFILL_ROWS;

use super::decode::Sequence;
use super::{ContextState, Engines, PipelineError};

/// Reads `ids` from position 0 on. The logits are those of the last token. `on_progress` is told the tokens done.
///
/// # Errors
///
/// An id is outside the vocabulary, or the decoder fails.
pub fn prefill(
    engines: &mut Engines<'_>,
    ids: &[u32],
    on_progress: impl FnMut(usize),
) -> Result<ContextState, PipelineError> {
    let mut sequence = Sequence::new(engines, ids.len())?;
    let logits = sequence.read(engines, ids, on_progress)?;
    sequence.into_state(logits)
}
