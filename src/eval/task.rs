//! What is asked: cases, and the sample that belongs to each.

use super::EvalError;
use crate::pipeline::decode::Continuation;
use crate::pipeline::prompt::PromptIds;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;

/// Names and values of what decides a result.
pub type Settings = BTreeMap<String, String>;

/// One point of an evaluation's grid.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Case {
    /// Tokens; what they count is the task's to say.
    pub length: usize,
    /// Where the answer stands in the context, in percent.
    pub depth: Option<u8>,
    /// Number of the sample.
    pub sample: usize,
    /// Whether this is read plainly whoever takes part, before anything is compressed.
    pub opening: bool,
}

/// What a case asks.
#[derive(Debug, Clone, PartialEq)]
pub struct Sample {
    /// What is compressed.
    pub prompt: PromptIds,
    /// Tokens at the start of the prefix that a contender keeps even where it reads only the last tokens.
    pub lead: usize,
    /// What is wanted.
    pub goal: Goal,
    /// Indices, in the context, of the tokens that hold the answer.
    pub marked: Vec<usize>,
}

/// What is wanted behind the compressed prompt.
#[derive(Debug, Clone, PartialEq)]
pub enum Goal {
    /// A text whose first integer is this.
    Integer {
        /// Its digits.
        expected: String,
        /// Tokens that may be generated.
        new_tokens: usize,
        /// Where a compressing method puts the first of them.
        continuation: Continuation,
    },
    /// A text with these words.
    Keywords {
        /// The words, in any order.
        expected: Vec<String>,
        /// Tokens that may be generated.
        new_tokens: usize,
    },
    /// These tokens, generated.
    Continue {
        /// What follows in the text.
        expected: Vec<u32>,
    },
    /// Their probabilities, teacher-forced.
    Predict {
        /// What follows in the text.
        ids: Vec<u32>,
        /// Tokens per position bucket.
        bucket: usize,
    },
}

/// An evaluation.
pub trait Task {
    /// The word for it.
    fn name(&self) -> &'static str;

    /// The seed of everything random.
    fn seed(&self) -> u64;

    /// What decides the samples besides seed and case.
    fn settings(&self) -> Settings;

    /// All cases, in the order they are run.
    fn cases(&self) -> Vec<Case>;

    /// What `case` asks.
    ///
    /// # Errors
    ///
    /// The settings leave no room for it, or a text is too short.
    fn sample(&self, case: Case) -> Result<Sample, EvalError>;
}

/// Random numbers for `case` of `task`; other cases have others.
pub fn stream(seed: u64, task: &str, case: Case) -> ChaCha8Rng {
    let label = format!("{task}/{}/{:?}/{}", case.length, case.depth, case.sample);
    named_stream(seed, &label)
}

/// Random numbers that go by a name.
pub fn named_stream(seed: u64, name: &str) -> ChaCha8Rng {
    ChaCha8Rng::from_seed(Sha256::digest(format!("accordion.eval/{seed}/{name}")).into())
}

/// A number below `limit`, which is not 0.
pub(super) fn below(random: &mut ChaCha8Rng, limit: usize) -> usize {
    // The bias is below 2^-32 for every length there is.
    (random.next_u64() % limit.max(1) as u64) as usize
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn streams_are_pinned_and_differ_by_everything_that_names_them() {
        let case = Case { length: 4096, depth: Some(50), sample: 0, opening: false };
        let first = |seed, task, case| stream(seed, task, case).next_u64();
        let base = first(0, "passkey", case);
        assert_eq!(first(0, "passkey", case), base);
        for other in [
            first(1, "passkey", case),
            first(0, "needle", case),
            first(0, "passkey", Case { length: 4097, ..case }),
            first(0, "passkey", Case { depth: Some(51), ..case }),
            first(0, "passkey", Case { sample: 1, ..case }),
        ] {
            assert_ne!(other, base);
        }
        // Files of rows are resumed by later versions: a change here is a change of the rows' schema.
        assert_eq!(below(&mut named_stream(0, "pinned"), 1_000_000), PINNED);
    }

    const PINNED: usize = 195_501;
}
