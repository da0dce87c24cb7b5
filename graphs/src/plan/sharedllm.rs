//! SharedLLM: how a context splits into chunks, how a chunk splits into a tree of nodes, and how many tokens of each node
//! are kept.

mod policy;

pub use policy::ChunkPolicy;

use super::{OperationCount, PlanError, PromptLengths};
use crate::architecture::Architecture;
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

    /// What cross attention takes for chunks, per chunk. As released, a tree of one level leaves its two nodes as chunks of their
    /// own.
    pub fn entries_per_chunk(&self) -> usize {
        if self.quirks == Quirks::Faithful && self.tree_depth == 1 { 2 } else { 1 }
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

    /// Operations of the whole prompt, including the output projection of the last row: the lower model `lower` over the
    /// tree, and the model `upper`, whose bottom `injected_layers` attend to what is kept. What reaches no result is not
    /// counted: of the last lower layer only the keys and values of kept rows, of the one before it no other row's MLP, and
    /// of halves that are compared only the last row behind the first layer's keys and values.
    pub fn operations(&self, upper: &Architecture, lower: &Architecture, injected_layers: usize) -> OperationCount {
        let running = self.running as u64;
        OperationCount::plain_prefill(upper, self.running)
            + self.encoding(lower, injected_layers).times(self.chunks)
            + self.search(lower).times(self.chunks)
            + self.query(upper)
            + OperationCount {
                linear: 2 * RowCost::of(upper).queries_outputs * running,
                attention: RowCost::of(upper).attention * running * self.injected_rows() as u64,
            }
            .times(injected_layers)
    }

    /// The lower layers over the nodes of a chunk, without the keys and values that the search needs anyway.
    fn encoding(&self, lower: &Architecture, layers: usize) -> OperationCount {
        let cost = RowCost::of(lower);
        let kept = self.kept_per_chunk as u64;
        let rows: u64 = self.levels.iter().map(|level| (level.nodes * level.node_len) as u64).sum();
        let pairs: u64 = self.levels.iter().map(|l| (l.nodes * l.node_len * (l.node_len + 1) / 2) as u64).sum();
        let whole = (layers as u64).saturating_sub(1);
        let known = u64::from(self.settings.retrieval);
        let keys_values = match whole {
            0 => (1 - known) * kept,
            _ => (whole - known) * rows + kept,
        };
        let mlp = if whole == 0 { 0 } else { (whole - 1) * rows + kept };
        OperationCount {
            linear: 2 * (cost.keys_values * keys_values + cost.queries_outputs * whole * rows + cost.mlp * mlp),
            attention: cost.attention * whole * pairs,
        }
    }

    /// Comparing the halves of a chunk and of its nodes, but the last.
    fn search(&self, lower: &Architecture) -> OperationCount {
        if !self.settings.retrieval {
            return OperationCount::default();
        }
        let cost = RowCost::of(lower);
        let compared = self.levels.iter().filter(|level| level.nodes == 1);
        let halves: u64 = compared.clone().map(|_| 2).sum();
        let seen: u64 = compared.map(|level| 2 * level.node_len as u64).sum();
        OperationCount {
            linear: 2
                * (cost.keys_values * self.settings.chunk_len as u64 + (cost.queries_outputs + cost.mlp) * halves),
            attention: cost.attention * seen,
        }
    }

    /// What the halves are compared with: the last row of the running text after the first upper layer.
    fn query(&self, upper: &Architecture) -> OperationCount {
        if !self.settings.retrieval {
            return OperationCount::default();
        }
        let (cost, running) = (RowCost::of(upper), self.running as u64);
        OperationCount {
            linear: 2 * (cost.keys_values * running + cost.queries_outputs + cost.mlp),
            attention: cost.attention * running,
        }
    }

    /// Context tokens per kept one \[beta\].
    pub fn compression_ratio(&self) -> f64 {
        self.settings.chunk_len as f64 / self.kept_per_chunk as f64
    }
}

/// What a row costs in one layer.
struct RowCost {
    /// Multiply-adds of the key and value projections.
    keys_values: u64,
    /// Multiply-adds of the query and output projections.
    queries_outputs: u64,
    /// Multiply-adds of the MLP.
    mlp: u64,
    /// Operations of attending to one row.
    attention: u64,
}

impl RowCost {
    fn of(arch: &Architecture) -> Self {
        let [projections, mlp] = arch.layer_matrix_elements();
        let width = (arch.num_heads() * arch.head_dim()) as u64;
        let queries_outputs = 2 * arch.hidden_size() as u64 * width;
        Self { keys_values: projections - queries_outputs, queries_outputs, mlp, attention: 4 * width }
    }
}

fn out_of_range(what: &'static str, found: usize, expected: impl Into<String>) -> PlanError {
    PlanError::OutOfRange { what, found: found.to_string(), expected: expected.into() }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use std::ops::Add;

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

    fn model() -> Architecture {
        use crate::architecture::{Llama, Rope, RopeScaling};
        Architecture::from(Llama {
            num_layers: 5,
            hidden_size: 48,
            intermediate_size: 80,
            num_heads: 4,
            num_kv_heads: 2,
            head_dim: 16,
            vocab_size: 97,
            max_positions: 64,
            rms_norm_eps: 1e-5,
            rope: Rope { theta: 1e4, scaling: RopeScaling::None },
            tie_word_embeddings: false,
            qkv_bias: false,
            o_bias: false,
            mlp_bias: false,
            sliding_window: None,
            eos_token_ids: vec![],
            bos_token_id: None,
        })
    }

    #[test]
    fn operations_are_those_of_the_parts() {
        let arch = model();
        let lengths = PromptLengths { prefix: 0, context: 128, suffix: 20 };
        let count = |keep, retrieval, layers| {
            let settings = SharedLlmSettings { retrieval, ..settings(64, 3, keep) };
            let plan = SharedLlmPlan::new(lengths, settings, ChunkPolicy::Chunks(2)).unwrap();
            plan.operations(&arch, &arch, layers)
        };
        let keys_values = 2 * 48 * 32;
        // Where everything is kept and nothing compared: whole layers over every node, but for the last.
        let nodes = [32, 16, 8, 8];
        let layer = nodes.iter().map(|&n| OperationCount::layer(&arch, n, n)).fold(OperationCount::default(), Add::add);
        let cross = OperationCount { linear: 2 * (2 * 48 * 64) * 20, attention: 4 * 64 * 20 * 128 };
        let mut expected = OperationCount::plain_prefill(&arch, 20) + layer.times(2 * 2) + cross.times(3);
        expected.linear += 2 * keys_values * 128;
        assert_eq!(count(Keep::All, false, 3), expected);
        // Comparing costs four rows of a layer per chunk, one of the upper model, and keys and values that the encoding
        // then has; with one layer, they are all that the encoding needs.
        let row = OperationCount::layer(&arch, 1, 1).linear - 2 * keys_values;
        let search = 2 * (4 * row) + row + 2 * keys_values * 20;
        assert_eq!(count(Keep::All, true, 3).linear - expected.linear, search);
        let [with, without] = [true, false].map(|retrieval| count(Keep::Tokens(4), retrieval, 1).linear);
        assert_eq!(with - without, search + 2 * keys_values * (128 - 2 * 16));
        // One row each over 2 x (2 x 32 + 2 x 16) candidate rows and 20 of the running text.
        let seen = count(Keep::All, true, 3).attention - expected.attention;
        assert_eq!(seen, 4 * 64 * (2 * (2 * 32 + 2 * 16) + 20));
    }
}
