//! `accordion calibrate`.

use super::tiny::{LONG, Tiny};
use accordion::bundle::Bundle;
use accordion::checkpoint::Checkpoint;
use accordion::reference::llama::Llama;
use accordion::reference::plain;
use accordion::tensor::Tensor;
use accordion_calibration::ranges::RangeTable;
use accordion_calibration::significance::SignificanceTable;
use accordion_graphs::architecture::Architecture;
use std::collections::BTreeMap;

const BASE: [&str; 9] =
    ["calibrate", "significance", "checkpoint", "--text", "text.txt", "--windows", "6", "--window-len", "32"];

fn tiny() -> Tiny {
    let tiny = Tiny::new();
    std::fs::write(tiny.path("text.txt"), LONG.repeat(20)).unwrap();
    tiny
}

#[test]
fn the_same_seed_gives_the_same_file() {
    let tiny = tiny();
    let bytes = |arguments: &[&str], out: &str| {
        tiny.succeed(&[&BASE[..], arguments, &["-o", out]].concat());
        std::fs::read(tiny.path(out)).unwrap()
    };
    let first = bytes(&["--seed", "3"], "a.safetensors");
    assert_eq!(bytes(&["--seed", "3"], "b.safetensors"), first);
    assert_ne!(bytes(&["--seed", "4"], "c.safetensors"), first);

    let table = SignificanceTable::load(&tiny.path("a.safetensors")).unwrap();
    assert_eq!((table.num_layers(), table.num_distances(), table.windows()), (5, 32, 6));
    assert_eq!(table.measured_distance(), 30, "the first token of a window is not measured");
    assert_eq!(table.provenance().seed, 3);
    assert_eq!(table.provenance().window_tokens, 32);
    assert_eq!(table.provenance().text_sha256.len(), 64);
}

/// One window is the whole text, and near distances are not smoothed.
#[test]
fn entries_are_the_references_logits_by_distance() {
    let tiny = tiny();
    let text = &LONG[..24];
    std::fs::write(tiny.path("text.txt"), text).unwrap();
    tiny.succeed(&[&BASE[..5], &["--windows", "1", "--window-len", "24", "-o", "table.safetensors"]].concat());
    let table = SignificanceTable::load(&tiny.path("table.safetensors")).unwrap();

    let checkpoint = Checkpoint::open(tiny.checkpoint()).unwrap();
    let Architecture::Llama(arch) = checkpoint.architecture() else { panic!("not a Llama") };
    let model = Llama::load(arch, |name| checkpoint.tensor(name)).unwrap();
    let ids = checkpoint.tokenizer().unwrap().encode(text, false).unwrap();
    let positions: Vec<i64> = (0..24).collect();
    let mut taps = BTreeMap::<String, Tensor>::new();
    plain::forward(&model, &ids, &positions, &mut model.empty_cache(), &mut taps).unwrap();
    let width = arch.head_dim;
    for layer in 0..arch.num_layers {
        let [q, k] = ["q", "k"].map(|part| taps[&format!("layers.{layer}.attn.{part}")].to_f32());
        // Row `row` of head `head` of `[24, heads * width]`.
        let at = |heads: usize, head: usize, row: usize| {
            let start = (row * heads + head) * width;
            start..start + width
        };
        for distance in 0..=16 {
            let score = |head: usize| {
                let group = head * arch.num_kv_heads / arch.num_heads;
                let (q, k) = (&q[at(arch.num_heads, head, 23)], &k[at(arch.num_kv_heads, group, 23 - distance)]);
                q.iter().zip(k).map(|(q, k)| q * k).sum::<f32>() / (width as f32).sqrt()
            };
            let expected = (0..arch.num_heads).map(score).fold(f32::NEG_INFINITY, f32::max);
            let found = table.bias(layer)[distance];
            assert!(
                (found - expected).abs() < 1e-4,
                "layer {layer}, distance {distance}: {found}, expected {expected}"
            );
        }
    }
}

#[test]
fn text_may_come_from_standard_input() {
    let tiny = tiny();
    let mut arguments = BASE;
    tiny.succeed(&[&arguments[..], &["-o", "a.safetensors"]].concat());
    arguments[4] = "-";
    let text = LONG.repeat(20);
    let piped = tiny.accordion(&[&arguments[..], &["-o", "b.safetensors", "--json"]].concat(), text.as_bytes());
    let report: serde_json::Value = serde_json::from_slice(&piped.stdout).unwrap();
    assert_eq!(report["schema"], "accordion.calibrate/1");
    let [a, b] = ["a.safetensors", "b.safetensors"].map(|name| std::fs::read(tiny.path(name)).unwrap());
    assert!(a == b);
}

#[test]
fn mistakes_get_one_message_and_leave_no_file() {
    let tiny = tiny();
    std::fs::write(tiny.path("binary"), [0xff]).unwrap();
    std::fs::write(tiny.path("few.txt"), "few").unwrap();
    let with = |at: usize, value: &'static str| {
        let mut arguments = BASE.to_vec();
        arguments[at] = value;
        arguments
    };
    for (arguments, expected) in [
        (with(2, "nowhere"), "there is no folder or file nowhere"),
        (with(4, "nowhere.txt"), "nowhere.txt: No such file"),
        (with(4, "binary"), "binary is not UTF-8 text: byte 0"),
        (with(4, "few.txt"), "--text few.txt: the calibration text has 3 tokens"),
        (with(6, "0"), "at least one window"),
        (with(8, "1"), "--window-len is 1, expected 2 to"),
        (with(8, "1000000"), "--window-len is 1000000"),
        ([&BASE[..], &["-o", "no/such/folder.safetensors"]].concat(), "no/such/folder.safetensors: No such file"),
    ] {
        let message = tiny.refuse(&arguments);
        assert!(message.contains(expected), "{arguments:?}: {message}");
        assert!(!tiny.path("significance.safetensors").exists());
    }
}

const RANGES: [&str; 8] = ["calibrate", "ranges", "plain", "--text", "text.txt", "--windows", "6", "--window-len"];

fn ranges(tiny: &Tiny, bundle: &str, more: &[&str], out: &str) -> RangeTable {
    let head = ["calibrate", "ranges", bundle, "--text", "text.txt", "-o", out];
    tiny.succeed(&[&head, more].concat());
    RangeTable::load(&tiny.path(out)).unwrap()
}

/// One window is the whole text.
#[test]
fn ranges_are_those_of_the_reference() {
    let tiny = tiny();
    let text = &LONG[..80];
    std::fs::write(tiny.path("text.txt"), text).unwrap();
    let table = ranges(&tiny, "plain", &["--windows", "1", "--window-len", "80", "--taps"], "table.safetensors");

    let checkpoint = Checkpoint::open(tiny.checkpoint()).unwrap();
    let Architecture::Llama(arch) = checkpoint.architecture() else { panic!("not a Llama") };
    let model = Llama::load(arch, |name| checkpoint.tensor(name)).unwrap();
    let ids = checkpoint.tokenizer().unwrap().encode(text, false).unwrap();
    let positions: Vec<i64> = (0..80).collect();
    let mut taps = BTreeMap::<String, Tensor>::new();
    plain::forward(&model, &ids, &positions, &mut model.empty_cache(), &mut taps).unwrap();

    let close = |found: f32, expected: f32| (found - expected).abs() <= 1e-4 * expected.abs().max(1.0);
    for layer in 0..arch.num_layers {
        let site = table.site(&format!("model.layers.{layer}.self_attn.o_proj.weight")).unwrap();
        let rows = taps[&format!("layers.{layer}.attn.out")].to_f32();
        let channels = arch.num_heads * arch.head_dim;
        assert_eq!((site.rows(), site.channels()), (80, channels));
        for (channel, (min, max)) in site.channel_ranges().enumerate() {
            let column = || rows.iter().skip(channel).step_by(channels).copied();
            let expected = (column().fold(f32::INFINITY, f32::min), column().fold(f32::NEG_INFINITY, f32::max));
            assert!(close(min, expected.0) && close(max, expected.1), "{layer} {channel}: {:?}", (min, max, expected));
        }
        let out = &table.taps()[&format!("layers.{layer}.out")];
        let mut expected = taps[&format!("layers.{layer}.out")].to_f32();
        if layer == arch.num_layers - 1 {
            // Of a call's rows only the last 32 go through the output matrix, and through what is just before it.
            expected.drain(..48 * arch.hidden_size);
        }
        assert_eq!((out.values, out.non_finite), (expected.len() as u64, 0));
        let absmax = expected.iter().fold(0.0, |max: f32, x| max.max(x.abs()));
        assert!(close(out.absmax, absmax), "layer {layer}: {} instead of {absmax}", out.absmax);
    }
    let shared = table.site("model.layers.0.self_attn.q_proj.weight").unwrap();
    let names = ["k_proj", "q_proj", "v_proj"].map(|part| format!("model.layers.0.self_attn.{part}.weight"));
    assert_eq!(shared.weights(), names);
    // q, k and v; o; gate and up; down of every layer, and the output matrix.
    assert_eq!(table.sites().len(), 4 * arch.num_layers + 1);
    assert_eq!(table.provenance().texts[0].starts, [0]);
}

#[test]
fn parts_make_exactly_the_table_of_a_single_run() {
    let tiny = tiny();
    std::fs::write(tiny.path("other.txt"), LONG.repeat(3)).unwrap();
    let bytes = |name: &str| std::fs::read(tiny.path(name)).unwrap();
    let settings = ["other.txt", "--windows", "7", "--window-len", "40", "--seed", "5", "--taps"];
    let whole = ranges(&tiny, "plain", &[&["--text"], &settings[..]].concat(), "whole.safetensors");
    assert_eq!((whole.windows(), whole.provenance().texts.len()), (7, 2));
    for part in ["1/3", "2/3", "3/3"] {
        let out = format!("{}.safetensors", &part[..1]);
        ranges(&tiny, "plain", &[&["--text"], &settings[..], &["--part", part]].concat(), &out);
    }
    for (order, out) in [(["1", "2", "3"], "a"), (["3", "1", "2"], "b")] {
        let tables = order.map(|part| format!("{part}.safetensors"));
        let tables = tables.each_ref().map(String::as_str);
        tiny.succeed(&[&["calibrate", "merge"], &tables[..], &["-o", out]].concat());
        assert!(bytes(out) == bytes("whole.safetensors"), "{order:?}");
    }

    let merge = |tables: [&str; 2]| tiny.refuse(&["calibrate", "merge", tables[0], tables[1], "-o", "none"]);
    let message = merge(["1.safetensors", "whole.safetensors"]);
    assert!(
        message.contains("1.safetensors and range table whole.safetensors cannot be merged: both have read"),
        "{message}"
    );
    ranges(&tiny, "plain", &["--windows", "1", "--window-len", "41"], "longer.safetensors");
    let message = merge(["1.safetensors", "longer.safetensors"]);
    assert!(
        message.contains("a tap differs") || message.contains("the length of windows differs: 40 and 41"),
        "{message}"
    );
    let message = merge(["1.safetensors", "text.txt"]);
    assert!(message.contains("range table text.txt: not a valid table"), "{message}");
    assert!(!tiny.path("none").exists());
}

#[test]
fn every_method_measures_all_its_linear_layers() {
    let tiny = tiny();
    tiny.succeed(&["convert", "sharedllm", "--from", "checkpoint", "--layers", "2", "--keep", "2", "shared"]);
    tiny.succeed(&["export", "sharedllm", "shared", "sharedllm", "--chunk-len", "16"]);
    let rcc = Tiny::rcc(|_| {});
    std::fs::write(rcc.path("text.txt"), LONG.repeat(20)).unwrap();
    for (tiny, bundle, window_tokens) in [(&tiny, "homer", 80), (&tiny, "sharedllm", 32), (&rcc, "rcc", 192)] {
        let table = ranges(tiny, bundle, &["--windows", "2", "--taps"], "table.safetensors");
        assert_eq!(table.provenance().window_tokens, window_tokens, "{bundle}");
        assert!(table.provenance().method.contains(bundle));
        let opened = Bundle::open(tiny.path(bundle)).unwrap();
        table.check_matches(&opened.manifest().identity()).unwrap();
        for weight in opened.manifest().graphs.values().flat_map(|entry| entry.signature.linears.keys()) {
            let columns = opened.weights().index().get(weight).unwrap().shape[1];
            table.expect_site(weight, columns).unwrap();
        }
    }
    // One checkpoint, one table: what plain measured serves HOMER.
    let plain = ranges(&tiny, "plain", &["--windows", "2", "--window-len", "40"], "plain.safetensors");
    let homer = ranges(&tiny, "homer", &["--windows", "2"], "homer.safetensors");
    let weights = |table: &RangeTable| table.sites().iter().map(|site| site.weights().to_vec()).collect::<Vec<_>>();
    assert_eq!(weights(&plain), weights(&homer));
    let message = tiny.refuse(&["calibrate", "merge", "plain.safetensors", "homer.safetensors", "-o", "none"]);
    assert!(message.contains("the method differs"), "{message}");
}

#[test]
fn tables_can_be_inspected() {
    let tiny = tiny();
    ranges(&tiny, "plain", &["--windows", "2", "--window-len", "40", "--taps"], "ranges.safetensors");
    tiny.succeed(&[&BASE[..], &["-o", "significance.safetensors"]].concat());
    let text = tiny.succeed(&["inspect", "ranges.safetensors"]);
    assert!(text.contains("2 of 40 tokens") && text.contains("model.layers.4.mlp.down_proj.weight"), "{text}");
    assert!(text.contains("half precision"), "{text}");
    let json = |name: &str| -> serde_json::Value {
        serde_json::from_str(&tiny.succeed(&["inspect", name, "--json"])).unwrap()
    };
    let found = json("ranges.safetensors");
    let sites = found["sites"].as_array().unwrap();
    let down = sites.iter().find(|site| site["weights"][0] == "model.layers.0.mlp.down_proj.weight").unwrap();
    assert_eq!((&found["kind"], &down["rows"]), (&"range-table".into(), &80.into()));
    assert_eq!(json("significance.safetensors")["kind"], "significance-table");
    std::fs::write(tiny.path("not.safetensors"), "nothing").unwrap();
    assert!(tiny.refuse(&["inspect", "not.safetensors"]).contains("not a valid table"));
}

#[test]
fn mistakes_with_ranges_get_one_message_and_leave_no_file() {
    let tiny = tiny();
    tiny.succeed(&["export", "plain", "checkpoint", "eight", "--precision", "weight-int8"]);
    let message = tiny.refuse(&["calibrate", "ranges", "eight", "--text", "text.txt"]);
    assert!(message.contains("its precision is weight-int8, expected fp32"), "{message}");
    std::fs::write(tiny.path("few.txt"), "few").unwrap();
    let arguments = |more: &[&'static str]| [&RANGES[..], &["40"], more].concat();
    for (arguments, expected) in [
        (arguments(&["--text", "few.txt"]), "--text few.txt: the calibration text has 3 tokens"),
        (arguments(&["--text", "nowhere.txt"]), "nowhere.txt: No such file"),
        (
            arguments(&["--text", "few.txt", "few.txt", "few.txt", "few.txt", "few.txt", "few.txt"]),
            "6 windows are too few: there are 7 texts",
        ),
        (arguments(&["--part", "1/7"]), "6 windows are too few: they are to be shared among 7"),
        (arguments(&["--part", "3/2"]), "'3/2' is not a part: expected K/N"),
        (arguments(&["--chunks", "2"]), "--chunks is for sharedllm, and the method is plain"),
        ([&RANGES[..], &["1"]].concat(), "--window-len is 1, expected 2 to"),
        ([&RANGES[..], &["1000000"]].concat(), "the longest text that the model can read"),
        (arguments(&["-o", "no/such/folder.safetensors"]), "no/such/folder.safetensors: No such file"),
    ] {
        let message = tiny.refuse(&arguments);
        assert!(message.contains(expected), "{arguments:?}: {message}");
        assert!(!tiny.path("ranges.safetensors").exists());
    }
}
