//! Which model a table was made for.

use serde::{Deserialize, Serialize};

/// The model that a table holds for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ModelIdentity {
    /// Fingerprint of the checkpoint.
    pub fingerprint: String,
    /// Rotary embedding in effect, base and scaling, in a canonical spelling: it is compared as text.
    pub rope: String,
}

/// A table was made for another model or another rotary scaling.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{table} was made for {what} {found}, expected {expected}: calibrate again for this model")]
pub struct ModelMismatch {
    /// The table.
    pub table: String,
    /// The property that differs.
    pub what: &'static str,
    /// Its value in the table.
    pub found: String,
    /// Its value in the model.
    pub expected: String,
}

impl ModelIdentity {
    /// The first property in which the two differ: its name, its value here and its value there.
    pub(crate) fn difference<'a>(&'a self, other: &'a Self) -> Option<(&'static str, &'a str, &'a str)> {
        let pairs =
            [("the model", &self.fingerprint, &other.fingerprint), ("the rotary embedding", &self.rope, &other.rope)];
        pairs.into_iter().find(|(_, here, there)| here != there).map(|(what, a, b)| (what, a.as_str(), b.as_str()))
    }

    /// Checks that `table`, which was made for this model, was made for `model`.
    pub(crate) fn check(&self, table: &str, model: &Self) -> Result<(), ModelMismatch> {
        self.difference(model).map_or(Ok(()), |(what, found, expected)| {
            let (table, found, expected) = (table.to_owned(), found.to_owned(), expected.to_owned());
            Err(ModelMismatch { table, what, found, expected })
        })
    }
}
