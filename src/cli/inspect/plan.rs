//! What a prompt of given lengths takes.

use super::pieces::{Chunks, Segments, Split};
use crate::cli::text::{bytes, grouped, operations, table};
use accordion::bundle::{Bundle, Method};
use accordion::pipeline::compress::Compression;
use accordion::pipeline::rcc::Rcc;
use accordion::profile::measure::work;
use accordion::report::PlanSummary;
use accordion_graphs::architecture::Architecture;
use accordion_graphs::methods::homer::graph_name;
use accordion_graphs::plan::homer::HomerPlan;
use accordion_graphs::plan::{OperationCount, PlanError, PromptLengths};
use serde::Serialize;

/// Operations and memory of one prompt, and what takes them.
#[derive(Serialize)]
pub(super) struct Cost {
    prompt: PromptLengths,
    operations: OperationCount,
    /// The context state: tokens in the cache, and bytes of its keys and values as fp32, injected ones included.
    state_tokens: usize,
    state_bytes: u64,
    /// The same prompt through the whole model.
    plain_operations: OperationCount,
    plain_state_bytes: u64,
    /// The same for every method: its levels.
    #[serde(skip_serializing_if = "Option::is_none")]
    tree: Option<PlanSummary>,
    #[serde(flatten)]
    steps: Option<Steps>,
    /// Graphs that the plan needs and the bundle does not have.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    missing_graphs: Vec<String>,
}

/// How a method gets from the prompt to the state.
#[derive(Serialize)]
#[serde(rename_all = "snake_case")]
enum Steps {
    Segments(Segments),
    Chunks(Box<Chunks>),
}

/// Plans for the method of `bundle`.
pub(super) fn of_bundle(bundle: &Bundle, lengths: PromptLengths) -> anyhow::Result<Cost> {
    let model = bundle.architecture();
    let plain = plain(model, lengths)?;
    match bundle.manifest().method {
        Method::Plain => Ok(plain),
        Method::Homer { settings, .. } => {
            let plan = HomerPlan::new(model.num_layers(), lengths, settings)?;
            let needed = plan.layers.iter().enumerate().map(|(level, layers)| graph_name(level, layers));
            let state_tokens = plan.root().out_len;
            Ok(Cost {
                operations: plan.operations(model),
                state_tokens,
                state_bytes: state_bytes(model, state_tokens),
                missing_graphs: needed.filter(|name| bundle.signature(name).is_none()).collect(),
                tree: Some(PlanSummary::from(&plan)),
                ..plain
            })
        }
        Method::Rcc { settings } => {
            let rcc = Rcc { settings, width: 1 };
            let plan = rcc.plan(bundle, lengths)?;
            let state_tokens = plan.slots + lengths.suffix;
            Ok(Cost {
                operations: work(bundle, &Compression::Rcc(rcc), lengths)?.0,
                state_tokens,
                state_bytes: state_bytes(model, state_tokens),
                tree: Some(PlanSummary::from(&plan)),
                steps: Some(Steps::Segments(Segments::from(&plan))),
                ..plain
            })
        }
        Method::SharedLlm { settings } => {
            let chunks = Chunks::new(bundle, settings, lengths)?;
            let Split { operations, running, state_bytes, .. } = chunks.default;
            let tree = Some(PlanSummary::from(&chunks.plan));
            let steps = Some(Steps::Chunks(Box::new(chunks)));
            Ok(Cost { operations, state_tokens: running, state_bytes, tree, steps, ..plain })
        }
    }
}

/// Plans for the whole model over the whole prompt.
pub(super) fn plain(model: &Architecture, prompt: PromptLengths) -> Result<Cost, PlanError> {
    // Longer ones would overflow the count of operations, and nobody has the memory.
    const LONGEST: usize = 1 << 26;
    let PromptLengths { prefix, context, suffix } = prompt;
    let total = prefix.checked_add(context).and_then(|n| n.checked_add(suffix));
    let Some(tokens) = total.filter(|n| (1..=LONGEST).contains(n)) else {
        return Err(PlanError::OutOfRange {
            what: "prompt length",
            found: format!("{prefix} + {context} + {suffix}"),
            expected: format!("1 to {LONGEST} tokens"),
        });
    };
    let operations = OperationCount::plain_prefill(model, tokens);
    let state_bytes = state_bytes(model, tokens);
    Ok(Cost {
        prompt,
        operations,
        state_tokens: tokens,
        state_bytes,
        plain_operations: operations,
        plain_state_bytes: state_bytes,
        tree: None,
        steps: None,
        missing_graphs: Vec::new(),
    })
}

fn state_bytes(model: &Architecture, tokens: usize) -> u64 {
    model.kv_bytes_per_token().saturating_mul(tokens as u64)
}

impl Cost {
    pub(super) fn in_words(&self) -> String {
        let PromptLengths { prefix, context, suffix } = self.prompt;
        let OperationCount { linear, attention } = self.operations;
        let plain = |what: String| if self.tree.is_some() { format!("; plain {what}") } else { String::new() };
        let injected = match &self.steps {
            Some(Steps::Chunks(chunks)) => chunks.injected(),
            _ => String::new(),
        };
        let mut lines = vec![
            format!("prompt of {prefix} + {context} + {suffix} tokens (prefix, context, suffix)"),
            format!(
                "  operations  {} (linear {}, attention {}){}",
                operations(self.operations.total()),
                operations(linear),
                operations(attention),
                plain(operations(self.plain_operations.total())),
            ),
            format!(
                "  state       {} tokens{injected}, {} as fp32{}",
                grouped(self.state_tokens as u64),
                bytes(self.state_bytes),
                plain(bytes(self.plain_state_bytes)),
            ),
        ];
        let text = match (&self.steps, &self.tree) {
            (Some(Steps::Segments(segments)), _) => Some(segments.in_words()),
            (Some(Steps::Chunks(chunks)), _) => Some(chunks.in_words()),
            (None, tree) => tree.as_ref().map(levels),
        };
        lines.extend(text.map(|text| text.trim_end().to_owned()));
        if !self.missing_graphs.is_empty() {
            let missing = self.missing_graphs.join(", ");
            lines.push(format!("  not in the bundle: {missing}; export with --context {context} to run this prompt"));
        }
        lines.join("\n")
    }
}

/// The levels of the tree from the root down; nodes of other lengths than most of their level on lines of their own.
fn levels(tree: &PlanSummary) -> String {
    let height = tree.nodes.iter().map(|node| node.height).max().unwrap_or(0);
    let mut rows = Vec::new();
    for level in (0..=height).rev() {
        let mut groups: Vec<(usize, usize, usize)> = Vec::new();
        for node in tree.nodes.iter().filter(|node| node.height == level) {
            match groups.iter_mut().find(|(_, i, o)| (*i, *o) == (node.in_len, node.out_len)) {
                Some((count, ..)) => *count += 1,
                None => groups.push((1, node.in_len, node.out_len)),
            }
        }
        groups.sort_by_key(|&(count, ..)| std::cmp::Reverse(count));
        let layers = tree.nodes.iter().find(|node| node.height == level).map(|node| node.layers.clone());
        let layers = match layers {
            Some(layers) if !layers.is_empty() => format!("{}-{}", layers.start, layers.end - 1),
            _ => "none".to_owned(),
        };
        for (i, (count, in_len, out_len)) in groups.into_iter().enumerate() {
            let first = |text: String| if i == 0 { text } else { String::new() };
            rows.push([
                first(format!("  {level}")),
                first(layers.clone()),
                count.to_string(),
                in_len.to_string(),
                out_len.to_string(),
            ]);
        }
    }
    table(["  HEIGHT", "LAYERS", ">NODES", ">TOKENS IN", ">OUT"], &rows)
}
