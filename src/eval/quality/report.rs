//! What `accordion verify --quality` writes: bundles of one model, side by side.

use super::Quality;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// The value of [`QualityReport::schema`].
pub const SCHEMA: &str = "accordion.quality/1";

/// The bundles, and of what text they were asked.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct QualityReport {
    /// [`SCHEMA`].
    pub schema: String,
    /// Where the text comes from.
    pub text: String,
    /// SHA-256 of the text.
    pub text_sha256: String,
    /// Windows of the text.
    pub windows: u32,
    /// Tokens of a window.
    pub window_len: u32,
    /// Tokens that are predicted of every window.
    pub predicted: usize,
    /// Runs of every bundle that were timed.
    pub rounds: u32,
    /// What the windows were drawn with.
    pub seed: u64,
    /// Where it ran: names and values.
    pub environment: Vec<(String, String)>,
    /// The first bundle, and those that are held against it.
    pub bundles: Vec<QualityRow>,
}

/// One bundle.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct QualityRow {
    /// Its folder.
    pub bundle: PathBuf,
    /// The method.
    pub method: String,
    /// The word for its precision.
    pub precision: String,
    /// What came of it.
    #[serde(flatten)]
    pub quality: Quality,
}
