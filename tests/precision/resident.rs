//! The engine whose tensors stay at a place, with the CPU as the place: the code that runs on a GPU, except for what CUDA itself
//! does. All methods compute the very bits that the engine for the CPU computes, and only what the host reads is copied to it.

use crate::host::{Host, runtime};
use crate::subject::{self, Subject, plain, subjects};
use accordion::bundle::Bundle;
use accordion::pipeline::decode::{Continuation, Sequence};
use accordion::pipeline::plain::prefill;
use accordion::pipeline::question::with_suffix;
use accordion::pipeline::rcc::read_slots;
use accordion::pipeline::sharedllm::{inject, read};
use accordion::pipeline::{ContextState, Engines, homer, sharedllm};
use accordion::runtime::bound::{Bound, BoundOptions};
use accordion::runtime::ort_cpu::{OrtCpu, OrtOptions};
use accordion::runtime::{InPlace, Loader, Memory};
use accordion::taps::{NoTaps, TapSink};
use accordion::tensor::Tensor;
use accordion::verify::VerifyError;
use accordion::verify::bundle::{Input, Plan, engine_parts};
use accordion::verify::parts::Parts;
use accordion_graphs::blocks::Target;
use accordion_graphs::plan::sharedllm::Quirks;
use accordion_graphs::precision::Precision;
use std::collections::BTreeMap;
use std::sync::Arc;

fn portable(subject: &Subject) -> Bundle {
    subject.exported(subject.recipe(Precision::Fp32), Target::Portable)
}

/// Every tap of every part.
#[derive(Default)]
struct All {
    part: BTreeMap<String, Tensor>,
    parts: BTreeMap<(String, String), Tensor>,
}

impl TapSink for All {
    fn wants(&self, _name: &str) -> bool {
        true
    }

    fn record(&mut self, name: &str, value: Tensor) {
        self.part.insert(name.to_owned(), value);
    }
}

impl Parts for All {
    fn end_part(&mut self, name: &str) -> Result<(), VerifyError> {
        let part = std::mem::take(&mut self.part).into_iter();
        self.parts.extend(part.map(|(tap, value)| ((name.to_owned(), tap), value)));
        Ok(())
    }
}

fn taps(loader: impl Loader, bundle: &Bundle, input: Input<'_>) -> BTreeMap<(String, String), Tensor> {
    let mut all = All::default();
    engine_parts(&mut Engines::new(bundle, Box::new(loader)), &input, &mut all, &mut |_| {}).unwrap();
    all.parts
}

/// Node by node and segment by segment, several in a call, and as many as there are.
const WIDTHS: [usize; 3] = [1, 2, usize::MAX];

#[test]
fn every_tap_is_that_of_the_cpu_bit_for_bit() {
    for subject in subjects() {
        let bundle = portable(&subject);
        for width in WIDTHS {
            let what = format!("{}, width {width}", subject.name);
            let input = Input { width, ..subject.input() };
            let cpu = OrtCpu::new(runtime(), bundle.weights().clone(), &OrtOptions::default()).unwrap();
            let expected = taps(cpu, &bundle, input);
            let found = taps(Host::new().loader(bundle.weights().clone(), BoundOptions::default()), &bundle, input);
            assert!(expected.len() > 20, "{what}: {} taps", expected.len());
            assert!(found.keys().eq(expected.keys()), "{what}");
            for (name, tensor) in &expected {
                let found = &found[name];
                assert_eq!((found.shape(), found.bytes()), (tensor.shape(), tensor.bytes()), "{what} {name:?}");
            }
        }
    }
}

/// What `subject`'s method makes of its prompt, and the logits of the tokens behind it, one by one.
fn decoded(engines: &mut Engines<'_>, subject: &Subject, width: usize) -> (ContextState, Vec<Vec<f32>>) {
    let Input { plan, lengths, ids, .. } = subject.input();
    let (prompt, teacher) = ids.split_at(lengths.total());
    let (text, suffix) = prompt.split_at(lengths.prefix + lengths.context);
    let (prefix, context) = text.split_at(lengths.prefix);
    let state = match plan {
        Plan::Plain => prefill(engines, prompt, |_| {}).unwrap(),
        Plan::Homer(plan, bias) => {
            let bias: Vec<&[f32]> = bias.iter().map(Vec::as_slice).collect();
            let prompt = homer::Prompt { prefix, context, suffix };
            homer::compress(engines, plan, prompt, &bias, width, &mut NoTaps, &mut |_| {}).unwrap()
        }
        Plan::Rcc(plan) => {
            let mut slots = read_slots(engines, plan, text, width, &mut NoTaps, &mut |_| {}).unwrap();
            let logits = slots.read(engines, suffix, |_| {}).unwrap();
            slots.into_state(logits).unwrap()
        }
        Plan::SharedLlm(plan) => {
            let context = sharedllm::Context { ids: text, mask: None, running: suffix, query_index: suffix.len() - 1 };
            let injected = inject(engines, plan, context, width, &mut NoTaps, &mut |_| {}).unwrap();
            read(engines, injected, suffix, |_| {}).unwrap()
        }
    };
    let mut sequence = Sequence::continue_from(engines, &state, teacher.len(), Continuation::Next).unwrap();
    let logits = teacher.iter().map(|&id| sequence.forward(engines, &[id], 1).unwrap().to_f32()).collect();
    (state, logits)
}

fn keys_and_values(state: &ContextState) -> Vec<&[u8]> {
    let injected = state.injected.iter().flat_map(|injected| &injected.layers);
    let injected = injected.flat_map(|layer| [Some(&layer.key), layer.single_key.as_ref(), Some(&layer.value)]);
    state.cache.iter().flatten().chain(injected.flatten()).map(Tensor::bytes).collect()
}

#[test]
fn only_logits_and_the_last_positions_are_copied_to_the_host() {
    // Bytes that were joined and taken apart at the place.
    let mut moved = BTreeMap::new();
    for subject in subjects().into_iter().chain([subject::sharedllm("lm3", Quirks::Fixed)]) {
        let bundle = portable(&subject);
        let row = 4 * bundle.architecture().vocab_size();
        for width in WIDTHS {
            let what = format!("{}, width {width}", subject.name);
            let host = Host::new();
            let (downloads, copies) = (Arc::clone(&host.downloads), Arc::clone(&host.moved));
            let mut engines =
                Engines::new(&bundle, Box::new(host.loader(bundle.weights().clone(), BoundOptions::default())));
            let (state, logits) = decoded(&mut engines, &subject, width);
            let mut expected = vec![row; 1 + logits.len()];
            if matches!(subject.input().plan, Plan::Homer(..)) {
                expected.insert(1, 8 * state.len());
            }
            assert_eq!(*downloads.lock().unwrap(), expected, "{what}");
            moved.insert(what.clone(), copies.lock().unwrap().iter().sum::<usize>());

            let cpu = OrtCpu::new(runtime(), bundle.weights().clone(), &OrtOptions::default()).unwrap();
            let (expected, of_cpu) = decoded(&mut Engines::new(&bundle, Box::new(cpu)), &subject, width);
            assert!(logits == of_cpu && state.logits == expected.logits, "{what}");
            assert!(keys_and_values(&state) == keys_and_values(&expected), "{what}");
        }
    }
    println!("{moved:?}");
    for joined in ["homer F, width 2", "homer G, width 2", "rcc neox_r32, width 1", "sharedllm lm3, width 1"] {
        assert!(moved[joined] > 0, "{joined}: {moved:?}");
    }
}

/// What a question leaves behind is taken off the cache where that lies.
#[test]
fn another_question_takes_rows_off_the_cache_where_it_lies() {
    let subject = plain("C");
    let bundle = portable(&subject);
    let ask = |loader: Box<dyn Loader>| {
        let mut engines = Engines::new(&bundle, loader);
        let state = prefill(&mut engines, &(0..20).collect::<Vec<u32>>(), |_| {}).unwrap();
        with_suffix(&mut engines, &state, 4, &[7, 3, 9]).unwrap()
    };
    let host = Host::new();
    let downloads = Arc::clone(&host.downloads);
    let found = ask(Box::new(host.loader(bundle.weights().clone(), BoundOptions::default())));
    assert_eq!(*downloads.lock().unwrap(), [4 * bundle.architecture().vocab_size(); 2]);
    let cpu = OrtCpu::new(runtime(), bundle.weights().clone(), &OrtOptions::default()).unwrap();
    let expected = ask(Box::new(cpu));
    assert!(keys_and_values(&found) == keys_and_values(&expected));
    assert_eq!((found.logits, found.position_ids), (expected.logits, expected.position_ids));
}

#[test]
fn a_weight_is_copied_to_the_place_once_for_all_graphs() {
    let subject = subjects().swap_remove(1);
    let bundle = portable(&subject);
    let host = Host::new();
    let uploads = Arc::clone(&host.uploads);
    let loader = host.loader(bundle.weights().clone(), BoundOptions::default());
    let graphs: Vec<&String> = bundle.manifest().graphs.keys().collect();
    assert!(graphs.len() > 2);
    let mut engines = Vec::new();
    for _ in 0..2 {
        for name in &graphs {
            let weights = &bundle.signature(name).unwrap().weights;
            engines.push(loader.load(name, &bundle.graph(name).unwrap(), weights).unwrap());
        }
    }
    let all = graphs.iter().flat_map(|name| &bundle.signature(name).unwrap().weights);
    let distinct: std::collections::BTreeSet<_> = all.collect();
    assert_eq!(uploads.lock().unwrap().len(), distinct.len());
}

#[test]
fn nodes_that_compute_elsewhere_are_refused_unless_they_may() {
    let subject = plain("C");
    let bundle = portable(&subject);
    let weights = &bundle.signature("decoder").unwrap().weights;
    let elsewhere = || {
        let mut host = Host::new();
        host.provider = "SomeExecutionProvider";
        host
    };
    let load = |options: BoundOptions| {
        let loader = Bound::new(runtime(), bundle.weights().clone(), elsewhere(), options);
        loader.load("decoder", &bundle.graph("decoder").unwrap(), weights).map(drop).map_err(|e| e.to_string())
    };
    let error = load(BoundOptions::default()).unwrap_err();
    for part in ["graph 'decoder'", "SomeExecutionProvider has no kernel for", "Attention", "--allow-fallback"] {
        assert!(error.contains(part), "{part}: {error}");
    }
    // The arithmetic on lengths is not what is wrong.
    assert!(!error.contains("Shape") && !error.contains("Unsqueeze"), "{error}");
    load(BoundOptions { allow_fallback: true, ..BoundOptions::default() }).unwrap();
}

#[test]
fn memory_of_the_host_is_not_updated_in_place() {
    let subject = plain("C");
    let bundle = portable(&subject);
    let weights = &bundle.signature("decoder").unwrap().weights;
    let loader = Host::new().loader(bundle.weights().clone(), BoundOptions::default());
    let mut engine = loader.load("decoder", &bundle.graph("decoder").unwrap(), weights).unwrap();
    let (input, output) = ("past_key_values.0.key", "present.0.key");
    let mut slots = [InPlace { input, output, shape: &[1, 1, 1, 1], data: Memory::F32(&mut [0.0]) }];
    let error = engine.run(&[], &mut slots, &[]).unwrap_err().to_string();
    assert!(error.contains(input) && error.contains("host"), "{error}");
}
