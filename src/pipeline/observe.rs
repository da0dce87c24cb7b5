//! Looking at values inside the graphs of a pipeline, whichever way it runs them.

use crate::runtime::{Engine, EngineError, InPlace};
use crate::tensor::Tensor;
use accordion_graphs::onnx::GraphSignature;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, PoisonError};

/// Somebody who looks at values.
pub trait Observer: Send {
    /// The values of the graph `name` that may be wanted.
    fn values(&self, name: &str, signature: &GraphSignature) -> BTreeSet<String>;

    /// Whether the value called `value` is wanted in the next run of the graph `name`.
    fn wants(&self, name: &str, value: &str) -> bool;

    /// Takes the values that were wanted of one run of the graph `name`.
    fn see(&mut self, name: &str, values: &BTreeMap<&str, &Tensor>);
}

/// What is observed of one graph.
pub(super) struct Observed {
    observer: Arc<Mutex<dyn Observer>>,
    name: String,
    /// Values that are an input of the graph.
    given: Vec<String>,
    /// Values that the graph computes, and whether they are an output as it is.
    computed: Vec<(String, bool)>,
}

impl Observed {
    pub(super) fn new(observer: &Arc<Mutex<dyn Observer>>, name: &str, signature: &GraphSignature) -> Self {
        let values = observer.lock().unwrap_or_else(PoisonError::into_inner).values(name, signature);
        let (given, computed): (Vec<_>, Vec<_>) =
            values.into_iter().partition(|value| signature.inputs.iter().any(|input| input.name == *value));
        let is_output = |value: &String| signature.outputs.iter().any(|output| output.name == *value);
        let computed = computed.into_iter().map(|value| (value.clone(), is_output(&value))).collect();
        Self { observer: Arc::clone(observer), name: name.to_owned(), given, computed }
    }

    /// The values that have to be declared outputs.
    pub(super) fn declared(&self) -> impl Iterator<Item = &str> {
        self.computed.iter().filter(|(_, is_output)| !is_output).map(|(value, _)| value.as_str())
    }

    pub(super) fn around(self, engine: Box<dyn Engine>) -> ObservedEngine {
        ObservedEngine { observed: self, engine }
    }
}

/// An engine whose runs are observed.
pub(super) struct ObservedEngine {
    observed: Observed,
    engine: Box<dyn Engine>,
}

impl Engine for ObservedEngine {
    fn run(
        &mut self,
        inputs: &[(&str, &Tensor)],
        in_place: &mut [InPlace<'_>],
        outputs: &[&str],
    ) -> Result<Vec<Tensor>, EngineError> {
        let Self { observed: Observed { observer, name, given, computed }, engine } = self;
        let wants = |value: &str| observer.lock().unwrap_or_else(PoisonError::into_inner).wants(name, value);
        let computed: Vec<&str> =
            computed.iter().map(|(value, _)| value.as_str()).filter(|value| wants(value)).collect();
        let given: Vec<&str> = given.iter().map(String::as_str).filter(|value| wants(value)).collect();
        let further = computed.iter().copied().filter(|value| !outputs.contains(value));
        let all: Vec<&str> = outputs.iter().copied().chain(further).collect();
        let mut results = engine.run(inputs, in_place, &all)?;
        if !computed.is_empty() || !given.is_empty() {
            let results = all.iter().copied().zip(&results).filter(|(value, _)| computed.contains(value));
            let inputs = inputs.iter().copied().filter(|(value, _)| given.contains(value));
            let values = results.chain(inputs).collect();
            observer.lock().unwrap_or_else(PoisonError::into_inner).see(name, &values);
        }
        results.truncate(outputs.len());
        Ok(results)
    }
}
