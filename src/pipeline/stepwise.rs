//! Keys and values in the keeping of an engine: they stay where they are while tokens are decoded one by one.

use super::PipelineError;
use super::decode::DECODER_STEP;
use crate::runtime::steps::{StepCache, StepCall, Steps};
use crate::runtime::{Engine, EngineError};
use crate::tensor::Tensor;

/// Rows that are made room for at first however many are expected; for more as they come.
pub const EXPECTED_ROWS: usize = 512;

/// Room is a multiple of as many rows, so that sequences of about one length have caches of one shape.
const BLOCK: usize = 64;

/// Rows that there is room for where `rows` are to come.
pub fn room_for(rows: usize) -> usize {
    let rows = rows.max(1);
    rows.checked_next_multiple_of(BLOCK).unwrap_or(rows)
}

/// Rows that there is room for at most in a sequence that never holds more than `rows`, whatever is expected of it: room that
/// is used up grows by half.
pub fn most_room_for(rows: usize) -> usize {
    room_for(rows.saturating_add(EXPECTED_ROWS.max(rows / 2)))
}

/// The inputs of the graph that single tokens are fed to, of which every call gives other values.
const CHANGING: [&str; 3] = ["input_ids", "position_ids", "past_length"];

/// Keys and values of all layers.
pub(super) struct Stepwise {
    /// None once a step failed: the rows are lost.
    steps: Option<Box<dyn Steps>>,
    capacity: usize,
}

/// The names of the graph's inputs and outputs for the cache.
pub(super) struct Names<'a> {
    pub(super) past: &'a [[String; 2]],
    pub(super) new: &'a [[String; 2]],
}

impl Stepwise {
    /// Gives `rows`, keys and values `[1, G, length, d]` of every layer, into the keeping of `engine`, with room for `capacity`;
    /// `fixed` are the other inputs of the graph. None if the engine has no use for that.
    pub(super) fn new(
        engine: &mut dyn Engine,
        names: &Names<'_>,
        rows: &[[Tensor; 2]],
        fixed: &[(&str, &Tensor)],
        capacity: usize,
    ) -> Result<Option<Self>, PipelineError> {
        let both = names.past.iter().flatten().zip(names.new.iter().flatten()).zip(rows.iter().flatten());
        let caches: Vec<StepCache<'_>> =
            both.map(|((input, output), rows)| StepCache { input, output, rows }).collect();
        let [.., length] = CHANGING;
        let call = StepCall { changing: &CHANGING, length, fixed, caches: &caches, capacity, outputs: &["logits"] };
        Ok(engine.steps(&call)?.map(|steps| Self { steps: Some(steps), capacity }))
    }

    /// Rows that there is room for.
    pub(super) fn capacity(&self) -> usize {
        self.capacity
    }

    /// Feeds the token `id` at `position` behind `length` rows and returns its logits `[1, 1, V]`. The rows are lost if the
    /// engine fails.
    pub(super) fn step(&mut self, [id, position]: [i64; 2], length: usize) -> Result<Vec<Tensor>, PipelineError> {
        let mut steps = self.steps.take().ok_or_else(lost)?;
        let results = steps.step(&[id, position, length as i64])?;
        self.steps = Some(steps);
        Ok(results)
    }

    /// The first `length` rows, `[1, G, length, d]` per layer.
    pub(super) fn rows(&self, length: usize) -> Result<Vec<[Tensor; 2]>, PipelineError> {
        let rows = self.steps.as_ref().ok_or_else(lost)?.rows(length)?;
        let mut rows = rows.into_iter();
        Ok(std::iter::from_fn(|| Some([rows.next()?, rows.next()?])).collect())
    }
}

fn lost() -> EngineError {
    let message = "an earlier step failed, and with it the sequence was lost".to_owned();
    EngineError::Runtime { graph: DECODER_STEP.to_owned(), message }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn room_is_made_in_blocks_and_never_beyond_the_most() {
        assert_eq!([0, 1, 64, 65].map(room_for), [64, 64, 64, 128]);
        assert_eq!(room_for(usize::MAX), usize::MAX);
        // What a sequence of up to `rows` rows starts with at any length, and what it grows to.
        for rows in [1, 64, 100, 5000] {
            let most = most_room_for(rows);
            for length in 0..=rows {
                assert!(room_for(length + EXPECTED_ROWS) <= most && room_for(length + length / 2) <= most);
            }
        }
    }
}
