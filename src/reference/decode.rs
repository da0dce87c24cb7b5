//! What follows a compressed context: ordinary decoding over its cache.

use super::cache::Cache;
use super::homer::ContextState;
use super::transformer::Transformer;
use super::{Result, plain};
use crate::taps::TapSink;
use ndarray::{Array2, ArrayView1, Axis, concatenate};

/// Where a continuation starts. The authors' two code paths disagree by one position.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ContinuationOffset {
    /// At the position after the last suffix token, as the authors' `forward` does.
    AfterLast,
    /// At the position of the last suffix token, which is thereby used twice, as the authors' `generate` does.
    RepeatLast,
}

/// A context state being continued. It works on a copy of the cache, so that one state can be continued many times.
#[derive(Debug, Clone)]
pub struct Continuation {
    /// Keys and values of the context and of everything fed since.
    pub cache: Cache,
    /// The position of the next token.
    pub next_position: i64,
}

/// When a text ends before its steps do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EndOfText<'a> {
    /// The ids that end it. They are not part of it.
    pub ids: &'a [u32],
    /// Whether the first generated id belongs to the text even if it is one of them, as in RCC's authors' code, which
    /// compares from the second id on.
    pub keeps_first: bool,
}

impl EndOfText<'_> {
    /// No id ends the text.
    pub const NEVER: Self = Self { ids: &[], keeps_first: false };
}

/// What greedy decoding produced.
#[derive(Debug, Clone)]
pub struct Generated {
    /// The first token, which the context decides, and one more per step, without what ended the text.
    pub tokens: Vec<u32>,
    /// Logits of every step, `[steps, vocab]`.
    pub step_logits: Array2<f32>,
    /// The position at which each step fed its token.
    pub position_ids: Vec<i64>,
}

impl Continuation {
    /// Continues `context`.
    pub fn new(context: &ContextState, offset: ContinuationOffset) -> Self {
        let last = context.last_position();
        let next_position = match offset {
            ContinuationOffset::AfterLast => last + 1,
            ContinuationOffset::RepeatLast => last,
        };
        Self { cache: context.cache.clone(), next_position }
    }

    /// Continues a context whose rows sit at positions 0, 1, and so on.
    pub fn after(cache: Cache) -> Self {
        Self { next_position: cache.rows() as i64, cache }
    }

    /// The same, with a cache that is kept as 8-bit integers from here on.
    #[must_use]
    pub fn rounded(self) -> Self {
        Self { cache: self.cache.rounded(), ..self }
    }

    /// Feeds `ids` at once and returns the logits of all of them, `[L, vocab]`.
    ///
    /// # Errors
    ///
    /// As [`plain::forward`].
    pub fn feed(&mut self, model: &dyn Transformer, ids: &[u32], taps: &mut dyn TapSink) -> Result<Array2<f32>> {
        let positions: Vec<i64> = (self.next_position..).take(ids.len()).collect();
        let hidden = plain::forward(model, ids, &positions, &mut self.cache, taps)?;
        self.next_position += ids.len() as i64;
        Ok(model.logits(&hidden))
    }

    /// Decodes greedily: the token that `last_logits [vocab]` of the context favours, then up to `steps` more, until one
    /// ends the text.
    ///
    /// # Errors
    ///
    /// As [`plain::forward`].
    pub fn greedy(
        &mut self,
        model: &dyn Transformer,
        last_logits: &ArrayView1<'_, f32>,
        steps: usize,
        end: EndOfText<'_>,
        taps: &mut dyn TapSink,
    ) -> Result<Generated> {
        let vocab = last_logits.len();
        let mut generated =
            Generated { tokens: Vec::new(), step_logits: Array2::zeros((0, vocab)), position_ids: Vec::new() };
        let mut token = argmax(last_logits);
        if end.ids.contains(&token) && !end.keeps_first {
            return Ok(generated);
        }
        generated.tokens.push(token);
        for _ in 0..steps {
            generated.position_ids.push(self.next_position);
            let logits = self.feed(model, &[token], taps)?;
            token = argmax(&logits.row(0));
            generated.step_logits = concatenate![Axis(0), generated.step_logits, logits];
            if end.ids.contains(&token) {
                break;
            }
            generated.tokens.push(token);
        }
        Ok(generated)
    }
}

/// The index of the largest logit, the lowest one among equals.
pub fn argmax(logits: &ArrayView1<'_, f32>) -> u32 {
    let mut best = 0;
    for (id, &logit) in logits.iter().enumerate() {
        if logit > logits[best] {
            best = id;
        }
    }
    best as u32
}
