//! The cases of a bundle of any method, against the reference over the bundle's own weights.

use super::BisectError;
use super::case::Visit;
use super::rebuild::Rebuilt;
use super::{homer, plain, rcc, sharedllm};
use crate::reference::llama::Llama;
use crate::reference::rcc::Rcc;
use crate::reference::sharedllm::SharedLlm;
use crate::reference::transformer;
use crate::verify::bundle::{Input, Plan, rcc_model, sharedllm_model};
use crate::verify::quantized::weights_of;
use std::ops::ControlFlow;

/// The cases of `input`.
///
/// # Errors
///
/// The reference cannot be loaded or run, the bundle lacks a graph, or `visit` fails.
pub fn cases(rebuilt: &Rebuilt<'_>, input: &Input<'_>, visit: &mut Visit<'_>) -> Result<ControlFlow<()>, BisectError> {
    let bundle = rebuilt.bundle();
    let source = weights_of(bundle);
    match input.plan {
        Plan::Plain => {
            let reference = transformer::load(bundle.architecture(), source)?;
            plain::cases(rebuilt, reference.as_ref(), input.prompt(), visit)
        }
        Plan::Homer(plan, bias) => {
            let reference = Llama::load(bundle.llama()?, source)?;
            let bias: Vec<&[f32]> = bias.iter().map(Vec::as_slice).collect();
            homer::cases(rebuilt, &reference, &input.homer(plan, &bias), visit)
        }
        Plan::Rcc(plan) => {
            let reference = Rcc::load(bundle.architecture(), rcc_model(bundle)?, plan.settings, source)?;
            rcc::cases(rebuilt, &reference, &input.rcc(plan), visit)
        }
        Plan::SharedLlm(plan) => {
            let reference = SharedLlm::load(bundle.llama()?, sharedllm_model(bundle)?, source)?;
            sharedllm::cases(rebuilt, &reference, &input.sharedllm(plan), visit)
        }
    }
}

/// How many cases [`cases`] visits if nothing breaks it off.
pub fn count(input: &Input<'_>) -> usize {
    match input.plan {
        Plan::Plain => 1,
        Plan::Homer(plan, _) => plan.nodes.len() + 2,
        Plan::Rcc(plan) => 2 * plan.segments + 1,
        Plan::SharedLlm(_) => 2,
    }
}
