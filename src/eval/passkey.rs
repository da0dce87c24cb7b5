//! Passkey retrieval: a number is hidden in a long text, and asked for.

use super::EvalError;
use super::haystack::{Frame, Grid, Haystack, Planted, marked};
use super::task::{Case, Goal, Sample, Settings, Task, below, stream};
use crate::checkpoint::Tokenizer;
use crate::pipeline::decode::Continuation;
use crate::pipeline::prompt::{Framing, PromptIds, leading_ids, read_text};
use serde::Deserialize;
use sha2::{Digest, Sha256};
use std::path::Path;

/// Digits of a key.
const DIGITS: u32 = 5;

/// What is asked where a chat template frames it, and where the model just goes on writing.
const QUESTION: &str = "What is the secret number mentioned in the text above? Answer with the number only.";
const RAW_QUESTION: &str = "\n\nWhat is the secret number mentioned in the text above? The secret number is";

/// Our own protocol: a five-digit number, twice in two short sentences, in a window of any text.
#[derive(Debug)]
pub struct Passkey<'a> {
    /// What is around every prompt.
    pub frame: Frame<'a>,
    /// The text to hide in.
    pub haystack: &'a Haystack,
    /// The grid.
    pub grid: Grid,
}

impl Task for Passkey<'_> {
    fn name(&self) -> &'static str {
        "passkey"
    }

    fn seed(&self) -> u64 {
        self.grid.seed
    }

    fn settings(&self) -> Settings {
        self.frame.settings(self.haystack)
    }

    fn cases(&self) -> Vec<Case> {
        self.grid.cases()
    }

    fn sample(&self, case: Case) -> Result<Sample, EvalError> {
        let mut random = stream(self.grid.seed, self.name(), case);
        let least = 10_usize.pow(DIGITS - 1);
        let key = loop {
            let key = (least + below(&mut random, 9 * least)).to_string();
            if !self.haystack.text.contains(&key) {
                break key;
            }
        };
        let sentence = format!("The secret number is {key}. Remember that {key} is the secret number.");
        let question = if matches!(self.frame.framing, Framing::Chat { .. }) { QUESTION } else { RAW_QUESTION };
        let goal = Goal::Integer {
            expected: key.clone(),
            new_tokens: self.frame.new_tokens,
            continuation: Continuation::Next,
        };
        let planted = Planted { sentence: &sentence, answers: &[key], question };
        self.frame.hide(self.haystack, planted, case, &mut random, goal)
    }
}

/// Tokens by which the authors' script shortens a context at its end, and which it generates at most.
const AUTHORS_NEW_TOKENS: usize = 20;

/// The protocol of HOMER's authors: questions of a file of theirs, framed as Llama 2's chat, the context without its last
/// 20 tokens, and the first generated token on the position of the last prompt token, as their `generate` puts it.
#[derive(Debug)]
pub struct AuthorsPasskey {
    questions: Vec<(PromptIds, String, Vec<usize>)>,
    sha256: String,
}

/// A line of the authors' file.
#[derive(Debug, Deserialize)]
struct Line {
    prefix: String,
    context: String,
    postfix: String,
    target: serde_json::Value,
}

impl AuthorsPasskey {
    /// The first `samples` questions of the JSON lines in `path`.
    ///
    /// # Errors
    ///
    /// The file cannot be read, or a line is not a question.
    pub fn open(path: &Path, tokenizer: &Tokenizer, samples: usize) -> Result<Self, EvalError> {
        let text = read_text(&path.to_string_lossy())?;
        let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()).take(samples);
        let questions = lines
            .map(|(i, line)| {
                let wrong = |problem: String| EvalError::Line { path: path.to_owned(), line: i + 1, problem };
                let line: Line = serde_json::from_str(line).map_err(|error| wrong(error.to_string()))?;
                let target = match &line.target {
                    serde_json::Value::String(text) => text.trim().to_owned(),
                    other => other.to_string(),
                };
                if target.is_empty() || !target.bytes().all(|byte| byte.is_ascii_digit()) {
                    return Err(wrong(format!("`target` is {}, expected an integer", line.target)));
                }
                question(tokenizer, &line, &target)?.ok_or_else(|| {
                    wrong(format!("`context` or `postfix` is too short: the context loses {AUTHORS_NEW_TOKENS} tokens"))
                })
            })
            .collect::<Result<Vec<_>, _>>()?;
        if questions.is_empty() {
            return Err(EvalError::setting("--data", &path.display(), "a file with at least one question"));
        }
        Ok(Self { questions, sha256: format!("{:x}", Sha256::digest(&text)) })
    }
}

fn question(
    tokenizer: &Tokenizer,
    line: &Line,
    target: &str,
) -> Result<Option<(PromptIds, String, Vec<usize>)>, EvalError> {
    let mut prefix = leading_ids(tokenizer)?;
    prefix.extend(tokenizer.encode(&format!("[INST] <<SYS>>\n{}\n<</SYS>>\n", line.prefix), false)?);
    let mut context = tokenizer.encode(&line.context, false)?;
    let suffix = tokenizer.encode(&format!("{} [/INST]", line.postfix), false)?;
    context.truncate(context.len().saturating_sub(AUTHORS_NEW_TOKENS));
    if context.is_empty() || suffix.is_empty() {
        return Ok(None);
    }
    let marked = marked(tokenizer, &context, &[target.to_owned()])?;
    Ok(Some((PromptIds { prefix, context, suffix }, target.to_owned(), marked)))
}

impl Task for AuthorsPasskey {
    fn name(&self) -> &'static str {
        "passkey"
    }

    fn seed(&self) -> u64 {
        0
    }

    fn settings(&self) -> Settings {
        Settings::from([
            ("protocol".to_owned(), "authors".to_owned()),
            ("data".to_owned(), self.sha256.clone()),
            ("new_tokens".to_owned(), AUTHORS_NEW_TOKENS.to_string()),
        ])
    }

    fn cases(&self) -> Vec<Case> {
        let case = |(sample, (prompt, ..)): (usize, &(PromptIds, String, Vec<usize>))| {
            // The files are called by these lengths; their prompts are a little shorter.
            let length = (prompt.lengths().total() + AUTHORS_NEW_TOKENS).next_power_of_two();
            Case { length, depth: None, sample, opening: false }
        };
        self.questions.iter().enumerate().map(case).collect()
    }

    fn sample(&self, case: Case) -> Result<Sample, EvalError> {
        let Some((prompt, expected, marked)) = self.questions.get(case.sample).cloned() else {
            return Err(EvalError::setting("--samples", &case.sample, format!("below {}", self.questions.len())));
        };
        let goal = Goal::Integer { expected, new_tokens: AUTHORS_NEW_TOKENS, continuation: Continuation::OffByOne };
        Ok(Sample { lead: prompt.prefix.len(), prompt, goal, marked })
    }
}
