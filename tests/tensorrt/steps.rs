//! Decoding token by token with engines that keep the rows so far: recorded, enqueued one by one, and without a kernel to append
//! with. They need a C++ compiler, as the tests in `execution.rs`.

use super::double::{Build, Counts, Machine, build, portable, stepping};
use super::execution::workload;
use super::goldens;
use accordion::bundle::{Bundle, MethodSettings};
use accordion::checkpoint::config_json;
use accordion::cuda::Origin;
use accordion::goldens::{HomerCase, RccCase, SharedLlmCase};
use accordion::pipeline::compress::{Compression, Homer, Significance};
use accordion::pipeline::decode::{Continuation, DECODER_STEP, Sequence};
use accordion::pipeline::prompt::PromptIds;
use accordion::pipeline::rcc::Rcc;
use accordion::pipeline::sharedllm::SharedLlm;
use accordion::pipeline::{ContextState, Engines};
use accordion::precision::Recipe;
use accordion::runtime::Loader;
use accordion::runtime::steps::{StepCache, StepCall};
use accordion::tensor::Tensor;
use accordion::tensorrt::ExecutionOptions;
use accordion::verify::golden;
use accordion_graphs::blocks::Target;
use accordion_graphs::plan::PromptLengths;
use accordion_graphs::plan::sharedllm::{ChunkPolicy, Quirks};
use std::sync::{Arc, Mutex};

/// A method with a model and a prompt, and engines for any length.
struct Subject {
    name: String,
    bundle: Bundle,
    compression: Compression,
    prompt: PromptIds,
    _folder: tempfile::TempDir,
}

impl Subject {
    fn plain() -> Self {
        let case = HomerCase::open(&goldens().join("homer/homer_C.json")).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let files = [("config.json", config_json(&case.architecture))];
        let checkpoint = golden::checkpoint(folder.path(), case.weights_path(), &files).unwrap();
        let bundle = golden::exported(&checkpoint, MethodSettings::Plain, Target::Portable, &Recipe::fp32()).unwrap();
        let context = case.context_ids.iter().copied().take(24).collect();
        let prompt = PromptIds { prefix: Vec::new(), context, suffix: Vec::new() };
        Self::built("plain", bundle, Compression::Plain { allow_overlong: true }, prompt, folder)
    }

    fn homer() -> Self {
        let case = HomerCase::open(&goldens().join("homer/homer_C.json")).unwrap();
        let (plan, folder) = (golden::homer::plan(&case).unwrap(), tempfile::tempdir().unwrap());
        let bundle = golden::homer::bundle(&case, &plan, Target::Portable, &Recipe::fp32(), folder.path()).unwrap();
        let significance = Some(Significance::Uncalibrated);
        let compression = Compression::Homer(Homer { settings: case.settings, significance, width: 1 });
        let (prefix, context) = (case.prefix_ids.clone(), case.context_ids.clone());
        let prompt = PromptIds { prefix, context, suffix: case.suffix_ids.clone() };
        Self::built("homer", bundle, compression, prompt, folder)
    }

    fn rcc(name: &str) -> Self {
        let case = RccCase::open(&goldens().join(format!("rcc/{name}.cases.safetensors"))).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let bundle = golden::rcc::bundle(&case, Target::Portable, &Recipe::fp32(), folder.path()).unwrap();
        let run = case.runs.iter().max_by_key(|run| run.text_ids.len()).unwrap();
        let (context, suffix) = (run.text_ids.clone(), run.prompt_ids.clone());
        let prompt = PromptIds { prefix: Vec::new(), context, suffix };
        let compression = Compression::Rcc(Rcc { settings: case.settings, width: 1 });
        Self::built(name, bundle, compression, prompt, folder)
    }

    fn sharedllm(name: &str) -> Self {
        let case = SharedLlmCase::open(&goldens().join(format!("sharedllm/case_{name}.json"))).unwrap();
        let (folder, quirks) = (tempfile::tempdir().unwrap(), Quirks::Faithful);
        let (weights, recipe) = (case.weights_path(), Recipe::fp32());
        let bundle =
            golden::sharedllm::bundle(&case, weights, quirks, Target::Portable, &recipe, folder.path()).unwrap();
        let policy = ChunkPolicy::Chunks(golden::sharedllm::plan(&case, quirks).unwrap().chunks);
        let compression = Compression::SharedLlm(SharedLlm { settings: case.settings(quirks), policy, width: 1 });
        let (context, suffix) = (case.context_ids.clone(), case.running_ids.clone());
        let prompt = PromptIds { prefix: Vec::new(), context, suffix };
        Self::built(name, bundle, compression, prompt, folder)
    }

    fn all() -> Vec<Self> {
        let rcc = ["neox_r32", "qwen2_r8", "mamba_pairs"].map(Self::rcc).into_iter();
        let sharedllm = ["q4", "far10"].map(Self::sharedllm).into_iter();
        [Self::plain(), Self::homer()].into_iter().chain(rcc).chain(sharedllm).collect()
    }

    fn built(
        name: &str,
        bundle: Bundle,
        compression: Compression,
        prompt: PromptIds,
        folder: tempfile::TempDir,
    ) -> Self {
        let lengths =
            PromptLengths { prefix: prompt.prefix.len(), context: prompt.context.len(), suffix: prompt.suffix.len() };
        build(&bundle, Build { workload: workload(lengths), taps: false, any_length: true });
        Self { name: name.to_owned(), bundle, compression, prompt, _folder: folder }
    }

    fn state(&self, engines: &mut Engines<'_>) -> ContextState {
        self.compression.compress(engines, &self.prompt, &mut |_, _| {}).unwrap()
    }

    /// A sequence behind the prompt, with no room for more rows.
    fn sequence(&self, engines: &mut Engines<'_>) -> Sequence {
        let state = self.state(engines);
        Sequence::continue_from(engines, &state, 0, Continuation::Next).unwrap()
    }

    fn logits_bytes(&self) -> u64 {
        4 * self.bundle.architecture().vocab_size() as u64
    }
}

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

    // Nor are there steps where no engine was built for them.
    let loader = machine.loader(&subject.bundle, &machine.options()).unwrap();
    assert!(loader.steps(DECODER_STEP) && !loader.steps("decoder") && !loader.steps("nothing"));
    let record = subject.bundle.dir().join("engines/tensorrt-11.4.0/engines.json");
    let text = std::fs::read_to_string(&record).unwrap();
    std::fs::write(&record, text.replacen("\"decoder_step\"", "\"another\"", 1)).unwrap();
    if let Ok(loader) = machine.loader(&subject.bundle, &machine.options()) {
        assert!(!loader.steps(DECODER_STEP));
    }
}

/// Room that was not built for says which flag of `build` to raise.
#[test]
#[ignore = "needs a C++ compiler"]
fn room_that_was_not_built_for_says_which_flag_to_raise() {
    let (machine, subject) = (Machine::open(), Subject::plain());
    let lengths = PromptLengths { prefix: 0, context: 20, suffix: 0 };
    build(&subject.bundle, Build { workload: workload(lengths), taps: false, any_length: false });
    let mut engines = machine.engines(&subject.bundle);
    let error = Sequence::new(&engines, 100_000).unwrap();
    drop(error);
    let mut sequence = Sequence::new(&engines, 0).unwrap();
    let error = (0..5000).find_map(|_| sequence.forward(&mut engines, &[1], 1).err()).unwrap().to_string();
    assert!(error.contains("(capacity) of input 'past_key_values.0.key'"), "{error}");
    assert!(error.contains("--context or --new-tokens"), "{error}");
}

/// What does not fit is refused, and named.
#[test]
#[ignore = "needs a C++ compiler"]
fn calls_that_do_not_fit_are_refused() {
    let (machine, subject) = (Machine::open(), Subject::plain());
    let mut engines = machine.engines(&subject.bundle);
    let state = subject.state(&mut engines);
    let names = |what: &str| -> Vec<String> {
        let layers = 0..state.cache.len();
        layers.flat_map(|l| ["key", "value"].map(|part| format!("{what}.{l}.{part}"))).collect()
    };
    let (past, new) = (names("past_key_values"), names("new"));
    let caches = |new: &'static [&'static str]| -> Vec<(String, String)> {
        let outputs = names("new").into_iter().enumerate();
        let outputs = outputs.map(|(i, name)| new.get(i).map_or(name, |name| (*name).to_owned()));
        past.iter().cloned().zip(outputs).collect()
    };
    let rows: Vec<&Tensor> = state.cache.iter().flatten().collect();
    let all = ["input_ids", "position_ids", "past_length"];
    let mut refused = |changing: &[&str], length: &str, outputs: &[&str], new: &'static [&'static str], room: usize| {
        let names = caches(new);
        let caches: Vec<StepCache<'_>> =
            names.iter().zip(&rows).map(|((input, output), &rows)| StepCache { input, output, rows }).collect();
        let call = StepCall { changing, length, fixed: &[], caches: &caches, capacity: room, outputs };
        let steps = engines.get(DECODER_STEP, &[]).unwrap().steps(&call);
        steps.map(|steps| steps.is_some()).map_err(|error| error.to_string())
    };
    assert_eq!(refused(&all, "past_length", &["logits"], &[], 64), Ok(true));
    for (found, expected) in [
        (refused(&all[..2], "past_length", &["logits"], &[], 64), "past_length"),
        (refused(&all, "length", &["logits"], &[], 64), "no input 'length'"),
        (refused(&["ids"], "ids", &["logits"], &[], 64), "no input 'ids'"),
        (refused(&all, "past_length", &["scores"], &[], 64), "no output 'scores'"),
        (refused(&all, "past_length", &["logits"], &["logits"], 64), "output 'logits' is"),
        (refused(&all, "past_length", &["logits"], &[], 3), "at most 3 rows"),
    ] {
        let found = found.unwrap_err();
        assert!(found.contains(expected), "{found}");
    }
    let _ = new;
    let call_names = caches(&[]);
    let caches: Vec<StepCache<'_>> =
        call_names.iter().zip(&rows).map(|((input, output), &rows)| StepCache { input, output, rows }).collect();
    let length = state.len() as i64;
    let call = StepCall {
        changing: &all,
        length: "past_length",
        fixed: &[],
        caches: &caches,
        capacity: state.len() + 1,
        outputs: &["logits"],
    };
    let mut steps = engines.get(DECODER_STEP, &[]).unwrap().steps(&call).unwrap().unwrap();
    for (values, expected) in [
        (vec![1, length], "2 values, expected 3"),
        (vec![1, length, length + 1], "with room for"),
        (vec![1, length, -1], "with room for"),
    ] {
        let error = steps.step(&values).map(|_| ()).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
    assert!(steps.rows(state.len() + 2).is_err());
    steps.step(&[1, length, length]).unwrap();
    let taken = steps.rows(state.len()).unwrap();
    for (taken, rows) in taken.iter().zip(&rows) {
        assert_eq!(taken.to_f32(), rows.to_f32());
    }
    drop((steps, taken));
}
