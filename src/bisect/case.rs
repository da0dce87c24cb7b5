//! One run of a graph, and what the reference has at each of its taps.

use super::BisectError;
use super::rebuild::RebuiltGraph;
use crate::runtime::{Engine, EngineError, InPlace, Loader, Memory};
use crate::tensor::Tensor;
use crate::verify::verdict::{Bounds, TapKind, TapResult, judge};
use accordion_graphs::dtype::DType;
use accordion_graphs::onnx::tap_outputs;
use std::collections::BTreeMap;
use std::ops::ControlFlow;

/// What expected scores are called, behind the place of a choice, in the form of the pairs that it is made between.
pub(super) const PAIRS: &str = "pairs";

/// What is done with one case after the other. It breaks where nothing more is to be seen.
pub type Visit<'v> = dyn FnMut(&Case<'_>) -> Result<ControlFlow<()>, BisectError> + 'v;

/// What is said of a point by its name, of what was found and expected there, and of the scores that a choice was made by.
pub(super) type Judgement<'j> = dyn Fn(&str, &Tensor, &Tensor, Option<&Tensor>) -> TapResult + 'j;

/// What a graph is given, and what should come out of it.
pub struct Case<'r> {
    /// The graph.
    pub graph: &'r RebuiltGraph<'r>,
    /// What distinguishes this run from others of the graph: a tree node. Empty where there is only one.
    pub place: String,
    /// The graph's inputs, all of them.
    pub inputs: Vec<(String, Tensor)>,
    /// Inputs whose memory an output is written into: the input's name and the output's.
    pub in_place: Vec<[String; 2]>,
    /// The reference's values by the name of the tap, or of the output where a value is no tap. A batch axis of one may
    /// be missing.
    pub expected: BTreeMap<String, Tensor>,
}

impl Case<'_> {
    /// Loads the graph with the values `taps` as further outputs.
    pub(super) fn load(&self, loader: &dyn Loader, taps: &[&str]) -> Result<Box<dyn Engine>, EngineError> {
        let model = &self.graph.model;
        let mut bytes = model.bytes.clone();
        if !taps.is_empty() {
            bytes.extend(tap_outputs(taps));
        }
        loader.load(&self.graph.name, &bytes, &model.signature.weights)
    }

    /// The values `names` of one run of `engine`.
    pub(super) fn run(&self, engine: &mut dyn Engine, names: &[&str]) -> Result<Vec<Tensor>, BisectError> {
        let mut given: Vec<(&str, &Tensor)> = Vec::with_capacity(self.inputs.len());
        let mut memory: Vec<(&[String; 2], Vec<usize>, Vec<f32>)> = Vec::with_capacity(self.in_place.len());
        for (name, tensor) in &self.inputs {
            match self.in_place.iter().find(|[input, _]| input == name) {
                Some(pair) => memory.push((pair, tensor.shape().to_vec(), tensor.as_f32()?.to_vec())),
                None => given.push((name, tensor)),
            }
        }
        let mut in_place: Vec<InPlace<'_>> = memory
            .iter_mut()
            .map(|([input, output], shape, data)| InPlace { input, output, shape, data: Memory::F32(data) })
            .collect();
        let written = |name: &str| self.in_place.iter().any(|[_, output]| output == name);
        let asked: Vec<&str> = names.iter().copied().filter(|name| !written(name)).collect();
        let mut results = engine.run(&given, &mut in_place, &asked)?.into_iter();
        let mut values = Vec::with_capacity(names.len());
        for name in names {
            let buffer = memory.iter().find(|([_, output], ..)| output == name);
            match buffer {
                Some((_, shape, data)) => values.push(Tensor::from_f32(shape.clone(), data.clone())?),
                None => values.extend(results.next()),
            }
        }
        Ok(values)
    }

    /// Whether `found` is what is expected at the point `name`; `None` where nothing is.
    pub(super) fn judge(&self, name: &str, found: &Tensor) -> Option<TapResult> {
        self.judge_by(name, found, &|name, found, expected, scores| judge(name, found, expected, scores, &bounds(name)))
    }

    /// As [`Case::judge`], by what `judge` says.
    pub(super) fn judge_by(&self, name: &str, found: &Tensor, judge: &Judgement<'_>) -> Option<TapResult> {
        let expected = self.expected.get(name)?;
        // The reference has no batch axis.
        let found = found.reshaped(expected.shape()).unwrap_or_else(|_| found.clone());
        let scores = match TapKind::of(name) {
            TapKind::Selection => self.expected.get("prune.scores"),
            TapKind::Choice => {
                name.strip_suffix("chosen").and_then(|level| self.expected.get(&format!("{level}{PAIRS}")))
            }
            TapKind::Logits | TapKind::Copy | TapKind::Value => None,
        };
        Some(judge(name, &found, expected, scores))
    }
}

/// What is permitted at the point `name`.
pub(super) fn bounds(name: &str) -> Bounds {
    Bounds::new(TapKind::of(name), DType::F32)
}

/// Whether what follows depends on what is chosen at the point `name`.
pub(super) fn decides(name: &str) -> bool {
    matches!(TapKind::of(name), TapKind::Selection | TapKind::Choice)
}
