//! SharedLLM: how a context splits into chunks, how a chunk splits into a tree of nodes, and how many tokens of each node
//! are kept.

use super::{PlanError, PromptLengths};
use serde::{Deserialize, Serialize};
use std::ops::Range;

/// Tokens to keep of a node (the authors' `last_p`).
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Keep {
    /// All of them.
    All,
    /// About this many, whatever the node's length.
    Tokens(usize),
    /// About this fraction of the node's length.
    Fraction(f64),
}

/// Which computation: that of the released code, or the one that it was meant to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Quirks {
    /// As released: halves of other chunks compared (Q1), leaves of other chunks joined (Q2), masks of the other half
    /// (Q3), key positions looked up twice (Q4), one angle for all frequencies where a single token is fed (Q5).
    #[default]
    Faithful,
    /// Repaired.
    Fixed,
}

/// What decides the graphs.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct SharedLlmSettings {
    /// Tokens of a chunk \[L\].
    pub chunk_len: usize,
    /// Levels of the tree \[D\].
    pub tree_depth: usize,
    /// Tokens kept of a node \[p\].
    pub keep: Keep,
    /// Whether the half that is more similar to the running text is split further; otherwise always the right one.
    pub retrieval: bool,
    /// Which computation.
    pub quirks: Quirks,
}

/// How many chunks of the prompt's beginning the lower model reads; the upper model reads the rest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ChunkPolicy {
    /// This many chunks.
    Chunks(usize),
    /// As in fine-tuning: one less than fit into the prompt, at least one.
    FineTuning,
    /// As for `LongBench`: as many as fit while this many tokens stay for the upper model, at least one.
    LeaveRunning(usize),
}

/// One level of the tree.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Level {
    /// Length of the nodes that are encoded at this level \[`l_w`\].
    pub node_len: usize,
    /// Nodes of this length per chunk: 1, and 2 at the last level.
    pub nodes: usize,
    /// Every how many tokens one is kept, from the first on.
    pub step: usize,
    /// Tokens kept per node \[`s_w`\].
    pub kept: usize,
}

/// The schedule for one prompt.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SharedLlmPlan {
    /// What was asked for.
    pub settings: SharedLlmSettings,
    /// The prompt.
    pub lengths: PromptLengths,
    /// Chunks \[n\]; the prompt's first `chunks * chunk_len` tokens.
    pub chunks: usize,
    /// Tokens that the upper model reads \[T\].
    pub running: usize,
    /// The levels, root first.
    pub levels: Vec<Level>,
    /// Tokens kept per chunk \[C\].
    pub kept_per_chunk: usize,
}

/// Most levels a tree may have.
const MAX_DEPTH: usize = 32;
/// Most tokens of a chunk; far above any that was trained.
const MAX_CHUNK_LEN: usize = 1 << 20;
/// Most chunks a plan may have.
const MAX_CHUNKS: usize = 1 << 20;

impl SharedLlmSettings {
    /// The levels of the tree.
    ///
    /// # Errors
    ///
    /// There is no level, a chunk is longer than any or cannot be halved that often (only the last halving may leave a
    /// token over), or more tokens are to be kept than a node has.
    pub fn levels(&self) -> Result<Vec<Level>, PlanError> {
        if !(1..=MAX_DEPTH).contains(&self.tree_depth) {
            return Err(out_of_range("tree depth", self.tree_depth, format!("1 to {MAX_DEPTH}")));
        }
        if self.chunk_len > MAX_CHUNK_LEN {
            return Err(out_of_range("chunk length", self.chunk_len, format!("at most {MAX_CHUNK_LEN} tokens")));
        }
        let last = self.tree_depth - 1;
        if self.chunk_len == 0 || !self.chunk_len.is_multiple_of(1 << last) || self.chunk_len >> last < 2 {
            let expected = format!("a multiple of {} that leaves leaves of at least 1 token", 1_u64 << last);
            return Err(out_of_range("chunk length", self.chunk_len, expected));
        }
        (0..self.tree_depth)
            .map(|level| {
                let node_len = self.chunk_len >> (level + 1);
                let step = self.keep.step(node_len)?;
                Ok(Level { node_len, nodes: 1 + usize::from(level == last), step, kept: node_len.div_ceil(step) })
            })
            .collect()
    }

    /// Tokens kept per chunk \[C\].
    ///
    /// # Errors
    ///
    /// As [`Self::levels`].
    pub fn kept_per_chunk(&self) -> Result<usize, PlanError> {
        Ok(self.levels()?.iter().map(|level| level.nodes * level.kept).sum())
    }
}

impl Keep {
    /// Every how many tokens one is kept of a node of `node_len` tokens.
    fn step(self, node_len: usize) -> Result<usize, PlanError> {
        let kept = match self {
            Self::All => node_len,
            Self::Tokens(count) => count,
            // Towards zero, as the authors' `int` does.
            Self::Fraction(fraction) => (node_len as f64 * fraction) as usize,
        };
        if (1..=node_len).contains(&kept) {
            return Ok(node_len / kept);
        }
        let found = match self {
            Self::Fraction(fraction) => format!("{fraction}, which is {kept} tokens of a node"),
            _ => kept.to_string(),
        };
        let expected = format!("1 to {node_len} tokens, the length of a node");
        Err(PlanError::OutOfRange { what: "number of kept tokens", found, expected })
    }
}

impl ChunkPolicy {
    /// Chunks of `chunk_len` tokens for a prompt of `total` tokens.
    fn chunks(self, total: usize, chunk_len: usize) -> usize {
        match self {
            Self::Chunks(count) => count,
            Self::FineTuning => (total / chunk_len).saturating_sub(1).max(1),
            Self::LeaveRunning(running) => (total.saturating_sub(running) / chunk_len).max(1),
        }
    }
}

impl SharedLlmPlan {
    /// Plans a prompt of `lengths`.
    ///
    /// # Errors
    ///
    /// As [`SharedLlmSettings::levels`]; there is no chunk, or the chunks leave the upper model no token.
    pub fn new(lengths: PromptLengths, settings: SharedLlmSettings, policy: ChunkPolicy) -> Result<Self, PlanError> {
        let levels = settings.levels()?;
        let total = lengths.prefix.saturating_add(lengths.context).saturating_add(lengths.suffix);
        let chunks = policy.chunks(total, settings.chunk_len);
        if !(1..=MAX_CHUNKS).contains(&chunks) {
            return Err(out_of_range("number of chunks", chunks, format!("1 to {MAX_CHUNKS}")));
        }
        let running = total.checked_sub(chunks * settings.chunk_len).filter(|&tokens| tokens > 0).ok_or_else(|| {
            let expected =
                format!("more than {chunks} x {} tokens, so that a running text is left", settings.chunk_len);
            out_of_range("prompt length", total, expected)
        })?;
        let kept_per_chunk = levels.iter().map(|level| level.nodes * level.kept).sum();
        let plan = Self { settings, lengths, chunks, running, levels, kept_per_chunk };
        Ok(plan)
    }

    /// The prompt's tokens that the lower model reads.
    pub fn compressed(&self) -> Range<usize> {
        0..self.chunks * self.settings.chunk_len
    }

    /// Rows of the injected cache, all chunks.
    pub fn injected_rows(&self) -> usize {
        self.chunks * self.kept_per_chunk
    }

    /// Context tokens per kept one \[beta\].
    pub fn compression_ratio(&self) -> f64 {
        self.settings.chunk_len as f64 / self.kept_per_chunk as f64
    }
}

fn out_of_range(what: &'static str, found: usize, expected: impl Into<String>) -> PlanError {
    PlanError::OutOfRange { what, found: found.to_string(), expected: expected.into() }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn settings(chunk_len: usize, tree_depth: usize, keep: Keep) -> SharedLlmSettings {
        SharedLlmSettings { chunk_len, tree_depth, keep, retrieval: true, quirks: Quirks::Faithful }
    }

    fn kept(chunk_len: usize, tree_depth: usize, keep: Keep) -> usize {
        settings(chunk_len, tree_depth, keep).kept_per_chunk().unwrap()
    }

    #[test]
    fn the_papers_lengths() {
        assert_eq!(kept(1024, 3, Keep::Tokens(32)), 128);
        assert_eq!(kept(512, 3, Keep::Tokens(32)), 128);
        assert_eq!(kept(1024, 3, Keep::All), 1024);
        // 5 does not divide 24: every fourth token is kept, which are 6.
        assert_eq!(kept(48, 3, Keep::Tokens(5)), 24);
        assert_eq!(kept(16, 2, Keep::Fraction(0.25)), 4);
        // The last halving of 60 leaves a token over.
        assert_eq!(settings(60, 3, Keep::Tokens(4)).levels().unwrap()[2].node_len, 7);
        assert_eq!(kept(60, 3, Keep::Tokens(4)), 24);
    }

    #[test]
    fn refusals_name_what_was_found() {
        let refusal = |chunk_len, depth, keep| settings(chunk_len, depth, keep).levels().unwrap_err().to_string();
        assert!(refusal(62, 3, Keep::All).starts_with("chunk length is 62, expected a multiple of 4"));
        assert!(refusal(1 << 40, 3, Keep::All).ends_with("expected at most 1048576 tokens"));
        assert!(refusal(64, 0, Keep::All).starts_with("tree depth is 0"));
        assert!(refusal(64, 3, Keep::Tokens(9)).starts_with("number of kept tokens is 9, expected 1 to 8"));
        assert!(refusal(64, 3, Keep::Fraction(0.01)).contains("which is 0 tokens of a node"));
    }

    #[test]
    fn policies_leave_a_running_text() {
        let lengths = |context| PromptLengths { prefix: 0, context, suffix: 1 };
        let plan = |context, policy| SharedLlmPlan::new(lengths(context), settings(512, 3, Keep::Tokens(32)), policy);
        assert_eq!(plan(4095, ChunkPolicy::FineTuning).unwrap().chunks, 7);
        assert_eq!(plan(4095, ChunkPolicy::LeaveRunning(3584)).unwrap().chunks, 1);
        let all = plan(511, ChunkPolicy::FineTuning).unwrap_err().to_string();
        assert_eq!(all, "prompt length is 512, expected more than 1 x 512 tokens, so that a running text is left");
        let two = plan(2047, ChunkPolicy::Chunks(2)).unwrap();
        assert_eq!((two.running, two.injected_rows(), two.compressed()), (1024, 256, 0..1024));
    }
}
