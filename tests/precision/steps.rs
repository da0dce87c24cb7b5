//! The decoder's step over a cache that stays where it is, against the decoder whose cache grows.

use super::host_steps::{Log, Manner, Stepping};
use super::subject::{Subject, one_of_each, subjects};
use super::{engines, loader, recipes};
use accordion::bundle::Bundle;
use accordion::pipeline::decode::{Continuation, DECODER_STEP, Sequence};
use accordion::pipeline::{ContextState, Engines};
use accordion::precision::Recipe;
use accordion::runtime::steps::{StepCache, StepCall, Steps};
use accordion::tensor::Tensor;
use accordion::verify::quantized::bounds_of;
use accordion::verify::verdict::{Bounds, TapKind, Verdict, judge};
use accordion_graphs::blocks::Target;
use accordion_graphs::dtype::DType;
use accordion_graphs::precision::{KvCache, Precision};
use std::sync::{Arc, Mutex};

/// Tokens that are fed one by one.
pub(super) const FED: [u32; 5] = [3, 9, 1, 7, 7];

/// What an engine is given for the cache, by layer and part.
type Named = Vec<[String; 2]>;

pub(super) fn stepping(bundle: &Bundle, manner: Manner) -> (Engines<'_>, Arc<Mutex<Log>>) {
    let log = Arc::new(Mutex::new(Log::default()));
    let loader = Stepping { loader: loader(bundle, false), manner, log: Arc::clone(&log) };
    (Engines::new(bundle, Box::new(loader)), log)
}

pub(super) fn state_of(engines: &mut Engines<'_>, subject: &Subject) -> ContextState {
    let (compression, prompt) = subject.compression();
    compression.compress(engines, &prompt, &mut |_, _| {}).unwrap()
}

/// The state before anything was read.
fn nothing(bundle: &Bundle) -> ContextState {
    let arch = bundle.architecture();
    let empty = || Tensor::from_f32([1, arch.num_kv_heads(), 0, arch.head_dim()], Vec::new()).unwrap();
    ContextState {
        cache: (0..arch.num_layers()).map(|_| [empty(), empty()]).collect(),
        position_ids: Vec::new(),
        last_position: -1,
        logits: Vec::new(),
        injected: None,
        scales: None,
    }
}

/// The steps of the graph behind `state`.
fn steps(engines: &mut Engines<'_>, state: &ContextState, capacity: usize) -> Box<dyn Steps> {
    let names = |what: &str, layers: usize| -> Named {
        (0..layers).map(|l| ["key", "value"].map(|part| format!("{what}.{l}.{part}"))).collect()
    };
    let injected = state.injected.as_ref().map(|injected| injected.layers.as_slice()).unwrap_or_default();
    let injected_names = names("injected", injected.len());
    let fixed: Vec<(&str, &Tensor)> = injected_names
        .iter()
        .zip(injected)
        .flat_map(|([key, value], layer)| {
            [(key.as_str(), layer.single_key.as_ref().unwrap_or(&layer.key)), (value.as_str(), &layer.value)]
        })
        .collect();
    let [past, new] = ["past_key_values", "new"].map(|what| names(what, state.cache.len()));
    let both = past.iter().flatten().zip(new.iter().flatten()).zip(state.cache.iter().flatten());
    let caches: Vec<StepCache<'_>> = both.map(|((input, output), rows)| StepCache { input, output, rows }).collect();
    let call = StepCall {
        changing: &["input_ids", "position_ids", "past_length"],
        length: "past_length",
        fixed: &fixed,
        caches: &caches,
        capacity,
        outputs: &["logits"],
    };
    engines.get(DECODER_STEP, &[]).unwrap().steps(&call).unwrap().unwrap()
}

/// What [`FED`] gives behind `state`: the logits of every token, and all rows.
pub(super) struct Decoded {
    pub(super) logits: Vec<Tensor>,
    pub(super) rows: Vec<Tensor>,
}

impl Decoded {
    fn growing(engines: &mut Engines<'_>, state: &ContextState) -> Self {
        let mut sequence = Sequence::continue_from(engines, state, 0, Continuation::Next).unwrap();
        let logits = FED.iter().map(|&id| sequence.forward(engines, &[id], 1).unwrap()).collect();
        Self { logits, rows: sequence.cache().unwrap().into_flattened() }
    }

    fn stepwise(engines: &mut Engines<'_>, state: &ContextState, capacity: usize) -> Self {
        let mut steps = steps(engines, state, capacity);
        let mut logits = Vec::new();
        for (i, &id) in FED.iter().enumerate() {
            let [position, length] = [state.last_position + 1 + i as i64, (state.len() + i) as i64];
            let mut results = steps.step(&[i64::from(id), position, length]).unwrap();
            let single = results.remove(0);
            logits.push(single.reshaped(&single.shape()[1..]).unwrap());
        }
        Self { logits, rows: steps.rows(state.len() + FED.len()).unwrap() }
    }

    /// Why it is not what `expected` is.
    pub(super) fn problems(&self, expected: &Self, bounds: impl Fn(&str) -> Bounds) -> Vec<String> {
        assert_eq!((self.logits.len(), self.rows.len()), (expected.logits.len(), expected.rows.len()));
        let named = |found: &Self, expected: &Self| -> Vec<(&'static str, Tensor, Tensor)> {
            let pairs = |name, a: &[Tensor], b: &[Tensor]| -> Vec<_> {
                a.iter().zip(b).map(|(a, b)| (name, a.clone(), b.clone())).collect()
            };
            [pairs("logits", &found.logits, &expected.logits), pairs("rows", &found.rows, &expected.rows)].concat()
        };
        let results = named(self, expected)
            .into_iter()
            .enumerate()
            .map(|(i, (name, found, expected))| (i, judge(name, &found, &expected, None, &bounds(name))));
        results
            .filter(|(_, result)| result.verdict == Verdict::Fail)
            .map(|(i, result)| format!("{} {i}: {}", result.name, result.reason))
            .collect()
    }
}

/// Small models of well-conditioned numbers agree to 1e-4 in fp32.
pub(super) fn single(name: &str) -> Bounds {
    Bounds::golden(TapKind::of(name), DType::F32)
}

#[test]
fn a_step_computes_what_the_growing_decoder_does() {
    let mut failures = Vec::new();
    for subject in subjects() {
        let bundle = subject.exported(Recipe::fp32(), Target::Portable);
        let (mut engines, _) = stepping(&bundle, Manner::Keeps);
        let mut growing = super::engines(&bundle, false);
        let state = state_of(&mut growing, &subject);
        // Behind the prompt, and, where nothing needs to be injected, from the very first token on.
        let states = [Some(state.clone()), state.injected.is_none().then(|| nothing(&bundle))];
        for state in states.into_iter().flatten() {
            let expected = Decoded::growing(&mut growing, &state);
            // Exactly enough: the last step has room for one row.
            for spare in [0, 1, 59] {
                let capacity = state.len() + FED.len() + spare;
                let found = Decoded::stepwise(&mut engines, &state, capacity);
                let row = format!("{}, {} rows of {capacity}", subject.name, state.len());
                failures.extend(found.problems(&expected, single).iter().map(|problem| format!("{row}: {problem}")));
            }
        }
    }
    assert!(failures.is_empty(), "{} failures:\n{}", failures.len(), failures.join("\n"));
}

#[test]
fn faults_of_an_engine_that_keeps_the_rows_are_found() {
    let [plain, ..] = one_of_each();
    let bundle = plain.exported(Recipe::fp32(), Target::Portable);
    let mut growing = engines(&bundle, false);
    let state = state_of(&mut growing, &plain);
    let expected = Decoded::growing(&mut growing, &state);
    for manner in [Manner::SeesTooMuch, Manner::AppendsTooFar] {
        let (mut engines, _) = stepping(&bundle, manner);
        let found = Decoded::stepwise(&mut engines, &state, state.len() + FED.len() + 2);
        assert!(!found.problems(&expected, single).is_empty(), "{manner:?}, and nobody sees it");
    }
}

#[test]
fn every_precision_has_the_step() {
    let mut failures = Vec::new();
    for subject in one_of_each() {
        for recipe in recipes(&subject, Target::Portable) {
            let row =
                format!("{}, {}{}", subject.name, recipe.precision, if recipe.emulated { ", emulated" } else { "" });
            let bundle = subject.exported(recipe, Target::Portable);
            let mut growing = engines(&bundle, false);
            let state = state_of(&mut growing, &subject);
            let expected = Decoded::growing(&mut growing, &state);
            let (mut engines, _) = stepping(&bundle, Manner::Keeps);
            let found = Decoded::stepwise(&mut engines, &state, state.len() + FED.len() + 3);
            let bounds = bounds_of(&bundle);
            let problems = found.problems(&expected, |name| bounds(name, TapKind::of(name)));
            failures.extend(problems.iter().map(|problem| format!("{row}: {problem}")));
        }
    }
    assert!(failures.is_empty(), "{} failures:\n{}", failures.len(), failures.join("\n"));
}

#[test]
fn only_caches_that_grow_have_the_graph() {
    let [plain, ..] = one_of_each();
    let has = |recipe, target| plain.exported(recipe, target).signature(DECODER_STEP).is_some();
    let int8 = || Recipe { kv_cache: KvCache::Int8, ..Recipe::of(Precision::Fp32) };
    assert!(has(Recipe::fp32(), Target::Portable));
    assert!(!has(int8(), Target::Portable));
    assert!(!has(Recipe::fp32(), Target::OrtCpu));
    assert!(!has(int8(), Target::OrtCpu));
}
