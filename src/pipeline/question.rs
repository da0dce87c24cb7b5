//! Another question about a context that was compressed for the first one.

use super::decode::{Continuation, Sequence};
use super::reserved::Element;
use super::{ContextState, Engines, PipelineError};
use crate::tensor::{Tensor, TensorError};
use accordion_graphs::dtype::DType;

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
            .map(|[k, v]| Ok([first_rows(k, kept)?, first_rows(v, kept)?]))
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

/// The first `rows` rows of every head of `[1, G, L, d]`.
fn first_rows(tensor: &Tensor, rows: usize) -> Result<Tensor, TensorError> {
    match tensor.dtype() {
        DType::I8 => first_rows_of::<i8>(tensor, rows),
        _ => first_rows_of::<f32>(tensor, rows),
    }
}

fn first_rows_of<T: Element>(tensor: &Tensor, rows: usize) -> Result<Tensor, TensorError> {
    let &[batch, groups, length, width] = tensor.shape() else { return Ok(tensor.clone()) };
    if rows == length {
        return Ok(tensor.clone());
    }
    let heads = T::of(tensor)?.chunks_exact((length * width).max(1));
    let kept = heads.flat_map(|head| &head[..rows * width]).copied().collect();
    T::tensor([batch, groups, rows, width], kept)
}
