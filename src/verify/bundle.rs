//! A bundle of any method as a side of a comparison, and the reference over its weights as another.

use super::error::VerifyError;
use super::homer::{self, HomerInput};
use super::parts::Parts;
use super::plain;
use super::quantized::weights_of;
use super::rcc::{self, RccInput};
use super::sharedllm::{self, SharedLlmInput};
use crate::bundle::{Bundle, Method};
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

/// The prompt's token ids in the parts that its method tells apart.
struct Divided<'a> {
    prefix: &'a [u32],
    context: &'a [u32],
    suffix: &'a [u32],
    prompt: &'a [u32],
    teacher: &'a [u32],
}

impl<'a> Input<'a> {
    fn divided(&self) -> Divided<'a> {
        let (prompt, teacher) = self.ids.split_at_checked(self.lengths.total()).unwrap_or((self.ids, &[]));
        let (prefix, rest) = prompt.split_at_checked(self.lengths.prefix).unwrap_or((prompt, &[]));
        let (context, suffix) = rest.split_at_checked(self.lengths.context).unwrap_or((rest, &[]));
        Divided { prefix, context, suffix, prompt, teacher }
    }

    /// The prompt's token ids, all parts.
    pub fn prompt(&self) -> &'a [u32] {
        self.divided().prompt
    }

    pub(crate) fn rcc(&self, plan: &'a RccPlan) -> RccInput<'a> {
        let Divided { prefix, context, suffix, prompt, teacher } = self.divided();
        RccInput { plan, text: &prompt[..prefix.len() + context.len()], prompt: suffix, teacher }
    }

    pub(crate) fn sharedllm(&self, plan: &'a SharedLlmPlan) -> SharedLlmInput<'a> {
        let Divided { prompt, teacher, .. } = self.divided();
        let (context, running) = prompt.split_at_checked(plan.compressed().end).unwrap_or((prompt, &[]));
        SharedLlmInput { plan, context, running, teacher, width: self.width }
    }

    pub(crate) fn homer<'b>(&self, plan: &'b HomerPlan, bias: &'b [&'b [f32]]) -> HomerInput<'b>
    where
        'a: 'b,
    {
        let Divided { prefix, context, suffix, teacher, .. } = self.divided();
        HomerInput { plan, prefix, context, suffix, teacher, bias, width: self.width }
    }
}

/// A bundle's engines as a side. `on_progress` hears how much is done of [`Plan::steps`].
///
/// # Errors
///
/// A graph cannot be run, or `parts` stops it.
pub fn engine_parts(
    engines: &mut Engines<'_>,
    input: &Input<'_>,
    parts: &mut dyn Parts,
    on_progress: &mut dyn FnMut(usize),
) -> Result<(), VerifyError> {
    match input.plan {
        Plan::Plain => {
            let Divided { prompt, teacher, .. } = input.divided();
            plain::engine_parts(engines, [prompt, teacher], parts, on_progress)
        }
        Plan::Homer(plan, bias) => {
            let bias: Vec<&[f32]> = bias.iter().map(Vec::as_slice).collect();
            homer::engine_parts(engines, &input.homer(plan, &bias), parts, on_progress)
        }
        Plan::Rcc(plan) => rcc::engine_parts(engines, &input.rcc(plan), parts, on_progress),
        Plan::SharedLlm(plan) => sharedllm::engine_parts(engines, &input.sharedllm(plan), parts, on_progress),
    }
}

/// The reference over the weights of `bundle` as a side.
///
/// # Errors
///
/// The reference cannot be loaded or run, or `parts` stops it.
pub fn reference_parts(bundle: &Bundle, input: &Input<'_>, parts: &mut dyn Parts) -> Result<(), VerifyError> {
    let source = weights_of(bundle);
    let kv_cache = bundle.manifest().kv_cache;
    match input.plan {
        Plan::Plain => {
            let Divided { prompt, teacher, .. } = input.divided();
            let reference = transformer::load(bundle.architecture(), source)?;
            plain::reference_parts(reference.as_ref(), [prompt, teacher], kv_cache, parts)
        }
        Plan::Homer(plan, bias) => {
            let reference = Llama::load(bundle.llama()?, source)?;
            let bias: Vec<&[f32]> = bias.iter().map(Vec::as_slice).collect();
            homer::reference_parts(&reference, &input.homer(plan, &bias), kv_cache, parts)
        }
        Plan::Rcc(plan) => {
            let reference = Rcc::load(bundle.architecture(), rcc_model(bundle)?, plan.settings, source)?;
            rcc::reference_parts(&reference, &input.rcc(plan), kv_cache, parts)
        }
        Plan::SharedLlm(plan) => {
            let reference = SharedLlm::load(bundle.llama()?, sharedllm_model(bundle)?, source)?;
            sharedllm::reference_parts(&reference, &input.sharedllm(plan), kv_cache, parts)
        }
    }
}

/// Checks that `other` computes the same of a prompt as `bundle`, if in another way: that it is of the same model, method and
/// settings.
///
/// # Errors
///
/// It is not.
pub fn check_same_model(bundle: &Bundle, other: &Bundle) -> Result<(), VerifyError> {
    let said = |bundle: &Bundle| serde_json::to_string(&bundle.manifest().method).unwrap_or_default();
    let differs = |what, expected: String, found: String| {
        Err(VerifyError::OtherModel { path: other.dir().to_owned(), what, found, expected })
    };
    let (one, two) = (bundle.manifest(), other.manifest());
    if one.fingerprint != two.fingerprint {
        return differs("model", one.fingerprint.clone(), two.fingerprint.clone());
    }
    match (&one.method, &two.method) {
        // The default settings of a run, and for which trees there are graphs, need not be the same.
        (Method::Homer { .. }, Method::Homer { .. }) => Ok(()),
        (method, other_method) if method == other_method => Ok(()),
        _ => differs("method", said(bundle), said(other)),
    }
}

impl Plan {
    /// What [`engine_parts`] counts for a prompt of `lengths` and `teacher` tokens behind it: the word for it, and how many
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
pub(crate) fn rcc_model(bundle: &Bundle) -> Result<&RccModel, VerifyError> {
    match &bundle.manifest().compressor {
        Some(Compressor::Rcc(model)) => Ok(model),
        _ => Err(VerifyError::NoCompressor { dir: bundle.dir().to_owned(), method: "rcc" }),
    }
}

/// The lower model of `bundle`.
pub(crate) fn sharedllm_model(bundle: &Bundle) -> Result<&SharedLlmModel, VerifyError> {
    match &bundle.manifest().compressor {
        Some(Compressor::SharedLlm(model)) => Ok(model),
        _ => Err(VerifyError::NoCompressor { dir: bundle.dir().to_owned(), method: "sharedllm" }),
    }
}
