//! `accordion calibrate`.

use super::tiny::{LONG, Tiny};
use accordion::checkpoint::Checkpoint;
use accordion::reference::llama::Llama;
use accordion::reference::plain;
use accordion::tensor::Tensor;
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
