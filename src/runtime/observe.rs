//! Hears what graphs compute on the way, whichever runtime runs them and whatever is made of their outputs.

use super::{Engine, EngineError, InPlace, Loader};
use crate::tensor::Tensor;
use accordion_graphs::onnx::{GraphSignature, tap_outputs};
use std::collections::BTreeMap;
use std::error::Error;
use std::sync::{Arc, Mutex, PoisonError};

/// Takes what is observed.
pub trait Observer: Send {
    /// Takes the values of one run of a graph, by name.
    ///
    /// # Errors
    ///
    /// The values are not what the observer can accept; the run then fails.
    fn observe(&mut self, graph: &str, values: &[(&str, Tensor)]) -> Result<(), Box<dyn Error + Send + Sync>>;
}

/// Loads graphs that show some of their values to an observer. What is asked of their engines is not changed, but none of
/// the observed values may be asked for, unless it is an output of the graph anyway.
pub struct ObservingLoader<'l, O> {
    loader: Box<dyn Loader + 'l>,
    graphs: BTreeMap<String, Values>,
    observer: Arc<Mutex<O>>,
}

/// The observed values of a graph.
#[derive(Debug, Clone, Default)]
struct Values {
    /// Those that are inputs.
    inputs: Vec<String>,
    /// The others.
    computed: Vec<String>,
    /// Those that are not outputs yet.
    added: Vec<String>,
}

impl<'l, O: Observer> ObservingLoader<'l, O> {
    /// As `loader`, with graphs that show values to `observer`: by graph its interface, and the names of the values.
    pub fn new<'a>(
        loader: Box<dyn Loader + 'l>,
        values: impl IntoIterator<Item = (String, &'a GraphSignature, Vec<String>)>,
        observer: Arc<Mutex<O>>,
    ) -> Self {
        let graph = |(name, signature, values): (String, &GraphSignature, Vec<String>)| {
            let is_input = |value: &String| signature.inputs.iter().any(|input| input.name == *value);
            let is_output = |value: &String| signature.outputs.iter().any(|output| output.name == *value);
            let (inputs, computed): (Vec<_>, Vec<_>) = values.into_iter().partition(is_input);
            let added = computed.iter().filter(|value| !is_output(value)).cloned().collect();
            (name, Values { inputs, computed, added })
        };
        Self { loader, graphs: values.into_iter().map(graph).collect(), observer }
    }
}

impl<O: Observer + 'static> Loader for ObservingLoader<'_, O> {
    fn load(&self, name: &str, bytes: &[u8], weights: &[String]) -> Result<Box<dyn Engine>, EngineError> {
        let Some(values) = self.graphs.get(name) else { return self.loader.load(name, bytes, weights) };
        let added: Vec<&str> = values.added.iter().map(String::as_str).collect();
        let engine = self.loader.load(name, &[bytes, &tap_outputs(&added)].concat(), weights)?;
        let (graph, values, observer) = (name.to_owned(), values.clone(), Arc::clone(&self.observer));
        Ok(Box::new(ObservedEngine { engine, graph, values, observer }))
    }

    fn name(&self) -> &'static str {
        self.loader.name()
    }
}

struct ObservedEngine<O> {
    engine: Box<dyn Engine>,
    graph: String,
    values: Values,
    observer: Arc<Mutex<O>>,
}

impl<O: Observer> Engine for ObservedEngine<O> {
    fn run(
        &mut self,
        inputs: &[(&str, &Tensor)],
        in_place: &mut [InPlace<'_>],
        outputs: &[&str],
    ) -> Result<Vec<Tensor>, EngineError> {
        let (asked, more): (Vec<&str>, Vec<&str>) =
            self.values.computed.iter().map(String::as_str).partition(|value| outputs.contains(value));
        let mut results = self.engine.run(inputs, in_place, &[outputs, &more].concat())?;
        let mut observed: Vec<(&str, Tensor)> = more.into_iter().zip(results.split_off(outputs.len())).collect();
        for value in asked {
            let known = outputs.iter().zip(&results).find(|(output, _)| **output == value);
            observed.extend(known.map(|(_, tensor)| (value, tensor.clone())));
        }
        let given = inputs.iter().filter(|(input, _)| self.values.inputs.iter().any(|value| value == input));
        observed.extend(given.map(|(input, tensor)| (*input, (*tensor).clone())));
        let mut observer = self.observer.lock().unwrap_or_else(PoisonError::into_inner);
        let failed = |source| EngineError::Observed { graph: self.graph.clone(), source };
        observer.observe(&self.graph, &observed).map_err(failed)?;
        Ok(results)
    }
}
