//! Reading the fields of a JSON object that somebody else wrote: every refusal names the file and the field.

use super::error::CheckpointError;
use serde_json::{Map, Value};
use std::path::Path;

/// A JSON object and where it came from.
#[derive(Clone, Copy)]
pub(crate) struct Fields<'a> {
    object: &'a Map<String, Value>,
    /// Prefix of field names in messages, with its dot.
    scope: &'a str,
    path: &'a Path,
}

impl<'a> Fields<'a> {
    /// The fields of `value`, which must be an object; `scope` (`"rope_scaling."`) precedes their names in messages.
    pub(crate) fn of(value: &'a Value, scope: &'a str, path: &'a Path) -> Result<Self, CheckpointError> {
        match value.as_object() {
            Some(object) => Ok(Self { object, scope, path }),
            None => Err(CheckpointError::Field {
                path: path.to_owned(),
                field: match scope.trim_end_matches('.') {
                    "" => "the file".to_owned(),
                    name => name.to_owned(),
                },
                found: shown(value),
                expected: "an object".to_owned(),
            }),
        }
    }

    pub(crate) fn path(&self) -> &'a Path {
        self.path
    }

    /// What precedes the names of fields in messages.
    pub(crate) fn scope(&self) -> &'a str {
        self.scope
    }

    /// Names of all fields.
    pub(crate) fn names(&self) -> impl Iterator<Item = &'a str> {
        self.object.keys().map(String::as_str)
    }

    /// The field's value; `null` counts as absent, as it does in Python's `None`.
    pub(crate) fn get(&self, name: &str) -> Option<&'a Value> {
        self.object.get(name).filter(|value| !value.is_null())
    }

    /// The value of the field, which must be there.
    pub(crate) fn required<T>(
        &self,
        name: &str,
        read: impl FnOnce(&Self, &str) -> Result<Option<T>, CheckpointError>,
    ) -> Result<T, CheckpointError> {
        read(self, name)?.ok_or_else(|| self.missing(name))
    }

    pub(crate) fn missing(&self, name: &str) -> CheckpointError {
        CheckpointError::MissingField { path: self.path.to_owned(), field: format!("{}{name}", self.scope) }
    }

    /// The error for a field whose value is not what was `expected`.
    pub(crate) fn wrong(&self, name: &str, expected: impl Into<String>) -> CheckpointError {
        CheckpointError::Field {
            path: self.path.to_owned(),
            field: format!("{}{name}", self.scope),
            found: self.object.get(name).map_or_else(|| "absent".to_owned(), shown),
            expected: expected.into(),
        }
    }

    /// The error for a value that may be right but is not known; `what` begins with the field's name.
    pub(crate) fn unsupported(&self, what: &str, found: &str, supported: &str) -> CheckpointError {
        CheckpointError::Unsupported {
            what: format!("{}{what}", self.scope),
            found: found.to_owned(),
            path: self.path.to_owned(),
            supported: supported.to_owned(),
        }
    }

    pub(crate) fn text(&self, name: &str) -> Result<Option<&'a str>, CheckpointError> {
        self.get(name).map(|value| value.as_str().ok_or_else(|| self.wrong(name, "a string"))).transpose()
    }

    pub(crate) fn flag(&self, name: &str) -> Result<Option<bool>, CheckpointError> {
        self.get(name).map(|value| value.as_bool().ok_or_else(|| self.wrong(name, "true or false"))).transpose()
    }

    /// A whole number from 1 to `most`.
    pub(crate) fn count(&self, name: &str, most: usize) -> Result<Option<usize>, CheckpointError> {
        self.get(name)
            .map(|value| {
                let number = value.as_u64().and_then(|n| usize::try_from(n).ok());
                number
                    .filter(|n| (1..=most).contains(n))
                    .ok_or_else(|| self.wrong(name, format!("a whole number from 1 to {most}")))
            })
            .transpose()
    }

    /// A whole number below `limit`: an id, an index.
    pub(crate) fn index(&self, name: &str, limit: usize) -> Result<Option<usize>, CheckpointError> {
        self.get(name)
            .map(|value| {
                let number = value.as_u64().filter(|&n| n < limit as u64);
                number.map(|n| n as usize).ok_or_else(|| self.wrong(name, format!("a whole number below {limit}")))
            })
            .transpose()
    }

    /// A finite number that `accept`s; `expected` describes those.
    pub(crate) fn number(
        &self,
        name: &str,
        expected: &str,
        accept: impl Fn(f64) -> bool,
    ) -> Result<Option<f64>, CheckpointError> {
        self.get(name)
            .map(|value| {
                value
                    .as_f64()
                    .filter(|&x| x.is_finite() && accept(x))
                    .ok_or_else(|| self.wrong(name, format!("a finite number {expected}")))
            })
            .transpose()
    }

    /// A number above zero.
    pub(crate) fn positive(&self, name: &str) -> Result<Option<f64>, CheckpointError> {
        self.number(name, "above 0", |x| x > 0.0)
    }
}

/// A value as messages show it: never longer than a line.
pub(crate) fn shown(value: &Value) -> String {
    const LONGEST: usize = 80;
    let text = value.to_string();
    match text.char_indices().nth(LONGEST) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text,
    }
}
