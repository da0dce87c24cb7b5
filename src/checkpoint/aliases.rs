//! `aliases.json`: further names of a checkpoint's tensors, so that a model which begins as a part of another one can
//! link to its weights instead of copying them.
//!
//! ```json
//! {
//!   "schema": "accordion.aliases/1",
//!   "tensors": { "encoder.embed_tokens.weight": "model.embed_tokens.weight" }
//! }
//! ```
//!
//! The file is ours; nothing else reads it. Each entry is a new name and the name of a tensor in the folder's files.

use super::error::CheckpointError;
use super::files;
use super::safetensors::Entries;
use accordion_graphs::weights::WeightIndex;
use serde::Deserialize;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::Path;

/// The file's name.
pub(crate) const ALIASES: &str = "aliases.json";
const SCHEMA: &str = "accordion.aliases/1";
/// A thousand layers of twenty tensors take two megabytes.
const MAX_ALIASES: u64 = 8 << 20;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    schema: String,
    tensors: Entries<String>,
}

/// Gives the tensors of `weights` the further names that the file `path` lists. Returns the file's content.
///
/// # Errors
///
/// The file is malformed, a name is taken, or a name is given to what is no tensor of a file.
pub(crate) fn add(path: &Path, weights: &mut WeightIndex) -> Result<Vec<u8>, CheckpointError> {
    let text = files::read_bounded(path, MAX_ALIASES)?;
    let File { schema, tensors: Entries(tensors) } =
        serde_json::from_slice(&text).map_err(|source| CheckpointError::Json { path: path.to_owned(), source })?;
    if schema != SCHEMA {
        return Err(CheckpointError::Unsupported {
            what: "schema".to_owned(),
            found: schema,
            path: path.to_owned(),
            supported: SCHEMA.to_owned(),
        });
    }
    for (alias, target) in tensors {
        weights.alias(&alias, &target).map_err(|problem| CheckpointError::Alias {
            path: path.to_owned(),
            alias,
            target,
            problem,
        })?;
    }
    Ok(text)
}

/// The content of a file that [`add`] reads.
pub(crate) fn to_json(tensors: &BTreeMap<String, String>) -> Value {
    json!({ "schema": SCHEMA, "tensors": tensors })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use accordion_graphs::dtype::DType;
    use accordion_graphs::weights::WeightRef;

    fn add_text(text: &str) -> Result<WeightIndex, String> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(ALIASES);
        std::fs::write(&path, text).unwrap();
        let weight = WeightRef { file: 0, offset: 0, len: 4, shape: vec![1], dtype: DType::F32 };
        let entries = ["a", "b"].map(|name| (name.to_owned(), weight.clone()));
        let mut weights = WeightIndex::new(vec!["w".into()], entries.into());
        add(&path, &mut weights).map_err(|e| e.to_string())?;
        Ok(weights)
    }

    #[test]
    fn what_is_written_reads_back() {
        let tensors = BTreeMap::from([("x", "a"), ("y", "a"), ("z", "b")].map(|(x, y)| (x.to_owned(), y.to_owned())));
        let weights = add_text(&to_json(&tensors).to_string()).unwrap();
        assert_eq!(weights.aliases(), &tensors);
        assert_eq!(weights.stored().count(), 2);
    }

    #[test]
    fn refusals_name_the_file_and_both_names() {
        let with = |tensors: &str| format!(r#"{{"schema":"{SCHEMA}","tensors":{tensors}}}"#);
        for (text, message) in [
            (with(r#"{"x":"c"}"#), "calls tensor c 'x': there is no tensor that it could mean"),
            (with(r#"{"a":"b"}"#), "calls tensor b 'a': a tensor of that name is there already"),
            (with(r#"{"x":"a","y":"x"}"#), "calls tensor x 'y': what it means is an alias itself"),
            // Whichever of the two comes first.
            (with(r#"{"y":"a","x":"y"}"#), "calls tensor y 'x'"),
            (with(r#"{"x":"a","x":"b"}"#), "tensor x appears twice"),
            (with(r#"{"x":1}"#), "invalid type"),
            (with("[]"), "an object by tensor name"),
            (r#"{"schema":"accordion.aliases/2","tensors":{}}"#.to_owned(), "schema 'accordion.aliases/2'"),
            (r#"{"tensors":{}}"#.to_owned(), "missing field `schema`"),
            (format!(r#"{{"schema":"{SCHEMA}","tensors":{{}},"prefixes":{{}}}}"#), "unknown field `prefixes`"),
            (" ".repeat(1 + MAX_ALIASES as usize), "at most"),
        ] {
            let found = add_text(&text).unwrap_err();
            assert!(found.contains(message) && found.contains(ALIASES), "{message}: {found}");
        }
    }
}
