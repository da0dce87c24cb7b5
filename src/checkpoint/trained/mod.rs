//! What a checkpoint holds besides its decoder, for the methods that were trained.

mod rcc;
mod sharedllm;

pub use rcc::{RCC_FILE, rcc_json};
pub use sharedllm::sharedllm_json;
pub(crate) use sharedllm::{Disagreement, disagreement, parse_last_p};

use super::error::CheckpointError;
use super::fields::Fields;
use super::required::{check_tensors, rcc_tensors, sharedllm_tensors};
use accordion_graphs::architecture::{Architecture, Compressor};
use accordion_graphs::plan::rcc::RccSettings;
use accordion_graphs::plan::sharedllm::SharedLlmSettings;
use accordion_graphs::weights::WeightIndex;
use serde_json::Value;
use std::path::Path;

/// A compressor, and the settings it was trained with.
#[derive(Debug, Clone)]
pub(crate) struct Trained {
    pub(crate) compressor: Compressor,
    pub(crate) settings: TrainedSettings,
}

#[derive(Debug, Clone, Copy)]
pub(crate) enum TrainedSettings {
    Rcc(RccSettings),
    SharedLlm(SharedLlmSettings),
}

/// Looks for a compressor in the folder `dir` with the configuration `config`, its decoder `architecture`, its tensors
/// `weights` and the content of its rcc.json, and checks that its tensors are there.
pub(crate) fn find(
    dir: &Path,
    config: Fields<'_>,
    architecture: &Architecture,
    rcc: Option<&Value>,
    weights: &WeightIndex,
) -> Result<Option<Trained>, CheckpointError> {
    let rcc_path = dir.join(RCC_FILE);
    let rcc = rcc.map(|value| Fields::of(value, "", &rcc_path)).transpose()?;
    if let Some((model, settings)) = sharedllm::read(config, architecture)? {
        if let Architecture::Llama(upper) = architecture {
            check_tensors(sharedllm_tensors(&model, upper), weights, dir, super::CONFIG)?;
        }
        sharedllm::check_unbiased(config, &model, weights)?;
        let (compressor, settings) = (Compressor::SharedLlm(model), TrainedSettings::SharedLlm(settings));
        return Ok(Some(Trained { compressor, settings }));
    }
    let Some((model, settings)) = rcc::read(dir, config, architecture, rcc, weights)? else {
        return Ok(None);
    };
    let described = rcc.is_some_and(|fields| fields.get("encoder").is_some());
    let description = if described { RCC_FILE } else { super::CONFIG };
    check_tensors(rcc_tensors(&model, architecture, settings), weights, dir, description)?;
    Ok(Some(Trained { compressor: Compressor::Rcc(model), settings: TrainedSettings::Rcc(settings) }))
}
