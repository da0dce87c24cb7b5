//! The file of a range table.
//!
//! It is safetensors. Of a site whose first matrix is called `W` there are `W.channel_min` and `W.channel_max` f32
//! `[channels]`, `W.histogram` u64 `[2048]`, `W.absmax_sum` u64 `[2]` (lower and upper half of the sum of the windows'
//! largest magnitudes, in units of 2^-32), `W.sample` f32 `[k, channels]` and `W.sample_keys` u64 `[k]`, and `W.extremes` and
//! `W.extremes_keys` likewise; of a tap called `T`
//! there are `taps.T.magnitudes` f32 `[2]` (largest, smallest but zero) and `taps.T.counts` u64 `[4]` (values, not finite,
//! overflow and underflow in half precision). The metadata entry [`METADATA_KEY`] holds the fields of [`Provenance`], and by
//! site the matrices, the numbers of rows and windows, and the exponent of the histogram's width.

use super::histogram::{BINS, Histogram};
use super::sample::{EXTREME_ROWS, SAMPLE_ROWS, Sample};
use super::{Provenance, RangeTable, Site, TapRange, TextWindows};
use crate::file::{Kind, TableError, TableProblem, shaped_tensor, tensor, write_aside};
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

/// Version of the file format.
pub const FORMAT: &str = "accordion.ranges/1";

/// Key of the metadata entry.
pub const METADATA_KEY: &str = "accordion.ranges";

const KIND: Kind = Kind {
    name: "range table",
    format: FORMAT,
    key: METADATA_KEY,
    // The inputs of a thousand layers of width 65536, with their samples, take less.
    max_bytes: 1 << 33,
};

/// The metadata entry.
#[derive(Serialize, Deserialize)]
struct Description {
    #[serde(flatten)]
    provenance: Provenance,
    sites: Vec<SiteEntry>,
    taps: Vec<String>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct SiteEntry {
    weights: Vec<String>,
    rows: u64,
    windows: u64,
    exponent: i32,
}

impl RangeTable {
    /// Writes the table: aside, then renamed to `path`, so that no reader ever sees half of it. The same table gives the
    /// same bytes.
    ///
    /// # Errors
    ///
    /// The folder cannot be written to. What was at `path` is then still there, and nothing else.
    pub fn save(&self, path: &Path) -> Result<(), TableError> {
        let write = || write_aside(path, &self.to_bytes()?);
        write().map_err(|problem| KIND.error(path, problem))
    }

    fn to_bytes(&self) -> Result<Vec<u8>, TableProblem> {
        let entry = |site: &Site| SiteEntry {
            weights: site.weights.clone(),
            rows: site.rows,
            windows: site.windows,
            exponent: site.histogram.exponent(),
        };
        let description = Description {
            provenance: self.provenance.clone(),
            sites: self.sites.iter().map(entry).collect(),
            taps: self.taps.keys().cloned().collect(),
        };
        let floats = |values: &[f32]| -> Vec<u8> { values.iter().flat_map(|x| x.to_le_bytes()).collect() };
        let counts = |values: &[u64]| -> Vec<u8> { values.iter().flat_map(|x| x.to_le_bytes()).collect() };
        let mut tensors: Vec<(String, Dtype, Vec<usize>, Vec<u8>)> = Vec::new();
        for site in &self.sites {
            let name = |part: &str| format!("{}.{part}", site.weights[0]);
            let channels = site.channels();
            let halves = [site.absmax_sum as u64, (site.absmax_sum >> 64) as u64];
            tensors.extend([
                (name("channel_min"), Dtype::F32, vec![channels], floats(&site.channel_min)),
                (name("channel_max"), Dtype::F32, vec![channels], floats(&site.channel_max)),
                (name("histogram"), Dtype::U64, vec![BINS], counts(site.histogram.counts())),
                (name("absmax_sum"), Dtype::U64, vec![2], counts(&halves)),
            ]);
            for (part, sample) in [("sample", &site.sample), ("extremes", &site.extremes)] {
                let keys = sample.keys();
                tensors.extend([
                    (name(part), Dtype::F32, vec![keys.len(), channels], floats(sample.rows())),
                    (name(&format!("{part}_keys")), Dtype::U64, vec![keys.len()], counts(keys)),
                ]);
            }
        }
        for (tap, range) in &self.taps {
            let numbers = [range.values, range.non_finite, range.f16_overflow, range.f16_underflow];
            tensors.extend([
                (format!("taps.{tap}.magnitudes"), Dtype::F32, vec![2], floats(&[range.absmax, range.smallest])),
                (format!("taps.{tap}.counts"), Dtype::U64, vec![4], counts(&numbers)),
            ]);
        }
        let views = tensors
            .iter()
            .map(|(name, dtype, shape, bytes)| Ok((name.as_str(), TensorView::new(*dtype, shape.clone(), bytes)?)));
        KIND.serialize(&description, views.collect::<Result<Vec<_>, TableProblem>>()?)
    }

    /// Reads a table and checks all of it.
    ///
    /// # Errors
    ///
    /// The file cannot be read or is not a valid table of this format.
    pub fn load(path: &Path) -> Result<Self, TableError> {
        Self::load_with_bytes(path).map(|(table, _)| table)
    }

    /// As [`Self::load`], with the file's bytes, by whose hash the table can be told from others.
    ///
    /// # Errors
    ///
    /// As [`Self::load`].
    pub fn load_with_bytes(path: &Path) -> Result<(Self, Vec<u8>), TableError> {
        let name = format!("{} {}", KIND.name, path.display());
        let read = || {
            let bytes = KIND.read(path)?;
            Ok((Self::from_bytes(name, &bytes)?, bytes))
        };
        read().map_err(|problem| KIND.error(path, problem))
    }

    fn from_bytes(name: String, bytes: &[u8]) -> Result<Self, TableProblem> {
        let (Description { provenance, sites, taps }, file) = KIND.parse::<Description>(bytes)?;
        check_texts(&provenance.texts)?;
        let windows = provenance.texts.iter().map(|text| text.starts.len() as u64).sum();
        let mut known = BTreeSet::new();
        for weight in sites.iter().flat_map(|site| &site.weights) {
            if !known.insert(weight.as_str()) {
                return Err(contradiction(weight, "is named twice"));
            }
        }
        let taps = taps.into_iter().map(|tap| tap_range(&file, &tap).map(|range| (tap, range)));
        let taps = taps.collect::<Result<BTreeMap<_, _>, _>>()?;
        let sites = sites.into_iter().map(|entry| site(&file, entry, windows)).collect::<Result<_, _>>()?;
        Ok(Self::new(name, sites, taps, provenance))
    }
}

fn contradiction(part: &str, problem: impl Into<String>) -> TableProblem {
    TableProblem::Contradiction { part: part.to_owned(), problem: problem.into() }
}

fn check_texts(texts: &[TextWindows]) -> Result<(), TableProblem> {
    let ascending = texts.is_sorted_by(|a, b| a.sha256 < b.sha256)
        && texts.iter().all(|text| !text.starts.is_empty() && text.starts.is_sorted_by(|a, b| a < b));
    if texts.is_empty() || !ascending {
        return Err(contradiction("texts", "must have windows, texts and windows ascending and none twice"));
    }
    Ok(())
}

/// What the file says about the site of `entry`, if it can be so in a table of `windows`.
fn site(file: &SafeTensors<'_>, entry: SiteEntry, windows: u64) -> Result<Site, TableProblem> {
    let SiteEntry { weights, rows, windows: seen_in, exponent } = entry;
    let Some(first) = weights.first().cloned().filter(|_| weights.is_sorted()) else {
        return Err(contradiction("sites", "a site must have the names of its matrices in ascending order"));
    };
    let name = |part: &str| format!("{first}.{part}");
    let value = |part: &str, index, found, expected| TableProblem::Value { tensor: name(part), index, found, expected };

    let (shape, channel_min) = tensor(file, &name("channel_min"), Dtype::F32, f32::from_le_bytes)?;
    let &[channels] = &shape[..] else {
        let expected = "[channels] with at least one".to_owned();
        return Err(TableProblem::Shape { tensor: name("channel_min"), found: shape, expected });
    };
    let channel_max = shaped_tensor(file, &name("channel_max"), &[channels], Dtype::F32, f32::from_le_bytes)?;
    for (part, bounds) in [("channel_min", &channel_min), ("channel_max", &channel_max)] {
        if let Some(i) = bounds.iter().position(|x| !x.is_finite()) {
            return Err(value(part, i, bounds[i].into(), "a finite number"));
        }
    }
    if let Some(i) = channel_min.iter().zip(&channel_max).position(|(min, max)| min > max) {
        return Err(value("channel_max", i, channel_max[i].into(), "a number not below channel_min"));
    }
    let numbers = rows.checked_mul(channels as u64).filter(|&n| n > 0);
    let Some(numbers) = numbers.filter(|_| (1..=windows.min(rows)).contains(&seen_in)) else {
        let problem = format!("{rows} rows in {seen_in} windows, but the table has read {windows}");
        return Err(contradiction(&first, problem));
    };

    let counts = shaped_tensor(file, &name("histogram"), &[BINS], Dtype::U64, u64::from_le_bytes)?;
    let halves = shaped_tensor(file, &name("absmax_sum"), &[2], Dtype::U64, u64::from_le_bytes)?;
    let absmax_sum = u128::from(halves[0]) | u128::from(halves[1]) << 64;
    let mut site = Site { rows, windows: seen_in, absmax_sum, ..Site::new(weights, channels) };
    (site.channel_min, site.channel_max) = (channel_min, channel_max);
    site.sample = kept_rows(file, &site, "sample", SAMPLE_ROWS)?;
    site.extremes = kept_rows(file, &site, "extremes", EXTREME_ROWS)?;
    let absmax = site.absmax();
    if absmax == 0.0 {
        return Err(contradiction(&site.weights[0], "the range is zero"));
    }
    let average = site.average_absmax();
    if !(average >= 0.0 && average <= absmax.next_up()) {
        let problem = format!("the mean of the largest magnitudes is {average}, the largest is {absmax}");
        return Err(contradiction(&site.weights[0], problem));
    }
    let histogram = Histogram::stored(exponent, counts, absmax).filter(|h| h.total() == Some(numbers));
    let Some(histogram) = histogram else {
        let problem = format!("the histogram is not one of {numbers} magnitudes up to {absmax}");
        return Err(contradiction(&site.weights[0], problem));
    };
    site.histogram = histogram;
    Ok(site)
}

/// The rows of `site` that the file keeps as `part`, at most `limit`.
fn kept_rows(file: &SafeTensors<'_>, site: &Site, part: &str, limit: usize) -> Result<Sample, TableProblem> {
    let channels = site.channels();
    let (name, keys_name) = (format!("{}.{part}", site.weights[0]), format!("{}.{part}_keys", site.weights[0]));
    let (shape, keys) = tensor(file, &keys_name, Dtype::U64, u64::from_le_bytes)?;
    let rows = shaped_tensor(file, &name, &[keys.len(), channels], Dtype::F32, f32::from_le_bytes)?;
    let inside = |(i, x): (usize, &f32)| (site.channel_min[i % channels]..=site.channel_max[i % channels]).contains(x);
    if let Some(index) = rows.iter().enumerate().position(|element| !inside(element)) {
        let (found, expected) = (rows[index].into(), "a number inside the range of its channel");
        return Err(TableProblem::Value { tensor: name, index, found, expected });
    }
    let one_dimension = shape.len() == 1;
    Sample::stored(limit, site.rows, keys, rows).filter(|_| one_dimension).ok_or_else(|| {
        let expected = format!("[{}], ascending", site.rows.min(limit as u64));
        TableProblem::Shape { tensor: keys_name, found: shape, expected }
    })
}

fn tap_range(file: &SafeTensors<'_>, tap: &str) -> Result<TapRange, TableProblem> {
    let [magnitudes, counts] = ["magnitudes", "counts"].map(|part| format!("taps.{tap}.{part}"));
    let numbers = shaped_tensor(file, &magnitudes, &[2], Dtype::F32, f32::from_le_bytes)?;
    let counts = shaped_tensor(file, &counts, &[4], Dtype::U64, u64::from_le_bytes)?;
    let (absmax, smallest) = (numbers[0], numbers[1]);
    // Where nothing was seen but zero the smallest is infinite and the largest zero.
    let ordered = absmax >= 0.0 && absmax.is_finite() && smallest > 0.0;
    let possible = ordered && (smallest <= absmax || (smallest == f32::INFINITY && absmax == 0.0));
    let parts = counts[1..].iter().try_fold(0_u64, |sum, &n| sum.checked_add(n));
    if !possible || parts.is_none_or(|parts| parts > counts[0]) {
        let problem = format!("magnitudes {smallest} to {absmax} with counts {counts:?} cannot be");
        return Err(contradiction(&format!("tap {tap}"), problem));
    }
    Ok(TapRange {
        values: counts[0],
        non_finite: counts[1],
        absmax,
        smallest,
        f16_overflow: counts[2],
        f16_underflow: counts[3],
    })
}
