//! Optimization profiles: the shapes that the engines of a bundle are built for, from the plan of its method.
//!
//! The graphs name their dimensions, and a method says how long each of them can be for prompts up to a length. An input of
//! one integer may decide shapes inside a graph; such inputs have a range of values.

use super::TensorRtError;
use crate::bundle::{Manifest, Method};
use crate::pipeline::decode::{DECODER, DECODER_KV_INT8, DECODER_STEP, PREFILL_ROWS};
use crate::pipeline::stepwise::{most_room_for, room_for};
use accordion_graphs::methods::homer::graph_name;
use accordion_graphs::onnx::GraphSignature;
use accordion_graphs::plan::homer::HomerPlan;
use accordion_graphs::plan::rcc::RccPlan;
use accordion_graphs::plan::sharedllm::{ChunkPolicy, Quirks, SharedLlmPlan};
use accordion_graphs::plan::{PlanError, PromptLengths};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Most tokens of each part of a prompt: NVIDIA's dimensions are that long.
const MAX_TOKENS: usize = (1 << 31) - 1;

/// The longest prompt that engines have to serve, and the one they are tuned for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Workload {
    /// The prompt.
    pub lengths: PromptLengths,
    /// Tokens decoded behind it.
    pub new_tokens: usize,
    /// Chunks, segments or leaves in one call, as far as there are so many.
    pub width: usize,
    /// How much of the prompt SharedLLM's lower model reads.
    pub policy: ChunkPolicy,
    /// Whether the decoder of a method that compresses also reads whole prompts, to be compared with.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub plain: bool,
}

/// Shortest, most usual and longest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Extent {
    /// Shortest.
    pub min: usize,
    /// What the engine is tuned for.
    pub opt: usize,
    /// Longest.
    pub max: usize,
}

impl Extent {
    /// From `min` to `max`, tuned for `opt` as far as it lies between them.
    fn new(min: usize, opt: usize, max: usize) -> Self {
        let max = max.max(min);
        Self { min, opt: opt.clamp(min, max), max }
    }

    fn fixed(n: usize) -> Self {
        Self { min: n, opt: n, max: n }
    }
}

/// One optimization profile of a graph, by the names of its dimensions and of its inputs of one integer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Profile {
    /// What it is for: `read`, `step`, or `all`.
    pub name: &'static str,
    dimensions: BTreeMap<&'static str, Extent>,
    values: BTreeMap<&'static str, Extent>,
}

/// What a profile says about one input.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct InputRange {
    /// The input.
    pub name: String,
    /// Its dimensions.
    pub shape: Vec<Extent>,
    /// Its one value, if it may decide shapes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub value: Option<Extent>,
}

impl Profile {
    fn new<const D: usize, const V: usize>(
        name: &'static str,
        dimensions: [(&'static str, Extent); D],
        values: [(&'static str, Extent); V],
    ) -> Self {
        Self { name, dimensions: dimensions.into(), values: values.into() }
    }

    /// The ranges of all inputs of `graph`.
    ///
    /// # Errors
    ///
    /// The graph has a dimension that the profile does not know.
    pub fn inputs(&self, graph: &str, signature: &GraphSignature) -> Result<Vec<InputRange>, TensorRtError> {
        let of_input = |input: &accordion_graphs::onnx::ValueInfo| {
            let extent = |dimension: &String| {
                let known = dimension.parse().ok().map(Extent::fixed);
                known.or_else(|| self.dimensions.get(dimension.as_str()).copied()).ok_or_else(|| {
                    let (graph, input) = (graph.to_owned(), input.name.clone());
                    TensorRtError::UnknownDimension { graph, input, dimension: dimension.clone() }
                })
            };
            let shape = input.shape.iter().map(extent).collect::<Result<_, _>>()?;
            Ok(InputRange { name: input.name.clone(), shape, value: self.values.get(input.name.as_str()).copied() })
        };
        signature.inputs.iter().map(of_input).collect()
    }
}

/// The profiles of graph `name` of a bundle.
///
/// # Errors
///
/// The method has no plan for the workload.
pub fn profiles(manifest: &Manifest, name: &str, workload: &Workload) -> Result<Vec<Profile>, TensorRtError> {
    let Workload { lengths, new_tokens, width, policy, plain } = *workload;
    let one = Extent::fixed(1);
    let up_to = |n: usize| Extent::new(1, n, n);
    // A decoder whose cache has `cache` rows when decoding begins, the last `read` of which it has read itself.
    let decoder = |cache: usize, read: usize, injected: usize| {
        let whole = if plain { lengths.total() } else { 0 };
        let end = cache.max(whole).saturating_add(new_tokens);
        if name == DECODER_STEP {
            let capacity = Extent::new(1, room_for(end), most_room_for(end));
            let dimensions = [("batch", one), ("capacity", capacity), ("injected", up_to(injected))];
            return vec![Profile::new("step", dimensions, [])];
        }
        // One more where a single row would be left over.
        let [usual, most] = [read, read.max(whole)].map(|rows| rows.clamp(1, PREFILL_ROWS + 1));
        let profile = |name, sequence: Extent, past: Extent| {
            let dimensions = [
                ("batch", one),
                ("sequence", sequence),
                ("past", past),
                ("injected", Extent::new(1, injected, injected)),
            ];
            Profile::new(name, dimensions, [("num_logits_to_keep", Extent::new(1, 1, sequence.max))])
        };
        let past = cache.saturating_sub(read);
        vec![
            profile("read", Extent::new(1, usual, most), Extent::new(0, past, end)),
            profile("step", one, Extent::new(0, cache, end)),
        ]
    };
    Ok(match &manifest.method {
        Method::Plain => decoder(lengths.total(), lengths.total(), 0),
        Method::Homer { settings, .. } => {
            let plan = HomerPlan::new(manifest.architecture.num_layers(), lengths, *settings)?;
            match name {
                DECODER | DECODER_KV_INT8 | DECODER_STEP => {
                    decoder(plan.root().out_len + lengths.suffix, lengths.suffix, 0)
                }
                "head" => vec![Profile::new(
                    "all",
                    [("batch", one), ("sequence", Extent::new(1, 1, settings.target_len))],
                    [],
                )],
                _ => vec![tree_node(&plan, name, width, manifest.architecture.max_positions())],
            }
        }
        Method::Rcc { settings } => {
            let plan = RccPlan::new(lengths, *settings)?;
            let width = width.clamp(1, plan.segments);
            let slots = width.saturating_mul(settings.slots_per_segment());
            match name {
                "encoder" => vec![Profile::new("all", [("segments", up_to(width))], [])],
                "slots" => {
                    let past = Extent::new(0, plan.slots / 2, plan.slots);
                    vec![Profile::new("all", [("batch", one), ("slots", up_to(slots)), ("past", past)], [])]
                }
                _ => decoder(plan.slots + lengths.suffix, lengths.suffix, 0),
            }
        }
        Method::SharedLlm { settings } => {
            let plan = SharedLlmPlan::new(lengths, *settings, policy)?;
            // A shorter prompt may leave the upper model more than this one does.
            let running = plan.running.max(2 * settings.chunk_len);
            if matches!(name, DECODER | DECODER_KV_INT8 | DECODER_STEP) {
                decoder(running, running, plan.injected_rows())
            } else {
                let coupled = settings.quirks == Quirks::Faithful && settings.tree_depth > 1;
                let chunks = if coupled { plan.chunks } else { width.clamp(1, plan.chunks) };
                let dimensions =
                    [("batch", one), ("chunks", up_to(chunks)), ("running", Extent::new(1, plan.running, running))];
                let values = [
                    ("first_chunk", Extent::new(0, 0, plan.chunks - 1)),
                    ("num_chunks", up_to(plan.chunks)),
                    ("query_index", Extent::new(0, plan.running - 1, running - 1)),
                ];
                vec![Profile::new("all", dimensions, values)]
            }
        }
    })
}

/// The flags of `accordion build` that widen the range of `name`, a dimension or an input of one value of graph `graph`.
pub(super) fn widened_by(method: &Method, graph: &str, name: &str) -> &'static str {
    match (name, method) {
        ("batch" | "segments" | "slots", _) => "--width",
        ("chunks", _) => "--width or --context",
        ("past" | "capacity", _) if graph.starts_with(DECODER) => "--context or --new-tokens",
        ("suffix_length", _) => "--suffix",
        ("sequence" | "num_logits_to_keep", Method::Homer { .. } | Method::Rcc { .. }) => "--suffix, or --plain",
        ("prefix_length", _) => "--prefix",
        _ => "--context",
    }
}

/// The profile of a node of HOMER's tree. A node may be as long as a chunk; it is tuned for what the plan gives it, or for
/// half a chunk if the tree of this plan does not have it. A significance table may have been made for any length up to
/// `max_positions`.
fn tree_node(plan: &HomerPlan, name: &str, width: usize, max_positions: usize) -> Profile {
    let settings = plan.settings;
    let width = width.clamp(1, plan.leaves());
    let chunk = settings.max_chunk_len.max(settings.max_initial_chunk_len.unwrap_or(0));
    let up_to = |opt: usize| Extent::new(1, opt, chunk);
    let node = plan.nodes.iter().find(|node| graph_name(node.height, &node.layers) == name);
    let [input, kept] = node.map_or([chunk, chunk / 2], |node| [node.in_len, node.out_len]);
    let [left, right] = node.and_then(|node| node.children).map_or([chunk / 2; 2], |pair| {
        pair.map(|child| plan.nodes.get(child).map_or(chunk / 2, |child| child.out_len))
    });
    let PromptLengths { prefix, suffix, .. } = plan.lengths;
    Profile::new(
        "all",
        [
            ("batch", Extent::new(1, width, width)),
            ("length", up_to(input)),
            ("left", up_to(left)),
            ("right", up_to(right)),
            ("distances", Extent::new(1, plan.max_distance() + 1, chunk.max(max_positions))),
        ],
        [("keep", up_to(kept)), ("prefix_length", Extent::new(0, prefix, chunk - 1)), ("suffix_length", up_to(suffix))],
    )
}

impl Workload {
    /// Checks that `manifest`'s method has a plan for it, before anything is built.
    ///
    /// # Errors
    ///
    /// There is none.
    pub fn check(&self, manifest: &Manifest) -> Result<(), TensorRtError> {
        let out_of_range = |what, found: usize, expected: &str| {
            Err(PlanError::OutOfRange { what, found: found.to_string(), expected: expected.to_owned() }.into())
        };
        if self.width == 0 {
            return out_of_range("width", 0, "at least 1");
        }
        let PromptLengths { prefix, context, suffix } = self.lengths;
        let longest = [prefix, context, suffix, self.new_tokens].into_iter().max().unwrap_or_default();
        if longest > MAX_TOKENS {
            return out_of_range("prompt length", longest, "at most 2^31 - 1 tokens of each part");
        }
        manifest.graphs.keys().try_for_each(|name| profiles(manifest, name, self).map(drop))
    }
}
