//! When a generation ends, and which of its text may be shown before that is known.

use serde::Serialize;
use std::ops::Range;

/// Why a generation ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "type", content = "text", rename_all = "snake_case")]
#[non_exhaustive]
pub enum StopReason {
    /// The model produced a token that ends a text.
    Eos,
    /// The text reached this stop string.
    StopString(String),
    /// As many tokens as asked for.
    MaxTokens,
    /// No position is left in the model's range.
    ContextFull,
}

/// What may end a generation.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct StopSettings {
    /// Token ids that end a text; their own text is not part of it.
    pub eos_token_ids: Vec<u32>,
    /// Whether the first token ends no text even if it is one of these: RCC's published code looks for the end from the
    /// second token on.
    pub keep_first: bool,
    /// Strings that end a text; they are not part of it.
    pub stop_strings: Vec<String>,
    /// Most tokens to generate.
    pub max_tokens: usize,
    /// Tokens for which there are positions.
    pub room: usize,
}

/// Why settings were refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum StopSettingsError {
    /// An empty stop string ends every text before it begins.
    #[error("--stop is empty, expected at least one character")]
    EmptyStopString,
    /// Nothing is to be generated.
    #[error("--max-tokens is 0, expected at least 1")]
    NoTokens,
    /// The prompt fills the model's range.
    #[error("the prompt leaves no position for a new token")]
    NoRoom,
}

/// What a token adds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Step {
    /// Text that is now certain to belong to the output.
    pub emit: String,
    /// Set with the last token.
    pub stop: Option<StopReason>,
}

/// Follows a generation token by token and decides what of its text is shown and when it ends.
///
/// Text that may still turn out to be the beginning of a stop string is held back; nothing else is. How the text is divided
/// into tokens makes no difference to what is emitted in total.
#[derive(Debug, Clone)]
pub struct StopMonitor {
    settings: StopSettings,
    generated: usize,
    /// The shortest end of the text so far that has to wait.
    held: String,
}

impl StopMonitor {
    /// Nothing generated yet.
    ///
    /// # Errors
    ///
    /// The settings stop before the first token.
    pub fn new(settings: StopSettings) -> Result<Self, StopSettingsError> {
        if settings.stop_strings.iter().any(String::is_empty) {
            return Err(StopSettingsError::EmptyStopString);
        }
        if settings.max_tokens == 0 {
            return Err(StopSettingsError::NoTokens);
        }
        if settings.room == 0 {
            return Err(StopSettingsError::NoRoom);
        }
        Ok(Self { settings, generated: 0, held: String::new() })
    }

    /// Takes the next token and the text that decoding it added (none while a character is incomplete). Of several
    /// reasons to stop, the one listed first in [`StopReason`] counts. Unless a stop string was reached, the last step
    /// also emits what was held back. Nothing may be pushed after a stop.
    pub fn push(&mut self, token: u32, text: &str) -> Step {
        self.generated += 1;
        let may_end = self.generated > usize::from(self.settings.keep_first);
        if may_end && self.settings.eos_token_ids.contains(&token) {
            return self.end(StopReason::Eos);
        }
        self.held.push_str(text);
        if let Some((stop, range)) = self.first_match() {
            let stop = Some(StopReason::StopString(stop.to_owned()));
            self.held.truncate(range.start);
            return Step { emit: std::mem::take(&mut self.held), stop };
        }
        if self.generated >= self.settings.max_tokens {
            return self.end(StopReason::MaxTokens);
        }
        if self.generated >= self.settings.room {
            return self.end(StopReason::ContextFull);
        }
        let waiting = self.held.split_off(self.held.len() - self.undecided());
        Step { emit: std::mem::replace(&mut self.held, waiting), stop: None }
    }

    /// From here on there are positions for `room` more tokens.
    pub fn renew_room(&mut self, room: usize) {
        self.settings.room = self.generated.saturating_add(room);
    }

    /// Tokens pushed so far.
    pub fn generated(&self) -> usize {
        self.generated
    }

    fn end(&mut self, reason: StopReason) -> Step {
        Step { emit: std::mem::take(&mut self.held), stop: Some(reason) }
    }

    /// The stop string that is complete first in the held text, and where; the longest of those that end there. This is the
    /// one found when text comes character by character.
    fn first_match(&self) -> Option<(&str, Range<usize>)> {
        let matches = self.settings.stop_strings.iter().filter_map(|stop| {
            let start = self.held.find(stop.as_str())?;
            Some((stop.as_str(), start..start + stop.len()))
        });
        matches.min_by_key(|(_, range)| (range.end, range.start))
    }

    /// Bytes at the end of the held text that are the beginning of a stop string.
    fn undecided(&self) -> usize {
        let beginnings =
            self.settings.stop_strings.iter().flat_map(|stop| stop.char_indices().map(|(end, _)| &stop[..end]));
        beginnings.filter(|beginning| self.held.ends_with(beginning)).map(str::len).max().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;

    fn monitor(stops: &[&str]) -> StopMonitor {
        StopMonitor::new(StopSettings {
            eos_token_ids: vec![2],
            stop_strings: stops.iter().map(|&s| s.to_owned()).collect(),
            max_tokens: 1000,
            room: 1000,
            ..StopSettings::default()
        })
        .unwrap()
    }

    fn step(emit: &str, stop: Option<StopReason>) -> Step {
        Step { emit: emit.to_owned(), stop }
    }

    #[test]
    fn holds_back_only_what_could_become_a_stop_string() {
        let mut monitor = monitor(&["\n\nQ:"]);
        assert_eq!(monitor.push(5, "one\n"), step("one", None));
        assert_eq!(monitor.push(5, "two\n\n"), step("\ntwo", None));
        assert_eq!(monitor.push(5, "\nQ"), step("\n", None));
        assert_eq!(monitor.push(5, ": three"), step("", Some(StopReason::StopString("\n\nQ:".into()))));
    }

    #[test]
    fn text_without_stop_strings_passes_at_once() {
        let mut monitor = monitor(&[]);
        assert_eq!(monitor.push(5, "ab"), step("ab", None));
        assert_eq!(monitor.push(5, ""), step("", None));
    }

    #[test]
    fn the_end_releases_what_was_held_and_leaves_the_eos_out() {
        let mut monitor = monitor(&["STOP"]);
        assert_eq!(monitor.push(5, "a ST"), step("a ", None));
        assert_eq!(monitor.push(2, "</s>"), step("ST", Some(StopReason::Eos)));
        assert_eq!(monitor.generated(), 2);
    }

    #[test]
    fn a_first_token_can_be_kept_whatever_it_is() {
        let settings = StopSettings { eos_token_ids: vec![2], max_tokens: 9, room: 9, ..StopSettings::default() };
        let stops = |keep_first| {
            let mut monitor = StopMonitor::new(StopSettings { keep_first, ..settings.clone() }).unwrap();
            [monitor.push(2, "").stop, monitor.push(2, "").stop]
        };
        assert_eq!(stops(true), [None, Some(StopReason::Eos)]);
        assert_eq!(stops(false)[0], Some(StopReason::Eos));
    }

    #[test]
    fn counts_tokens_and_positions() {
        let run = |max_tokens, room| {
            let settings =
                StopSettings { stop_strings: vec!["xyz".into()], max_tokens, room, ..StopSettings::default() };
            let mut monitor = StopMonitor::new(settings).unwrap();
            assert_eq!(monitor.push(5, "x"), step("", None));
            monitor.push(5, "y")
        };
        assert_eq!(run(2, 9), step("xy", Some(StopReason::MaxTokens)));
        assert_eq!(run(9, 2), step("xy", Some(StopReason::ContextFull)));
        assert_eq!(run(2, 2), step("xy", Some(StopReason::MaxTokens)));
    }

    #[test]
    fn a_stop_string_counts_before_the_limit_it_coincides_with() {
        let settings =
            StopSettings { stop_strings: vec!["b".into()], max_tokens: 1, room: 1, ..StopSettings::default() };
        let mut monitor = StopMonitor::new(settings).unwrap();
        assert_eq!(monitor.push(5, "ab"), step("a", Some(StopReason::StopString("b".into()))));
    }

    #[test]
    fn the_first_complete_stop_string_wins_then_the_longest() {
        let stop = |s: &str| Some(StopReason::StopString(s.to_owned()));
        assert_eq!(monitor(&["abc", "b"]).push(5, "abc"), step("a", stop("b")));
        assert_eq!(monitor(&["bc", "abc"]).push(5, "abc"), step("", stop("abc")));
    }

    #[test]
    fn settings_that_generate_nothing_are_refused() {
        let good = StopSettings { max_tokens: 1, room: 1, ..StopSettings::default() };
        let refused = |settings| StopMonitor::new(settings).unwrap_err();
        let stop_strings = vec!["a".to_owned(), String::new()];
        assert_eq!(refused(StopSettings { stop_strings, ..good.clone() }), StopSettingsError::EmptyStopString);
        assert_eq!(refused(StopSettings { max_tokens: 0, ..good.clone() }), StopSettingsError::NoTokens);
        assert_eq!(refused(StopSettings { room: 0, ..good }), StopSettingsError::NoRoom);
    }

    /// What the whole text should give: cut before the stop string that is complete first.
    fn expected(text: &str, stops: &[String]) -> (String, Option<StopReason>) {
        for (end, _) in text.char_indices().skip(1).chain([(text.len(), ' ')]) {
            let longest = stops.iter().filter(|stop| text[..end].ends_with(*stop)).max_by_key(|stop| stop.len());
            if let Some(stop) = longest {
                return (text[..end - stop.len()].to_owned(), Some(StopReason::StopString(stop.clone())));
            }
        }
        (text.to_owned(), Some(StopReason::Eos))
    }

    proptest! {
        #[test]
        fn division_into_tokens_makes_no_difference(
            pieces in prop::collection::vec("[abé€]{0,4}", 0..12),
            stops in prop::collection::vec("[abé€]{1,4}", 0..4),
        ) {
            let mut monitor = monitor(&stops.iter().map(String::as_str).collect::<Vec<_>>());
            let mut emitted = String::new();
            let mut stop = None;
            for (token, piece) in pieces.iter().map(|p| (5, p.as_str())).chain([(2, "</s>")]) {
                let step = monitor.push(token, piece);
                emitted += &step.emit;
                let (all, reason) = expected(&pieces.concat(), &stops);
                prop_assert!(all.starts_with(&emitted), "{emitted:?} is not a beginning of {all:?} ({reason:?})");
                stop = step.stop;
                if stop.is_some() {
                    break;
                }
            }
            prop_assert_eq!((emitted, stop), expected(&pieces.concat(), &stops));
        }

        #[test]
        fn holds_back_no_more_than_needed(text in "[ab]{0,20}", stops in prop::collection::vec("[ab]{1,4}", 1..4)) {
            let mut monitor = monitor(&stops.iter().map(String::as_str).collect::<Vec<_>>());
            let step = monitor.push(5, &text);
            prop_assume!(step.stop.is_none());
            let held = &text[step.emit.len()..];
            prop_assert!(held.is_empty() || stops.iter().any(|stop| stop.starts_with(held)));
        }
    }
}
