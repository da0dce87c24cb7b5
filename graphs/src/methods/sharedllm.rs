//! SharedLLM: the lower model over the context tree, and the upper model's decoder that attends to what it kept.

use super::{Graphs, Source, plain};
use crate::architecture::SharedLlmModel;
use crate::plan::PlanError;
use crate::plan::sharedllm::SharedLlmSettings;

/// The graphs of the method: `compress` and `decoder`.
///
/// # Errors
///
/// As [`SharedLlmSettings::levels`].
pub fn graphs(source: &Source, _model: &SharedLlmModel, settings: SharedLlmSettings) -> Result<Graphs, PlanError> {
    settings.levels()?;
    Ok(plain::graphs(source))
}
