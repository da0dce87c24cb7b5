//! A bundle of any method against the reference over the bundle's own weights.

use super::error::VerifyError;
use super::homer::{HomerInput, compare_homer};
use super::judge::{Detail, Findings};
use super::plain::compare_plain;
use super::quantized::weights_of;
use super::rcc::{RccInput, compare_rcc};
use super::sharedllm::{SharedLlmInput, compare_sharedllm};
use crate::bundle::Bundle;
use crate::pipeline::Engines;
use crate::reference::llama::Llama;
use crate::reference::rcc::Rcc;
use crate::reference::sharedllm::SharedLlm;
use crate::reference::transformer;
use accordion_graphs::architecture::{Compressor, RccModel, SharedLlmModel};
use accordion_graphs::plan::PromptLengths;
use accordion_graphs::plan::homer::HomerPlan;
use accordion_graphs::plan::rcc::RccPlan;
use accordion_graphs::plan::sharedllm::SharedLlmPlan;

/// How the bundle's method treats a prompt.
#[derive(Debug, Clone)]
pub enum Plan {
    /// It is read as it is.
    Plain,
    /// A tree of chunks, and the significance table, one row per layer.
    Homer(HomerPlan, Vec<Vec<f32>>),
    /// Segments and slots.
    Rcc(RccPlan),
    /// A tree per chunk.
    SharedLlm(SharedLlmPlan),
}

/// What both sides are given.
#[derive(Debug, Clone, Copy)]
pub struct Input<'a> {
    /// How the prompt is treated.
    pub plan: &'a Plan,
    /// Where the prompt's parts end.
    pub lengths: PromptLengths,
    /// The prompt's token ids and, behind them, those that both sides are fed after it, whatever they would have generated
    /// themselves.
    pub ids: &'a [u32],
    /// Leaves or chunks that the engine may take in one batch.
    pub width: usize,
}

/// Compares `engines` with the reference on `input`. `on_progress` hears how much is done of [`Plan::steps`].
///
/// # Errors
///
/// The reference cannot be loaded from the bundle's weights, or a side cannot be run.
pub fn compare_bundle(
    engines: &mut Engines<'_>,
    input: &Input<'_>,
    detail: Detail,
    on_progress: &mut dyn FnMut(usize),
) -> Result<Findings, VerifyError> {
    let bundle = engines.bundle();
    let source = weights_of(bundle);
    let &Input { plan, lengths: PromptLengths { prefix, context, .. }, ids, width } = input;
    let (prompt, teacher) = ids.split_at_checked(input.lengths.total()).unwrap_or((ids, &[]));
    match plan {
        Plan::Plain => {
            let reference = transformer::load(bundle.architecture(), source)?;
            compare_plain(engines, reference.as_ref(), prompt, teacher, detail, on_progress)
        }
        Plan::Homer(plan, bias) => {
            let reference = Llama::load(bundle.llama()?, source)?;
            let (before, suffix) = prompt.split_at(prefix + context);
            let (prefix, context) = before.split_at(prefix);
            let bias: Vec<&[f32]> = bias.iter().map(Vec::as_slice).collect();
            let input = HomerInput { plan, prefix, context, suffix, teacher, bias: &bias, width };
            compare_homer(engines, &reference, &input, detail, on_progress)
        }
        Plan::Rcc(plan) => {
            let reference = Rcc::load(bundle.architecture(), rcc_model(bundle)?, plan.settings, source)?;
            let (text, prompt) = prompt.split_at(prefix + context);
            compare_rcc(engines, &reference, &RccInput { plan, text, prompt, teacher }, detail, on_progress)
        }
        Plan::SharedLlm(plan) => {
            let reference = SharedLlm::load(bundle.llama()?, sharedllm_model(bundle)?, source)?;
            let (context, running) = prompt.split_at(plan.compressed().end);
            let input = SharedLlmInput { plan, context, running, teacher, width };
            compare_sharedllm(engines, &reference, &input, detail, on_progress)
        }
    }
}

impl Plan {
    /// What [`compare_bundle`] counts for a prompt of `lengths` and `teacher` tokens behind it: the word for it, and how many
    /// there are.
    pub fn steps(&self, lengths: PromptLengths, teacher: usize) -> (&'static str, usize) {
        match self {
            Self::Plain => ("tokens", lengths.total() + teacher),
            Self::Homer(plan, _) => ("nodes", plan.nodes.len()),
            Self::Rcc(plan) => ("segments", plan.segments),
            Self::SharedLlm(_) => ("tokens", lengths.total()),
        }
    }
}

/// The encoder and the maps of `bundle`.
fn rcc_model(bundle: &Bundle) -> Result<&RccModel, VerifyError> {
    match &bundle.manifest().compressor {
        Some(Compressor::Rcc(model)) => Ok(model),
        _ => Err(VerifyError::NoCompressor { dir: bundle.dir().to_owned(), method: "rcc" }),
    }
}

/// The lower model of `bundle`.
pub(super) fn sharedllm_model(bundle: &Bundle) -> Result<&SharedLlmModel, VerifyError> {
    match &bundle.manifest().compressor {
        Some(Compressor::SharedLlm(model)) => Ok(model),
        _ => Err(VerifyError::NoCompressor { dir: bundle.dir().to_owned(), method: "sharedllm" }),
    }
}
