//! Text to the three parts of a prompt: what stands before the context, the context, and what stands behind it.

use super::homer::Prompt;
use crate::checkpoint::{CheckpointError, Tokenizer};
use accordion_graphs::plan::PromptLengths;
use std::fs::File;
use std::io::Read;

/// Longer texts are not read: a model would need tens of millions of positions for them.
pub const MAX_TEXT_BYTES: u64 = 256 << 20;

/// The name that stands for standard input where a file is expected.
pub const STDIN: &str = "-";

/// What is written around a context.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Framing<'a> {
    /// The tokenizer's chat template: the user's message is the context, a blank line and the question.
    Chat {
        /// The system message, if not the template's own.
        system: Option<&'a str>,
    },
    /// The texts as they are. Only what the tokenizer puts before every text (a BOS, usually) is added in front.
    Raw {
        /// Text before the context.
        prefix: &'a str,
    },
}

/// The token ids of a prompt's three parts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PromptIds {
    /// Before the context; may be empty.
    pub prefix: Vec<u32>,
    /// The context, encoded by itself; at least one token.
    pub context: Vec<u32>,
    /// Behind the context; at least one token, except where only the context is read.
    pub suffix: Vec<u32>,
}

/// Why a prompt could not be made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PromptError {
    /// A text could not be read.
    #[error("{name}: {source}")]
    Io {
        /// The file, or standard input.
        name: String,
        /// What the operating system said.
        source: std::io::Error,
    },
    /// A text is longer than any context.
    #[error("{name} is longer than {MAX_TEXT_BYTES} bytes, the most that is read as a text")]
    TooLong {
        /// The file, or standard input.
        name: String,
    },
    /// A file is not text.
    #[error("{name} is not UTF-8 text: byte {offset} does not belong to a character")]
    NotUtf8 {
        /// The file, or standard input.
        name: String,
        /// Bytes before the first wrong one.
        offset: usize,
    },
    /// There is nothing to compress.
    #[error("the context is empty, expected at least one token")]
    EmptyContext,
    /// Nothing stands behind the context.
    #[error("the question is empty, expected at least one token behind the context")]
    EmptyQuestion,
    /// The tokenizer or its chat template refuses the text.
    #[error(transparent)]
    Tokenizer(#[from] CheckpointError),
}

/// The text of the file `name`, or of standard input if it is [`STDIN`].
///
/// # Errors
///
/// It cannot be read, is longer than [`MAX_TEXT_BYTES`] or is not UTF-8.
pub fn read_text(name: &str) -> Result<String, PromptError> {
    let (source, name): (Box<dyn Read>, _) = if name == STDIN {
        (Box::new(std::io::stdin().lock()), "standard input".to_owned())
    } else {
        let file = File::open(name).map_err(|source| PromptError::Io { name: name.to_owned(), source })?;
        (Box::new(file), name.to_owned())
    };
    let mut bytes = Vec::new();
    if let Err(source) = source.take(MAX_TEXT_BYTES + 1).read_to_end(&mut bytes) {
        return Err(PromptError::Io { name, source });
    }
    if bytes.len() as u64 > MAX_TEXT_BYTES {
        return Err(PromptError::TooLong { name });
    }
    String::from_utf8(bytes).map_err(|e| PromptError::NotUtf8 { name, offset: e.utf8_error().valid_up_to() })
}

/// The ids of a context.
///
/// # Errors
///
/// It has no token, or one that the model does not know.
pub fn encode_context(tokenizer: &Tokenizer, text: &str) -> Result<Vec<u32>, PromptError> {
    let ids = tokenizer.encode(text, false)?;
    if ids.is_empty() { Err(PromptError::EmptyContext) } else { Ok(ids) }
}

/// The ids before and behind a context that `question` is asked about.
///
/// # Errors
///
/// The suffix would be empty, or the tokenizer or its chat template refuses a text.
pub fn encode_affixes(
    tokenizer: &Tokenizer,
    framing: Framing<'_>,
    question: &str,
) -> Result<(Vec<u32>, Vec<u32>), PromptError> {
    let (prefix, suffix) = match framing {
        Framing::Chat { system } => {
            let affixes = tokenizer.prompt_affixes(system, question)?;
            (tokenizer.encode(&affixes.prefix, false)?, tokenizer.encode(&affixes.suffix, false)?)
        }
        Framing::Raw { prefix } => {
            let mut ids = leading_ids(tokenizer)?;
            ids.extend(tokenizer.encode(prefix, false)?);
            (ids, tokenizer.encode(question, false)?)
        }
    };
    if suffix.is_empty() { Err(PromptError::EmptyQuestion) } else { Ok((prefix, suffix)) }
}

/// What the tokenizer puts before every text: a BOS, or nothing. What it puts behind one (an EOS) would end the prompt.
///
/// # Errors
///
/// The model does not know one of the tokens.
pub fn leading_ids(tokenizer: &Tokenizer) -> Result<Vec<u32>, CheckpointError> {
    const PROBE: &str = "a";
    let bare = tokenizer.encode(PROBE, false)?;
    let mut framed = tokenizer.encode(PROBE, true)?;
    let leading = framed.windows(bare.len().max(1)).position(|ids| ids == bare).unwrap_or(0);
    framed.truncate(leading);
    Ok(framed)
}

impl PromptIds {
    /// Token counts.
    pub fn lengths(&self) -> PromptLengths {
        PromptLengths { prefix: self.prefix.len(), context: self.context.len(), suffix: self.suffix.len() }
    }

    /// Prefix and context: what stands before the suffix.
    pub fn text(&self) -> Vec<u32> {
        [&self.prefix[..], &self.context].concat()
    }

    /// All ids in order.
    pub fn concatenated(&self) -> Vec<u32> {
        [&self.prefix[..], &self.context, &self.suffix].concat()
    }

    /// The prompt whose past is this one and `generated`: the prefix stays, the suffix is as long as it was but ends
    /// with the last token generated, and all between them is context.
    #[must_use]
    pub fn with_generated(&self, generated: &[u32]) -> Self {
        let mut context = [&self.context[..], &self.suffix, generated].concat();
        let suffix = context.split_off(context.len() - self.suffix.len());
        Self { prefix: self.prefix.clone(), context, suffix }
    }
}

impl<'a> From<&'a PromptIds> for Prompt<'a> {
    fn from(ids: &'a PromptIds) -> Self {
        Self { prefix: &ids.prefix, context: &ids.context, suffix: &ids.suffix }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use serde_json::{Value, json};

    /// Every character of "abc|" is a token; the template writes `[S:system][U:message][A]`.
    fn tokenizer(post_processor: &Value, template: Option<&str>) -> (tempfile::TempDir, Tokenizer) {
        let characters = "abc\n|SUA:[]?".chars().map(String::from);
        let vocab: serde_json::Map<_, _> = ["<s>", "</s>"]
            .map(String::from)
            .into_iter()
            .chain(characters)
            .zip(0..)
            .map(|(t, id)| (t, json!(id)))
            .collect();
        let special = |id: u32, content: &str| {
            json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
                "special": true})
        };
        let tokenizer = json!({
            "version": "1.0", "truncation": null, "padding": null, "normalizer": null, "decoder": null,
            "added_tokens": [special(0, "<s>"), special(1, "</s>")],
            "pre_tokenizer": {"type": "Split", "pattern": {"Regex": ""}, "behavior": "Isolated", "invert": false},
            "post_processor": post_processor,
            "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "?"},
        });
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("tokenizer.json"), tokenizer.to_string()).unwrap();
        std::fs::write(dir.path().join("tokenizer_config.json"), json!({"chat_template": template}).to_string())
            .unwrap();
        let tokenizer = Tokenizer::open(dir.path(), 100).unwrap();
        (dir, tokenizer)
    }

    fn bos_and_eos() -> Value {
        let special = |id: &str| json!({"SpecialToken": {"id": id, "type_id": 0}});
        let text = json!({"Sequence": {"id": "A", "type_id": 0}});
        json!({
            "type": "TemplateProcessing", "single": [special("<s>"), text, special("</s>")], "pair": [],
            "special_tokens": {
                "<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]},
                "</s>": {"id": "</s>", "ids": [1], "tokens": ["</s>"]},
            },
        })
    }

    #[test]
    fn raw_prompts_start_with_what_the_tokenizer_adds_and_never_end_with_it() {
        let (_dir, with) = tokenizer(&bos_and_eos(), None);
        assert_eq!(encode_affixes(&with, Framing::Raw { prefix: "" }, "c").unwrap(), (vec![0], vec![4]));
        assert_eq!(encode_affixes(&with, Framing::Raw { prefix: "ab" }, "c").unwrap(), (vec![0, 2, 3], vec![4]));
        assert_eq!(encode_context(&with, "abc").unwrap(), [2, 3, 4]);
        let (_dir, without) = tokenizer(&Value::Null, None);
        assert_eq!(encode_affixes(&without, Framing::Raw { prefix: "" }, "c").unwrap(), (vec![], vec![4]));
    }

    #[test]
    fn chat_prompts_are_cut_around_the_context() {
        let template =
            "{% for m in messages %}{{ '[S:' if m.role == 'system' else '[U:' }}{{ m.content }}]{% endfor %}[A]";
        let (_dir, tokenizer) = tokenizer(&bos_and_eos(), Some(template));
        let (prefix, suffix) = encode_affixes(&tokenizer, Framing::Chat { system: Some("b") }, "a").unwrap();
        assert_eq!(tokenizer.decode(&prefix, false).unwrap().replace(' ', ""), "[S:b][U:");
        assert_eq!(tokenizer.decode(&suffix, false).unwrap().replace(' ', ""), "\n\na][A]");
    }

    #[test]
    fn empty_parts_are_refused() {
        let (_dir, tokenizer) = tokenizer(&bos_and_eos(), None);
        assert!(matches!(encode_context(&tokenizer, ""), Err(PromptError::EmptyContext)));
        let question = encode_affixes(&tokenizer, Framing::Raw { prefix: "a" }, "");
        assert!(matches!(question, Err(PromptError::EmptyQuestion)));
    }

    #[test]
    fn a_file_that_is_not_text_is_named_with_the_place() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("binary");
        std::fs::write(&path, b"abc\xff").unwrap();
        let message = read_text(path.to_str().unwrap()).unwrap_err().to_string();
        assert!(message.contains("binary is not UTF-8 text: byte 3"), "{message}");
        let message = read_text(dir.path().join("none").to_str().unwrap()).unwrap_err().to_string();
        assert!(message.contains("none: "), "{message}");
    }

    #[test]
    fn the_past_keeps_prefix_and_suffix_length() {
        let prompt = PromptIds { prefix: vec![1], context: vec![2, 3], suffix: vec![4, 5] };
        let past = prompt.with_generated(&[6]);
        assert_eq!(past, PromptIds { prefix: vec![1], context: vec![2, 3, 4], suffix: vec![5, 6] });
        assert_eq!(past.concatenated(), [1, 2, 3, 4, 5, 6]);
        assert_eq!(past.with_generated(&[7, 8, 9]).suffix, [8, 9]);
    }
}
