//! Which values of a bundle's graphs are observed, and what of an estimator they are.

use super::RangeError;
use crate::bundle::Bundle;
use crate::pipeline::observe::Observer;
use crate::tensor::Tensor;
use accordion_calibration::ranges::{Observation, RangeEstimator, SiteLayout};
use accordion_graphs::onnx::GraphSignature;
use accordion_graphs::precision::Precision;
use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::error::Error;

/// What is observed of a bundle.
pub(super) struct Layout {
    pub(super) sites: Vec<SiteLayout>,
    pub(super) taps: Vec<String>,
    /// By graph and value, what it is.
    pub(super) values: BTreeMap<String, BTreeMap<String, Vec<Target>>>,
}

/// What a value of a graph is.
#[derive(Debug, Clone, Copy)]
pub(super) enum Target {
    Site(usize),
    Tap(usize),
}

impl Layout {
    /// The inputs of all linear layers, and all taps if they are wanted.
    pub(super) fn new(bundle: &Bundle, with_taps: bool) -> Result<Self, RangeError> {
        let manifest = bundle.manifest();
        let failed = |problem: String| Err(RangeError::Bundle { problem });
        if manifest.precision != Precision::Fp32 {
            return failed(format!("its precision is {}, expected fp32", manifest.precision));
        }
        // Matrices that are multiplied by the same rows in all graphs share a site.
        let mut rows_of: BTreeMap<&str, BTreeSet<(&str, &str)>> = BTreeMap::new();
        for (graph, entry) in &manifest.graphs {
            for (weight, values) in &entry.signature.linears {
                rows_of.entry(weight).or_default().extend(values.iter().map(|value| (graph.as_str(), value.as_str())));
            }
        }
        if rows_of.is_empty() {
            return failed("it does not say what goes into its linear layers: export it again".to_owned());
        }
        let mut weights_of: BTreeMap<BTreeSet<(&str, &str)>, Vec<String>> = BTreeMap::new();
        for (weight, values) in rows_of {
            weights_of.entry(values).or_default().push(weight.to_owned());
        }
        let mut values: BTreeMap<String, BTreeMap<String, Vec<Target>>> = BTreeMap::new();
        let mut observe = |graph: &str, value: &str, target| {
            let of_graph = values.entry(graph.to_owned()).or_default();
            of_graph.entry(value.to_owned()).or_default().push(target);
        };
        let mut sites = Vec::with_capacity(weights_of.len());
        for (number, (of, weights)) in weights_of.into_iter().enumerate() {
            for (graph, value) in of {
                observe(graph, value, Target::Site(number));
            }
            let shape = bundle.weights().index().get(&weights[0]).map(|info| info.shape.clone()).unwrap_or_default();
            let &[_, channels] = &shape[..] else {
                return failed(format!("{} has shape {shape:?}, expected [out, in]", weights[0]));
            };
            sites.push(SiteLayout { weights, channels });
        }
        let mut taps: Vec<String> = Vec::new();
        if with_taps {
            let of_graphs = manifest.graphs.values().flat_map(|entry| entry.signature.taps.iter());
            let floats = of_graphs.filter(|(_, info)| info.dtype.is_float()).map(|(tap, _)| tap.clone());
            taps = floats.collect::<BTreeSet<_>>().into_iter().collect();
            for (graph, entry) in &manifest.graphs {
                for (tap, info) in &entry.signature.taps {
                    if let Ok(number) = taps.binary_search(tap) {
                        observe(graph, &info.name, Target::Tap(number));
                    }
                }
            }
        }
        Ok(Self { sites, taps, values })
    }
}

/// Feeds what graphs compute to the estimator.
pub(super) struct RangeObserver {
    pub(super) estimator: RangeEstimator,
    pub(super) values: BTreeMap<String, BTreeMap<String, Vec<Target>>>,
}

impl Observer for RangeObserver {
    fn values(&self, graph: &str, _: &GraphSignature) -> BTreeSet<String> {
        self.values.get(graph).into_iter().flat_map(BTreeMap::keys).cloned().collect()
    }

    fn wants(&self, _: &str, _: &str) -> bool {
        true
    }

    fn see(&mut self, graph: &str, values: &BTreeMap<&str, &Tensor>) -> Result<(), Box<dyn Error + Send + Sync>> {
        let numbers: Vec<(&str, Cow<'_, [f32]>)> = values
            .iter()
            .map(|(name, tensor)| {
                let numbers = tensor.as_f32().map_or_else(|_| Cow::Owned(tensor.to_f32()), Cow::Borrowed);
                (*name, numbers)
            })
            .collect();
        let targets = |name: &str| self.values.get(graph).and_then(|of_graph| of_graph.get(name)).into_iter().flatten();
        let observations: Vec<Observation<'_>> = numbers
            .iter()
            .flat_map(|(name, numbers)| {
                targets(name).map(move |target| match *target {
                    Target::Site(site) => Observation::Rows(site, numbers),
                    Target::Tap(tap) => Observation::Tap(tap, numbers),
                })
            })
            .collect();
        Ok(self.estimator.observe(&observations)?)
    }
}
