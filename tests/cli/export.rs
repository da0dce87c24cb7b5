//! `accordion export`.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use crate::program::{Run, Workspace, accordion, command};
use crate::sparse;
use crate::tiny::Tiny;
use accordion::bundle::{Bundle, Method};
use accordion_graphs::architecture::{Architecture, RopeScaling};
use std::fs;

const SMALL: &[&str] = &["--context", "100", "--max-chunk-len", "32"];

#[test]
fn the_same_export_gives_the_same_bytes() {
    let workspace = Workspace::new();
    for (method, more) in [("plain", &[][..]), ("homer", SMALL)] {
        for weights in ["link", "copy"] {
            let options: Vec<&str> = more.iter().copied().chain(["--weights", weights]).collect();
            let [first, second] = ["first", "second"].map(|which| {
                let name = format!("{method}-{weights}-{which}");
                let text = workspace.export(method, &name, &options).output();
                assert!(
                    text.contains(&format!("{method}, "))
                        && text.contains(if weights == "link" { "linked" } else { "copied" })
                );
                workspace.path(&name)
            });
            let files: Vec<_> = fs::read_dir(&first).unwrap().map(|entry| entry.unwrap().file_name()).collect();
            assert_eq!(fs::read_dir(&second).unwrap().count(), files.len());
            for file in files {
                assert_eq!(fs::read(first.join(&file)).unwrap(), fs::read(second.join(&file)).unwrap(), "{file:?}");
            }
        }
    }
}

#[test]
fn the_summary_counts_what_was_written() {
    let workspace = Workspace::new();
    let linked = workspace.export("homer", "linked", &[SMALL, &["--json"]].concat()).json("accordion.export/1");
    let copied = workspace
        .export("homer", "copied", &[SMALL, &["--json", "--weights", "copy"]].concat())
        .json("accordion.export/1");
    assert_eq!((&linked["weights"], &copied["weights"]), (&"linked".into(), &"copied".into()));
    let size = |bundle: &str, skip: &[&str]| -> u64 {
        let entries = fs::read_dir(workspace.path(bundle)).unwrap().map(|entry| entry.unwrap());
        let counted = entries.filter(|entry| !skip.contains(&entry.file_name().to_str().unwrap()));
        counted.map(|entry| entry.metadata().unwrap().len()).sum()
    };
    assert_eq!(linked["bytes_written"], size("linked", &["model.safetensors", "config.json"]));
    assert_eq!(copied["bytes_written"], size("copied", &[]));
    let bundle = Bundle::open(workspace.path("linked")).unwrap();
    assert_eq!(linked["graphs"], bundle.manifest().graphs.len());
}

#[test]
fn every_context_up_to_the_longest_gets_its_tree() {
    let workspace = Workspace::new();
    let heights = |more: &[&str]| {
        workspace.export("homer", "bundle", &[more, &["--force", "--max-chunk-len", "32"]].concat()).output();
        let bundle = Bundle::open(workspace.path("bundle")).unwrap();
        let Method::Homer { settings, tree_heights } = &bundle.manifest().method else { unreachable!() };
        (*settings, tree_heights.clone())
    };
    // Affixes of half a chunk leave room for 16 tokens: 100 take seven leaves, so eight.
    let (settings, found) = heights(&["--context", "100", "--target-len", "24", "--layers-warmup", "1"]);
    assert_eq!((settings.target_len, settings.layers_warmup), (24, 1));
    assert_eq!(found, [0, 1, 2, 3]);
    // 64 leaves of 16 would leave one empty, with just these affixes; others need a tree of the same height.
    assert_eq!(heights(&["--context", "1000"]).1, [0, 1, 2, 3, 4, 5, 6]);
    // The affixes are within the target: 24 tokens of room, five leaves, so eight.
    assert_eq!(heights(&["--context", "100", "--target-len", "8"]).1, [0, 1, 2, 3]);
}

#[test]
fn rope_scaling_can_be_replaced() {
    let workspace = Workspace::new();
    for (flag, expected) in [
        ("none", RopeScaling::None),
        ("linear=2", RopeScaling::Linear { factor: 2.0 }),
        ("dynamic=2:32", RopeScaling::Dynamic { factor: 2.0, original_max_positions: 32 }),
    ] {
        workspace.export("plain", "bundle", &["--force", "--rope-scaling", flag]).output();
        let bundle = Bundle::open(workspace.path("bundle")).unwrap();
        let Architecture::Llama(model) = &bundle.manifest().architecture else { unreachable!() };
        assert_eq!(model.rope.scaling, expected);
    }
    let error = workspace.export("plain", "other", &["--rope-scaling", "yarn=none"]).error();
    assert!(error.contains("--rope-scaling") && error.contains("none"), "{error}");
    assert!(!workspace.path("other").exists());
}

#[test]
fn what_cannot_be_exported_is_one_line_and_leaves_nothing() {
    let workspace = Workspace::new();
    let before = fs::read_dir(workspace.path("")).unwrap().count();
    for (more, word) in [
        (&["--context", "0"][..], "context length is 0"),
        (&["--context", "100", "--max-chunk-len", "1"], "max_chunk_len"),
        (&["--layers-warmup", "7"], "layers_warmup"),
        (&["--context", "18446744073709551615"], "context length"),
        (&["--table", "nowhere"], "nowhere"),
    ] {
        let error = workspace.export("homer", "bundle", more).error();
        assert!(error.contains(word), "{error}");
    }
    let error = Run::of(command().args(["export", "plain", "no-such-model"]).arg(workspace.path("bundle"))).error();
    assert!(error.contains("no-such-model") && error.contains("smollm2-135m"), "{error}");
    assert_eq!(fs::read_dir(workspace.path("")).unwrap().count(), before);
}

#[test]
fn a_sharded_model_of_seven_billion_parameters_is_exported_without_its_weights() {
    let workspace = Workspace::new();
    let checkpoint = workspace.path("large");
    fs::create_dir(&checkpoint).unwrap();
    sparse::write(&checkpoint, &sparse::large_model(), "BF16", 3);
    let mut arguments = vec!["export".into(), "homer".into(), checkpoint.into_os_string()];
    arguments.extend([workspace.path("bundle").into_os_string(), "--json".into()]);
    let summary = accordion(arguments).json("accordion.export/1");
    assert_eq!((&summary["weight_files"], &summary["weights"]), (&3.into(), &"linked".into()));
    assert!(summary["bytes_written"].as_u64().unwrap() < 5_000_000, "{summary}");
    assert_eq!(Bundle::open(workspace.path("bundle")).unwrap().weights().index().parameter_count(), 6_738_415_616);
}

#[test]
fn rcc_is_exported_with_the_settings_of_the_checkpoint_or_the_flags() {
    let tiny = Tiny::rcc(|_| {});
    let settings = |bundle: &str| match Bundle::open(tiny.path(bundle)).unwrap().manifest().method {
        Method::Rcc { settings } => settings,
        _ => unreachable!(),
    };
    let trained = settings("rcc");
    assert_eq!((trained.window, trained.ratio, trained.pairs), (64, 8, false));
    tiny.succeed(&["export", "rcc", "checkpoint", "other", "--window", "32", "--ratio", "4"]);
    let other = settings("other");
    assert_eq!((other.window, other.ratio, other.pairs), (32, 4, false));
    for (flags, expected) in [
        (&["--ratio", "7"][..], "ratio is 7, expected a divisor of the window, 64"),
        (&["--window", "0"], "window is 0"),
        // Four blocks are too few for four decoder layers of two states each.
        (&["--pairs"], "two for every decoder layer"),
    ] {
        let message = tiny.refuse(&[&["export", "rcc", "checkpoint", "bundle"], flags].concat());
        assert!(message.contains(expected), "{flags:?}: {message}");
        assert!(!tiny.path("bundle").exists());
    }
}

#[test]
fn trained_methods_need_a_checkpoint_of_theirs() {
    let workspace = Workspace::new();
    for (method, expected) in [("rcc", "an encoder and maps"), ("sharedllm", "a lower model")] {
        let error = workspace.export(method, "bundle", &[]).error();
        assert!(error.contains(expected), "{error}");
    }
    let run = workspace.export("sharedllm", "bundle", &["--keep", "1.5"]);
    assert!(run.err.contains("a fraction above 0 and up to 1.0"), "{run:?}");
}
