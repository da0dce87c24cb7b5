//! Text to token ids and back.

use super::chat::{ChatMessage, ChatTemplate, PromptAffixes};
use super::error::CheckpointError;
use super::fields::Fields;
use super::files;
use std::panic::AssertUnwindSafe;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// The tokenizer's file name.
pub(crate) const TOKENIZER: &str = "tokenizer.json";
/// Beside it: special tokens and the chat template.
pub(crate) const TOKENIZER_CONFIG: &str = "tokenizer_config.json";
const MAX_TOKENIZER: u64 = 256 << 20;
const MAX_CONFIG: u64 = 16 << 20;

/// The tokenizer of a checkpoint, with its chat template. Clones share everything.
#[derive(Clone)]
pub struct Tokenizer(Arc<Inner>);

struct Inner {
    tokenizer: tokenizers::Tokenizer,
    chat: Option<ChatTemplate>,
    bos_token: Option<String>,
    eos_token: Option<String>,
    vocab_size: usize,
    path: PathBuf,
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tokenizer").field("path", &self.0.path).finish_non_exhaustive()
    }
}

impl Tokenizer {
    /// Opens the tokenizer in the folder `dir` (a checkpoint or a bundle) for a model of `vocab_size` token ids.
    ///
    /// # Errors
    ///
    /// tokenizer.json is missing or malformed, or one of the files beside it is malformed.
    pub fn open(dir: &Path, vocab_size: usize) -> Result<Self, CheckpointError> {
        let path = dir.join(TOKENIZER);
        if !files::exists(&path)? {
            return Err(CheckpointError::NoTokenizer { path });
        }
        let refused = |source| CheckpointError::Tokenizer { path: path.clone(), source };
        let bytes = files::read_bounded(&path, MAX_TOKENIZER)?;
        let mut tokenizer = contained(|| tokenizers::Tokenizer::from_bytes(bytes)).map_err(refused)?;
        // Both are left-overs of training; a context is never cut or filled silently.
        tokenizer.with_padding(None).with_truncation(None).map_err(refused)?;

        let config_path = dir.join(TOKENIZER_CONFIG);
        let config = files::exists(&config_path)?.then(|| files::read_json(&config_path, MAX_CONFIG)).transpose()?;
        let config = config.as_ref().map(|value| Fields::of(value, "", &config_path)).transpose()?;
        let special = |name| config.map_or(Ok(None), |fields| special_token(fields, name));
        let (bos_token, eos_token) = (special("bos_token")?, special("eos_token")?);
        let chat = ChatTemplate::load(dir, config, bos_token.clone(), eos_token.clone())?;
        Ok(Self(Arc::new(Inner { tokenizer, chat, bos_token, eos_token, vocab_size, path })))
    }

    /// The ids of `text`. `add_special` adds what the tokenizer puts around every text (a BOS, usually); special tokens
    /// spelled out in the text become their ids in any case.
    ///
    /// # Errors
    ///
    /// The text contains a token whose id is not below the model's `vocab_size`.
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>, CheckpointError> {
        let encoding =
            contained(|| self.0.tokenizer.encode_fast(text, add_special)).map_err(|source| self.refused(source))?;
        let ids = encoding.get_ids();
        match ids.iter().find(|&&id| id as usize >= self.0.vocab_size) {
            None => Ok(ids.to_vec()),
            Some(&id) => Err(CheckpointError::TokenId {
                path: self.0.path.clone(),
                token: self.token(id).unwrap_or_default(),
                id,
                vocab_size: self.0.vocab_size,
            }),
        }
    }

    /// The text of `ids`, without special tokens if `skip_special`. Bytes that are not UTF-8 become U+FFFD.
    ///
    /// # Errors
    ///
    /// The tokenizer's decoder refuses the tokens.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String, CheckpointError> {
        contained(|| self.0.tokenizer.decode(ids, skip_special)).map_err(|source| self.refused(source))
    }

    /// A decoder that takes ids one by one.
    pub fn stream(&self, skip_special: bool) -> TextStream {
        TextStream { tokenizer: self.clone(), skip_special, ids: Vec::new(), emitted: 0 }
    }

    /// The id of the token spelled `token`, special or not.
    pub fn id(&self, token: &str) -> Option<u32> {
        self.0.tokenizer.token_to_id(token)
    }

    /// The token with the id `id`, as the vocabulary spells it.
    pub fn token(&self, id: u32) -> Option<String> {
        self.0.tokenizer.id_to_token(id)
    }

    /// The token that starts a text, as `tokenizer_config.json` spells it.
    pub fn bos_token(&self) -> Option<&str> {
        self.0.bos_token.as_deref()
    }

    /// The token that ends a text, as `tokenizer_config.json` spells it.
    pub fn eos_token(&self) -> Option<&str> {
        self.0.eos_token.as_deref()
    }

    /// Number of tokens, special ones included.
    pub fn vocab_size(&self) -> usize {
        self.0.tokenizer.get_vocab_size(true)
    }

    /// Whether the checkpoint says how a conversation is written.
    pub fn has_chat_template(&self) -> bool {
        self.0.chat.is_some()
    }

    /// The prompt of a conversation, to be encoded without special tokens added. `add_generation_prompt` ends it where
    /// the model is to answer.
    ///
    /// # Errors
    ///
    /// There is no chat template, or it refuses the conversation.
    pub fn render_chat(
        &self,
        messages: &[ChatMessage],
        add_generation_prompt: bool,
    ) -> Result<String, CheckpointError> {
        self.chat()?.render(messages, add_generation_prompt)
    }

    /// The texts around a context in a chat prompt whose user message is the context, a blank line and `question`.
    ///
    /// # Errors
    ///
    /// There is no chat template, or it refuses the conversation or changes the user's message.
    pub fn prompt_affixes(&self, system: Option<&str>, question: &str) -> Result<PromptAffixes, CheckpointError> {
        self.chat()?.affixes(system, question)
    }

    fn chat(&self) -> Result<&ChatTemplate, CheckpointError> {
        self.0.chat.as_ref().ok_or_else(|| CheckpointError::ChatTemplate {
            path: self.0.path.parent().unwrap_or(&self.0.path).to_owned(),
            detail: "there is none".to_owned(),
        })
    }

    fn refused(&self, source: Box<dyn std::error::Error + Send + Sync>) -> CheckpointError {
        CheckpointError::Tokenizer { path: self.0.path.clone(), source }
    }
}

/// Runs `work` of the tokenizers library. It panics on some files that contradict themselves (a post-processor that names
/// a token it does not define, a decoder that does not parse); those are refused like all others.
fn contained<T>(work: impl FnOnce() -> tokenizers::Result<T>) -> tokenizers::Result<T> {
    // The library's state is only read, or dropped with the failure: nothing half-changed can be seen afterwards.
    std::panic::catch_unwind(AssertUnwindSafe(work))
        .unwrap_or_else(|_| Err("the file contradicts itself: the tokenizers library panicked over it".into()))
}

/// A special token is given as its text or as an object with its `content`.
fn special_token(config: Fields<'_>, name: &str) -> Result<Option<String>, CheckpointError> {
    let Some(value) = config.get(name) else { return Ok(None) };
    let text = value.as_str().or_else(|| value.get("content").and_then(serde_json::Value::as_str));
    text.map(|text| Some(text.to_owned())).ok_or_else(|| config.wrong(name, "a string or an object with `content`"))
}

/// Token ids to text as they come. A character whose bytes are spread over several tokens appears once it is whole.
#[derive(Debug, Clone)]
pub struct TextStream {
    tokenizer: Tokenizer,
    skip_special: bool,
    /// The last emitted tokens, which decide whether the next begins with a space, and those still held back.
    ids: Vec<u32>,
    /// How many of `ids` have been emitted.
    emitted: usize,
}

impl TextStream {
    /// Tokens held back at most. A character has four bytes, so what is still broken after so many stays broken; more
    /// than four because an honest U+FFFD looks broken until something follows it.
    const MOST_HELD_BACK: usize = 16;

    /// The text that `id` completes; empty while a character is incomplete.
    ///
    /// # Errors
    ///
    /// The tokenizer's decoder refuses the tokens.
    pub fn push(&mut self, id: u32) -> Result<String, CheckpointError> {
        self.ids.push(id);
        let text = self.pending()?;
        let held_back = self.ids.len() - self.emitted;
        if text.is_empty() || (text.ends_with('\u{FFFD}') && held_back < Self::MOST_HELD_BACK) {
            return Ok(String::new());
        }
        self.ids.drain(..self.emitted);
        self.emitted = self.ids.len();
        Ok(text)
    }

    /// What is still held back, broken characters included.
    ///
    /// # Errors
    ///
    /// The tokenizer's decoder refuses the tokens.
    pub fn finish(self) -> Result<String, CheckpointError> {
        self.pending()
    }

    fn pending(&self) -> Result<String, CheckpointError> {
        let before = self.tokenizer.decode(&self.ids[..self.emitted], self.skip_special)?;
        let all = self.tokenizer.decode(&self.ids, self.skip_special)?;
        // `before` is where `all` begins, unless it ends in a broken character that has been completed since.
        let same = before.chars().zip(all.chars()).take_while(|(a, b)| a == b).map(|(c, _)| c.len_utf8()).sum();
        Ok(all.get(same..).unwrap_or_default().to_owned())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    /// A byte-level tokenizer without merges: every byte is a token, so that characters are always spread.
    fn bytes() -> (tempfile::TempDir, Tokenizer) {
        let mut alphabet: Vec<char> =
            tokenizers::pre_tokenizers::byte_level::ByteLevel::alphabet().into_iter().collect();
        alphabet.sort_unstable();
        let vocab: serde_json::Map<_, _> =
            alphabet.iter().enumerate().map(|(id, c)| (c.to_string(), json!(id))).collect();
        let end = json!({"id": 256, "content": "<|end|>", "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": true});
        let level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
        let tokenizer = json!({
            "version": "1.0", "truncation": {"max_length": 3, "strategy": "LongestFirst", "stride": 0, "direction": "Right"},
            "padding": null, "added_tokens": [end], "normalizer": null, "pre_tokenizer": level,
            "post_processor": null, "decoder": level,
            "model": {"type": "BPE", "vocab": vocab, "merges": []},
        });
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join(TOKENIZER), tokenizer.to_string()).unwrap();
        let config = json!({"eos_token": {"content": "<|end|>"}, "bos_token": "<|end|>"});
        std::fs::write(dir.path().join(TOKENIZER_CONFIG), config.to_string()).unwrap();
        let tokenizer = Tokenizer::open(dir.path(), 257).unwrap();
        (dir, tokenizer)
    }

    #[test]
    fn text_is_neither_cut_nor_filled() {
        let (_dir, tokenizer) = bytes();
        assert_eq!(tokenizer.encode("eight ch", false).unwrap().len(), 8);
    }

    #[test]
    fn special_tokens_are_recognised_and_skipped() {
        let (_dir, tokenizer) = bytes();
        let ids = tokenizer.encode("a<|end|>b", false).unwrap();
        assert_eq!(ids[1], 256);
        assert_eq!(tokenizer.id(tokenizer.eos_token().unwrap()), Some(256));
        assert_eq!(tokenizer.token(256).as_deref(), tokenizer.bos_token());
        assert_eq!(tokenizer.decode(&ids, true).unwrap(), "ab");
        assert_eq!(tokenizer.decode(&ids, false).unwrap(), "a<|end|>b");
    }

    #[test]
    fn an_id_the_model_does_not_know_is_refused() {
        let (dir, _) = bytes();
        let error = Tokenizer::open(dir.path(), 256).unwrap().encode("a<|end|>", false).unwrap_err().to_string();
        assert!(error.contains("token '<|end|>' has id 256, but the model knows only ids below 256"), "{error}");
    }

    #[test]
    fn a_stream_emits_whole_characters() {
        let (_dir, tokenizer) = bytes();
        let mut stream = tokenizer.stream(true);
        let pieces: Vec<String> = tokenizer
            .encode("a\u{e9}\u{1f600}", false)
            .unwrap()
            .into_iter()
            .map(|id| stream.push(id).unwrap())
            .collect();
        assert_eq!(pieces, ["a", "", "\u{e9}", "", "", "", "\u{1f600}"]);
        assert_eq!(stream.finish().unwrap(), "");
    }

    #[test]
    fn a_stream_gives_up_on_broken_characters() {
        let (_dir, tokenizer) = bytes();
        let first_byte_of_four = tokenizer.encode("\u{1f600}", false).unwrap()[0];
        let mut stream = tokenizer.stream(true);
        assert_eq!(stream.push(first_byte_of_four).unwrap(), "");
        assert_eq!(stream.clone().finish().unwrap(), "\u{FFFD}");
        let ascii = tokenizer.encode("a", false).unwrap()[0];
        assert_eq!(stream.push(ascii).unwrap(), "\u{FFFD}a");
        for _ in 0..15 {
            assert_eq!(stream.push(first_byte_of_four).unwrap(), "");
        }
        assert_eq!(stream.push(first_byte_of_four).unwrap(), "\u{FFFD}".repeat(16));
        let rest = &tokenizer.encode("\u{1f600}", false).unwrap()[1..];
        let completed: String = rest.iter().map(|&id| stream.push(id).unwrap()).collect();
        assert_eq!(completed, "\u{1f600}");
    }

    proptest! {
        #[test]
        fn a_stream_loses_nothing(text in "\\PC{0,20}") {
            let (_dir, tokenizer) = bytes();
            let mut stream = tokenizer.stream(false);
            let mut out = String::new();
            for id in tokenizer.encode(&text, false).unwrap() {
                out += &stream.push(id).unwrap();
            }
            out += &stream.finish().unwrap();
            prop_assert_eq!(out, text);
        }
    }
}
