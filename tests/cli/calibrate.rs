//! `accordion calibrate`.

use super::tiny::{LONG, Tiny};
use accordion_calibration::significance::SignificanceTable;

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
        (with(2, "nowhere"), "nowhere/config.json: No such file"),
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
