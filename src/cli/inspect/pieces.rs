//! The pieces that RCC and SharedLLM split a prompt into.

use crate::cli::text::{bytes, grouped, operations, table};
use accordion::bundle::Bundle;
use accordion::pipeline::compress::Compression;
use accordion::pipeline::sharedllm::SharedLlm;
use accordion::profile::measure::work;
use accordion_graphs::architecture::Compressor;
use accordion_graphs::plan::rcc::RccPlan;
use accordion_graphs::plan::sharedllm::{ChunkPolicy, Level, Quirks, SharedLlmPlan, SharedLlmSettings};
use accordion_graphs::plan::{OperationCount, PromptLengths};
use serde::Serialize;

/// RCC's segments.
#[derive(Serialize)]
pub(super) struct Segments {
    count: usize,
    window: usize,
    /// Tokens of the text that fill the first segment up: its last ones, in front.
    padding: usize,
    /// How often the text follows.
    repeats: usize,
    slots: usize,
    slots_per_segment: usize,
}

impl From<&RccPlan> for Segments {
    fn from(plan: &RccPlan) -> Self {
        Self {
            count: plan.segments,
            window: plan.settings.window,
            padding: plan.front.len(),
            repeats: plan.repeats,
            slots: plan.slots,
            slots_per_segment: plan.settings.slots_per_segment(),
        }
    }
}

impl Segments {
    pub(super) fn in_words(&self) -> String {
        let Self { count, window, padding, repeats, slots, slots_per_segment } = self;
        let [count, slots] = [count, slots].map(|&n| grouped(n as u64));
        let text = match repeats {
            1 => "the text".to_owned(),
            times => format!("the text {times} times"),
        };
        let front = match padding {
            0 => String::new(),
            tokens => format!(", behind {} tokens of its end", grouped(*tokens as u64)),
        };
        format!(
            "  segments    {count} of {window} tokens: {text}{front}\n  slots       {slots}, {slots_per_segment} of a segment"
        )
    }
}

/// SharedLLM's chunks.
#[derive(Serialize)]
pub(super) struct Chunks {
    chunk_len: usize,
    /// Tokens kept per chunk \[C\].
    kept_per_chunk: usize,
    /// Context tokens per kept one \[beta\].
    compression_ratio: f64,
    injected_layers: usize,
    levels: Vec<Level>,
    #[serde(skip)]
    pub(super) plan: SharedLlmPlan,
    /// By the policy that holds where no other is asked for.
    pub(super) default: Split,
    /// By the other named ones, where such a prompt can be split by them.
    others: Vec<Split>,
}

/// How one policy splits the prompt.
#[derive(Serialize)]
pub(super) struct Split {
    policy: String,
    chunks: usize,
    /// Tokens that the upper model reads.
    pub(super) running: usize,
    injected_rows: usize,
    pub(super) operations: OperationCount,
    pub(super) state_bytes: u64,
}

impl Chunks {
    /// Plans for the prompt by every named policy.
    pub(super) fn new(bundle: &Bundle, settings: SharedLlmSettings, lengths: PromptLengths) -> anyhow::Result<Self> {
        let shared = |policy| SharedLlm { settings, policy, width: 1 };
        let injected_layers = match &bundle.manifest().compressor {
            Some(Compressor::SharedLlm(model)) => model.injected_layers,
            _ => 0,
        };
        let split = |policy: ChunkPolicy| -> anyhow::Result<(SharedLlmPlan, Split)> {
            let plan = shared(policy).plan(bundle, lengths)?;
            let split = Split {
                policy: policy.to_string(),
                chunks: plan.chunks,
                running: plan.running,
                injected_rows: plan.injected_rows(),
                operations: work(bundle, &Compression::SharedLlm(shared(policy)), lengths)?.0,
                state_bytes: state_bytes(bundle, &plan, injected_layers),
            };
            Ok((plan, split))
        };
        let (plan, default) = split(ChunkPolicy::FineTuning)?;
        let others = [ChunkPolicy::LONGBENCH].into_iter().filter_map(|policy| Some(split(policy).ok()?.1));
        Ok(Self {
            chunk_len: settings.chunk_len,
            kept_per_chunk: plan.kept_per_chunk,
            compression_ratio: plan.compression_ratio(),
            injected_layers,
            others: others.collect(),
            levels: plan.levels.clone(),
            plan,
            default,
        })
    }

    /// What the state holds besides the running text's cache.
    pub(super) fn injected(&self) -> String {
        let rows = grouped(self.default.injected_rows as u64);
        format!(" and {rows} injected in each of {} layers", self.injected_layers)
    }

    pub(super) fn in_words(&self) -> String {
        let Self { chunk_len, kept_per_chunk, compression_ratio, .. } = self;
        let row = |split: &Split| {
            [
                format!("  {}", split.policy),
                grouped(split.chunks as u64),
                grouped(split.running as u64),
                grouped(split.injected_rows as u64),
                operations(split.operations.total()),
                bytes(split.state_bytes),
            ]
        };
        let splits: Vec<_> = std::iter::once(&self.default).chain(&self.others).map(row).collect();
        let level = |(number, level): (usize, &Level)| {
            let Level { node_len, nodes, step, kept } = level;
            [format!("  {number}"), node_len.to_string(), nodes.to_string(), step.to_string(), kept.to_string()]
        };
        let levels: Vec<_> = self.levels.iter().enumerate().map(level).collect();
        format!(
            "  chunks      of {chunk_len} tokens, {kept_per_chunk} kept of each (1 of {compression_ratio:.1})\n{}{}",
            table(["  --chunks", ">CHUNKS", ">RUNNING", ">INJECTED", ">OPERATIONS", ">STATE"], &splits),
            table(["  LEVEL", ">NODE LENGTH", ">NODES", ">STEP", ">KEPT OF A NODE"], &levels),
        )
    }
}

/// Bytes of the upper model's cache and of what is injected, as fp32. As released, keys are there twice: a single token
/// looks at them from another angle.
fn state_bytes(bundle: &Bundle, plan: &SharedLlmPlan, injected_layers: usize) -> u64 {
    let model = bundle.architecture();
    let parts = match plan.settings.quirks {
        Quirks::Faithful => 3,
        Quirks::Fixed => 2,
    };
    let row = 4 * parts * injected_layers * model.num_kv_heads() * model.head_dim();
    model.kv_bytes_per_token() * plan.running as u64 + row as u64 * plan.injected_rows() as u64
}
