//! Observes rows and taps while a model reads windows of text.

use super::sample::WindowKey;
use super::site::NotFinite;
use super::{ModelIdentity, Provenance, RangeTable, Site, TapRange, TextWindows};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Mutex;
use std::thread;

/// The matrices of a site, and the numbers in a row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SiteLayout {
    /// Names of the matrices.
    pub weights: Vec<String>,
    /// Columns of the matrices.
    pub channels: usize,
}

/// Values that a graph has computed.
#[derive(Debug, Clone, Copy)]
pub enum Observation<'a> {
    /// Rows of the site with this number.
    Rows(usize, &'a [f32]),
    /// Values of the tap with this number.
    Tap(usize, &'a [f32]),
}

/// Why no table could be made.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum EstimateError {
    /// Sites that cannot be.
    #[error("the input of {weight}: {problem}")]
    Layout {
        /// Name of the matrix.
        weight: String,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// Numbers that are not a row, or of a site that there is not.
    #[error("the input of {weight} has {found} numbers, expected rows of {channels}")]
    Shape {
        /// Name of the first matrix.
        weight: String,
        /// Numbers given.
        found: usize,
        /// Numbers in a row.
        channels: usize,
    },
    /// The model does not compute finite numbers.
    #[error("the input of {weight}: {numbers}, in the window at token {start}")]
    NotFinite {
        /// Name of the first matrix.
        weight: String,
        /// How many.
        numbers: NotFinite,
        /// First token of the window.
        start: u64,
    },
    /// A linear layer was never run.
    #[error("no row was multiplied by {weight}")]
    NotSeen {
        /// Name of the first matrix.
        weight: String,
    },
    /// All inputs of a linear layer were zero.
    #[error("the input of {weight} is always zero: it has no range")]
    Zero {
        /// Name of the first matrix.
        weight: String,
    },
    /// A window was read twice.
    #[error("the window at token {start} of the text {sha256} is read twice")]
    Window {
        /// SHA-256 of the text.
        sha256: String,
        /// First token of the window.
        start: u64,
    },
    /// Nothing was read.
    #[error("no window was read")]
    NoWindows,
}

/// Measures the ranges of activations.
#[derive(Debug)]
pub struct RangeEstimator {
    sites: Vec<Open>,
    taps: Vec<(String, TapRange)>,
    windows: BTreeMap<String, BTreeSet<u64>>,
    window: Option<(WindowKey, u64)>,
}

/// A site, and what was seen of it in the window that is being read.
#[derive(Debug)]
struct Open {
    site: Site,
    rows: u64,
    absmax: f32,
}

impl RangeEstimator {
    /// Nothing seen yet of sites and taps, which are numbered in this order.
    ///
    /// # Errors
    ///
    /// A site has no channels, or no matrix, or one that is another's too.
    pub fn new(sites: Vec<SiteLayout>, taps: Vec<String>) -> Result<Self, EstimateError> {
        let mut known = BTreeSet::new();
        for site in &sites {
            let failed = |weight: &str, problem| EstimateError::Layout { weight: weight.to_owned(), problem };
            if site.weights.is_empty() || site.channels == 0 {
                let weight = site.weights.first().map_or("no matrix", String::as_str);
                return Err(failed(weight, "a site needs a matrix and at least one channel"));
            }
            if let Some(twice) = site.weights.iter().find(|weight| !known.insert(weight.as_str())) {
                return Err(failed(twice, "a matrix can only belong to one site"));
            }
        }
        let open = |SiteLayout { mut weights, channels }| {
            weights.sort_unstable();
            Open { site: Site::new(weights, channels), rows: 0, absmax: 0.0 }
        };
        Ok(Self {
            sites: sites.into_iter().map(open).collect(),
            taps: taps.into_iter().map(|tap| (tap, TapRange::default())).collect(),
            windows: BTreeMap::new(),
            window: None,
        })
    }

    /// From here on what is observed belongs to the window that begins with token `start` of the text with this hash.
    ///
    /// # Errors
    ///
    /// The window was read before.
    pub fn begin_window(&mut self, text_sha256: &str, start: u64) -> Result<(), EstimateError> {
        self.end_window();
        if !self.windows.entry(text_sha256.to_owned()).or_default().insert(start) {
            return Err(EstimateError::Window { sha256: text_sha256.to_owned(), start });
        }
        self.window = Some((WindowKey::new(text_sha256, start), start));
        Ok(())
    }

    fn end_window(&mut self) {
        for open in self.sites.iter_mut().filter(|open| open.rows > 0) {
            open.site.end_window(open.absmax);
            (open.rows, open.absmax) = (0, 0.0);
        }
    }

    /// Adds what a graph has computed. Observations of the same site or tap are taken in order, others at the same time.
    ///
    /// # Errors
    ///
    /// Numbers that are not rows of the site or not finite. The estimator is of no use then.
    pub fn observe(&mut self, observations: &[Observation<'_>]) -> Result<(), EstimateError> {
        let (window, start) = self.window.ok_or(EstimateError::NoWindows)?;
        let mut rows: Vec<Vec<&[f32]>> = vec![Vec::new(); self.sites.len()];
        let mut values: Vec<Vec<&[f32]>> = vec![Vec::new(); self.taps.len()];
        for observation in observations {
            match *observation {
                Observation::Rows(site, given) => rows[site].push(given),
                Observation::Tap(tap, given) => values[tap].push(given),
            }
        }
        let sites = self.sites.iter_mut().zip(rows).filter(|(_, rows)| !rows.is_empty());
        let taps = self.taps.iter_mut().zip(values).filter(|(_, values)| !values.is_empty());
        let work = sites.map(|(open, rows)| Work::Site(open, rows)).chain(taps.map(|((_, t), v)| Work::Tap(t, v)));
        let work = Mutex::new(work.collect::<Vec<_>>());
        let threads = thread::available_parallelism().map_or(1, usize::from);
        let take = || work.lock().ok().and_then(|mut work| work.pop());
        let step = || {
            while let Some(next) = take() {
                match next {
                    Work::Site(open, rows) => {
                        for rows in rows {
                            open.observe(rows, window, start)?;
                        }
                    }
                    Work::Tap(tap, values) => values.into_iter().for_each(|values| tap.observe(values)),
                }
            }
            Ok(())
        };
        thread::scope(|scope| {
            let others: Vec<_> = (1..threads).map(|_| scope.spawn(step)).collect();
            let mine = step();
            let results = others.into_iter().map(|other| match other.join() {
                Ok(result) => result,
                Err(panic) => std::panic::resume_unwind(panic),
            });
            results.fold(mine, Result::and)
        })
    }

    /// The table, of a `model` that was run by `method` over windows of `window_tokens` by the program `tool`.
    ///
    /// # Errors
    ///
    /// Nothing was read, or a site has not been seen or was always zero.
    pub fn finish(
        mut self,
        model: ModelIdentity,
        method: String,
        window_tokens: usize,
        tool: String,
    ) -> Result<RangeTable, EstimateError> {
        self.end_window();
        if self.windows.is_empty() {
            return Err(EstimateError::NoWindows);
        }
        for Open { site, .. } in &self.sites {
            let weight = site.weights[0].clone();
            if site.rows == 0 {
                return Err(EstimateError::NotSeen { weight });
            }
            if site.absmax() == 0.0 {
                return Err(EstimateError::Zero { weight });
            }
        }
        let texts = self.windows.into_iter();
        let texts =
            texts.map(|(sha256, starts)| TextWindows { sha256, starts: starts.into_iter().collect() }).collect();
        let provenance = Provenance { model, method, window_tokens, texts, tool };
        let sites = self.sites.into_iter().map(|open| open.site).collect();
        Ok(RangeTable::new("the range table".to_owned(), sites, self.taps.into_iter().collect(), provenance))
    }
}

enum Work<'s, 'r> {
    Site(&'s mut Open, Vec<&'r [f32]>),
    Tap(&'s mut TapRange, Vec<&'r [f32]>),
}

impl Open {
    fn observe(&mut self, rows: &[f32], window: WindowKey, start: u64) -> Result<(), EstimateError> {
        let weight = || self.site.weights[0].clone();
        let channels = self.site.channels();
        if !rows.len().is_multiple_of(channels) {
            return Err(EstimateError::Shape { weight: weight(), found: rows.len(), channels });
        }
        let observed = self.site.observe(rows, window, self.rows);
        let absmax = observed.map_err(|numbers| EstimateError::NotFinite {
            weight: self.site.weights[0].clone(),
            numbers,
            start,
        })?;
        self.rows += (rows.len() / channels) as u64;
        self.absmax = self.absmax.max(absmax);
        Ok(())
    }
}
