//! What a calibration table holds.

use super::{Described, facts};
use crate::cli::text::{grouped, table};
use accordion_calibration::ModelIdentity;
use accordion_calibration::file::TableProblem;
use accordion_calibration::ranges::{Calibrator, RangeTable, TapRange, TextWindows};
use accordion_calibration::significance::{self, SignificanceTable};
use serde::Serialize;
use std::path::Path;

/// Facts about a table.
#[derive(Serialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub(super) enum Description {
    SignificanceTable {
        layers: usize,
        distances: usize,
        windows: u64,
        provenance: significance::Provenance,
    },
    RangeTable {
        model: ModelIdentity,
        method: String,
        windows: usize,
        window_tokens: usize,
        texts: Vec<TextWindows>,
        tool: String,
        sites: Vec<Site>,
        taps: Vec<Tap>,
    },
}

/// The input of linear layers.
#[derive(Serialize)]
pub(super) struct Site {
    weights: Vec<String>,
    channels: usize,
    rows: u64,
    absmax: f32,
    average_absmax: f32,
    /// The magnitude that this share of all does not exceed.
    percentile_99_99: f32,
    /// The largest channel's largest magnitude over that of the median channel.
    outlier: f32,
}

/// What half precision makes of a tap.
#[derive(Serialize)]
pub(super) struct Tap {
    name: String,
    values: u64,
    not_finite: u64,
    absmax: f32,
    smallest: Option<f32>,
    f16_overflow: u64,
    f16_underflow: u64,
}

/// Describes the table in the file `path`, of whichever kind.
pub(super) fn describe(path: &Path) -> anyhow::Result<Description> {
    let ranges = match RangeTable::load(path) {
        Err(error) if matches!(error.problem, TableProblem::NoMetadata { .. }) => {
            let found = SignificanceTable::load(path)?;
            return Ok(Description::SignificanceTable {
                layers: found.num_layers(),
                distances: found.num_distances(),
                windows: found.windows(),
                provenance: found.provenance().clone(),
            });
        }
        other => other?,
    };
    let site = |site: &accordion_calibration::ranges::Site| {
        let mut channels = site.channel_absmax();
        channels.sort_unstable_by(f32::total_cmp);
        Site {
            weights: site.weights().to_vec(),
            channels: site.channels(),
            rows: site.rows(),
            absmax: site.absmax(),
            average_absmax: site.average_absmax(),
            percentile_99_99: site.threshold(Calibrator::Percentile(99.99)),
            outlier: site.absmax() / channels[channels.len() / 2],
        }
    };
    let tap = |(name, range): (&String, &TapRange)| Tap {
        name: name.clone(),
        values: range.values,
        not_finite: range.non_finite,
        absmax: range.absmax,
        smallest: Some(range.smallest).filter(|smallest| smallest.is_finite()),
        f16_overflow: range.f16_overflow,
        f16_underflow: range.f16_underflow,
    };
    let provenance = ranges.provenance().clone();
    Ok(Description::RangeTable {
        model: provenance.model,
        method: provenance.method,
        windows: ranges.windows(),
        window_tokens: provenance.window_tokens,
        texts: provenance.texts,
        tool: provenance.tool,
        sites: ranges.sites().iter().map(site).collect(),
        taps: ranges.taps().iter().map(tap).collect(),
    })
}

impl Described for Description {
    fn in_words(&self) -> String {
        match self {
            Self::SignificanceTable { layers, distances, windows, provenance } => facts(&[
                ("table", "significance by layer and distance".to_owned()),
                ("model", format!("{}, rotary {}", provenance.model.fingerprint, provenance.model.rope)),
                ("size", format!("{layers} layers, {} distances", grouped(*distances as u64))),
                ("windows", format!("{windows} of {} tokens", grouped(provenance.window_tokens as u64))),
                ("made by", provenance.tool.clone()),
            ]),
            Self::RangeTable { model, method, windows, window_tokens, texts, tool, sites, taps } => {
                let texts = if texts.len() == 1 { String::new() } else { format!(" of {} texts", texts.len()) };
                let about = facts(&[
                    ("table", format!("ranges of {} inputs of linear layers, {} taps", sites.len(), taps.len())),
                    ("model", format!("{}, rotary {}", model.fingerprint, model.rope)),
                    ("method", method.clone()),
                    ("windows", format!("{windows} of {} tokens{texts}", grouped(*window_tokens as u64))),
                    ("made by", tool.clone()),
                ]);
                let rows: Vec<[String; 6]> = sites.iter().map(Site::row).collect();
                let header = [">largest", ">average", ">99.99 %", ">outlier", ">rows", "input of"];
                format!("{about}\n{}{}", table(header, &rows), tap_lines(taps))
            }
        }
    }
}

impl Site {
    fn row(&self) -> [String; 6] {
        [
            format!("{:.4}", self.absmax),
            format!("{:.4}", self.average_absmax),
            format!("{:.4}", self.percentile_99_99),
            format!("{:.1} x", self.outlier),
            grouped(self.rows),
            self.weights.join(", "),
        ]
    }
}

/// The taps that half precision does not hold, if taps were measured.
fn tap_lines(taps: &[Tap]) -> String {
    if taps.is_empty() {
        return String::new();
    }
    let lost = |tap: &&Tap| tap.not_finite + tap.f16_overflow + tap.f16_underflow > 0;
    let rows: Vec<[String; 5]> = taps
        .iter()
        .filter(lost)
        .map(|tap| {
            [
                format!("{:.4e}", tap.absmax),
                grouped(tap.not_finite),
                grouped(tap.f16_overflow),
                format!("{:.3} %", 100.0 * tap.f16_underflow as f64 / tap.values as f64),
                tap.name.clone(),
            ]
        })
        .collect();
    if rows.is_empty() {
        return format!("\nhalf precision holds all {} taps\n", taps.len());
    }
    let header = [">largest", ">not finite", ">infinite in fp16", ">zero in fp16", "tap"];
    format!("\n{} of {} taps lose something in half precision\n{}", rows.len(), taps.len(), table(header, &rows))
}
