//! The baseline: the whole prompt through the decoder.

use super::decode::Sequence;
use super::{ContextState, Engines, PipelineError};

/// Rows per call: enough for matrix products at full speed, few enough that activations stay small however long the
/// prompt is.
pub const PREFILL_ROWS: usize = 2048;

/// Reads `ids` from position 0 on. The logits are those of the last token. `on_progress` is told the tokens done.
///
/// # Errors
///
/// An id is outside the vocabulary, or the decoder fails.
pub fn prefill(
    engines: &mut Engines<'_>,
    ids: &[u32],
    mut on_progress: impl FnMut(usize),
) -> Result<ContextState, PipelineError> {
    let mut sequence = Sequence::new(engines, ids.len())?;
    let mut logits = Vec::new();
    for chunk in ids.chunks(PREFILL_ROWS) {
        logits = sequence.forward(engines, chunk, 1)?.to_f32();
        on_progress(sequence.len());
    }
    sequence.into_state(logits)
}
