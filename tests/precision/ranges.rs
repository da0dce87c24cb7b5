//! The ranges of a golden model's activations, over its golden prompt.

use accordion::bundle::Bundle;
use accordion::pipeline::observe::Observer;
use accordion::tensor::Tensor;
use accordion::verify::Detail;
use accordion::verify::bundle::Input;
use accordion_calibration::ranges::{Observation, RangeEstimator, RangeTable, SiteLayout};
use accordion_graphs::onnx::GraphSignature;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};

/// Rows of every matrix, which are sites of their own here: who shares rows does not matter for their ranges.
struct Ranges {
    estimator: RangeEstimator,
    matrices: Vec<String>,
    /// By graph, the values that a matrix multiplies.
    linears: BTreeMap<String, BTreeMap<String, Vec<String>>>,
}

impl Observer for Ranges {
    fn values(&self, name: &str, _: &GraphSignature) -> BTreeSet<String> {
        self.linears.get(name).into_iter().flat_map(BTreeMap::values).flatten().cloned().collect()
    }

    fn wants(&self, _: &str, _: &str) -> bool {
        true
    }

    fn see(&mut self, name: &str, values: &BTreeMap<&str, &Tensor>) {
        for (matrix, rows) in self.linears.get(name).into_iter().flatten() {
            let site = self.matrices.binary_search(matrix).unwrap();
            for value in rows.iter().filter_map(|value| values.get(value.as_str())) {
                self.estimator.observe(&[Observation::Rows(site, &value.to_f32())]).unwrap();
            }
        }
    }
}

/// The table of what `bundle`, in fp32, computes of `input`.
pub(super) fn range_table(bundle: &Bundle, input: &Input<'_>) -> RangeTable {
    let graphs = &bundle.manifest().graphs;
    let linears: BTreeMap<_, _> =
        graphs.iter().map(|(name, graph)| (name.clone(), graph.signature.linears.clone())).collect();
    let matrices: BTreeSet<String> = linears.values().flat_map(BTreeMap::keys).cloned().collect();
    let matrices: Vec<String> = matrices.into_iter().collect();
    let columns = |matrix: &String| bundle.weights().index().get(matrix).unwrap().shape[1];
    let sites = matrices.iter().map(|matrix| SiteLayout { weights: vec![matrix.clone()], channels: columns(matrix) });
    let mut estimator = RangeEstimator::new(sites.collect(), vec![]).unwrap();
    estimator.begin_window("golden", 0).unwrap();
    let ranges = Arc::new(Mutex::new(Ranges { estimator, matrices, linears }));
    let mut engines = super::engines(bundle, false);
    engines.observe(Arc::clone(&ranges) as _);
    super::compare_whole(&mut engines, *input, Detail::Result);
    drop(engines);
    let Ranges { estimator, .. } = Arc::into_inner(ranges).unwrap().into_inner().unwrap();
    estimator.finish(bundle.manifest().identity(), "golden".to_owned(), input.ids.len(), "test".to_owned()).unwrap()
}
