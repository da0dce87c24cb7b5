//! Perplexity of what follows a compressed past.

use super::EvalError;
use super::haystack::Haystack;
use super::task::{Case, Goal, Sample, Settings, Task, below, named_stream, stream};
use crate::pipeline::prompt::PromptIds;
use std::ops::Range;

/// Which windows of the text are scored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Protocol {
    /// Segments anywhere in the text, each after pasts of these lengths. Where the text is long enough, a sample's segment
    /// is the same after every length, so that only the past differs.
    Anywhere(Vec<usize>),
    /// That of HOMER's authors on PG-19: a window of so many tokens is read from its start. The first two segments are read
    /// plainly; for each further one all of the past is compressed anew.
    FromStart(usize),
}

/// The next `segment` tokens after a compressed past, teacher-forced. Of the past, the first and the last `buffer` tokens
/// are kept whole as prefix and suffix. A case's length is that of the past, without what the tokenizer puts before it.
#[derive(Debug)]
pub struct Perplexity<'a> {
    /// The text.
    pub text: &'a Haystack,
    /// What the tokenizer puts before every text.
    pub leading: Vec<u32>,
    /// Which windows are scored.
    pub protocol: Protocol,
    /// Windows.
    pub samples: usize,
    /// Tokens predicted behind a past.
    pub segment: usize,
    /// Tokens of prefix and of suffix; the authors take 100.
    pub buffer: usize,
    /// Predicted tokens per position bucket.
    pub bucket: usize,
    /// Seed of everything random.
    pub seed: u64,
}

impl Perplexity<'_> {
    /// Checks what no single case can: that there is one.
    ///
    /// # Errors
    ///
    /// The window has no room for a segment behind the first two.
    pub fn check(&self) -> Result<(), EvalError> {
        match self.protocol {
            Protocol::FromStart(window) if window < 3 * self.segment => {
                let expected = format!("at least three segments of {} tokens", self.segment);
                Err(EvalError::setting("--from-start", &window, expected))
            }
            _ => Ok(()),
        }
    }

    /// Where in the text the past and the predicted tokens of `case` are.
    fn place(&self, case: Case) -> Result<(Range<usize>, Range<usize>), EvalError> {
        let tokens = self.text.ids.len();
        let short = |expected| EvalError::ShortText { flag: self.text.flag, found: tokens, expected };
        match &self.protocol {
            Protocol::Anywhere(_) => {
                let needed = case.length + self.segment;
                let last = tokens.checked_sub(needed).map(|room| room + case.length).ok_or_else(|| short(needed))?;
                // By the sample alone, and drawn again until the past fits: mostly the first draw.
                let mut random = named_stream(self.seed, &format!("{}/{}", self.name(), case.sample));
                let start = loop {
                    let start = below(&mut random, last + 1);
                    if start >= case.length {
                        break start;
                    }
                };
                Ok((start - case.length..start, start..start + self.segment))
            }
            Protocol::FromStart(window) => {
                let room = tokens.checked_sub(*window).ok_or_else(|| short(*window))?;
                let whole = Case { length: *window, depth: None, opening: false, ..case };
                let start = below(&mut stream(self.seed, self.name(), whole), room + 1);
                let end = if case.opening { 2 * self.segment } else { case.length + self.segment };
                Ok((start..start + case.length, start + case.length..start + end))
            }
        }
    }
}

/// The past of an opening: one token, so that there is something to predict from.
pub const OPENING: usize = 1;

impl Task for Perplexity<'_> {
    fn name(&self) -> &'static str {
        "perplexity"
    }

    fn seed(&self) -> u64 {
        self.seed
    }

    fn settings(&self) -> Settings {
        let protocol = match &self.protocol {
            Protocol::Anywhere(_) => "anywhere".to_owned(),
            Protocol::FromStart(window) => format!("from the start, {window} tokens"),
        };
        Settings::from([
            ("protocol".to_owned(), protocol),
            ("text".to_owned(), self.text.sha256.clone()),
            ("segment".to_owned(), self.segment.to_string()),
            ("buffer".to_owned(), self.buffer.to_string()),
            ("bucket".to_owned(), self.bucket.to_string()),
        ])
    }

    fn cases(&self) -> Vec<Case> {
        let lengths: Vec<(usize, bool)> = match &self.protocol {
            Protocol::Anywhere(lengths) => lengths.iter().map(|&length| (length, false)).collect(),
            Protocol::FromStart(window) => {
                let compressed = (2..).map(|segments| segments * self.segment);
                let compressed = compressed.take_while(|past| past.saturating_add(self.segment) <= *window);
                std::iter::once((OPENING, true)).chain(compressed.map(|past| (past, false))).collect()
            }
        };
        let case =
            |(length, opening)| (0..self.samples).map(move |sample| Case { length, depth: None, sample, opening });
        lengths.into_iter().flat_map(case).collect()
    }

    fn sample(&self, case: Case) -> Result<Sample, EvalError> {
        if !case.opening && case.length <= 2 * self.buffer {
            let expected = format!("more than prefix and suffix, 2 * {} tokens", self.buffer);
            return Err(EvalError::setting("--length", &case.length, expected));
        }
        let (past, predicted) = self.place(case)?;
        let ids = &self.text.ids;
        let mut prefix = self.leading.clone();
        let prompt = if case.opening {
            PromptIds { prefix, context: ids[past].to_vec(), suffix: Vec::new() }
        } else {
            let context = past.start + self.buffer..past.end - self.buffer;
            prefix.extend_from_slice(&ids[past.start..context.start]);
            PromptIds { prefix, suffix: ids[context.end..past.end].to_vec(), context: ids[context].to_vec() }
        };
        let goal = Goal::Predict { ids: ids[predicted].to_vec(), bucket: self.bucket };
        Ok(Sample { prompt, lead: self.leading.len(), goal, marked: Vec::new() })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::panic)]
    use super::*;

    fn text(tokens: u32) -> Haystack {
        Haystack { text: String::new(), ids: (100..100 + tokens).collect(), sha256: String::new(), flag: "--text" }
    }

    fn task(text: &Haystack, protocol: Protocol) -> Perplexity<'_> {
        Perplexity { text, leading: vec![0], protocol, samples: 2, segment: 20, buffer: 3, bucket: 8, seed: 5 }
    }

    fn predicted(sample: &Sample) -> &[u32] {
        match &sample.goal {
            Goal::Predict { ids, .. } => ids,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn the_same_segment_follows_pasts_of_every_length() {
        let text = text(100_000);
        let task = task(&text, Protocol::Anywhere(vec![40, 80]));
        let cases = task.cases();
        assert_eq!(cases.len(), 4);
        let samples: Vec<Sample> = cases.iter().map(|&case| task.sample(case).unwrap()).collect();
        assert_eq!(predicted(&samples[0]), predicted(&samples[2]));
        assert_ne!(predicted(&samples[0]), predicted(&samples[1]));
        let all = samples[2].prompt.concatenated();
        assert_eq!((all.len(), all[0]), (81, 0));
        assert!(all[1..].windows(2).all(|pair| pair[1] == pair[0] + 1));
        assert_eq!(predicted(&samples[2])[0], all[80] + 1);
        let PromptIds { prefix, suffix, .. } = &samples[2].prompt;
        assert_eq!((prefix.len(), suffix.len(), predicted(&samples[2]).len()), (1 + 3, 3, 20));
    }

    #[test]
    fn texts_from_their_start_are_covered_once() {
        let text = text(150);
        let task = task(&text, Protocol::FromStart(100));
        let lengths: Vec<(usize, bool)> =
            task.cases().iter().filter(|case| case.sample == 1).map(|case| (case.length, case.opening)).collect();
        assert_eq!(lengths, [(1, true), (40, false), (60, false), (80, false)]);
        let samples: Vec<Sample> =
            task.cases().iter().filter(|case| case.sample == 1).map(|&case| task.sample(case).unwrap()).collect();
        let scored: Vec<u32> = samples.iter().flat_map(|sample| predicted(sample).to_vec()).collect();
        assert_eq!(scored.len(), 99);
        assert!(scored.windows(2).all(|pair| pair[1] == pair[0] + 1));
        assert_eq!(samples[0].prompt.concatenated(), [0, scored[0] - 1]);
    }

    #[test]
    fn short_texts_and_pasts_are_refused() {
        let text = text(99);
        let refusal = |protocol: Protocol, length| {
            let case = Case { length, depth: None, sample: 0, opening: false };
            task(&text, protocol).sample(case).unwrap_err().to_string()
        };
        let message = refusal(Protocol::Anywhere(vec![80]), 80);
        assert_eq!(message, "--text: the text has 99 tokens, expected at least 100");
        assert!(refusal(Protocol::FromStart(100), 40).starts_with("--text: "));
        assert!(
            refusal(Protocol::Anywhere(vec![6]), 6).starts_with("--length is 6, expected more than prefix and suffix")
        );
    }
}
