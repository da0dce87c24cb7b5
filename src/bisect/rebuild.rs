//! The graphs of a bundle, built again from what its manifest says.

use super::BisectError;
use crate::bundle::{Bundle, BundleError, MANIFEST_FILE, Method, second_decoder};
use crate::checkpoint::NamedShape;
use crate::precision::Quantization;
use accordion_graphs::architecture::Compressor;
use accordion_graphs::dtype::DType;
use accordion_graphs::methods::{self, Graphs, Source};
use accordion_graphs::onnx::{Model, Scope};
use accordion_graphs::weights::{WeightIndex, WeightRef};
use std::path::PathBuf;
use std::rc::Rc;

/// The rebuilt graphs of a bundle.
pub struct Rebuilt<'b> {
    bundle: &'b Bundle,
    graphs: Graphs,
    locations: Vec<String>,
}

/// One of them.
pub struct RebuiltGraph<'r> {
    /// Its name in the bundle.
    pub name: String,
    /// The graph as it was built.
    pub scope: Scope,
    /// The bundle's file, and its interface.
    pub model: Model,
    /// The bundle.
    pub bundle: &'r Bundle,
    /// Where the weight files are.
    pub locations: &'r [String],
}

/// What tensors of a checkpoint are stored in. Of those that a bundle has in a precision of its own nothing says which it was, and a
/// graph that casts names its nodes otherwise.
const STORED: [DType; 3] = [DType::F32, DType::Bf16, DType::F16];

impl<'b> Rebuilt<'b> {
    /// The graphs of `bundle`.
    ///
    /// # Errors
    ///
    /// The manifest's method does not fit its model.
    pub fn new(bundle: &'b Bundle) -> Result<Self, BisectError> {
        let manifest = bundle.manifest();
        let built = |stored| {
            let locations = manifest.weights.iter().map(|weight| weight.file.clone()).collect();
            Ok::<_, BisectError>(Self { bundle, graphs: graphs(bundle, stored)?, locations })
        };
        let first = built(STORED[0])?;
        if manifest.quantization.is_none() || first.is_the_bundle_s() {
            return Ok(first);
        }
        for stored in &STORED[1..] {
            let other = built(*stored)?;
            if other.is_the_bundle_s() {
                return Ok(other);
            }
        }
        Ok(first)
    }

    fn is_the_bundle_s(&self) -> bool {
        self.bundle.manifest().graphs.keys().all(|name| self.graph(name).is_ok())
    }

    /// The bundle.
    pub fn bundle(&self) -> &'b Bundle {
        self.bundle
    }

    /// Graph `name`, if it is the one in the bundle.
    ///
    /// # Errors
    ///
    /// The bundle has no such graph, or another one of that name.
    pub fn graph(&self, name: &str) -> Result<RebuiltGraph<'_>, BisectError> {
        let bytes = self.bundle.graph(name)?;
        let missing = || BundleError::MissingGraph { dir: self.bundle.dir().to_owned(), name: name.to_owned() };
        let scope = self.graphs.get(name).ok_or_else(missing)?.clone();
        let model = scope.finish(&self.locations)?;
        if model.bytes != bytes {
            let path: PathBuf = self.bundle.dir().join(format!("{name}.onnx"));
            let producer = self.bundle.manifest().producer.clone();
            return Err(BisectError::OtherVersion { path, graph: name.to_owned(), producer });
        }
        Ok(RebuiltGraph { name: name.to_owned(), scope, model, bundle: self.bundle, locations: &self.locations })
    }
}

/// The graphs of `bundle`, if the checkpoint had in `stored` what the bundle has in another type.
fn graphs(bundle: &Bundle, stored: DType) -> Result<Graphs, BisectError> {
    let manifest = bundle.manifest();
    let index = Rc::new(bundle.weights().index().clone());
    let tensors = manifest.required_tensors();
    let weights = match &manifest.quantization {
        Some(quantization) => Rc::new(as_in_checkpoint(quantization, &tensors, &index, stored)),
        None => Rc::clone(&index),
    };
    let source = Source { arch: manifest.architecture.clone(), weights, target: manifest.target };
    let mut graphs = match (&manifest.method, &manifest.compressor) {
        (Method::Plain, _) => methods::plain::graphs(&source),
        (Method::Homer { settings, tree_heights }, _) => methods::homer::graphs(&source, *settings, tree_heights)?,
        (Method::Rcc { settings }, Some(Compressor::Rcc(model))) => methods::rcc::graphs(&source, model, *settings),
        (Method::SharedLlm { settings }, Some(Compressor::SharedLlm(model))) => {
            methods::sharedllm::graphs(&source, model, *settings)?
        }
        (method, _) => {
            let problem = format!("method {} needs a compressor of its own, and there is none", method.name());
            return Err(BundleError::Invalid { path: bundle.dir().join(MANIFEST_FILE), problem }.into());
        }
    };
    graphs.extend(second_decoder(manifest, &source));
    if let Some(quantization) = &manifest.quantization {
        quantization.again(&graphs, &tensors, manifest.target, &index);
    }
    Ok(graphs)
}

/// `tensors` as the checkpoint of a bundle had them, to build over: those that the bundle's `index` has in another type were
/// `stored` in one.
fn as_in_checkpoint(
    quantization: &Quantization,
    tensors: &[NamedShape],
    index: &WeightIndex,
    stored: DType,
) -> WeightIndex {
    let rounded = |name: &String| quantization.rounding.as_ref().is_some_and(|r| r.tensors.contains(name));
    let entries = tensors.iter().filter_map(|(name, shape)| {
        let kept = index.get(name).filter(|_| !rounded(name));
        let weight = match kept {
            Some(weight) => weight.clone(),
            // Where it would lie matters to no graph: none refers to it in the end.
            None => WeightRef {
                file: 0,
                offset: 0,
                len: stored.bytes_of_shape(shape)? as u64,
                shape: shape.clone(),
                dtype: stored,
            },
        };
        Some((name.clone(), weight))
    });
    WeightIndex::new(index.files().to_vec(), entries.collect())
}
