//! Who takes part: ways of reading a context.

use super::EvalError;
use super::task::{Sample, Settings};
use crate::pipeline::compress::{Compression, Significance};
use crate::pipeline::prompt::PromptIds;
use accordion_calibration::significance::SignificanceTable;
use serde::Serialize;
use serde_json::Value;
use sha2::{Digest, Sha256};
use std::borrow::Cow;

/// A way of reading a context.
#[derive(Debug, Clone, PartialEq)]
pub struct Contender {
    name: String,
    compression: Compression,
    last: Option<usize>,
    up_to: Option<usize>,
}

impl Contender {
    /// By a method, called by its word.
    pub fn method(compression: Compression) -> Self {
        Self { name: compression.method().to_owned(), compression, last: None, up_to: None }
    }

    /// All of it, as it is, however long; only in cases of at most `up_to` tokens if that is given.
    pub fn plain(up_to: Option<usize>) -> Self {
        Self { up_to, ..Self::method(Compression::Plain { allow_overlong: true }) }
    }

    /// The last `tokens` of the prompt, as they are: what the rest is worth shows against this.
    pub fn last(tokens: usize) -> Self {
        Self { name: format!("last:{tokens}"), last: Some(tokens), ..Self::plain(None) }
    }

    /// The same, called otherwise: another one has its name.
    #[must_use]
    pub fn called(self, name: String) -> Self {
        Self { name, ..self }
    }

    /// Its name: a method, or `last:N`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// How it reads.
    pub fn compression(&self) -> &Compression {
        &self.compression
    }

    /// Whether it takes part in cases of `length` tokens.
    pub fn takes(&self, length: usize) -> bool {
        self.up_to.is_none_or(|longest| length <= longest)
    }

    /// What decides its results. Widths are no part of it: they decide memory and time.
    pub fn settings(&self) -> Settings {
        match &self.compression {
            Compression::Plain { .. } => Settings::new(),
            Compression::Homer(homer) => {
                let mut settings = described(&homer.settings);
                let significance = match &homer.significance {
                    None => "none".to_owned(),
                    Some(Significance::Uncalibrated) => "uncalibrated".to_owned(),
                    Some(Significance::Table(table)) => table_hash(table),
                };
                settings.insert("significance".to_owned(), significance);
                settings
            }
            Compression::Rcc(rcc) => described(&rcc.settings),
            Compression::SharedLlm(shared) => {
                let mut settings = described(&shared.settings);
                settings.insert("policy".to_owned(), format!("{:?}", shared.policy));
                settings
            }
        }
    }

    /// What it reads of the sample's prompt.
    ///
    /// # Errors
    ///
    /// The last tokens are too few to hold what has to be read in any case.
    pub fn prompt<'s>(&self, sample: &'s Sample) -> Result<Cow<'s, PromptIds>, EvalError> {
        let prompt = &sample.prompt;
        let Some(last) = self.last.filter(|&last| last < prompt.lengths().total()) else {
            return Ok(Cow::Borrowed(prompt));
        };
        let all = prompt.concatenated();
        let (lead, suffix) = (sample.lead.min(prompt.prefix.len()), prompt.suffix.len());
        if last <= lead + suffix {
            let expected = format!("more than the {} tokens that stand around the context", lead + suffix);
            return Err(EvalError::setting("--against", &self.name, expected));
        }
        let context = all[all.len() - (last - lead)..all.len() - suffix].to_vec();
        Ok(Cow::Owned(PromptIds { prefix: all[..lead].to_vec(), context, suffix: prompt.suffix.clone() }))
    }
}

/// The fields of a method's settings, as names and values.
fn described(settings: &impl Serialize) -> Settings {
    let Ok(Value::Object(fields)) = serde_json::to_value(settings) else { return Settings::new() };
    fields.into_iter().filter(|(_, value)| !value.is_null()).map(|(name, value)| (name, value.to_string())).collect()
}

/// Another table has another hash, wherever it was read from.
fn table_hash(table: &SignificanceTable) -> String {
    let mut digest = Sha256::new();
    for layer in 0..table.num_layers() {
        for score in table.bias(layer) {
            digest.update(score.to_le_bytes());
        }
    }
    format!("{:x}", digest.finalize())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::eval::Goal;
    use crate::pipeline::compress::Homer;
    use accordion_graphs::plan::homer::HomerSettings;

    fn sample(lead: usize) -> Sample {
        let prompt = PromptIds { prefix: vec![1, 2], context: vec![3, 4, 5, 6], suffix: vec![7, 8] };
        Sample { prompt, lead, goal: Goal::Continue { expected: vec![9] }, marked: Vec::new() }
    }

    #[test]
    fn the_last_tokens_keep_the_lead_and_the_suffix() {
        let read = |last, lead| Contender::last(last).prompt(&sample(lead)).unwrap().concatenated();
        assert_eq!(read(6, 2), [1, 2, 5, 6, 7, 8]);
        assert_eq!(read(6, 0), [3, 4, 5, 6, 7, 8]);
        assert_eq!(read(7, 1), [1, 3, 4, 5, 6, 7, 8]);
        assert_eq!(read(8, 2), [1, 2, 3, 4, 5, 6, 7, 8]);
        assert_eq!(read(9000, 0), [1, 2, 3, 4, 5, 6, 7, 8]);
        let message = Contender::last(4).prompt(&sample(2)).unwrap_err().to_string();
        assert_eq!(message, "--against is last:4, expected more than the 4 tokens that stand around the context");
    }

    #[test]
    fn settings_tell_runs_apart() {
        let settings =
            HomerSettings { max_chunk_len: 40, max_initial_chunk_len: None, target_len: 40, layers_warmup: 2 };
        let homer = |settings, significance| {
            Contender::method(Compression::Homer(Homer { settings, significance, width: 1 })).settings()
        };
        let one = homer(settings, Some(Significance::Uncalibrated));
        assert_eq!(one["max_chunk_len"], "40");
        assert_eq!(one["significance"], "uncalibrated");
        assert!(!one.contains_key("max_initial_chunk_len"));
        assert_ne!(homer(HomerSettings { target_len: 30, ..settings }, Some(Significance::Uncalibrated)), one);
        assert_ne!(homer(settings, None), one);
    }

    #[test]
    fn plain_stops_where_it_is_told_to() {
        assert!(Contender::plain(None).takes(1 << 20));
        assert!(Contender::plain(Some(10)).takes(10) && !Contender::plain(Some(10)).takes(11));
        assert!(Contender::last(10).takes(11));
    }
}
