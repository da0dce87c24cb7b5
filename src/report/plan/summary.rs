//! The plan of any method as the levels of a tree: what enters at the bottom, what the decoder reads at the top.

use crate::profile::schema::describe;
use accordion_graphs::plan::PromptLengths;
use accordion_graphs::plan::homer::HomerPlan;
use accordion_graphs::plan::rcc::RccPlan;
use accordion_graphs::plan::sharedllm::SharedLlmPlan;
use serde::{Deserialize, Serialize};
use std::fmt::Display;
use std::ops::Range;

/// The value of [`PlanSummary::schema`].
pub(in crate::report) const PLAN: &str = "accordion.plan/1";

/// One node of a plan's tree.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LevelNode {
    /// 0 for leaves.
    pub height: usize,
    /// Left to right among the nodes of its height.
    pub index: usize,
    /// Tokens that enter.
    pub in_len: usize,
    /// Tokens that leave.
    pub out_len: usize,
    /// Layers it runs; none where the level says otherwise what it is.
    pub layers: Range<usize>,
    /// Its place among the nodes above; if absent, half of its own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent: Option<usize>,
    /// Whether it is not encoded itself but split into the nodes below it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub split: bool,
}

/// What the nodes of one height are.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LevelName {
    /// Which height.
    pub height: usize,
    /// A word or two.
    pub name: String,
    /// A few more.
    pub detail: String,
}

/// A plan, as far as it is drawn.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlanSummary {
    /// `PLAN`.
    pub schema: String,
    /// The method.
    pub method: String,
    /// The prompt it was made for.
    pub prompt: PromptLengths,
    /// The method's settings: names and values.
    pub settings: Vec<(String, String)>,
    /// The tree.
    pub nodes: Vec<LevelNode>,
    /// What its levels are; without, they are heights of a tree whose nodes run layers.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub levels: Vec<LevelName>,
    /// What the picture leaves out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub remark: Option<String>,
}

impl PlanSummary {
    fn new(method: &str, prompt: PromptLengths, settings: Vec<(String, String)>, nodes: Vec<LevelNode>) -> Self {
        let (schema, method) = (PLAN.to_owned(), method.to_owned());
        Self { schema, method, prompt, settings, nodes, levels: Vec::new(), remark: None }
    }
}

fn node(height: usize, index: usize, [in_len, out_len]: [usize; 2], parent: usize) -> LevelNode {
    LevelNode { height, index, in_len, out_len, layers: 0..0, parent: Some(parent), split: false }
}

fn level(height: usize, name: &str, detail: String) -> LevelName {
    LevelName { height, name: name.to_owned(), detail }
}

fn pair(name: &str, value: &dyn Display) -> (String, String) {
    (name.to_owned(), value.to_string())
}

impl From<&HomerPlan> for PlanSummary {
    fn from(plan: &HomerPlan) -> Self {
        let nodes = plan.nodes.iter().map(|node| LevelNode {
            height: node.height,
            index: node.index,
            in_len: node.in_len,
            out_len: node.out_len,
            layers: node.layers.clone(),
            parent: None,
            split: false,
        });
        Self::new("homer", plan.lengths, describe(&plan.settings), nodes.collect())
    }
}

/// Segments at the bottom, the slots that they fill, and the decoder.
impl From<&RccPlan> for PlanSummary {
    fn from(plan: &RccPlan) -> Self {
        let (window, slots) = (plan.settings.window, plan.settings.slots_per_segment());
        let mut nodes: Vec<LevelNode> =
            (0..plan.segments).map(|index| node(0, index, [window, slots], index)).collect();
        nodes.extend((0..plan.segments).map(|index| node(1, index, [slots, slots], 0)));
        let rows = plan.slots.saturating_add(plan.lengths.suffix);
        nodes.push(node(2, 0, [rows, rows], 0));
        let settings =
            vec![pair("window", &window), pair("ratio", &plan.settings.ratio), pair("pairs", &plan.settings.pairs)];
        let text = match (plan.front.len(), plan.repeats) {
            (0, 1) => "The text fills the segments.".to_owned(),
            (front, 1) => {
                format!("The last {front} tokens of the text stand in front of it, so that the segments are full.")
            }
            (front, repeats) => format!(
                "The text stands there {repeats} times, behind its last {front} tokens, so that the segment is full."
            ),
        };
        Self {
            levels: vec![
                level(0, "Segments", "through the encoder".to_owned()),
                level(1, "Slots", "after those before".to_owned()),
                level(2, "Decoder", "slots and question".to_owned()),
            ],
            remark: Some(text),
            ..Self::new("rcc", plan.lengths, settings, nodes)
        }
    }
}

/// The tree of the first chunk at the bottom, all chunks, and the upper model.
impl From<&SharedLlmPlan> for PlanSummary {
    fn from(plan: &SharedLlmPlan) -> Self {
        let (chunk, depth) = (plan.settings.chunk_len, plan.levels.len());
        let (mut nodes, mut levels) = (Vec::new(), Vec::new());
        for (w, found) in plan.levels.iter().enumerate() {
            let height = depth - 1 - w;
            // Above the first level there is the chunk; further down, the half that was split.
            let parent = usize::from(w > 0);
            for index in 0..found.nodes {
                nodes.push(node(height, index, [found.node_len, found.kept], parent));
            }
            if found.nodes < 2 {
                nodes.push(LevelNode { split: true, ..node(height, 1, [found.node_len, 0], parent) });
            }
            let detail = match found.step {
                1 => "all kept".to_owned(),
                step => format!("1 of {step} kept"),
            };
            levels.push(level(height, &format!("Level {w}"), detail));
        }
        nodes.extend((0..plan.chunks).map(|index| node(depth, index, [chunk, plan.kept_per_chunk], 0)));
        levels.push(level(depth, "Chunks", "lower model".to_owned()));
        let rows = plan.injected_rows().saturating_add(plan.running);
        nodes.push(node(depth + 1, 0, [rows, rows], 0));
        levels.push(level(depth + 1, "Upper model", format!("{} injected", plan.injected_rows())));
        let kept = if plan.settings.retrieval { "the half that resembles the question more" } else { "the right half" };
        let remark = format!(
            "Below the chunks stands the tree of the first one; those of the others are alike. At every level one half is \
             encoded and thinned out, and {kept} is split further; of the last level both are encoded."
        );
        let settings = vec![
            pair("chunk length", &chunk),
            pair("tree depth", &depth),
            pair("kept per chunk", &plan.kept_per_chunk),
            pair("retrieval", &plan.settings.retrieval),
            pair("quirks", &format!("{:?}", plan.settings.quirks).to_lowercase()),
        ];
        Self { levels, remark: Some(remark), ..Self::new("sharedllm", plan.lengths, settings, nodes) }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use accordion_graphs::plan::rcc::RccSettings;
    use accordion_graphs::plan::sharedllm::{ChunkPolicy, Keep, Quirks, SharedLlmSettings};

    fn lengths(plan: &PlanSummary, height: usize) -> Vec<[usize; 2]> {
        plan.nodes.iter().filter(|node| node.height == height).map(|node| [node.in_len, node.out_len]).collect()
    }

    #[test]
    fn rcc_goes_from_segments_over_slots_to_the_decoder() {
        let settings = RccSettings { window: 16, ratio: 4, pairs: false, first_state_is_embedding: true };
        let prompt = PromptLengths { prefix: 0, context: 40, suffix: 3 };
        let plan = PlanSummary::from(&RccPlan::new(prompt, settings).unwrap());
        assert_eq!(lengths(&plan, 0), [[16, 4]; 3]);
        assert_eq!(lengths(&plan, 1), [[4, 4]; 3]);
        assert_eq!(lengths(&plan, 2), [[15, 15]]);
        assert!(plan.remark.unwrap().starts_with("The last 8 tokens"));
    }

    #[test]
    fn sharedllm_shows_what_is_split_further() {
        let settings = SharedLlmSettings {
            chunk_len: 32,
            tree_depth: 3,
            keep: Keep::Tokens(2),
            retrieval: true,
            quirks: Quirks::Fixed,
        };
        let prompt = PromptLengths { prefix: 0, context: 70, suffix: 4 };
        let planned = SharedLlmPlan::new(prompt, settings, ChunkPolicy::FineTuning).unwrap();
        let plan = PlanSummary::from(&planned);
        let splits = |height| plan.nodes.iter().filter(|node| node.height == height && node.split).count();
        assert_eq!([2, 1, 0].map(splits), [1, 1, 0]);
        assert_eq!((lengths(&plan, 2)[0], lengths(&plan, 0)), ([16, 2], vec![[4, 2]; 2]));
        assert_eq!(lengths(&plan, 3), vec![[32, planned.kept_per_chunk]; planned.chunks]);
        assert_eq!(plan.levels.len(), 5);
        let read: PlanSummary = serde_json::from_str(&serde_json::to_string(&plan).unwrap()).unwrap();
        assert_eq!(read, plan);
    }
}
