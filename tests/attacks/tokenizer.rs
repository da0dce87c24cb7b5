//! Tokenizers and chat templates that lie. What they contain reaches a library of somebody else; it must not bring the
//! program down.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use accordion::checkpoint::{ChatMessage, Tokenizer};
use proptest::prelude::*;
use serde_json::{Value, json};
use tempfile::TempDir;

fn honest() -> Value {
    let byte_level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    json!({
        "version": "1.0", "truncation": null, "padding": null, "normalizer": null,
        "added_tokens": [{"id": 4, "content": "<|end|>", "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": true}],
        "pre_tokenizer": byte_level, "decoder": byte_level,
        "post_processor": {"type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<|end|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<|end|>": {"id": "<|end|>", "ids": [4], "tokens": ["<|end|>"]}}},
        "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2, "\u{120}": 3}, "merges": [["a", "b"]]},
    })
}

fn folder(files: &[(&str, &[u8])]) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    for (name, bytes) in files {
        std::fs::write(dir.path().join(name), bytes).unwrap();
    }
    dir
}

fn open(tokenizer: &[u8]) -> Result<Tokenizer, String> {
    Tokenizer::open(folder(&[("tokenizer.json", tokenizer)]).path(), 5).map_err(|e| e.to_string())
}

#[test]
fn the_honest_one_encodes() {
    let tokenizer = open(honest().to_string().as_bytes()).unwrap();
    assert_eq!(tokenizer.encode("ab a", true).unwrap(), [4, 2, 3, 0]);
}

#[test]
fn files_that_are_no_tokenizers() {
    for text in ["", "{}", "[]", "null", "{\"version\": \"1.0\"}", "{\"version\":\"1.0\",\"model\":{\"type\":\"BPE\"}}"]
    {
        let error = open(text.as_bytes()).expect_err(text);
        assert!(error.contains("tokenizer.json"), "{text}: {error}");
    }
    assert!(open(b"\xff\xfe").unwrap_err().contains("tokenizer.json"));
    assert!(open("[".repeat(200_000).as_bytes()).unwrap_err().contains("tokenizer.json"));
    let missing = Tokenizer::open(folder(&[]).path(), 5).unwrap_err().to_string();
    assert!(missing.contains("tokenizer.json"), "{missing}");
}

#[test]
fn special_tokens_and_templates_that_are_none() {
    let honest = honest().to_string();
    for (name, text, part) in [
        ("tokenizer_config.json", "[", "tokenizer_config.json"),
        ("tokenizer_config.json", "[]", "`the file` in"),
        ("tokenizer_config.json", "{\"bos_token\": 3}", "`bos_token`"),
        ("tokenizer_config.json", "{\"eos_token\": {\"text\": \"x\"}}", "`eos_token`"),
        ("tokenizer_config.json", "{\"chat_template\": \"{% for %}\"}", "the chat template of"),
        ("chat_template.jinja", "{{", "chat_template.jinja"),
    ] {
        let dir = folder(&[("tokenizer.json", honest.as_bytes()), (name, text.as_bytes())]);
        let error = Tokenizer::open(dir.path(), 5).unwrap_err().to_string();
        assert!(error.contains(part), "{error}");
    }
    let dir = folder(&[("tokenizer.json", honest.as_bytes()), ("chat_template.jinja", b"\xff")]);
    assert!(Tokenizer::open(dir.path(), 5).unwrap_err().to_string().contains("chat_template.jinja"));
    let error = open(honest.as_bytes()).unwrap().prompt_affixes(None, "?").unwrap_err().to_string();
    assert!(error.contains("there is none"), "{error}");
}

#[test]
fn templates_that_never_end_or_eat_memory() {
    for template in [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}",
        "{{ range(100000000) | list }}",
        "{{ '%1000000000s' | format('x') }}",
        "{{ '{:1000000000}'.format('x') }}",
        "{{ 'x' * 1000000000000 }}",
    ] {
        let honest = honest().to_string();
        let dir = folder(&[("tokenizer.json", honest.as_bytes()), ("chat_template.jinja", template.as_bytes())]);
        let tokenizer = Tokenizer::open(dir.path(), 5).unwrap();
        let error = tokenizer.render_chat(&[ChatMessage::new("user", "x")], true).err();
        let error = error.unwrap_or_else(|| panic!("{template} must be refused")).to_string();
        assert!(error.contains("chat_template.jinja"), "{error}");
    }
}

#[test]
fn files_that_contradict_themselves() {
    let mut undefined = honest();
    undefined["post_processor"]["special_tokens"] = json!({});
    let refusal = open(undefined.to_string().as_bytes()).map(|t| t.encode("a", true).unwrap_err().to_string());
    let refusal = refusal.unwrap_or_else(|at_open| at_open);
    assert!(refusal.contains("tokenizer.json"), "{refusal}");
    let broken = honest().to_string().replacen("\"decoder\":{", "\"decoder\":{,", 1);
    assert!(open(broken.as_bytes()).unwrap_err().contains("tokenizer.json"));
}

proptest! {
    #[test]
    fn spoiled_tokenizers_work_or_are_refused(
        edits in proptest::collection::vec((0..1000_usize, prop_oneof![any::<u8>(), b'0'..=b'9', b'a'..=b'z']), 1..4),
    ) {
        let mut bytes = honest().to_string().into_bytes();
        for (at, byte) in edits {
            let at = at % bytes.len();
            bytes[at] = byte;
        }
        if let Ok(tokenizer) = open(&bytes)
            && let Ok(ids) = tokenizer.encode("ab<|end|> a", true)
        {
            let _ = tokenizer.decode(&ids, false);
        }
    }
}
