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

impl ModelIdentity {
    /// The first property in which the two differ: its name, its value here and its value there.
    pub(crate) fn difference<'a>(&'a self, other: &'a Self) -> Option<(&'static str, &'a str, &'a str)> {
        let pairs =
            [("the model", &self.fingerprint, &other.fingerprint), ("the rotary embedding", &self.rope, &other.rope)];
        pairs.into_iter().find(|(_, here, there)| here != there).map(|(what, a, b)| (what, a.as_str(), b.as_str()))
    }
}
