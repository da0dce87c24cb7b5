//! The graphs of a bundle, built again from what its manifest says.

use super::BisectError;
use crate::bundle::{Bundle, BundleError, MANIFEST_FILE, Method};
use accordion_graphs::architecture::Compressor;
use accordion_graphs::methods::{self, Graphs, Source};
use accordion_graphs::onnx::{Model, Scope};
use accordion_graphs::precision::Precision;
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

impl<'b> Rebuilt<'b> {
    /// The graphs of `bundle`.
    ///
    /// # Errors
    ///
    /// The manifest's method does not fit its model, or its graphs compute in another precision than fp32.
    pub fn new(bundle: &'b Bundle) -> Result<Self, BisectError> {
        let manifest = bundle.manifest();
        if manifest.precision != Precision::Fp32 {
            let (path, precision) = (bundle.dir().join(MANIFEST_FILE), manifest.precision.to_string());
            return Err(BisectError::Precision { path, precision });
        }
        let weights = Rc::new(bundle.weights().index().clone());
        let source = Source { arch: manifest.architecture.clone(), weights, target: manifest.target };
        let graphs = match (&manifest.method, &manifest.compressor) {
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
        let locations = manifest.weights.iter().map(|weight| weight.file.clone()).collect();
        Ok(Self { bundle, graphs, locations })
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
