//! Another question about a context that was compressed for the first one.

use super::decode::{Continuation, Sequence};
use super::{ContextState, Engines, PipelineError};
use crate::tensor::TensorError;

/// The state in which another suffix stands in the place of the last `suffix_len` tokens of `state`, which is not
/// changed.
///
/// Nothing before a suffix attends to it, so without its rows a state holds nothing of the first question's words; the
/// new ones are fed from the position where it began. What the first question still decides is which tokens of the
/// context were kept. Where none was dropped, the result is that of compressing for the new question.
///
/// # Errors
///
/// The decoder refuses the tokens.
pub fn with_suffix(
    engines: &mut Engines<'_>,
    state: &ContextState,
    suffix_len: usize,
    suffix: &[u32],
) -> Result<ContextState, PipelineError> {
    let kept = state.len().saturating_sub(suffix_len);
    let context = ContextState {
        cache: state
            .cache
            .iter()
            .map(|[k, v]| Ok([k.narrow(2, 0..kept)?, v.narrow(2, 0..kept)?]))
            .collect::<Result<_, TensorError>>()?,
        position_ids: state.position_ids[..kept].to_vec(),
        last_position: state.last_position - suffix_len as i64,
        logits: Vec::new(),
        injected: state.injected.clone(),
        scales: state.scales.clone(),
    };
    let mut sequence = Sequence::continue_from(engines, &context, suffix.len(), Continuation::Next)?;
    let start = sequence.next_position();
    let logits = sequence.read(engines, suffix, |_| {})?;
    let mut asked = sequence.into_state(logits)?;
    asked.position_ids = context.position_ids;
    asked.position_ids.extend(start..start + suffix.len() as i64);
    Ok(asked)
}
