//! Decoding token by token with engines that keep the rows so far: recorded, enqueued one by one, and without a kernel to append
//! with. They need a C++ compiler, as the tests in `execution.rs`.

use super::double::{Build, Counts, Machine, build, portable, stepping};
use super::execution::workload;
use super::methods::Subject;
use accordion::cuda::Origin;
use accordion::pipeline::Engines;
use accordion::pipeline::decode::{DECODER_STEP, Sequence};
use accordion::runtime::Loader;
use accordion::runtime::steps::{StepCache, StepCall};
use accordion::tensor::Tensor;
use accordion::tensorrt::ExecutionOptions;
use accordion_graphs::plan::PromptLengths;
use std::sync::{Arc, Mutex};

/// What a sequence was fed, each the most likely behind the one before, what came of it, and the rows that were left.
#[derive(Debug, PartialEq)]
struct Decoded {
    ids: Vec<u32>,
    logits: Vec<Vec<f32>>,
    rows: Vec<Vec<f32>>,
}

fn decode(subject: &Subject, engines: &mut Engines<'_>, tokens: usize) -> Decoded {
    let mut sequence = subject.sequence(engines);
    let (mut id, mut ids, mut logits) = (3, Vec::new(), Vec::new());
    for _ in 0..tokens {
        ids.push(id);
        let row = sequence.forward(engines, &[id], 1).unwrap().to_f32();
        id = (0..row.len()).max_by(|&a, &b| row[a].total_cmp(&row[b])).unwrap() as u32;
        logits.push(row);
    }
    Decoded { ids, logits, rows: rows(&sequence) }
}

fn rows(sequence: &Sequence) -> Vec<Vec<f32>> {
    sequence.cache().unwrap().iter().flatten().map(Tensor::to_f32).collect()
}

/// As much as sums in another order differ.
fn assert_close(found: &Decoded, expected: &Decoded, name: &str) {
    assert_eq!(found.ids, expected.ids, "{name}");
    let pairs = found.logits.iter().chain(&found.rows).zip(expected.logits.iter().chain(&expected.rows));
    for (found, expected) in pairs {
        assert_eq!(found.len(), expected.len(), "{name}");
        for (found, expected) in found.iter().zip(expected) {
            assert!((found - expected).abs() <= 1e-4 * expected.abs().max(1.0), "{name}: {found}, expected {expected}");
        }
    }
}

/// Engines of `subject` with these options, and what users are told.
fn told<'b>(
    machine: &Machine,
    subject: &'b Subject,
    options: &ExecutionOptions,
) -> (Engines<'b>, Arc<Mutex<Vec<String>>>) {
    let notices = Arc::new(Mutex::new(Vec::new()));
    let heard = Arc::clone(&notices);
    let loader = machine.loader(&subject.bundle, options).unwrap();
    let loader = loader.telling(move |notice: &str| heard.lock().unwrap().push(notice.to_owned()));
    (Engines::new(&subject.bundle, Box::new(loader)), notices)
}

/// Bit by bit what the same graphs give with caches on the host, and what the decoder whose cache grows gives.
#[test]
#[ignore = "needs a C++ compiler"]
fn every_method_decodes_what_onnx_runtime_does() {
    let machine = Machine::open();
    for subject in Subject::all() {
        let growing = decode(&subject, &mut Engines::new(&subject.bundle, Box::new(portable(&subject.bundle))), 8);
        let expected = decode(&subject, &mut stepping(&subject.bundle), 8);
        assert_close(&expected, &growing, &subject.name);
        let before = machine.counts();
        let (mut engines, notices) = told(&machine, &subject, &machine.options());
        assert!(decode(&subject, &mut engines, 8) == expected, "{}", subject.name);
        assert_eq!((machine.counts() - before).records, 1, "{}", subject.name);
        drop(engines);
        assert_eq!((machine.live(), notices.lock().unwrap().len()), (0, 0), "{}", subject.name);
    }
}

/// From the third on, a token is one launch: its integers go up, one row of logits comes down, and nothing else happens.
#[test]
#[ignore = "needs a C++ compiler"]
fn a_recorded_step_is_one_launch() {
    let machine = Machine::open();
    for subject in [Subject::plain(), Subject::homer(), Subject::sharedllm("q4")] {
        let mut engines = machine.engines(&subject.bundle);
        let mut sequence = subject.sequence(&mut engines);
        let step = |sequence: &mut Sequence, engines: &mut Engines<'_>| {
            let before = machine.counts();
            sequence.forward(engines, &[5], 1).unwrap();
            machine.counts() - before
        };
        let first = step(&mut sequence, &mut engines);
        assert_eq!((first.calls, first.kernels, first.graphs, first.records), (1, 1, 0, 0), "{}", subject.name);
        let always = Counts { to_device: 24, to_host: subject.logits_bytes(), graphs: 1, ..Counts::default() };
        assert_eq!(step(&mut sequence, &mut engines), Counts { records: 1, ..always }, "{}", subject.name);
        for i in 2..8 {
            assert_eq!(step(&mut sequence, &mut engines), always, "{} {i}", subject.name);
        }
    }
}

/// More tokens than there was room for: the rows move, and what was recorded is recorded anew.
#[test]
#[ignore = "needs a C++ compiler"]
fn more_room_is_another_record() {
    let machine = Machine::open();
    let subject = Subject::plain();
    let expected = decode(&subject, &mut stepping(&subject.bundle), 100);
    let before = machine.counts();
    let mut engines = machine.engines(&subject.bundle);
    assert!(decode(&subject, &mut engines, 100) == expected);
    let counts = machine.counts() - before;
    assert!(counts.records >= 2 && counts.graphs == 100 - counts.records, "{counts:?}");
    drop(engines);
    assert_eq!(machine.live(), 0);
}

#[test]
#[ignore = "needs a C++ compiler"]
fn steps_that_cannot_be_recorded_are_enqueued_and_that_is_said_once() {
    let machine = Machine::open();
    machine.refuse_to_record(true);
    for subject in [Subject::plain(), Subject::sharedllm("q4")] {
        let expected = decode(&subject, &mut stepping(&subject.bundle), 5);
        let (mut engines, notices) = told(&machine, &subject, &machine.options());
        for _ in 0..2 {
            assert!(decode(&subject, &mut engines, 5) == expected, "{}", subject.name);
        }
        let mut sequence = subject.sequence(&mut engines);
        sequence.forward(&mut engines, &[1], 1).unwrap();
        let before = machine.counts();
        sequence.forward(&mut engines, &[2], 1).unwrap();
        let (to_device, to_host) = (24, subject.logits_bytes());
        let one = Counts { to_device, to_host, calls: 1, kernels: 1, ..Counts::default() };
        assert_eq!(machine.counts() - before, one, "{}", subject.name);
        let notices = notices.lock().unwrap();
        let [notice] = notices.as_slice() else { panic!("{notices:?}") };
        assert!(notice.contains("graph 'decoder_step'") && notice.contains("a layer cannot be recorded"), "{notice}");
    }
    machine.refuse_to_record(false);
}

/// Switched off when engines are loaded, and between two sequences, and in the middle of one.
#[test]
#[ignore = "needs a C++ compiler"]
fn steps_are_not_recorded_where_that_is_switched_off() {
    let machine = Machine::open();
    let subject = Subject::homer();
    let expected = decode(&subject, &mut stepping(&subject.bundle), 5);
    let off = ExecutionOptions { cuda_graphs: false, ..machine.options() };
    let (mut engines, notices) = told(&machine, &subject, &off);
    let before = machine.counts();
    // The flag stands above the switch.
    engines.record_steps(true);
    assert!(decode(&subject, &mut engines, 5) == expected);
    let counts = machine.counts() - before;
    assert_eq!((counts.records, counts.graphs, counts.kernels), (0, 0, 5));
    assert!(notices.lock().unwrap().is_empty());

    let mut engines = machine.engines(&subject.bundle);
    let mut sequence = subject.sequence(&mut engines);
    let mut graphs = Vec::new();
    for on in [true, true, true, false, false, true, false] {
        engines.record_steps(on);
        let before = machine.counts();
        sequence.forward(&mut engines, &[7], 1).unwrap();
        graphs.push((machine.counts() - before).graphs);
    }
    assert_eq!(graphs, [0, 1, 1, 0, 0, 1, 0]);
    let mut host = stepping(&subject.bundle);
    let mut same = subject.sequence(&mut host);
    for _ in 0..7 {
        same.forward(&mut host, &[7], 1).unwrap();
    }
    assert!(rows(&sequence) == rows(&same));
}

/// Each has memory of its own, whatever else runs in between and however much memory that takes for itself.
#[test]
#[ignore = "needs a C++ compiler"]
fn sequences_that_live_at_once_are_apart() {
    let machine = Machine::open();
    for subject in [Subject::plain(), Subject::rcc("neox_r32")] {
        let both = |engines: &mut Engines<'_>| {
            let mut sequences = [subject.sequence(engines), subject.sequence(engines)];
            let mut logits = Vec::new();
            for i in 0..6 {
                for (sequence, id) in sequences.iter_mut().zip([i, 9 - i]) {
                    logits.push(sequence.forward(engines, &[id], 1).unwrap().to_f32());
                }
                // Several tokens at once are read by another engine, which takes more memory than any before.
                let mut read = Sequence::new(engines, 0).unwrap();
                logits.push(read.forward(engines, &[1, 2, 3], 1).unwrap().to_f32());
            }
            let [first, second] = sequences.each_ref().map(rows);
            // And the rows of a sequence go back to where they grow, and from there into steps again.
            let mut again = sequences.into_iter().next().unwrap();
            logits.push(again.forward(engines, &[4, 5], 1).unwrap().to_f32());
            logits.extend((0..4).map(|id| again.forward(engines, &[id], 1).unwrap().to_f32()));
            (logits, first, second, rows(&again))
        };
        let expected = both(&mut stepping(&subject.bundle));
        let mut engines = machine.engines(&subject.bundle);
        assert!(both(&mut engines) == expected, "{}", subject.name);
        drop(engines);
        assert_eq!(machine.live(), 0);
    }
}

/// Without the kernel the cache grows as before, and the user hears why.
#[test]
#[ignore = "needs a C++ compiler"]
fn caches_grow_where_nothing_can_append() {
    let (machine, subject) = (Machine::open(), Subject::plain());
    let expected = decode(&subject, &mut Engines::new(&subject.bundle, Box::new(portable(&subject.bundle))), 4);
    let empty = tempfile::tempdir().unwrap();
    let options =
        ExecutionOptions { kernels: Some(Origin::Folder(empty.path().to_owned())), ..ExecutionOptions::default() };
    let (mut engines, notices) = told(&machine, &subject, &options);
    for _ in 0..2 {
        assert!(decode(&subject, &mut engines, 4) == expected);
    }
    let notices = notices.lock().unwrap();
    let [notice] = notices.as_slice() else { panic!("{notices:?}") };
    assert!(notice.contains("caches are copied for every token") && notice.contains("append_rows.sm_90"), "{notice}");

    // Nor is any other graph made for steps.
    let loader = machine.loader(&subject.bundle, &machine.options()).unwrap();
    assert!(loader.steps(DECODER_STEP) && !loader.steps("decoder") && !loader.steps("nothing"));
}

/// Room that was not built for says which flag of `build` to raise.
#[test]
#[ignore = "needs a C++ compiler"]
fn room_that_was_not_built_for_says_which_flag_to_raise() {
    let (machine, subject) = (Machine::open(), Subject::plain());
    let lengths = PromptLengths { prefix: 0, context: 20, suffix: 0 };
    build(&subject.bundle, Build { workload: workload(lengths), taps: false, any_length: false });
    let mut engines = machine.engines(&subject.bundle);
    let mut sequence = Sequence::new(&engines, 0).unwrap();
    let error = (0..5000).find_map(|_| sequence.forward(&mut engines, &[1], 1).err()).unwrap().to_string();
    assert!(error.contains("(capacity) of input 'past_key_values.0.key'"), "{error}");
    assert!(error.contains("--context or --new-tokens"), "{error}");
}

/// What does not fit is refused, and named.
#[test]
#[ignore = "needs a C++ compiler"]
fn calls_that_do_not_fit_are_refused() {
    const ALL: [&str; 3] = ["input_ids", "position_ids", "past_length"];
    let (machine, subject) = (Machine::open(), Subject::plain());
    let mut engines = machine.engines(&subject.bundle);
    let state = subject.state(&mut engines);
    let rows: Vec<&Tensor> = state.cache.iter().flatten().collect();
    let names = |what: &str| -> Vec<String> {
        (0..state.cache.len()).flat_map(|l| ["key", "value"].map(|part| format!("{what}.{l}.{part}"))).collect()
    };
    let (past, new) = (names("past_key_values"), names("new"));
    let pairs = past.iter().zip(&new).zip(&rows);
    let caches: Vec<StepCache<'_>> = pairs.map(|((input, output), rows)| StepCache { input, output, rows }).collect();
    let pairs = past.iter().zip(&new).zip(&rows).enumerate();
    let output = |i: usize, new| if i == 0 { "logits" } else { new };
    let wrong: Vec<StepCache<'_>> =
        pairs.map(|(i, ((input, new), rows))| StepCache { input, output: output(i, new), rows }).collect();
    let call = |caches| StepCall {
        changing: &ALL,
        length: "past_length",
        fixed: &[],
        caches,
        capacity: state.len() + 1,
        outputs: &["logits"],
    };
    let right = || call(&caches);
    let engine = engines.get(DECODER_STEP, &[]).unwrap();
    for (call, expected) in [
        (StepCall { changing: &ALL[..2], ..right() }, "past_length"),
        (StepCall { length: "length", ..right() }, "no input 'length'"),
        (StepCall { changing: &["ids"], ..right() }, "no input 'ids'"),
        (StepCall { outputs: &["scores"], ..right() }, "no output 'scores'"),
        (StepCall { capacity: state.len() - 1, ..right() }, "at most"),
        (call(&wrong), "output 'logits' is"),
        (call(&[]), "no cache"),
    ] {
        let error = engine.steps(&call).map(|steps| steps.is_some()).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
    let mut steps = engine.steps(&right()).unwrap().unwrap();
    let length = state.len() as i64;
    for (values, expected) in [
        (&[1, length][..], "2 values, expected 3"),
        (&[1, length, length + 1], "with room for"),
        (&[1, length, -1], "with room for"),
    ] {
        let error = steps.step(values).map(|results| results.len()).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
    assert!(steps.rows(state.len() + 2).is_err());
    steps.step(&[1, length, length]).unwrap();
    for (taken, rows) in steps.rows(state.len()).unwrap().iter().zip(&rows) {
        assert_eq!(taken.to_f32(), rows.to_f32());
    }
}
