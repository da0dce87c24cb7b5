//! What a bundle and the reference are compared on.

use super::super::output::Output;
use super::{Arguments, Environment};
use accordion::bundle::{Bundle, Method};
use accordion::checkpoint::Tokenizer;
use accordion::pipeline;
use accordion::verify::bundle::{Input, Plan};
use accordion::verify::recording::RecordedInput;
use accordion_graphs::architecture::Compressor;
use accordion_graphs::plan::PromptLengths;
use accordion_graphs::plan::homer::{HomerPlan, HomerSettings};
use accordion_graphs::plan::rcc::RccSettings;
use accordion_graphs::plan::sharedllm::{ChunkPolicy, SharedLlmSettings};
use anyhow::Context;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};
use std::path::{Path, PathBuf};

/// Rows of a plain check, unless said otherwise.
const PLAIN_CONTEXT: usize = 512;
/// Most tokens that are compressed unless said otherwise: the reference takes seconds for them.
const MOST_TOKENS: usize = 6144;
/// Chunks of a sharedllm check, unless said otherwise.
const CHUNKS: usize = 3;
/// Longer parts than any model reads are mistyped.
const MAX_PART: usize = 1 << 26;

/// The prompt and what follows it, as long as the arguments or the method say.
pub(super) struct Chosen {
    plan: Plan,
    lengths: PromptLengths,
    ids: Vec<u32>,
    width: usize,
    source: (String, String),
}

impl Chosen {
    /// Every sample that the arguments ask for.
    pub(super) fn samples(bundle: &Bundle, arguments: &Arguments, output: &Output) -> anyhow::Result<Vec<Self>> {
        let method = &bundle.manifest().method;
        let tokens = Tokens::new(bundle, arguments, output)?;
        let lengths = lengths(method, arguments, &tokens)?;
        let plan = plan(bundle, method, lengths, output)?;
        let all = usize::from(arguments.samples);
        let samples = (0..all).map(|sample| {
            let ids = tokens.take(lengths.total() + usize::from(arguments.steps), sample, all)?;
            Ok(Self { plan: plan.clone(), lengths, ids, width: arguments.width, source: tokens.source() })
        });
        samples.collect()
    }

    /// The first of them.
    pub(super) fn first(bundle: &Bundle, arguments: &Arguments, output: &Output) -> anyhow::Result<Self> {
        let samples = Self::samples(bundle, arguments, output)?;
        samples.into_iter().next().context("there is no sample")
    }

    /// What somebody recorded.
    pub(super) fn recorded(
        bundle: &Bundle,
        recorded: RecordedInput,
        file: &Path,
        width: usize,
        output: &Output,
    ) -> anyhow::Result<Self> {
        let RecordedInput { lengths, ids } = recorded;
        let plan = plan(bundle, &bundle.manifest().method, lengths, output)?;
        Ok(Self {
            plan,
            lengths,
            ids,
            width,
            source: ("text".to_owned(), format!("as recorded in {}", file.display())),
        })
    }

    pub(super) fn input(&self) -> Input<'_> {
        Input { plan: &self.plan, lengths: self.lengths, ids: &self.ids, width: self.width }
    }

    /// The word for what a comparison counts, and how many of it there are.
    pub(super) fn steps(&self) -> (&'static str, u64) {
        let (what, count) = self.plan.steps(self.lengths, self.ids.len() - self.lengths.total());
        (what, count as u64)
    }

    /// What the report says about it.
    pub(super) fn described(&self) -> Environment {
        let PromptLengths { prefix, context, suffix } = self.lengths;
        let width = if self.width == usize::MAX { "max".to_owned() } else { self.width.to_string() };
        let plan = match &self.plan {
            Plan::Plain => None,
            Plan::Homer(plan, _) => {
                Some(("tree", format!("height {}, {} nodes, width {width}", plan.tree_height, plan.nodes.len())))
            }
            Plan::Rcc(plan) => Some(("segments", format!("{}, {} slots", plan.segments, plan.slots))),
            Plan::SharedLlm(plan) => {
                let (levels, kept) = (plan.levels.len(), plan.kept_per_chunk);
                Some(("chunks", format!("{}, {levels} levels, {kept} tokens kept of each, width {width}", plan.chunks)))
            }
        };
        let steps = self.ids.len() - self.lengths.total();
        let tokens = ("tokens", format!("{prefix} + {context} + {suffix}, then {steps}"));
        let named = [Some(tokens), plan].into_iter().flatten().map(|(name, value)| (name.to_owned(), value));
        named.chain([self.source.clone()]).collect()
    }
}

/// Lengths of the prompt's parts, each as asked for or as the method's default.
fn lengths(method: &Method, arguments: &Arguments, tokens: &Tokens) -> anyhow::Result<PromptLengths> {
    let affix = |length: usize| (length / 8).clamp(1, 16);
    let (affixes, room) = match method {
        Method::Plain => ([0, 0], None),
        Method::Homer { settings, .. } => {
            let chunk = leaf_len(settings);
            ([affix(chunk); 2], Some(chunk))
        }
        Method::Rcc { settings } => ([0, affix(settings.window)], None),
        Method::SharedLlm { settings } => ([0, affix(settings.chunk_len)], None),
    };
    let part = |flag: &str, asked: Option<usize>, default: usize| match asked {
        Some(asked) if asked > MAX_PART => anyhow::bail!("{flag} is {asked}, expected at most {MAX_PART} tokens"),
        asked => Ok(asked.unwrap_or(default)),
    };
    let prefix = part("--prefix", arguments.prefix, affixes[0])?;
    let suffix = part("--suffix", arguments.suffix, affixes[1])?;
    let default = match method {
        Method::Plain => PLAIN_CONTEXT,
        Method::Homer { tree_heights, .. } => {
            let room = room.unwrap_or_default().saturating_sub(prefix + suffix).max(1);
            default_tree(tree_heights, room)
        }
        // Two windows and a half or, of long ones, a part of one, which is repeated until it is full.
        Method::Rcc { settings: RccSettings { window, .. } } => {
            let few = if 3 * window <= MOST_TOKENS { 5 * window } else { *window };
            (few / 2).saturating_sub(prefix).max(1)
        }
        Method::SharedLlm { settings: SharedLlmSettings { chunk_len, .. } } => {
            ((MOST_TOKENS / chunk_len.max(&1)).clamp(1, CHUNKS) * chunk_len).saturating_sub(prefix).max(1)
        }
    };
    let context = tokens.context(arguments.context, default, prefix + suffix + usize::from(arguments.steps))?;
    Ok(PromptLengths { prefix, context, suffix })
}

fn leaf_len(settings: &HomerSettings) -> usize {
    settings.max_initial_chunk_len.unwrap_or(settings.max_chunk_len).min(settings.max_chunk_len)
}

/// A context for the highest tree up to height 2 that there are graphs for (else the lowest), with leaves five eighths full:
/// no affixes change its height then.
fn default_tree(heights: &[usize], room: usize) -> usize {
    let low_enough = heights.iter().copied().filter(|&height| height <= 2).max();
    let height = low_enough.or_else(|| heights.iter().copied().min()).unwrap_or(0);
    1_usize.checked_shl(height as u32).and_then(|leaves| leaves.checked_mul(room)).map_or(room, |n| (n / 8 * 5).max(1))
}

fn plan(bundle: &Bundle, method: &Method, lengths: PromptLengths, output: &Output) -> anyhow::Result<Plan> {
    Ok(match method {
        Method::Plain => Plan::Plain,
        Method::Homer { settings, .. } => {
            let plan = HomerPlan::new(bundle.architecture().num_layers(), lengths, *settings)?;
            let table = significance(bundle, &plan, output)?;
            Plan::Homer(plan, table)
        }
        Method::Rcc { settings } => {
            Plan::Rcc(pipeline::rcc::Rcc { settings: *settings, width: 1 }.plan(bundle, lengths)?)
        }
        Method::SharedLlm { settings } => {
            // What is left of the context by whole chunks is read in front of the suffix.
            let policy = ChunkPolicy::LeaveRunning(lengths.suffix.max(1));
            let shared = pipeline::sharedllm::SharedLlm { settings: *settings, policy, width: 1 };
            Plan::SharedLlm(shared.plan(bundle, lengths)?)
        }
    })
}

/// The table of the bundle, or zeros: both sides subtract the same one, so that parity does not depend on it.
fn significance(bundle: &Bundle, plan: &HomerPlan, output: &Output) -> anyhow::Result<Vec<Vec<f32>>> {
    let (layers, distances) = (bundle.architecture().num_layers(), plan.max_distance() + 1);
    if let Some(table) = bundle.significance()? {
        table.covers(layers, plan.max_distance())?;
        return Ok((0..layers).map(|layer| table.bias(layer).to_vec()).collect());
    }
    output.remark("The bundle has no significance table: zeros are used on both sides, which is enough for parity.");
    Ok(vec![vec![0.0; distances]; layers])
}

/// Where token ids come from.
enum Tokens {
    Text { path: PathBuf, ids: Vec<u32> },
    Random { seed: u64, vocab_size: usize },
}

impl Tokens {
    fn new(bundle: &Bundle, arguments: &Arguments, output: &Output) -> anyhow::Result<Self> {
        let vocab_size = vocab_size(bundle);
        let Some(path) = &arguments.text else {
            output.remark("No --text is given: pseudo-random tokens are compared, which suits every vocabulary.");
            return Ok(Self::Random { seed: arguments.seed, vocab_size });
        };
        let bytes = std::fs::read(path).with_context(|| format!("{} cannot be read", path.display()))?;
        let text = String::from_utf8(bytes).with_context(|| format!("{} is not UTF-8 text", path.display()))?;
        let ids = Tokenizer::open(bundle.dir(), vocab_size)?.encode(&text, false)?;
        Ok(Self::Text { path: path.clone(), ids })
    }

    /// The length of the context: as asked for, else `default` or what there is behind `around` other tokens.
    fn context(&self, asked: Option<usize>, default: usize, around: usize) -> anyhow::Result<usize> {
        Ok(match (asked, self) {
            (Some(asked), _) if !(1..=MAX_PART).contains(&asked) => {
                anyhow::bail!("--context is {asked}, expected 1 to {MAX_PART} tokens")
            }
            (Some(asked), _) => asked,
            (None, Self::Text { ids, .. }) => default.min(ids.len().saturating_sub(around)).max(1),
            (None, Self::Random { .. }) => default,
        })
    }

    /// `count` tokens for sample number `sample` of `samples`: windows of the text, as far from each other as it is long.
    fn take(&self, count: usize, sample: usize, samples: usize) -> anyhow::Result<Vec<u32>> {
        match self {
            Self::Text { path, ids } => {
                let room = ids.len().checked_sub(count).filter(|&room| room + 1 >= samples);
                let Some(room) = room else {
                    let needed = count.saturating_add(samples - 1);
                    anyhow::bail!("{} has {} tokens, {needed} are needed", path.display(), ids.len())
                };
                let start = room.checked_div(samples - 1).unwrap_or(0) * sample;
                Ok(ids[start..start + count].to_vec())
            }
            Self::Random { seed, vocab_size } => {
                let mut generator = ChaCha8Rng::seed_from_u64(seed.wrapping_add(sample as u64));
                // The bias of the remainder is nothing here.
                let mut next = || (generator.next_u64() % (*vocab_size).max(1) as u64) as u32;
                Ok((0..count).map(|_| next()).collect())
            }
        }
    }

    fn source(&self) -> (String, String) {
        let value = match self {
            Self::Text { path, .. } => path.display().to_string(),
            Self::Random { seed, .. } => format!("pseudo-random, seed {seed}"),
        };
        ("text".to_owned(), value)
    }
}

/// Ids that every part of the model knows: what reads the context may know fewer than the decoder.
fn vocab_size(bundle: &Bundle) -> usize {
    let decoder = bundle.architecture().vocab_size();
    match &bundle.manifest().compressor {
        Some(Compressor::Rcc(model)) => decoder.min(model.encoder.vocab_size()),
        Some(Compressor::SharedLlm(model)) => decoder.min(model.lower.vocab_size),
        _ => decoder,
    }
}
