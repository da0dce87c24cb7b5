//! How a prompt splits between the lower and the upper model.

use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// How many chunks of the prompt's beginning the lower model reads; the upper model reads the rest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ChunkPolicy {
    /// This many chunks.
    Chunks(usize),
    /// As in fine-tuning: one less than fit into the prompt, at least one.
    FineTuning,
    /// As for `LongBench`: as many as fit while this many tokens stay for the upper model, at least one.
    LeaveRunning(usize),
}

impl ChunkPolicy {
    /// The released evaluation's on `LongBench`, as it is for most models.
    pub const LONGBENCH: Self = Self::LeaveRunning(3584);

    /// Chunks of `chunk_len` tokens for a prompt of `total` tokens.
    pub(super) fn chunks(self, total: usize, chunk_len: usize) -> usize {
        match self {
            Self::Chunks(count) => count,
            Self::FineTuning => (total / chunk_len).saturating_sub(1).max(1),
            Self::LeaveRunning(running) => (total.saturating_sub(running) / chunk_len).max(1),
        }
    }
}

impl fmt::Display for ChunkPolicy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Chunks(count) => write!(f, "{count}"),
            Self::FineTuning => f.write_str("sft"),
            Self::LeaveRunning(running) => write!(f, "longbench:{running}"),
        }
    }
}

/// No policy is called that.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("expected sft, longbench, longbench:N or N, a number of chunks from 1 on")]
pub struct UnknownPolicy;

impl FromStr for ChunkPolicy {
    type Err = UnknownPolicy;

    /// `sft`, `longbench` with or without `:N`, the tokens that stay for the upper model, or a number of chunks.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let number = |text: &str| text.parse().ok().filter(|&number| number > 0);
        let policy = match text.split_once(':') {
            None if text == "sft" => Some(Self::FineTuning),
            None if text == "longbench" => Some(Self::LONGBENCH),
            None => number(text).map(Self::Chunks),
            Some(("longbench", running)) => number(running).map(Self::LeaveRunning),
            Some(_) => None,
        };
        policy.ok_or(UnknownPolicy)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn policies_are_read_as_they_are_written() {
        for (text, policy) in [
            ("sft", ChunkPolicy::FineTuning),
            ("longbench:512", ChunkPolicy::LeaveRunning(512)),
            ("7", ChunkPolicy::Chunks(7)),
        ] {
            assert_eq!((text.parse(), policy.to_string().as_str()), (Ok(policy), text));
        }
        assert_eq!("longbench".parse(), Ok(ChunkPolicy::LONGBENCH));
        for wrong in ["", "0", "-1", "1.5", "SFT", "sft:1", "longbench:", "longbench:0", "7:8", "99999999999999999999"]
        {
            assert_eq!(wrong.parse::<ChunkPolicy>(), Err(UnknownPolicy), "{wrong}");
        }
    }
}
