//! RCC: an encoder that turns segments into slots, the decoder's layers over the slots, and the decoder.

use super::{Graphs, Source, plain};
use crate::architecture::RccModel;
use crate::plan::rcc::RccSettings;

/// The graphs of the method: `encoder`, `slots` and `decoder`.
pub fn graphs(source: &Source, _model: &RccModel, _settings: RccSettings) -> Graphs {
    plain::graphs(source)
}
