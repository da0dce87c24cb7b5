//! Why an evaluation cannot be done.

use crate::checkpoint::CheckpointError;
use crate::pipeline::PipelineError;
use crate::pipeline::generate::GenerateError;
use crate::pipeline::prompt::PromptError;
use crate::tensor::TensorError;
use std::path::PathBuf;

/// Why an evaluation stopped. Rows that were done are kept.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EvalError {
    /// A setting is out of range.
    #[error("{flag} is {found}, expected {expected}")]
    Setting {
        /// Flag of the command that sets it.
        flag: &'static str,
        /// What it was.
        found: String,
        /// What it may be.
        expected: String,
    },
    /// A text is too short for what is to be taken from it.
    #[error("{flag}: the text has {found} tokens, expected at least {expected}")]
    ShortText {
        /// Flag of the command that names it.
        flag: &'static str,
        /// Its tokens.
        found: usize,
        /// Tokens needed.
        expected: usize,
    },
    /// A contender cannot read a prompt.
    #[error("{contender} at {length} tokens: {source}")]
    Contender {
        /// The contender.
        contender: String,
        /// Length of the case.
        length: usize,
        /// Why not.
        source: Box<PipelineError>,
    },
    /// A file of rows or of questions is not what it should be.
    #[error("{}, line {line}: {problem}", path.display())]
    Line {
        /// The file.
        path: PathBuf,
        /// Line, counted from 1.
        line: usize,
        /// What is wrong with it.
        problem: String,
    },
    /// A file cannot be read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the operating system said.
        source: std::io::Error,
    },
    /// Two processes would append to the same file.
    #[error("{} is being written by another process", path.display())]
    Busy {
        /// The file.
        path: PathBuf,
    },
    /// A graph failed.
    #[error(transparent)]
    Pipeline(#[from] PipelineError),
    /// A graph gave a tensor of another form than its interface says.
    #[error(transparent)]
    Tensor(#[from] TensorError),
    /// No text could be generated.
    #[error(transparent)]
    Generate(#[from] GenerateError),
    /// A text could not be encoded as a prompt.
    #[error(transparent)]
    Prompt(#[from] PromptError),
    /// The tokenizer refuses a text.
    #[error(transparent)]
    Tokenizer(#[from] CheckpointError),
}

impl EvalError {
    pub(super) fn setting(flag: &'static str, found: &impl ToString, expected: impl Into<String>) -> Self {
        Self::Setting { flag, found: found.to_string(), expected: expected.into() }
    }
}
