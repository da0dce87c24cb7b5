//! `accordion demo`: what it refuses before it does anything. The whole of it needs a real model, and is run by the
//! README's first command.

use crate::program::accordion;
use std::fs;

#[test]
fn a_context_that_is_none_is_a_usage_error() {
    for context in ["0", "63", "131073", "many"] {
        let run = accordion(["demo", "--context", context]);
        assert_eq!(run.code, Some(2), "{run:?}");
        assert!(run.err.contains("expected a number of tokens from 64 to 131072"), "{run:?}");
    }
}

#[test]
fn a_folder_that_cannot_be_made_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("file");
    fs::write(&file, "").unwrap();
    let out = file.join("demo");
    let message = accordion(["demo", "--out", out.to_str().unwrap()]).error();
    assert!(message.contains(out.to_str().unwrap()), "{message}");
}
