//! What HOMER's tree kept of a context: its text, with how far every token came.

use super::trace::{KeptRows, NodeRows, follow};
use crate::checkpoint::{CheckpointError, Tokenizer};
use crate::pipeline::prompt::PromptIds;
use crate::profile::schema::describe;
use accordion_graphs::plan::PromptLengths;
use accordion_graphs::plan::homer::HomerPlan;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// The value of [`KeptText::schema`].
pub const SCHEMA: &str = "accordion.kept/1";

/// Most tokens in one run: a reader who wants less than all of the text can cut at every run.
const LONGEST_RUN: usize = 32;

/// A context and what was kept of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeptText {
    /// [`SCHEMA`].
    pub schema: String,
    /// The method.
    pub method: String,
    /// Fingerprint of the model.
    pub model: String,
    /// The prompt that was compressed.
    pub prompt: PromptLengths,
    /// What was asked: the question decides what is kept.
    pub question: String,
    /// The method's settings: names and values.
    pub settings: Vec<(String, String)>,
    /// Context tokens of every leaf; the last one may hold fewer.
    pub leaf_tokens: usize,
    /// Levels of the tree, leaves first.
    pub levels: Vec<KeptLevel>,
    /// The context, in order.
    pub parts: Vec<Part>,
}

/// What one level of the tree did to the context.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeptLevel {
    /// 0 for leaves.
    pub height: usize,
    /// Its nodes.
    pub nodes: usize,
    /// Context tokens that entered.
    pub entered: usize,
    /// Context tokens that left.
    pub left: usize,
}

/// A part of the context.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Part {
    /// Neighbouring tokens of one leaf that came equally far.
    Run {
        /// Their text. A character whose bytes are several tokens stands with the last of them.
        text: String,
        /// How many.
        tokens: usize,
        /// Levels that they passed, from the leaves on: 0 were dropped by their leaf, all levels are in the cache.
        passed: usize,
    },
    /// Tokens whose text is left out.
    Omitted {
        /// How many.
        omitted: usize,
        /// How many of them are in the cache.
        kept: usize,
    },
}

impl KeptText {
    /// Follows the context of `prompt`, which was asked `question`, through the tree of `plan`, whose nodes kept what
    /// `kept` recorded, in the model called `model`.
    ///
    /// # Errors
    ///
    /// The tokenizer cannot decode the context.
    pub fn new(
        plan: &HomerPlan,
        kept: &KeptRows,
        tokenizer: &Tokenizer,
        prompt: &PromptIds,
        question: &str,
        model: &str,
    ) -> Result<Self, CheckpointError> {
        let followed = follow(plan, kept);
        Ok(Self {
            schema: SCHEMA.to_owned(),
            method: "homer".to_owned(),
            model: model.to_owned(),
            prompt: plan.lengths,
            question: question.to_owned(),
            settings: describe(&plan.settings),
            leaf_tokens: plan.leaf_context,
            levels: levels(plan, &followed),
            parts: runs(&pieces(tokenizer, &prompt.context)?, &passed(plan, &followed), plan.leaf_context),
        })
    }
}

/// Context tokens among `rows`.
fn tokens(rows: &[Option<usize>]) -> impl Iterator<Item = usize> {
    rows.iter().flatten().copied()
}

fn levels(plan: &HomerPlan, followed: &[NodeRows]) -> Vec<KeptLevel> {
    let mut levels: BTreeMap<usize, KeptLevel> = BTreeMap::new();
    for (node, rows) in plan.nodes.iter().zip(followed) {
        let empty = KeptLevel { height: node.height, nodes: 0, entered: 0, left: 0 };
        let level = levels.entry(node.height).or_insert(empty);
        level.nodes += 1;
        level.entered += tokens(&rows.entering).count();
        level.left += tokens(&rows.leaving).count();
    }
    levels.into_values().collect()
}

/// For every token of the context how many levels it passed.
fn passed(plan: &HomerPlan, followed: &[NodeRows]) -> Vec<usize> {
    let mut passed = vec![0; plan.lengths.context];
    for (node, rows) in plan.nodes.iter().zip(followed) {
        for token in tokens(&rows.leaving) {
            if let Some(levels) = passed.get_mut(token) {
                *levels = node.height + 1;
            }
        }
    }
    passed
}

/// The text of every token: together they are the text of all.
fn pieces(tokenizer: &Tokenizer, ids: &[u32]) -> Result<Vec<String>, CheckpointError> {
    let mut stream = tokenizer.stream(false);
    let mut pieces = ids.iter().map(|&id| stream.push(id)).collect::<Result<Vec<_>, _>>()?;
    if let Some(last) = pieces.last_mut() {
        last.push_str(&stream.finish()?);
    }
    Ok(pieces)
}

fn runs(pieces: &[String], passed: &[usize], leaf_tokens: usize) -> Vec<Part> {
    let mut parts: Vec<Part> = Vec::new();
    for (place, (piece, &levels)) in pieces.iter().zip(passed).enumerate() {
        let leaf_starts = place.is_multiple_of(leaf_tokens.max(1));
        match parts.last_mut() {
            Some(Part::Run { text, tokens, passed }) if *passed == levels && *tokens < LONGEST_RUN && !leaf_starts => {
                text.push_str(piece);
                *tokens += 1;
            }
            _ => parts.push(Part::Run { text: piece.clone(), tokens: 1, passed: levels }),
        }
    }
    parts
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::taps::TapSink;
    use crate::tensor::Tensor;
    use accordion_graphs::plan::homer::HomerSettings;

    #[test]
    fn every_token_comes_as_far_as_its_rows() {
        let lengths = PromptLengths { prefix: 1, context: 16, suffix: 1 };
        let settings =
            HomerSettings { max_chunk_len: 10, max_initial_chunk_len: None, target_len: 8, layers_warmup: 0 };
        let plan = HomerPlan::new(4, lengths, settings).unwrap();
        let mut kept = KeptRows::default();
        // Rows 1..9 of a leaf are its tokens. The first keeps 0 to 3, the second 8, 10, 11 and 15; the root drops 0 and 10.
        for (node, rows) in [
            ("node.h0.i0", vec![0, 1, 2, 3, 4, 9]),
            ("node.h0.i1", vec![0, 1, 3, 4, 8, 9]),
            ("node.h1.i0", vec![0, 2, 3, 4, 5, 7, 8, 9]),
        ] {
            kept.record(&format!("{node}.prune.keep_idx"), Tensor::from_i64([rows.len()], rows).unwrap());
        }
        let followed = follow(&plan, &kept);
        let passed = passed(&plan, &followed);
        assert_eq!(passed, [1, 2, 2, 2, 0, 0, 0, 0, 2, 0, 1, 2, 0, 0, 0, 2]);
        let found: Vec<_> = levels(&plan, &followed).iter().map(|l| (l.height, l.nodes, l.entered, l.left)).collect();
        assert_eq!(found, [(0, 2, 16, 8), (1, 1, 8, 6)]);

        let pieces: Vec<String> = (0..16).map(|i| char::from(b'a' + i).to_string()).collect();
        let runs = runs(&pieces, &passed, plan.leaf_context);
        let texts: Vec<_> = runs
            .iter()
            .map(|part| match part {
                Part::Run { text, tokens, passed } => (text.as_str(), *tokens, *passed),
                Part::Omitted { .. } => ("", 0, 0),
            })
            .collect();
        let expected = [("a", 1, 1), ("bcd", 3, 2), ("efgh", 4, 0), ("i", 1, 2), ("j", 1, 0), ("k", 1, 1), ("l", 1, 2)];
        assert_eq!((&texts[..7], &texts[7..]), (&expected[..], &[("mno", 3, 0), ("p", 1, 2)][..]));
    }

    #[test]
    fn runs_end_with_their_leaf_and_are_short() {
        let (pieces, passed) = (vec!["x".to_owned(); 100], vec![0; 100]);
        let lengths: Vec<usize> = runs(&pieces, &passed, 50)
            .iter()
            .map(|part| match part {
                Part::Run { tokens, .. } => *tokens,
                Part::Omitted { .. } => 0,
            })
            .collect();
        assert_eq!(lengths, [32, 18, 32, 18]);
    }

    #[test]
    fn both_kinds_of_parts_come_back_from_json() {
        let parts = [Part::Run { text: "x".into(), tokens: 1, passed: 2 }, Part::Omitted { omitted: 7, kept: 1 }];
        let json = serde_json::to_string(&parts).unwrap();
        assert_eq!(json, r#"[{"text":"x","tokens":1,"passed":2},{"omitted":7,"kept":1}]"#);
        assert_eq!(serde_json::from_str::<Vec<Part>>(&json).unwrap(), parts);
    }
}
