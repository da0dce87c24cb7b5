//! Significance calibration: the probe graph over windows of ordinary text.

use super::PipelineError;
use super::decode::token_tensor;
use super::prompt::leading_ids;
use crate::checkpoint::{Checkpoint, CheckpointError, model_identity};
use crate::runtime::Loader;
use crate::tensor::Tensor;
use accordion_calibration::significance::{
    EstimateError, Provenance, SignificanceEstimator, SignificanceTable, Smoothing,
};
use accordion_calibration::windows::{WindowError, choose_windows};
use accordion_graphs::architecture::Architecture;
use accordion_graphs::blocks::Target;
use accordion_graphs::methods::{Source, significance};
use accordion_graphs::onnx::BuildError;
use sha2::{Digest, Sha256};
use std::path::PathBuf;
use std::rc::Rc;

/// What is measured.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct CalibrationSettings {
    /// Windows of text.
    pub windows: usize,
    /// Tokens per window, with what the tokenizer puts before every text: the longest chunk that will be pruned.
    pub window_len: usize,
    /// Seed of the choice of windows.
    pub seed: u64,
    /// How the means are smoothed.
    pub smoothing: Smoothing,
}

/// Why there is no table.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CalibrationError {
    /// The model is not one whose significance can be measured.
    #[error("significance can be calibrated only for models of the Llama family")]
    Architecture,
    /// A window would be longer than the model can read.
    #[error("--window-len is {found}, expected {expected}")]
    WindowLength {
        /// What it was.
        found: usize,
        /// What it may be.
        expected: String,
    },
    /// The text is too short.
    #[error(transparent)]
    Windows(#[from] WindowError),
    /// The text cannot be encoded.
    #[error(transparent)]
    Tokenizer(#[from] CheckpointError),
    /// The probe's graph came out inconsistent.
    #[error(transparent)]
    Build(#[from] BuildError),
    /// The probe failed.
    #[error(transparent)]
    Pipeline(#[from] PipelineError),
    /// The scores make no table.
    #[error(transparent)]
    Estimate(#[from] EstimateError),
}

/// Measures the expected significance of tokens by layer and distance on windows of `text`, with the plain model in the
/// runtime of `loader`. `on_window` hears how many windows are done.
///
/// The same arguments give the same table; the runtime's number of threads may change it in the last bits.
///
/// # Errors
///
/// The text is shorter than the windows need, a window is longer than the model was trained for, or the model fails.
pub fn calibrate(
    checkpoint: &Checkpoint,
    loader: &dyn Loader,
    text: &str,
    settings: CalibrationSettings,
    on_window: &mut dyn FnMut(usize),
) -> Result<SignificanceTable, CalibrationError> {
    let CalibrationSettings { windows, window_len, seed, smoothing } = settings;
    let Architecture::Llama(arch) = checkpoint.architecture() else { return Err(CalibrationError::Architecture) };
    let tokenizer = checkpoint.tokenizer()?;
    let leading = leading_ids(&tokenizer)?;
    let longest = arch.sliding_window.map_or(arch.max_positions, |window| window.min(arch.max_positions));
    if !(leading.len() + 2..=longest).contains(&window_len) {
        let expected = format!("{} to {longest}, the longest text that the model can read", leading.len() + 2);
        return Err(CalibrationError::WindowLength { found: window_len, expected });
    }
    let tokens = tokenizer.encode(text, false)?;
    let chosen = choose_windows(tokens.len(), window_len - leading.len(), windows, seed)?;
    // Whatever the first token is, attention collects on it; as part of a prefix it is never pruned. Its scores would
    // spoil those of the farthest distances, which are continued from their neighbours instead.
    let sinks = leading.len().max(1);
    let mut estimator = SignificanceEstimator::new(arch.num_layers, window_len - 1)?;

    let weights = Rc::new(checkpoint.weights().clone());
    let source = Source { arch: checkpoint.architecture().clone(), weights, target: Target::OrtCpu };
    // The loader finds weights by name, but the runtime insists that the files are where the graph says.
    let name = |path: &PathBuf| path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let locations: Vec<String> = checkpoint.weights().files().iter().map(name).collect();
    let model = significance::probe(&source).finish(&locations)?;
    let mut probe =
        loader.load("significance_probe", &model.bytes, &model.signature.weights).map_err(PipelineError::from)?;
    let positions = Tensor::from_i64([1, window_len], (0..window_len as i64).collect()).map_err(PipelineError::from)?;
    for (done, window) in chosen.into_iter().enumerate() {
        let ids = token_tensor(&[&leading, &tokens[window]].concat(), arch.vocab_size)?;
        let inputs = [("input_ids", &ids), ("position_ids", &positions)];
        let scores = probe.run(&inputs, &mut [], &["scores"]).map_err(PipelineError::from)?;
        let scores = scores[0].as_f32().map_err(PipelineError::from)?;
        let measured: Vec<f32> = scores.chunks_exact(window_len).flat_map(|row| &row[sinks..]).copied().collect();
        estimator.add_window(&measured)?;
        on_window(done + 1);
    }
    let provenance = Provenance {
        model: model_identity(checkpoint),
        text_sha256: format!("{:x}", Sha256::digest(text)),
        window_tokens: window_len,
        seed,
        smoothing,
        tool: format!("accordion {}", env!("CARGO_PKG_VERSION")),
    };
    Ok(estimator.finish(provenance)?)
}
