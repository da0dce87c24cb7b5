//! The decoder's step over a cache that stays where it is, against the decoder whose cache grows: the graph alone, and the
//! pipeline over an engine that keeps the rows.

use super::host_steps::{Log, Manner, Stepping};
use super::subject::{Subject, one_of_each, subjects};
use super::{engines, loader, recipes};
use accordion::bundle::Bundle;
use accordion::pipeline::decode::{Continuation, DECODER_STEP, Sequence};
use accordion::pipeline::{ContextState, Engines};
use accordion::precision::Recipe;
use accordion::runtime::steps::{StepCache, StepCall, Steps};
use accordion::tensor::Tensor;
use accordion::verify::linears::LinearCheck;
use accordion::verify::quantized::{bounds_of, weights_of};
use accordion::verify::verdict::{Bounds, TapKind, Verdict, judge};
use accordion_graphs::blocks::Target;
use accordion_graphs::dtype::DType;
use accordion_graphs::precision::{KvCache, Precision};
use std::sync::{Arc, Mutex};

/// Tokens that are fed one by one.
const FED: [u32; 5] = [3, 9, 1, 7, 7];

/// What an engine is given for the cache, by layer and part.
type Named = Vec<[String; 2]>;

fn stepping<'b>(bundle: &'b Bundle, manner: Manner) -> (Engines<'b>, Arc<Mutex<Log>>) {
    let log = Arc::new(Mutex::new(Log::default()));
    let loader = Stepping { loader: loader(bundle, false), manner, log: Arc::clone(&log) };
    (Engines::new(bundle, Box::new(loader)), log)
}

fn state_of(engines: &mut Engines<'_>, subject: &Subject) -> ContextState {
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
struct Decoded {
    logits: Vec<Tensor>,
    rows: Vec<Tensor>,
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
    fn problems(&self, expected: &Self, bounds: impl Fn(&str) -> Bounds) -> Vec<String> {
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
fn single(name: &str) -> Bounds {
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

/// The likeliest tokens behind `state`, and what the sequence is then.
fn greedy(engines: &mut Engines<'_>, state: &ContextState, expected: usize, count: usize) -> (Vec<u32>, Sequence) {
    let mut sequence = Sequence::continue_from(engines, state, expected, Continuation::Next).unwrap();
    let mut logits = state.logits.clone();
    let mut tokens = Vec::new();
    for _ in 0..count {
        let likeliest = logits.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1)).unwrap().0;
        tokens.push(u32::try_from(likeliest).unwrap());
        logits = sequence.forward(engines, &tokens[tokens.len() - 1..], 1).unwrap().to_f32();
    }
    (tokens, sequence)
}

/// Both sequences go on with several tokens and one, and end in the same state.
fn same_end<'b>(growing: (&mut Engines<'b>, Sequence), stepwise: (&mut Engines<'b>, Sequence)) -> Vec<String> {
    let [expected, found] = [growing, stepwise].map(|(engines, mut sequence)| {
        let several = sequence.forward(engines, &FED, 2).unwrap();
        let one = sequence.forward(engines, &FED[..1], 1).unwrap();
        let next = sequence.next_position();
        let in_between = sequence.cache().unwrap().into_flattened();
        let state = sequence.into_state(Vec::new()).unwrap();
        assert_eq!((state.len(), state.last_position), (state.cache[0][0].shape()[2], next - 1));
        Decoded { logits: vec![several, one], rows: [state.cache.into_flattened(), in_between].concat() }
    });
    found.problems(&expected, single)
}

#[test]
fn single_tokens_go_to_the_engine_that_keeps_the_rows() {
    const COUNT: usize = 70;
    for subject in one_of_each() {
        let bundle = subject.exported(Recipe::fp32(), Target::Portable);
        let mut growing = engines(&bundle, false);
        let state = state_of(&mut growing, &subject);
        let (expected, sequence) = greedy(&mut growing, &state, 0, COUNT);
        // More than were expected.
        let (mut stepwise, log) = stepping(&bundle, Manner::Keeps);
        let (tokens, kept) = greedy(&mut stepwise, &state, 3, COUNT);
        assert_eq!(tokens, expected, "{}", subject.name);
        let problems = same_end((&mut growing, sequence), (&mut stepwise, kept));
        assert!(problems.is_empty(), "{}: {problems:?}", subject.name);
        let log = log.lock().unwrap();
        let rows = state.len();
        assert_eq!((log.loaded, log.steps), (1, COUNT + 1), "{}", subject.name);
        assert!(log.capacities.len() >= 3, "{}: {:?} behind {rows}", subject.name, log.capacities);
        assert_eq!(log.capacities[0], (rows + 3).next_multiple_of(64));
        // Where the room was used up, before several tokens, and twice in the end.
        assert_eq!(log.taken, log.capacities.len() + 1, "{}: {:?}", subject.name, log.capacities);
        assert!(log.capacities.windows(2).all(|pair| pair[0] <= pair[1]), "{:?}", log.capacities);
    }
}

#[test]
fn room_for_all_that_is_expected_is_made_at_once() {
    let [plain, ..] = one_of_each();
    let bundle = plain.exported(Recipe::fp32(), Target::Portable);
    let (mut engines, log) = stepping(&bundle, Manner::Keeps);
    let state = state_of(&mut engines, &plain);
    greedy(&mut engines, &state, 100, 100);
    assert_eq!(log.lock().unwrap().capacities, [(state.len() + 100).next_multiple_of(64)]);
}

#[test]
fn an_engine_that_has_no_use_for_it_is_asked_once() {
    let [plain, ..] = one_of_each();
    let bundle = plain.exported(Recipe::fp32(), Target::Portable);
    let mut growing = engines(&bundle, false);
    let state = state_of(&mut growing, &plain);
    let (expected, _) = greedy(&mut growing, &state, 0, 10);
    let (mut refusing, log) = stepping(&bundle, Manner::Refuses);
    let (tokens, _) = greedy(&mut refusing, &state, 0, 10);
    assert_eq!(tokens, expected);
    let log = log.lock().unwrap();
    assert_eq!((log.loaded, log.capacities.len(), log.steps), (1, 1, 0));
}

#[test]
fn a_sequence_whose_engine_failed_is_lost() {
    let [plain, ..] = one_of_each();
    let bundle = plain.exported(Recipe::fp32(), Target::Portable);
    let (mut engines, log) = stepping(&bundle, Manner::FailsAt(2));
    let state = state_of(&mut engines, &plain);
    let (_, mut sequence) = greedy(&mut engines, &state, 10, 2);
    let message =
        |result: Result<Tensor, _>| result.map_err(|error: accordion::pipeline::PipelineError| error.to_string());
    assert!(message(sequence.forward(&mut engines, &[1], 1)).unwrap_err().contains("broken"));
    for ids in [&[1][..], &[1, 2]] {
        assert!(message(sequence.forward(&mut engines, ids, 1)).unwrap_err().contains("an earlier step failed"));
    }
    assert!(sequence.cache().is_err());
    assert!(sequence.into_state(Vec::new()).is_err());
    assert_eq!(log.lock().unwrap().steps, 2);
}

/// Where nobody can have a use for it the graph is not loaded.
#[test]
fn the_graph_is_loaded_only_where_an_engine_may_keep_rows() {
    let [plain, ..] = one_of_each();
    let fp32 = plain.exported(Recipe::fp32(), Target::Portable);
    // Values are looked at.
    let (mut observed, log) = stepping(&fp32, Manner::Keeps);
    let state = state_of(&mut observed, &plain);
    let check = LinearCheck::watch(&mut observed, weights_of(&fp32));
    let (expected, mut sequence) = greedy(&mut observed, &state, 0, 3);
    assert_eq!(sequence.step_graph(&observed), sequence.graph());
    check.finish().unwrap();
    assert_eq!(log.lock().unwrap().loaded, 0);
    // A tap is wanted, or the loader says no.
    let (mut tapped, log) = stepping(&fp32, Manner::Keeps);
    let tap = fp32.signature("decoder").unwrap().taps["layers.0.attn.out"].name.clone();
    sequence.forward_tapped(&mut tapped, &[1], 1, &[tap.as_str()]).unwrap();
    assert_eq!(log.lock().unwrap().loaded, 0);
    // A bundle of an earlier version has no such graph.
    let manifest = fp32.dir().join("bundle.json");
    let mut json: serde_json::Value = serde_json::from_slice(&std::fs::read(&manifest).unwrap()).unwrap();
    json["graphs"].as_object_mut().unwrap().remove(DECODER_STEP).unwrap();
    std::fs::write(&manifest, json.to_string()).unwrap();
    let before = Bundle::open(fp32.dir()).unwrap();
    let (mut engines, log) = stepping(&before, Manner::Keeps);
    assert_eq!(greedy(&mut engines, &state, 0, 3).0, expected);
    assert_eq!(log.lock().unwrap().loaded, 0);
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
