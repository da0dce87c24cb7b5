//! Texts in which something is hidden: windows of a text, and a sentence planted in them.

use super::EvalError;
use super::task::{Case, Goal, Sample, Settings, below};
use crate::checkpoint::Tokenizer;
use crate::pipeline::prompt::{Framing, PromptIds, encode_affixes};
use rand_chacha::ChaCha8Rng;
use sha2::{Digest, Sha256};

/// How far before its place a planted sentence may move to the end of a sentence, in tokens.
const SNAP: usize = 64;

/// A text and its tokens.
#[derive(Debug, Clone)]
pub struct Haystack {
    /// The text.
    pub text: String,
    /// Its token ids, without what the tokenizer puts around every text.
    pub ids: Vec<u32>,
    /// SHA-256 of the text.
    pub sha256: String,
    /// Flag of the command that names it, for messages.
    pub flag: &'static str,
}

impl Haystack {
    /// Encodes `text`, which the command's `flag` names.
    ///
    /// # Errors
    ///
    /// The tokenizer refuses it.
    pub fn new(text: String, tokenizer: &Tokenizer, flag: &'static str) -> Result<Self, EvalError> {
        let ids = tokenizer.encode(&text, false)?;
        let sha256 = format!("{:x}", Sha256::digest(&text));
        Ok(Self { text, ids, sha256, flag })
    }

    /// `length` tokens next to each other, anywhere in the text.
    ///
    /// # Errors
    ///
    /// It has fewer.
    pub fn window(&self, random: &mut ChaCha8Rng, length: usize) -> Result<&[u32], EvalError> {
        let Some(last) = self.ids.len().checked_sub(length) else {
            return Err(EvalError::ShortText { flag: self.flag, found: self.ids.len(), expected: length });
        };
        let start = below(random, last + 1);
        Ok(&self.ids[start..start + length])
    }
}

/// Lengths, depths and samples.
#[derive(Debug, Clone)]
pub struct Grid {
    /// Tokens of prompt and answer.
    pub lengths: Vec<usize>,
    /// Where the sentence stands, in percent.
    pub depths: Vec<u8>,
    /// Samples at every point.
    pub samples: usize,
    /// Seed of everything random.
    pub seed: u64,
}

impl Grid {
    /// All points, by length, depth and sample.
    pub fn cases(&self) -> Vec<Case> {
        let by_depth = |&length: &usize| self.depths.iter().map(move |&depth| (length, Some(depth)));
        let points = self.lengths.iter().flat_map(by_depth);
        points
            .flat_map(|(length, depth)| {
                (0..self.samples).map(move |sample| Case { length, depth, sample, opening: false })
            })
            .collect()
    }
}

/// A sentence to plant, and what is asked about it.
#[derive(Debug, Clone, Copy)]
pub struct Planted<'a> {
    /// The sentence.
    pub sentence: &'a str,
    /// The parts of it that answer.
    pub answers: &'a [String],
    /// What is asked behind the context.
    pub question: &'a str,
}

/// What is around every prompt of an evaluation.
#[derive(Debug, Clone, Copy)]
pub struct Frame<'a> {
    /// The model's tokenizer.
    pub tokenizer: &'a Tokenizer,
    /// The chat template, or plain text.
    pub framing: Framing<'a>,
    /// Tokens that may be generated. They are part of a case's length.
    pub new_tokens: usize,
}

impl Frame<'_> {
    /// What decides the samples that are hidden in `haystack`.
    pub fn settings(&self, haystack: &Haystack) -> Settings {
        let framing = match self.framing {
            Framing::Chat { system: None } => "chat".to_owned(),
            Framing::Chat { system: Some(system) } => format!("chat, system message {system:?}"),
            Framing::Raw { prefix } => format!("raw, prefix {prefix:?}"),
        };
        Settings::from([
            ("protocol".to_owned(), "own".to_owned()),
            ("haystack".to_owned(), haystack.sha256.clone()),
            ("framing".to_owned(), framing),
            ("new_tokens".to_owned(), self.new_tokens.to_string()),
        ])
    }

    /// The prompt of `case`: a window of `haystack` with the sentence at the case's depth, and the question. Prompt and new
    /// tokens together are exactly as long as the case.
    ///
    /// # Errors
    ///
    /// The length leaves no room, or the text is too short.
    pub fn hide(
        &self,
        haystack: &Haystack,
        planted: Planted<'_>,
        case: Case,
        random: &mut ChaCha8Rng,
        goal: Goal,
    ) -> Result<Sample, EvalError> {
        let (prefix, suffix) = encode_affixes(self.tokenizer, self.framing, planted.question)?;
        let needle = self.tokenizer.encode(&format!(" {}", planted.sentence), false)?;
        let around = prefix.len() + needle.len() + suffix.len() + self.new_tokens;
        let Some(hay) = case.length.checked_sub(around).filter(|&hay| hay > 0) else {
            let expected = format!("more than the {around} tokens of question, sentence and answer");
            return Err(EvalError::setting("--length", &case.length, expected));
        };
        let hay = haystack.window(random, hay)?;
        let place = self.place(hay, case.depth.unwrap_or(0))?;
        let context = [&hay[..place], &needle, &hay[place..]].concat();
        let marked = marked(self.tokenizer, &needle, planted.answers)?.into_iter().map(|i| place + i).collect();
        Ok(Sample { lead: prefix.len(), prompt: PromptIds { prefix, context, suffix }, goal, marked })
    }

    /// The end of a sentence at `depth` percent of `hay` or a little before, else the very place.
    fn place(&self, hay: &[u32], depth: u8) -> Result<usize, EvalError> {
        let place = hay.len() * usize::from(depth.min(100)) / 100;
        if place == 0 || place == hay.len() {
            return Ok(place);
        }
        for end in (place.saturating_sub(SNAP).max(1)..=place).rev() {
            let token = self.tokenizer.decode(&hay[end - 1..end], false)?;
            if token.trim_end_matches('"').ends_with(['.', '!', '?', '\n']) {
                return Ok(end);
            }
        }
        Ok(place)
    }
}

/// Indices of the tokens of `ids` that hold any part of an occurrence of one of `parts` in their text.
///
/// # Errors
///
/// The tokenizer refuses the tokens.
pub fn marked(tokenizer: &Tokenizer, ids: &[u32], parts: &[String]) -> Result<Vec<usize>, EvalError> {
    let text = tokenizer.decode(ids, false)?;
    let mut marked = Vec::new();
    for part in parts.iter().filter(|part| !part.is_empty()) {
        for (start, found) in text.match_indices(part.as_str()) {
            let first = reaching(tokenizer, ids, start + 1)?;
            let last = reaching(tokenizer, ids, start + found.len())?;
            marked.extend(first..=last);
        }
    }
    marked.sort_unstable();
    marked.dedup();
    marked.retain(|&i| i < ids.len());
    Ok(marked)
}

/// The first token with which the text has `bytes` bytes.
fn reaching(tokenizer: &Tokenizer, ids: &[u32], bytes: usize) -> Result<usize, EvalError> {
    let (mut low, mut high) = (0, ids.len());
    while low < high {
        let middle = usize::midpoint(low, high);
        if tokenizer.decode(&ids[..=middle], false)?.len() < bytes {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    Ok(low)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::eval::task::stream;
    use crate::pipeline::decode::Continuation;
    use serde_json::json;

    /// Every byte is a token.
    fn tokenizer() -> (tempfile::TempDir, Tokenizer) {
        let mut alphabet: Vec<char> =
            tokenizers::pre_tokenizers::byte_level::ByteLevel::alphabet().into_iter().collect();
        alphabet.sort_unstable();
        let vocab: serde_json::Map<_, _> =
            alphabet.iter().enumerate().map(|(id, c)| (c.to_string(), json!(id))).collect();
        let level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
        let tokenizer = json!({
            "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
            "pre_tokenizer": level, "post_processor": null, "decoder": level,
            "model": {"type": "BPE", "vocab": vocab, "merges": []},
        });
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("tokenizer.json"), tokenizer.to_string()).unwrap();
        let tokenizer = Tokenizer::open(dir.path(), 256).unwrap();
        (dir, tokenizer)
    }

    const TEXT: &str =
        "One fish. Two fish. Red fish. Blue fish. Some are glad, and some are sad, and some are very bad.";

    fn hidden(tokenizer: &Tokenizer, length: usize, depth: u8) -> Result<Sample, EvalError> {
        let frame = Frame { tokenizer, framing: Framing::Raw { prefix: "Read: " }, new_tokens: 4 };
        let haystack = Haystack::new(TEXT.to_owned(), tokenizer, "--haystack").unwrap();
        let planted = Planted { sentence: "It is 77, yes 77!", answers: &["77".to_owned()], question: " What?" };
        let case = Case { length, depth: Some(depth), sample: 0, opening: false };
        let goal = Goal::Integer { expected: "77".to_owned(), new_tokens: 4, continuation: Continuation::Next };
        frame.hide(&haystack, planted, case, &mut stream(0, "test", case), goal)
    }

    #[test]
    fn lengths_are_exact_and_the_sentence_stands_at_its_depth() {
        let (_dir, tokenizer) = tokenizer();
        for depth in [0, 10, 50, 99, 100] {
            let Sample { prompt, marked, .. } = hidden(&tokenizer, 100, depth).unwrap();
            assert_eq!(prompt.lengths().total() + 4, 100);
            let context = tokenizer.decode(&prompt.context, false).unwrap();
            let at = context.find(" It is 77, yes 77!").unwrap();
            let hay = prompt.context.len() - " It is 77, yes 77!".len();
            assert!(at <= hay * usize::from(depth) / 100, "depth {depth}: {context}");
            assert!(depth != 100 || at == hay);
            assert!(
                at == 0 || depth == 100 || context[..at].ends_with('.') || !context[..at].contains('.'),
                "{context}"
            );
            let answer: Vec<u32> = marked.iter().map(|&i| prompt.context[i]).collect();
            assert_eq!(tokenizer.decode(&answer, false).unwrap(), "7777");
        }
    }

    #[test]
    fn too_little_room_and_too_little_text_are_refused() {
        let (_dir, tokenizer) = tokenizer();
        let message = hidden(&tokenizer, 34, 0).unwrap_err().to_string();
        assert_eq!(message, "--length is 34, expected more than the 34 tokens of question, sentence and answer");
        assert!(hidden(&tokenizer, 35, 0).is_ok());
        let message = hidden(&tokenizer, 34 + TEXT.len() + 1, 0).unwrap_err().to_string();
        assert_eq!(
            message,
            format!("--haystack: the text has {} tokens, expected at least {}", TEXT.len(), TEXT.len() + 1)
        );
    }

    #[test]
    fn characters_of_several_tokens_are_marked_whole() {
        let (_dir, tokenizer) = tokenizer();
        let ids = tokenizer.encode("a\u{e9}\u{e9}b\u{e9}", false).unwrap();
        assert_eq!(marked(&tokenizer, &ids, &["b".to_owned()]).unwrap(), [5]);
        assert_eq!(marked(&tokenizer, &ids, &["a".to_owned(), "ab".to_owned()]).unwrap(), [0]);
        assert!(marked(&tokenizer, &ids, &["\u{e9}b".to_owned()]).unwrap().ends_with(&[4, 5]));
    }
}
