//! Sequences over an engine that keeps their rows, against those over the decoder whose cache grows.

use super::engines;
use super::host_steps::Manner;
use super::steps::{Decoded, FED, single, state_of, stepping};
use super::subject::one_of_each;
use accordion::bundle::Bundle;
use accordion::checkpoint::Tokenizer;
use accordion::pipeline::decode::{Continuation, DECODER_STEP, Sequence};
use accordion::pipeline::generate::{GenerationSettings, Recompression, generate};
use accordion::pipeline::sampling::SamplingSettings;
use accordion::pipeline::{ContextState, Engines, PipelineError};
use accordion::precision::Recipe;
use accordion::tensor::Tensor;
use accordion::verify::linears::LinearCheck;
use accordion::verify::quantized::weights_of;
use accordion_graphs::blocks::Target;
use serde_json::json;

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

/// A tokenizer that has a word for every one of `count` tokens.
fn words(count: usize) -> (tempfile::TempDir, Tokenizer) {
    let vocab: serde_json::Map<_, _> = (0..count).map(|id| (format!("w{id}"), json!(id))).collect();
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
        "pre_tokenizer": {"type": "WhitespaceSplit"}, "post_processor": null, "decoder": null,
        "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "w0"},
    });
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("tokenizer.json"), tokenizer.to_string()).unwrap();
    let tokenizer = Tokenizer::open(dir.path(), count).unwrap();
    (dir, tokenizer)
}

#[test]
fn a_text_is_the_same_over_an_engine_that_keeps_the_rows() {
    for subject in one_of_each() {
        let bundle = subject.exported(Recipe::fp32(), Target::Portable);
        let (_dir, tokenizer) = words(bundle.architecture().vocab_size());
        let (compression, prompt) = subject.compression();
        let settings = GenerationSettings {
            sampling: SamplingSettings { temperature: 0.8, top_k: None, top_p: 0.9, seed: 7 },
            stop_strings: Vec::new(),
            max_tokens: 24,
            keep_first: true,
            continuation: Continuation::Next,
            max_positions: 100_000,
        };
        for every in [None, Some(7)] {
            let recompression = every.map(|every| Recompression { compression: &compression, prompt: &prompt, every });
            let text = |mut engines: Engines<'_>| {
                let state = state_of(&mut engines, &subject);
                let mut nothing = |_: accordion::pipeline::generate::Event<'_>| {};
                generate(&mut engines, &tokenizer, &state, &settings, recompression, &mut nothing).unwrap()
            };
            let expected = text(engines(&bundle, false));
            let (stepwise, log) = stepping(&bundle, Manner::Keeps);
            let found = text(stepwise);
            assert_eq!(found.token_ids, expected.token_ids, "{}, {every:?}", subject.name);
            assert_eq!((found.text, found.stop), (expected.text, expected.stop), "{}", subject.name);
            let log = log.lock().unwrap();
            // The first token comes with the state, and those before a compression are not fed.
            let compressed = every.map_or(0, |every| (found.token_ids.len() - 1) / every);
            assert_eq!(log.steps, found.token_ids.len() - 1 - compressed, "{}", subject.name);
            assert_eq!((log.loaded, log.capacities.len()), (1, 1 + compressed), "{}", subject.name);
        }
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
    let message = |result: Result<Tensor, PipelineError>| result.map_err(|error| error.to_string());
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
