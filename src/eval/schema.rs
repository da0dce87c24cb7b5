//! What an evaluation stores: one JSON row per sample.

use super::stats::{Interval, Mean};
use super::task::Settings;
use super::trace::Survival;
use accordion_graphs::plan::PromptLengths;
use serde::{Deserialize, Serialize};

/// The value of `schema` in rows and summaries.
pub const SCHEMA: &str = "accordion.eval/1";

/// What names a row: everything that decides its result.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct RowKey {
    /// The task.
    pub task: String,
    /// The contender.
    pub method: String,
    /// Tokens, as the task counts them.
    pub length: usize,
    /// Where the answer stands in the context, in percent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub depth: Option<u8>,
    /// Number of the sample.
    pub sample: usize,
    /// Seed of everything random.
    pub seed: u64,
    /// Fingerprint of the model.
    pub model: String,
    /// Of the task, the method and the engine.
    pub settings: Settings,
}

/// One sample, put to one contender.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Row {
    /// [`SCHEMA`].
    pub schema: String,
    /// Its name.
    #[serde(flatten)]
    pub key: RowKey,
    /// Tokens of the prompt that the contender read.
    pub prompt: PromptLengths,
    /// Rows of the context state's cache.
    pub tokens_kept: usize,
    /// What came of it.
    pub outcome: Outcome,
    /// Where the answer was lost, if that was asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub survival: Option<Survival>,
    /// From the prompt's token ids to the context state.
    pub compression_seconds: f64,
    /// From there to the outcome.
    pub answer_seconds: f64,
}

/// What came of a sample.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum Outcome {
    /// A generated answer.
    Answer {
        /// What it should be, or the words it should have.
        expected: Vec<String>,
        /// What it is.
        answer: String,
        /// Whether all of it is right.
        hit: bool,
        /// How much of it is right: 0 to 1.
        score: f64,
    },
    /// Probabilities of a given text.
    Likelihood {
        /// Tokens predicted.
        tokens: usize,
        /// Sum of their negative log-likelihoods, in nats.
        nll: f64,
        /// The same by position among these tokens.
        buckets: Vec<Bucket>,
    },
    /// A generated continuation.
    Continuation {
        /// What follows in the text.
        expected: String,
        /// What was generated.
        answer: String,
        /// Whether all tokens are the same.
        exact: bool,
        /// BLEU-4 by words.
        bleu: f64,
    },
}

/// Tokens next to each other.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Bucket {
    /// Index of the first among the predicted tokens.
    pub start: usize,
    /// How many.
    pub tokens: usize,
    /// Sum of their negative log-likelihoods, in nats.
    pub nll: f64,
}

/// What the rows of an evaluation say together.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Summary {
    /// [`SCHEMA`].
    pub schema: String,
    /// The task.
    pub task: String,
    /// Fingerprint of the model.
    pub model: String,
    /// Seed of everything random.
    pub seed: u64,
    /// What decides the samples.
    pub settings: Settings,
    /// The contenders, the bundle's method first, with their settings.
    pub methods: Vec<MethodSettings>,
    /// By contender, length and, where there are depths, depth; then the same over all depths.
    pub cells: Vec<Cell>,
    /// The contenders against the bundle's method on the same samples.
    pub comparisons: Vec<Comparison>,
    /// Perplexity of the text so far, where texts are read from their start.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub running: Vec<Running>,
}

/// A contender.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MethodSettings {
    /// Its name.
    pub method: String,
    /// What decides its results.
    pub settings: Settings,
}

/// Samples of one contender at one point of the grid.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Cell {
    /// The contender.
    pub method: String,
    /// Tokens, as the task counts them.
    pub length: usize,
    /// In percent; absent over all depths.
    pub depth: Option<u8>,
    /// Samples.
    pub n: usize,
    /// How they went.
    pub result: CellResult,
    /// Tokens of the answer that each level of the tree kept, leaves first, where rows tell it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub survival: Vec<LevelSurvival>,
    /// Mean of the rows' compression times.
    pub compression_seconds: f64,
}

/// How the samples of a cell went.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum CellResult {
    /// Generated answers.
    Answer {
        /// How many were right altogether.
        hits: usize,
        /// Their share.
        share: f64,
        /// Its Wilson interval.
        interval: Interval,
        /// How much was right in the mean.
        score: f64,
    },
    /// Probabilities.
    Likelihood {
        /// Tokens in all.
        tokens: usize,
        /// Mean negative log-likelihood per token, of windows: those of one window depend on each other.
        nll: Mean,
        /// `exp` of the mean.
        perplexity: f64,
        /// Perplexity by position among the predicted tokens.
        buckets: Vec<BucketPerplexity>,
    },
    /// Generated continuations.
    Continuation {
        /// How many were exact.
        exact: usize,
        /// Their share.
        share: f64,
        /// Its Wilson interval.
        interval: Interval,
        /// BLEU-4 by words, the mean of the samples'.
        bleu: Mean,
    },
}

/// Perplexity of tokens at one place.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct BucketPerplexity {
    /// Index of the first among the predicted tokens.
    pub start: usize,
    /// How many, in all samples.
    pub tokens: usize,
    /// Their perplexity.
    pub perplexity: f64,
}

/// What one level of a tree did to the answers' tokens, over all samples of a cell.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct LevelSurvival {
    /// 0 for leaves.
    pub height: usize,
    /// Tokens that entered.
    pub entered: usize,
    /// Tokens that left.
    pub left: usize,
}

/// Two contenders on the same samples.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Comparison {
    /// The one.
    pub method: String,
    /// The other.
    pub baseline: String,
    /// Tokens, as the task counts them.
    pub length: usize,
    /// `nll`, per token, or `bleu`.
    pub quantity: String,
    /// The one less the other, by sample.
    pub difference: Mean,
}

/// Perplexity of a text up to some token, the mean over all tokens of all samples before it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Running {
    /// The contender.
    pub method: String,
    /// Tokens read.
    pub tokens: usize,
    /// Texts.
    pub n: usize,
    /// Perplexity of all of them.
    pub perplexity: f64,
}
