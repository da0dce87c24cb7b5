//! RCC over engines: segment batch by segment batch through the encoder and the decoder's layers over slots.

use super::prompt::PromptIds;
use super::{ContextState, Engines, PipelineError};
use crate::bundle::Bundle;
use accordion_graphs::plan::PromptLengths;
use accordion_graphs::plan::rcc::{RccPlan, RccSettings};

/// RCC for one run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rcc {
    /// The settings that the bundle was exported with.
    pub settings: RccSettings,
    /// Segments that may be encoded in one batch. Decides memory and time, not the result.
    pub width: usize,
}

impl Rcc {
    /// The plan for a prompt of `lengths`.
    ///
    /// # Errors
    ///
    /// There is none, or the bundle does not fit it.
    pub fn plan(&self, _bundle: &Bundle, lengths: PromptLengths) -> Result<RccPlan, PipelineError> {
        Ok(RccPlan::new(lengths, self.settings)?)
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
