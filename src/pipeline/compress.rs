//! A prompt to a context state, by whichever method.

use super::prompt::PromptIds;
use super::rcc::Rcc;
use super::sharedllm::SharedLlm;
use super::{ContextState, Engines, PipelineError, homer, plain};
use crate::bundle::{Bundle, Method};
use crate::taps::{NoTaps, TapSink};
use accordion_calibration::significance::SignificanceTable;
use accordion_graphs::methods::homer::graph_name;
use accordion_graphs::plan::PromptLengths;
use accordion_graphs::plan::homer::{HomerPlan, HomerSettings};

/// What is done to a context, with everything that decides the result.
#[derive(Debug, Clone, PartialEq)]
pub enum Compression {
    /// Nothing: it is read as it is.
    Plain {
        /// Whether prompts may be longer than the model was trained for.
        allow_overlong: bool,
    },
    /// Hierarchical context merging.
    Homer(Homer),
    /// Recurrent context compression.
    Rcc(Rcc),
    /// Context tree and self-injection.
    SharedLlm(SharedLlm),
}

/// HOMER's settings for one run.
#[derive(Debug, Clone, PartialEq)]
pub struct Homer {
    /// Chunk lengths, target and warm-up.
    pub settings: HomerSettings,
    /// What scores are expected; needed as soon as something is pruned.
    pub significance: Option<Significance>,
    /// Leaves that may be built in one batch. Decides memory and time, not the result.
    pub width: usize,
}

/// The scores that are expected before a token's significance is judged.
#[derive(Debug, Clone, PartialEq)]
pub enum Significance {
    /// Those of a table.
    Table(Box<SignificanceTable>),
    /// Zero everywhere: scores are taken as they are, which favours tokens near the end of a chunk.
    Uncalibrated,
}

impl Compression {
    /// The word for the method.
    pub fn method(&self) -> &'static str {
        match self {
            Self::Plain { .. } => "plain",
            Self::Homer(_) => "homer",
            Self::Rcc(_) => "rcc",
            Self::SharedLlm(_) => "sharedllm",
        }
    }

    /// Checks, without running anything, that prompts of `lengths` can be compressed with the graphs of `bundle`.
    ///
    /// # Errors
    ///
    /// The prompt is too long for the method, or the bundle or the significance table does not fit.
    pub fn check(&self, bundle: &Bundle, lengths: PromptLengths) -> Result<(), PipelineError> {
        match self {
            Self::Plain { .. } if matches!(bundle.manifest().method, Method::SharedLlm { .. }) => {
                Err(PipelineError::NoPlainDecoder)
            }
            Self::Plain { allow_overlong } => {
                let (length, max_positions) = (lengths.total(), bundle.architecture().max_positions());
                if length > max_positions && !allow_overlong {
                    return Err(PipelineError::Overlong { length, max_positions });
                }
                Ok(())
            }
            Self::Homer(homer) => homer.plan(bundle, lengths).map(drop),
            Self::Rcc(rcc) => rcc.plan(bundle, lengths).map(drop),
            Self::SharedLlm(shared) => shared.plan(bundle, lengths).map(drop),
        }
    }

    /// The state of `prompt`, in the numbers that the bundle's decoder keeps. `on_progress` hears how many of how many steps are done.
    ///
    /// # Errors
    ///
    /// As [`Self::check`], or a graph fails.
    pub fn compress(
        &self,
        engines: &mut Engines<'_>,
        prompt: &PromptIds,
        on_progress: &mut dyn FnMut(usize, usize),
    ) -> Result<ContextState, PipelineError> {
        self.check(engines.bundle(), prompt.lengths())?;
        let state = match self {
            Self::Plain { .. } => {
                let ids = prompt.concatenated();
                plain::prefill(engines, &ids, |done| on_progress(done, ids.len()))?
            }
            Self::Homer(homer) => homer.compress(engines, prompt, &mut NoTaps, on_progress)?,
            Self::Rcc(rcc) => rcc.compress(engines, prompt, on_progress)?,
            Self::SharedLlm(shared) => shared.compress(engines, prompt, on_progress)?,
        };
        Ok(state.into_numbers(engines.bundle().manifest().kv_cache)?)
    }

    /// Checks, without running anything, that prefix and context of `lengths` can be compressed for no prompt in
    /// particular.
    ///
    /// # Errors
    ///
    /// What the method keeps of a context depends on the prompt; else as [`Self::check`].
    pub fn check_context(&self, bundle: &Bundle, lengths: PromptLengths) -> Result<(), PipelineError> {
        match self {
            Self::Homer(_) | Self::SharedLlm(_) => Err(PipelineError::NeedsPrompt { method: self.method() }),
            Self::Plain { .. } | Self::Rcc(_) => self.check(bundle, PromptLengths { suffix: 0, ..lengths }),
        }
    }

    /// The state of prefix and context alone, without logits, behind which any prompt can be read. `prompt` has no
    /// suffix.
    ///
    /// # Errors
    ///
    /// As [`Self::check_context`], or a graph fails.
    pub fn read_context(
        &self,
        engines: &mut Engines<'_>,
        prompt: &PromptIds,
        on_progress: &mut dyn FnMut(usize, usize),
    ) -> Result<ContextState, PipelineError> {
        self.check_context(engines.bundle(), prompt.lengths())?;
        match self {
            Self::Rcc(rcc) => {
                let state = rcc.document(engines, prompt, on_progress)?;
                Ok(state.into_numbers(engines.bundle().manifest().kv_cache)?)
            }
            _ => Ok(ContextState { logits: Vec::new(), ..self.compress(engines, prompt, on_progress)? }),
        }
    }
}

impl Homer {
    /// The plan for a prompt of `lengths`.
    ///
    /// # Errors
    ///
    /// There is none, or the bundle or the significance table does not fit it.
    pub fn plan(&self, bundle: &Bundle, lengths: PromptLengths) -> Result<HomerPlan, PipelineError> {
        let arch = bundle.architecture();
        let plan = HomerPlan::new(arch.num_layers(), lengths, self.settings)?;
        for (height, layers) in plan.layers.iter().enumerate() {
            let graph = graph_name(height, layers);
            if bundle.signature(&graph).is_none() {
                return Err(PipelineError::NotExported { graph, context: lengths.context, height: plan.tree_height });
            }
        }
        if plan.nodes.iter().any(|node| node.removed() > 0) {
            match &self.significance {
                None => return Err(PipelineError::NoTable),
                Some(Significance::Uncalibrated) => {}
                Some(Significance::Table(table)) => {
                    table.check_matches(&bundle.manifest().identity())?;
                    table.covers(arch.num_layers(), plan.max_distance())?;
                }
            }
        }
        Ok(plan)
    }

    /// The state of `prompt`; what `taps` wants of the tree goes there. `on_progress` hears how many of how many nodes are
    /// done.
    ///
    /// # Errors
    ///
    /// As [`Self::plan`], or a graph fails.
    pub fn compress(
        &self,
        engines: &mut Engines<'_>,
        prompt: &PromptIds,
        taps: &mut dyn TapSink,
        on_progress: &mut dyn FnMut(usize, usize),
    ) -> Result<ContextState, PipelineError> {
        let plan = self.plan(engines.bundle(), prompt.lengths())?;
        let layers = engines.bundle().architecture().num_layers();
        let zero = vec![0.0; plan.max_distance() + 1];
        let bias: Vec<&[f32]> = match &self.significance {
            Some(Significance::Table(table)) if table.num_layers() >= layers => {
                (0..layers).map(|layer| table.bias(layer)).collect()
            }
            _ => vec![&zero; layers],
        };
        let (mut done, total) = (0, plan.nodes.len());
        let mut on_node = |_: &_| {
            done += 1;
            on_progress(done, total);
        };
        homer::compress(engines, &plan, prompt.into(), &bias, self.width, taps, &mut on_node)
    }
}
