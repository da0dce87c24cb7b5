//! One self-contained HTML page made from any set of results: no network, no fonts, no libraries, readable without
//! scripts, on paper and by a screen reader.
//!
//! - [`Report`]: what goes in. [`render`]: the page. [`markdown`]: the same results as text for a pull request.
//! - `html`: the only place that writes markup; everything it is given as text is escaped.
//! - `page`, `parity`, `performance`, `details`, `operators`, `quality`, `evaluation`, `kept`, `plan`, `generation`: the sections. `chart`: the
//!   plots. `table`: tables, for the page and for Markdown. `format`: numbers.

mod chart;
mod details;
mod evaluation;
mod format;
mod generation;
mod html;
mod kept;
mod markdown;
mod operators;
mod page;
mod parity;
mod performance;
mod plan;
mod quality;
mod result;
mod table;

pub use markdown::markdown;
pub use page::render;
pub use plan::{LevelName, LevelNode, PlanSummary};
pub use result::{GenerationRecord, ResultError};

use crate::environment::Provenance;
use crate::eval::kept::KeptText;
use crate::eval::quality::report::QualityReport;
use crate::eval::schema::Summary;
use crate::profile::schema::ProfileReport;
use crate::verify::schema::VerifyReport;
use serde::{Deserialize, Serialize};

/// Everything one page shows. Sections without content are left out.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// Heading of the page.
    pub title: String,
    /// When the page was made, as it should be printed; the renderer reads no clock.
    pub generated_at: String,
    /// Versions, hardware and provenance: names and values.
    pub environment: Vec<(String, String)>,
    /// Comparisons.
    pub verifications: Vec<VerifyReport>,
    /// Measurements.
    pub profiles: Vec<ProfileReport>,
    /// Precisions side by side.
    #[serde(default)]
    pub qualities: Vec<QualityReport>,
    /// Evaluations.
    #[serde(default)]
    pub evaluations: Vec<Summary>,
    /// What was kept of contexts.
    #[serde(default)]
    pub kept: Vec<KeptText>,
    /// Plans.
    pub plans: Vec<PlanSummary>,
    /// Generated texts.
    pub generations: Vec<GenerationRecord>,
}

impl Report {
    /// An empty report on this machine, as of now.
    pub fn here(title: &str) -> Self {
        // The format has only directives that are known.
        let generated_at = crate::checkpoint::clock::now().format("%Y-%m-%d %H:%M UTC").unwrap_or_default();
        Self { title: title.to_owned(), generated_at, environment: Provenance::probe().pairs(), ..Self::default() }
    }
}
