//! SharedLLM over engines: the lower model over the context tree, then the upper model over the running text.

use super::prompt::PromptIds;
use super::{ContextState, Engines, PipelineError};
use crate::bundle::Bundle;
use accordion_graphs::plan::PromptLengths;
use accordion_graphs::plan::sharedllm::{ChunkPolicy, SharedLlmPlan, SharedLlmSettings};

/// SharedLLM for one run.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SharedLlm {
    /// The settings that the bundle was exported with.
    pub settings: SharedLlmSettings,
    /// How much of the prompt the lower model reads.
    pub policy: ChunkPolicy,
    /// Chunks that may be compressed in one call, where they do not depend on each other. Decides memory and time, not
    /// the result.
    pub width: usize,
}

impl SharedLlm {
    /// The plan for a prompt of `lengths`.
    ///
    /// # Errors
    ///
    /// There is none, or the bundle does not fit it.
    pub fn plan(&self, _bundle: &Bundle, lengths: PromptLengths) -> Result<SharedLlmPlan, PipelineError> {
        Ok(SharedLlmPlan::new(lengths, self.settings, self.policy)?)
    }

    pub(super) fn compress(
        &self,
        _engines: &mut Engines<'_>,
        _prompt: &PromptIds,
        _on_progress: &mut dyn FnMut(usize, usize),
    ) -> Result<ContextState, PipelineError> {
        unimplemented!()
    }
}
