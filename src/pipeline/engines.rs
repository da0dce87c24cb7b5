//! The engines of a bundle, loaded when they are first needed.

use super::PipelineError;
use super::observe::{Observed, Observer};
use crate::bundle::{Bundle, BundleError};
use crate::runtime::{Engine, Loader};
use accordion_graphs::onnx::{GraphSignature, tap_outputs};
use std::collections::HashMap;
use std::sync::{Arc, Mutex};

/// The graphs of a bundle in one runtime.
pub struct Engines<'b> {
    bundle: &'b Bundle,
    loader: Box<dyn Loader + 'b>,
    loaded: HashMap<(String, Vec<String>), Box<dyn Engine>>,
    observer: Option<Arc<Mutex<dyn Observer>>>,
}

impl<'b> Engines<'b> {
    /// Engines of `bundle`, made by `loader`.
    pub fn new(bundle: &'b Bundle, loader: Box<dyn Loader + 'b>) -> Self {
        Self { bundle, loader, loaded: HashMap::new(), observer: None }
    }

    /// Shows `observer` the values it wants of every graph that runs from now on.
    pub fn observe(&mut self, observer: Arc<Mutex<dyn Observer>>) {
        self.loaded.clear();
        self.observer = Some(observer);
    }

    /// The bundle.
    pub fn bundle(&self) -> &'b Bundle {
        self.bundle
    }

    /// The interface of graph `name`.
    ///
    /// # Errors
    ///
    /// The bundle has no such graph.
    pub fn signature(&self, name: &str) -> Result<&'b GraphSignature, PipelineError> {
        self.bundle.signature(name).ok_or_else(|| {
            BundleError::MissingGraph { dir: self.bundle.dir().to_owned(), name: name.to_owned() }.into()
        })
    }

    /// Whether the engine of graph `name`, if there is such a graph, may have a use for [`Engine::steps`]. One that is observed
    /// has none: every value of it is looked at on its own.
    pub(crate) fn may_step(&self, name: &str) -> bool {
        self.observer.is_none() && self.bundle.signature(name).is_some() && self.loader.steps(name)
    }

    /// The engine of graph `name`, with the values `taps` (names of values in the graph) as further outputs.
    ///
    /// # Errors
    ///
    /// The bundle has no such graph, its file changed, or the runtime refuses it.
    pub fn get(&mut self, name: &str, taps: &[&str]) -> Result<&mut dyn Engine, PipelineError> {
        let key = (name.to_owned(), taps.iter().map(|&t| t.to_owned()).collect::<Vec<_>>());
        let engine = match self.loaded.entry(key) {
            std::collections::hash_map::Entry::Occupied(entry) => entry.into_mut(),
            std::collections::hash_map::Entry::Vacant(entry) => {
                let mut bytes = self.bundle.graph(name)?;
                let signature = self.bundle.signature(name);
                let observed = self.observer.as_ref().zip(signature);
                let observed = observed.map(|(observer, signature)| Observed::new(observer, name, signature));
                let mut declared = taps.to_vec();
                if let Some(observed) = &observed {
                    declared.extend(observed.declared().filter(|value| !taps.contains(value)));
                }
                if !declared.is_empty() {
                    bytes.extend(tap_outputs(&declared));
                }
                let weights = signature.map(|s| s.weights.as_slice()).unwrap_or_default();
                let engine = self.loader.load(name, &bytes, weights)?;
                entry.insert(match observed {
                    Some(observed) => Box::new(observed.around(engine)),
                    None => engine,
                })
            }
        };
        Ok(engine.as_mut())
    }

    /// Whether engines may record what a token does and repeat that, as [`Loader::record_steps`].
    pub fn record_steps(&self, on: bool) {
        self.loader.record_steps(on);
    }

    /// Drops the engines loaded so far, and the memory their runtimes hold.
    pub fn unload(&mut self) {
        self.loaded.clear();
    }
}
