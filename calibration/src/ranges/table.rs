//! The range table: what it says, what it may be used for and how two become one.

use super::{ModelIdentity, Site, TapRange};
use crate::identity::ModelMismatch;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};

/// Windows of one text.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TextWindows {
    /// SHA-256 of the text, hexadecimal.
    pub sha256: String,
    /// The tokens that the windows begin with, ascending.
    pub starts: Vec<u64>,
}

/// Where a table comes from: what it takes to make it again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Provenance {
    /// Model that was run.
    pub model: ModelIdentity,
    /// What was done with a window: the method and its settings.
    pub method: String,
    /// Tokens per window.
    pub window_tokens: usize,
    /// What was read, ascending by hash.
    pub texts: Vec<TextWindows>,
    /// Name and version of the program that made the table.
    pub tool: String,
}

/// The ranges of a model's activations.
#[derive(Debug, Clone, PartialEq)]
pub struct RangeTable {
    /// How messages call it.
    pub(super) name: String,
    /// Ascending by their first matrix.
    pub(super) sites: Vec<Site>,
    pub(super) site_of: BTreeMap<String, usize>,
    pub(super) taps: BTreeMap<String, TapRange>,
    pub(super) provenance: Provenance,
}

/// Why a table cannot be used for a model.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum MismatchError {
    /// Made for another model or another rotary scaling.
    #[error(transparent)]
    Model(#[from] ModelMismatch),
    /// A matrix is not in the table.
    #[error("{table} has no range for the input of {weight}: calibrate with a bundle of the same method")]
    Missing {
        /// The table.
        table: String,
        /// Name of the matrix.
        weight: String,
    },
    /// A matrix has another number of columns.
    #[error("{table}: the input of {weight} has {found} channels, the matrix has {expected}")]
    Channels {
        /// The table.
        table: String,
        /// Name of the matrix.
        weight: String,
        /// Channels in the table.
        found: usize,
        /// Columns of the matrix.
        expected: usize,
    },
}

/// Why two tables cannot become one.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum MergeError {
    /// They do not say the same about something else than text.
    #[error("{first} and {second} cannot be merged, {what} differs: {found} and {expected}")]
    Differs {
        /// The one table.
        first: String,
        /// The other.
        second: String,
        /// The property.
        what: &'static str,
        /// Its value in the first.
        found: String,
        /// Its value in the second.
        expected: String,
    },
    /// A window would be counted twice.
    #[error("{first} and {second} cannot be merged: both have read the window at token {start} of the text {sha256}")]
    Window {
        /// The one table.
        first: String,
        /// The other.
        second: String,
        /// SHA-256 of the text.
        sha256: String,
        /// First token of the window.
        start: u64,
    },
    /// A sum cannot be represented.
    #[error("{first} and {second} cannot be merged: the counts of {part} are too large")]
    Overflow {
        /// The one table.
        first: String,
        /// The other.
        second: String,
        /// Where.
        part: String,
    },
}

impl RangeTable {
    /// Of sites without a matrix in common.
    pub(super) fn new(
        name: String,
        mut sites: Vec<Site>,
        taps: BTreeMap<String, TapRange>,
        provenance: Provenance,
    ) -> Self {
        sites.sort_unstable_by(|a, b| a.weights.cmp(&b.weights));
        let names = sites.iter().enumerate();
        let site_of = names.flat_map(|(i, site)| site.weights.iter().map(move |weight| (weight.clone(), i))).collect();
        Self { name, sites, site_of, taps, provenance }
    }

    /// All sites, ascending by the name of their first matrix.
    pub fn sites(&self) -> &[Site] {
        &self.sites
    }

    /// What goes into the linear layer with the matrix `weight`.
    pub fn site(&self, weight: &str) -> Option<&Site> {
        self.site_of.get(weight).map(|&i| &self.sites[i])
    }

    /// Ranges of taps by name; none where they were not measured.
    pub fn taps(&self) -> &BTreeMap<String, TapRange> {
        &self.taps
    }

    /// Where the table comes from.
    pub fn provenance(&self) -> &Provenance {
        &self.provenance
    }

    /// Windows read.
    pub fn windows(&self) -> usize {
        self.provenance.texts.iter().map(|text| text.starts.len()).sum()
    }

    /// Checks that the table was made for `model`.
    ///
    /// # Errors
    ///
    /// It was made for another checkpoint or another rotary embedding.
    pub fn check_matches(&self, model: &ModelIdentity) -> Result<(), MismatchError> {
        Ok(self.provenance.model.check(&self.name, model)?)
    }

    /// The site of the matrix `weight`, which has `columns` columns.
    ///
    /// # Errors
    ///
    /// There is none, or it has another number of channels.
    pub fn expect_site(&self, weight: &str, columns: usize) -> Result<&Site, MismatchError> {
        let (table, weight_name) = (self.name.clone(), weight.to_owned());
        match self.site(weight) {
            None => Err(MismatchError::Missing { table, weight: weight_name }),
            Some(site) if site.channels() != columns => {
                let (found, expected) = (site.channels(), columns);
                Err(MismatchError::Channels { table, weight: weight_name, found, expected })
            }
            Some(site) => Ok(site),
        }
    }

    /// The table of all windows of both, which is the one that a single run over them would have made.
    ///
    /// # Errors
    ///
    /// The tables are not of the same model, method, window length, program version, sites and taps; or both have read the
    /// same window.
    pub fn merge(&self, other: &Self) -> Result<Self, MergeError> {
        let names = || (self.name.clone(), other.name.clone());
        if let Some((what, found, expected)) = self.difference(other) {
            let (first, second) = names();
            return Err(MergeError::Differs { first, second, what, found, expected });
        }
        let overflow = |part: &str| {
            let (first, second) = names();
            MergeError::Overflow { first, second, part: part.to_owned() }
        };
        let mut merged = self.clone();
        merged.provenance.texts = merge_texts(&self.provenance.texts, &other.provenance.texts).map_err(
            |TextWindows { sha256, starts }| {
                let (first, second) = names();
                MergeError::Window { first, second, sha256, start: starts.first().copied().unwrap_or_default() }
            },
        )?;
        for (site, more) in merged.sites.iter_mut().zip(&other.sites) {
            site.merge(more).ok_or_else(|| overflow(&more.weights[0]))?;
        }
        for ((tap, range), more) in merged.taps.iter_mut().zip(other.taps.values()) {
            range.merge(more).ok_or_else(|| overflow(tap))?;
        }
        merged.name = format!("{} with {}", self.name, other.name);
        Ok(merged)
    }

    /// The first property besides texts in which the two differ, and its values.
    fn difference(&self, other: &Self) -> Option<(&'static str, String, String)> {
        let (a, b) = (&self.provenance, &other.provenance);
        let named = a.model.difference(&b.model).map(|(what, a, b)| (what, a.to_owned(), b.to_owned()));
        let lengths = [a.window_tokens.to_string(), b.window_tokens.to_string()];
        let described = [
            ("the method", &a.method, &b.method),
            ("the length of windows", &lengths[0], &lengths[1]),
            ("the program that made them", &a.tool, &b.tool),
        ];
        let described = described.into_iter().find(|(_, a, b)| a != b);
        let layout = |table: &Self| -> BTreeSet<String> {
            let sites = table.sites.iter();
            sites.map(|site| format!("{} with {} channels", site.weights.join(", "), site.channels())).collect()
        };
        let taps = |table: &Self| -> BTreeSet<String> { table.taps.keys().cloned().collect() };
        named
            .or_else(|| described.map(|(what, a, b)| (what, a.clone(), b.clone())))
            .or_else(|| first_difference("a site", &layout(self), &layout(other)))
            .or_else(|| first_difference("a tap", &taps(self), &taps(other)))
    }
}

/// What only one of two sets has.
fn first_difference(
    what: &'static str,
    first: &BTreeSet<String>,
    second: &BTreeSet<String>,
) -> Option<(&'static str, String, String)> {
    let only = |a: &BTreeSet<String>, b: &BTreeSet<String>| a.difference(b).next().cloned();
    let (first, second) = (only(first, second), only(second, first));
    let word = |name: Option<String>| name.unwrap_or_else(|| "none".to_owned());
    (first.is_some() || second.is_some()).then(|| (what, word(first), word(second)))
}

/// The windows of both, or the text and the start of one that is in both.
fn merge_texts(first: &[TextWindows], second: &[TextWindows]) -> Result<Vec<TextWindows>, TextWindows> {
    let mut texts: BTreeMap<&str, BTreeSet<u64>> = BTreeMap::new();
    for TextWindows { sha256, starts } in first.iter().chain(second) {
        let known = texts.entry(sha256).or_default();
        for &start in starts {
            if !known.insert(start) {
                return Err(TextWindows { sha256: sha256.clone(), starts: vec![start] });
            }
        }
    }
    let texts = texts.into_iter();
    Ok(texts
        .map(|(text, starts)| TextWindows { sha256: text.to_owned(), starts: starts.into_iter().collect() })
        .collect())
}
