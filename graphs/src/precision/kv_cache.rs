//! What numbers the decoder's cache holds.

use serde::{Deserialize, Serialize};

/// What numbers keys and values are held in while tokens are decoded behind a context.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum KvCache {
    /// Single precision.
    #[default]
    Fp32,
    /// 8-bit integers; every channel of every head counts in units of its own.
    Int8,
}

impl KvCache {
    /// The word for it, in flags, bundles and reports.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Fp32 => "fp32",
            Self::Int8 => "int8",
        }
    }

    /// Whether it is the one that bundles have unless another is asked for.
    pub fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

impl std::fmt::Display for KvCache {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(self.name())
    }
}
