//! Plans: what a method will do to a prompt, from its lengths alone.
//!
//! A plan can be printed, tested and compared without weights, graphs or a runtime. It is checked against the authors'
//! outputs by itself, which is why every part of the toolkit, the reference included, may build on it.

mod cost;
pub mod homer;
pub mod rcc;
pub mod sharedllm;

pub use cost::OperationCount;

use serde::{Deserialize, Serialize};

/// Token counts of the three parts of a prompt.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct PromptLengths {
    /// Tokens before the context (system prompt) \[P\].
    pub prefix: usize,
    /// Tokens of the context itself \[C\].
    pub context: usize,
    /// Tokens after the context (the question) \[S\].
    pub suffix: usize,
}

impl PromptLengths {
    /// Tokens of the whole prompt.
    pub fn total(&self) -> usize {
        self.prefix + self.context + self.suffix
    }
}

/// Why no plan exists for the given lengths and settings.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PlanError {
    /// A prompt part or setting is outside what the method is defined for.
    #[error("{what} is {found}, expected {expected}")]
    OutOfRange {
        /// The quantity, in the words of the flags.
        what: &'static str,
        /// Its value.
        found: String,
        /// What it has to be.
        expected: String,
    },
    /// The even split of the context leaves a leaf before the last without any token.
    #[error(
        "a context of {context} tokens does not fill {leaves} leaves of {leaf_len}: \
         use a larger max_chunk_len or a longer context"
    )]
    EmptyLeaves {
        /// Context tokens.
        context: usize,
        /// Leaves of the tree.
        leaves: usize,
        /// Context tokens per leaf.
        leaf_len: usize,
    },
}
