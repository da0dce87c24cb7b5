//! `accordion run`.

use super::tiny::{LONG, SETTINGS, SHORT, Tiny};
use accordion::bundle::{ExportOptions, MethodSettings, WeightStorage, export, tree_heights};
use accordion::checkpoint::Checkpoint;
use accordion::precision::Recipe;
use accordion_graphs::blocks::Target;
use serde_json::{Deserializer, Value};

/// A model of random weights is as good uncalibrated.
const NO_TABLE: [&str; 2] = ["--table", "none"];

/// What `run` prints with `--json`, one value per question.
fn reports(tiny: &Tiny, bundle: &str, context: &str, arguments: &[&str]) -> Vec<Value> {
    let plain = bundle == "plain" || arguments.contains(&"plain");
    let table: &[&str] = if plain { &[] } else { &NO_TABLE };
    let limit: &[&str] = if arguments.contains(&"--max-tokens") { &[] } else { &["--max-tokens", "20"] };
    let head = ["run", bundle, "--json", "--context", context];
    let text = tiny.succeed(&[&head[..], table, limit, arguments].concat());
    Deserializer::from_str(&text).into_iter().map(Result::unwrap).collect()
}

/// As [`reports`], for one question.
fn report(tiny: &Tiny, bundle: &str, context: &str, arguments: &[&str]) -> Value {
    let mut all = reports(tiny, bundle, context, &[&["--prompt", " Who?"], arguments].concat());
    assert_eq!(all.len(), 1);
    all.remove(0)
}

fn ids(report: &Value) -> Vec<u64> {
    report["token_ids"].as_array().unwrap().iter().map(|id| id.as_u64().unwrap()).collect()
}

#[test]
fn the_same_arguments_give_the_same_text() {
    let tiny = Tiny::new();
    let run = |arguments: &[&str]| ids(&report(&tiny, "homer", "long.txt", arguments));
    let greedy = run(&[]);
    assert_eq!(greedy.len(), 20);
    assert_eq!(run(&[]), greedy);
    let sampled = run(&["--temperature", "5", "--seed", "7"]);
    assert_ne!(sampled, greedy);
    assert_eq!(run(&["--temperature", "5", "--seed", "7"]), sampled);
    assert_ne!(run(&["--temperature", "5", "--seed", "8"]), sampled);
    assert_eq!(run(&["--temperature", "5", "--top-k", "1"]), greedy);
}

#[test]
fn the_report_says_what_was_done() {
    let tiny = Tiny::new();
    let report = report(&tiny, "homer", "long.txt", &[]);
    assert_eq!(report["schema"], "accordion.run/1");
    assert_eq!(report["method"], "homer");
    assert_eq!(report["lengths"]["context"], LONG.len());
    assert_eq!(report["lengths"]["suffix"], " Who?".len());
    // Each of the root's children keeps half of the 35 that the suffix leaves of a chunk.
    assert_eq!(report["tokens_kept"], 17 + 17 + 5);
    assert_eq!(report["tokens"], 20);
    assert_eq!(report["stop"]["type"], "max_tokens");
    assert_eq!(report["token_seconds"].as_array().unwrap().len(), 20);
}

#[test]
fn the_width_does_not_change_the_text() {
    let tiny = Tiny::new();
    let one = ids(&report(&tiny, "homer", "long.txt", &["--width", "1"]));
    for width in ["2", "max"] {
        assert_eq!(ids(&report(&tiny, "homer", "long.txt", &["--width", width])), one);
    }
}

#[test]
fn where_nothing_is_pruned_homer_is_plain() {
    let tiny = Tiny::new();
    let homer = report(&tiny, "homer", "short.txt", &[]);
    assert_eq!(homer["tokens_kept"], SHORT.len() + " Who?".len());
    for (bundle, arguments) in [("plain", &[][..]), ("homer", &["--method", "plain"])] {
        let plain = report(&tiny, bundle, "short.txt", arguments);
        assert_eq!(plain["method"], "plain");
        assert_eq!(ids(&plain), ids(&homer));
    }
    assert_ne!(ids(&report(&tiny, "plain", "long.txt", &[])), ids(&report(&tiny, "homer", "long.txt", &[])));
}

#[test]
fn questions_do_not_see_each_other() {
    let tiny = Tiny::new();
    let several = |bundle: &str, context: &str, questions: &[&str]| -> Vec<Vec<u64>> {
        let arguments: Vec<&str> = questions.iter().flat_map(|question| ["--prompt", *question]).collect();
        reports(&tiny, bundle, context, &arguments).iter().map(ids).collect()
    };
    let [first, second, third] = [" Who?", "\nWhere was it?", "!"];
    // Everything is kept: a question is answered as if it had been the only one.
    for (bundle, context) in [("homer", "short.txt"), ("plain", "short.txt"), ("plain", "long.txt")] {
        let together = several(bundle, context, &[first, second, third]);
        for (answer, question) in together.iter().zip([first, second, third]) {
            assert_eq!(several(bundle, context, &[question]), [answer.as_slice()], "{bundle} {context} {question:?}");
        }
    }
    // The first question decides what is kept, the others nothing.
    let together = several("homer", "long.txt", &[first, second, third]);
    assert_eq!(several("homer", "long.txt", &[first]), together[..1]);
    assert_eq!(several("homer", "long.txt", &[first, third]), [together[0].clone(), together[2].clone()]);
    assert_ne!(together[1], together[2]);
}

#[test]
fn texts_end_at_stop_strings_end_tokens_and_limits() {
    let tiny = Tiny::new();
    let free = report(&tiny, "homer", "long.txt", &[]);
    let text = free["text"].as_str().unwrap();
    let middle: String = text.chars().skip(10).take(2).collect();
    let middle = middle.as_str();
    let stopped = report(&tiny, "homer", "long.txt", &["--stop", "never", "--stop", middle]);
    assert_eq!(stopped["text"], text[..text.find(middle).unwrap()]);
    assert_eq!(stopped["stop"]["type"], "stop_string");
    assert_eq!(stopped["stop"]["text"], middle);

    let three = report(&tiny, "homer", "long.txt", &["--max-tokens", "3"]);
    assert_eq!(ids(&three), ids(&free)[..3]);

    let end = ids(&free)[5];
    let ending = Tiny::with(|arch| arch.eos_token_ids = vec![end as u32], None);
    let ended = report(&ending, "homer", "long.txt", &[]);
    let first = ids(&free).iter().position(|&id| id == end).unwrap();
    assert_eq!(ids(&ended), ids(&free)[..=first]);
    assert_eq!(ended["stop"]["type"], "eos");
    assert!(text.starts_with(ended["text"].as_str().unwrap()));

    // The last suffix position is 3 leaves down, not the number of tokens.
    let short = Tiny::with(|arch| arch.max_positions = 40, None);
    let full = report(&short, "homer", "long.txt", &[]);
    let last = LONG.len().div_ceil(4) + " Who?".len() - 1;
    assert_eq!(full["tokens"], 40 - (last + 1));
    assert_eq!(full["stop"]["type"], "context_full");
}

#[test]
fn the_first_token_does_not_depend_on_where_the_second_is_placed() {
    let tiny = Tiny::new();
    let next = report(&tiny, "homer", "long.txt", &["--continuation", "next"]);
    let off = report(&tiny, "homer", "long.txt", &["--continuation", "off-by-one"]);
    assert_eq!(ids(&next)[0], ids(&off)[0]);
    assert_eq!(ids(&off).len(), 20);
    let full = Tiny::with(|arch| arch.max_positions = 40, None);
    let [next, off] = ["next", "off-by-one"].map(|at| report(&full, "homer", "long.txt", &["--continuation", at]));
    assert_eq!(off["tokens"].as_u64(), next["tokens"].as_u64().map(|n| n + 1), "one position more is free");
}

#[test]
fn the_past_is_compressed_again() {
    let tiny = Tiny::new();
    let without = ids(&report(&tiny, "homer", "long.txt", &[]));
    let rare = report(&tiny, "homer", "long.txt", &["--recompress-every", "20"]);
    assert_eq!(ids(&rare), without, "the limit is reached first");

    // What comes after a compression is what a run over the same past begins with.
    let every = ids(&report(&tiny, "homer", "long.txt", &["--recompress-every", "8"]));
    assert_eq!(every[..8], without[..8]);
    let past = report(&tiny, "homer", "long.txt", &["--max-tokens", "8"]);
    let past: Vec<char> = format!("{LONG} Who?{}", past["text"].as_str().unwrap()).chars().collect();
    let (context, suffix) = past.split_at(past.len() - " Who?".len());
    std::fs::write(tiny.path("past.txt"), String::from_iter(context)).unwrap();
    let again = reports(&tiny, "homer", "past.txt", &["--prompt", &String::from_iter(suffix)]);
    assert_eq!(again[0]["lengths"]["context"], LONG.len() + 8);
    assert_eq!(every[8..16], ids(&again[0])[..8]);

    // Positions start anew each time, so that the text may become longer than the model's range.
    let short = Tiny::with(|arch| arch.max_positions = 45, None);
    let long = report(&short, "homer", "long.txt", &["--recompress-every", "4", "--max-tokens", "45"]);
    assert_eq!(long["tokens"], 45);
}

#[test]
fn a_context_may_come_from_standard_input() {
    let tiny = Tiny::new();
    let arguments = ["run", "homer", "--context", "-", "--prompt", " Who?", "--max-tokens", "20", "--json"];
    let piped = tiny.accordion(&[&arguments[..], &NO_TABLE].concat(), LONG.as_bytes());
    let piped: Value = serde_json::from_slice(&piped.stdout).unwrap();
    assert_eq!(ids(&piped), ids(&report(&tiny, "homer", "long.txt", &[])));
}

#[test]
fn text_is_printed_as_it_is() {
    let tiny = Tiny::new();
    let arguments = ["run", "homer", "--quiet", "--context", "long.txt", "--max-tokens", "20"];
    let questions = ["--prompt", " Who?", "--prompt", "!"];
    let output = tiny.accordion(&[&arguments[..], &NO_TABLE, &questions].concat(), b"");
    let texts = reports(&tiny, "homer", "long.txt", &questions);
    let expected: Vec<&str> = texts.iter().map(|report| report["text"].as_str().unwrap()).collect();
    assert_eq!(String::from_utf8_lossy(&output.stdout), expected.join("\n") + "\n");
    assert!(output.stderr.is_empty());
}

#[test]
fn the_chat_template_is_used_unless_it_is_not_wanted() {
    let template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<a>";
    let tiny = Tiny::with(|_| {}, Some(template));
    let lengths = |arguments: &[&str]| {
        let lengths = report(&tiny, "homer", "long.txt", arguments)["lengths"].clone();
        ["prefix", "context", "suffix"].map(|part| lengths[part].as_u64().unwrap() as usize)
    };
    assert_eq!(lengths(&[]), ["<user>".len(), LONG.len(), "\n\n Who?<a>".len()]);
    assert_eq!(lengths(&["--system", "Be."])[0], "<system>Be.<user>".len());
    assert_eq!(lengths(&["--no-chat-template"]), [0, LONG.len(), " Who?".len()]);
    assert_eq!(lengths(&["--no-chat-template", "--prefix", "abc"])[0], 3);
    let message = tiny.refuse(&["run", "homer", "--context", "long.txt", "--prompt", "?", "--prefix", "a"]);
    assert!(message.contains("--prefix has no place in the chat template"), "{message}");
}

#[test]
fn a_table_is_taken_from_the_flag_then_from_the_bundle() {
    let tiny = Tiny::new();
    std::fs::write(tiny.path("text.txt"), LONG.repeat(20)).unwrap();
    let calibrate = |seed: &str, out: &str| {
        let arguments = ["calibrate", "significance", "checkpoint", "--text", "text.txt", "--windows", "4"];
        tiny.succeed(&[&arguments[..], &["--window-len", "40", "--seed", seed, "-o", out]].concat());
    };
    let run = |arguments: &[&str]| {
        let head = ["run", "homer", "--context", "long.txt", "--prompt", " Who?", "--json", "--max-tokens", "20"];
        ids(&serde_json::from_str(&tiny.succeed(&[&head[..], arguments].concat())).unwrap())
    };
    let head = ["run", "homer", "--context", "long.txt", "--prompt", " Who?"];
    let message = tiny.refuse(&head);
    assert!(message.contains("accordion calibrate significance") && message.contains("--table"), "{message}");

    calibrate("1", "table.safetensors");
    let flag = run(&["--table", "table.safetensors"]);
    assert_ne!(flag, run(&["--table", "none"]));
    let settings = SETTINGS;
    let checkpoint = Checkpoint::open(tiny.checkpoint()).unwrap();
    let tree_heights = tree_heights(5, settings, LONG.len()).unwrap();
    let method = MethodSettings::Homer { settings, tree_heights, significance: Some(tiny.path("table.safetensors")) };
    let options = ExportOptions {
        method,
        target: Target::OrtCpu,
        weights: WeightStorage::Link,
        recipe: Recipe::fp32(),
        force: true,
    };
    export(&checkpoint, &tiny.path("homer"), &options).unwrap();
    assert_eq!(run(&[]), flag);

    let message = tiny.refuse(&[&head[..], &["--max-chunk-len", "60"]].concat());
    assert!(message.contains("distances"), "{message}");
    let other = Tiny::with(|arch| arch.rope.theta = 1234.0, None);
    std::fs::copy(tiny.path("table.safetensors"), other.path("table.safetensors")).unwrap();
    let message = other.refuse(&[&head[..], &["--table", "table.safetensors"]].concat());
    assert!(message.contains("was made for the model"), "{message}");
}

#[test]
fn mistakes_get_one_message() {
    let tiny = Tiny::with(|arch| arch.max_positions = 60, None);
    std::fs::write(tiny.path("empty.txt"), "").unwrap();
    std::fs::write(tiny.path("binary"), [b'a', b'b', 0xff, 0]).unwrap();
    let run = |bundle, context, arguments: &[&str]| {
        let head = ["run", bundle, "--context", context, "--prompt"];
        let question: &[&str] = if arguments.contains(&"--prompt") { &arguments[1..] } else { &[" Who?"] };
        let rest = if arguments.contains(&"--prompt") { &[][..] } else { arguments };
        tiny.refuse(&[&head[..], question, rest].concat())
    };
    let long_question = "?".repeat(50);
    for (bundle, context, arguments, expected) in [
        ("nowhere", "long.txt", &[][..], "nowhere/bundle.json: there is no such file"),
        ("checkpoint", "long.txt", &[], "checkpoint/bundle.json: there is no such file"),
        ("homer", "nowhere.txt", &[], "nowhere.txt: No such file"),
        ("homer", ".", &[], ".: Is a directory"),
        ("homer", "empty.txt", &[], "--context empty.txt: the context is empty"),
        ("homer", "binary", &[], "binary is not UTF-8 text: byte 2"),
        ("homer", "long.txt", &["--prompt", ""], "the question is empty"),
        ("homer", "long.txt", &["--prompt", &long_question], "max_chunk_len is 40, expected more than prefix + suffix"),
        ("homer", "long.txt", &["--table", "nowhere.safetensors"], "nowhere.safetensors: No such file"),
        ("homer", "long.txt", &["--table", "long.txt"], "long.txt: not a valid table"),
        (
            "homer",
            "long.txt",
            &["--table", "none", "--max-chunk-len", "60", "--layers-warmup", "0"],
            "the bundle has no graph",
        ),
        ("homer", "long.txt", &["--temperature", "-1"], "--temperature"),
        ("homer", "long.txt", &["--max-tokens", "0"], "--max-tokens is 0"),
        ("homer", "long.txt", &["--top-p", "2"], "--top-p is 2"),
        ("homer", "long.txt", &["--top-k", "0"], "--top-k is 0"),
        ("homer", "long.txt", &["--stop", ""], "--stop is empty"),
        ("homer", "long.txt", &["--width", "0"], "--width"),
        ("homer", "long.txt", &["--recompress-every", "0"], "--recompress-every"),
        ("homer", "long.txt", &["--allow-overlong"], "--allow-overlong is for --method plain"),
        ("homer", "long.txt", &["--system", "s"], "--system needs a chat template"),
        (
            "homer",
            "long.txt",
            &["--table", "none", "--recompress-every", "9", "--max-tokens", "900"],
            "--recompress-every 9: compressing again after",
        ),
        ("plain", "long.txt", &[], "longer than the 60 positions the model was trained for"),
        ("plain", "long.txt", &["--method", "homer"], "was exported for plain"),
        ("plain", "short.txt", &["--table", "none"], "--table is for homer"),
        ("plain", "short.txt", &["--recompress-every", "5"], "--recompress-every needs a method that compresses"),
    ] {
        let message = run(bundle, context, arguments);
        assert!(message.contains(expected), "{bundle} {context} {arguments:?}: {message}");
    }
    let overlong = reports(&tiny, "plain", "long.txt", &["--prompt", "?", "--allow-overlong"]);
    assert_eq!(overlong[0]["tokens"], 20);
}

/// As [`report`], for the RCC bundle.
fn rcc(tiny: &Tiny, arguments: &[&str]) -> Value {
    let head = ["run", "rcc", "--json", "--context", "long.txt", "--max-tokens", "20"];
    let question: &[&str] = if arguments.contains(&"--prompt") { &[] } else { &["--prompt", " Who?"] };
    serde_json::from_str(&tiny.succeed(&[&head[..], question, arguments].concat())).unwrap()
}

#[test]
fn rcc_answers_behind_slots() {
    let tiny = Tiny::rcc(|_| {});
    let report = rcc(&tiny, &[]);
    assert_eq!((&report["method"], &report["tokens_kept"]), (&"rcc".into(), &(16 + " Who?".len()).into()));
    assert_eq!(ids(&report).len(), 20);
    for width in ["2", "max"] {
        assert_eq!(ids(&rcc(&tiny, &["--width", width])), ids(&report));
    }
    let plain = rcc(&tiny, &["--method", "plain", "--allow-overlong"]);
    assert_eq!(plain["tokens_kept"], LONG.len() + " Who?".len());
    assert_ne!(ids(&plain), ids(&report));
    // The decoder's range is no limit, and exceeding it is said.
    let short = Tiny::rcc(|arch| arch.max_positions = 20);
    let head = ["run", "rcc", "--context", "long.txt", "--max-tokens", "20", "--json", "--prompt", " Who?"];
    let output = short.accordion(&head, b"");
    let (found, said) = (serde_json::from_slice(&output.stdout).unwrap(), String::from_utf8_lossy(&output.stderr));
    assert_eq!(ids(&found), ids(&report));
    assert!(said.contains("16 slots and a prompt of 5 tokens are more than the 20 positions"), "{said}");
}

#[test]
fn the_first_token_of_rcc_ends_the_text_only_if_repaired() {
    let free = ids(&rcc(&Tiny::rcc(|_| {}), &[]));
    let ending = Tiny::rcc(|arch| arch.eos_token_ids = vec![free[0] as u32]);
    let kept = ids(&rcc(&ending, &[]));
    assert_eq!(kept[0], free[0]);
    assert!(kept.len() > 1, "{kept:?}");
    assert_eq!(kept, ids(&rcc(&ending, &["--eos", "faithful"])));
    assert_eq!(ids(&rcc(&ending, &["--eos", "repaired"])), free[..1]);
}

#[test]
fn instructions_are_compressed_with_the_context() {
    let tiny = Tiny::rcc(|_| {});
    let opening = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n";
    std::fs::write(tiny.path("both.txt"), format!("{LONG}\n\nWho?")).unwrap();
    for (mode, prompt) in [("reconstruct", opening.to_owned()), ("manual", format!("{opening}Who?"))] {
        let instructed = rcc(&tiny, &["--prompt", "Who?", "--instruction", mode]);
        let arguments = ["run", "rcc", "--json", "--context", "both.txt", "--max-tokens", "20", "--prompt", &prompt];
        let by_hand: Value = serde_json::from_str(&tiny.succeed(&arguments)).unwrap();
        assert_eq!(ids(&instructed), ids(&by_hand), "{mode}");
        assert_eq!(instructed["lengths"], by_hand["lengths"]);
        // These weights do not speak the format: without a turn of the assistant all of the text is the answer.
        assert_eq!(instructed["text"], by_hand["text"]);
    }
}

#[test]
fn prompts_that_rcc_does_not_take_are_cut_or_refused() {
    let tiny = Tiny::rcc(|_| {});
    let long = "?".repeat(600 * 8 + 3);
    let head = ["run", "rcc", "--context", "long.txt", "--max-tokens", "2", "--json", "--prompt", &long];
    let message = tiny.refuse(&head);
    assert!(message.contains("prompt length is 4803, expected at most 600 x ratio = 4800"), "{message}");
    let cut = rcc(&tiny, &["--prompt", &long, "--truncate-prompt"]);
    assert_eq!(cut["lengths"]["suffix"], 4800);
    for (arguments, expected) in [
        (&["--prompt", ""][..], "the question is empty"),
        (&["--prompt", "?", "--system", "s"], "rcc uses none"),
        (&["--prompt", "?", "--prompt", "!", "--instruction", "manual"], "ask one at a time"),
        (&["--prompt", "?", "--table", "none"], "--table is for homer"),
        (&["--prompt", "?", "--method", "plain", "--eos", "repaired"], "--eos is for rcc"),
    ] {
        let message = tiny.refuse(&[&["run", "rcc", "--context", "long.txt"], arguments].concat());
        assert!(message.contains(expected), "{arguments:?}: {message}");
    }
}

/// Lengths at which RCC's published code stops, or takes another way than for others.
#[test]
fn contexts_of_every_length_are_compressed_by_rcc() {
    let tiny = Tiny::rcc(|_| {});
    let text = LONG.repeat(3);
    let run = |length: usize| {
        std::fs::write(tiny.path("long.txt"), &text[..length]).unwrap();
        rcc(&tiny, &[])
    };
    // Proper divisors of the window, with which the published code ends in an error; what does not divide it; the window,
    // a token more, and a multiple.
    for (length, segments) in [(1, 1), (16, 1), (32, 1), (23, 1), (64, 1), (65, 2), (128, 3)] {
        let report = run(length);
        assert_eq!(
            (&report["tokens_kept"], ids(&report).len()),
            (&(8 * segments + " Who?".len()).into(), 20),
            "{length}"
        );
    }
    // What is repeated until it fills the window is compressed as if it had been written so.
    std::fs::write(tiny.path("long.txt"), text[..16].repeat(4)).unwrap();
    assert_eq!(ids(&rcc(&tiny, &[])), ids(&run(16)));
    std::fs::write(tiny.path("long.txt"), "").unwrap();
    let refused = tiny.refuse(&["run", "rcc", "--context", "long.txt", "--prompt", "?"]);
    assert!(refused.contains("the context is empty"), "{refused}");
}

#[test]
fn rcc_is_not_exported_with_settings_that_contradict_each_other() {
    let tiny = Tiny::rcc(|_| {});
    for (arguments, expected) in [
        (&["--ratio", "3"][..], "ratio is 3, expected a divisor of the window, 64"),
        (&["--ratio", "0"], "ratio is 0"),
        (&["--ratio", "128"], "ratio is 128, expected a divisor of the window, 64"),
        (&["--window", "0"], "window is 0"),
        (&["--window", "100"], "ratio is 8, expected a divisor of the window, 100"),
        (&["--pairs"], "number of encoder layers is 4, expected at least 8, two for every decoder layer"),
    ] {
        let refused = tiny.refuse(&[&["export", "rcc", "checkpoint", "refused"], arguments].concat());
        assert!(refused.contains(expected), "{arguments:?}: {refused}");
        assert!(!tiny.path("refused").exists());
    }
}
