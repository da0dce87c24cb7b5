//! Needle in a haystack: a sentence at every depth of every length, and a question about it.

use super::EvalError;
use super::haystack::{Frame, Grid, Haystack, Planted};
use super::task::{Case, Goal, Sample, Settings, Task, stream};
use crate::pipeline::prompt::Framing;

/// A sentence, a question about it, and the words of a right answer.
#[derive(Debug)]
pub struct Needle<'a> {
    /// What is around every prompt.
    pub frame: Frame<'a>,
    /// The text to hide in.
    pub haystack: &'a Haystack,
    /// The grid.
    pub grid: Grid,
    /// The sentence.
    pub sentence: String,
    /// The question.
    pub question: String,
    /// Words of the sentence that an answer must have.
    pub keywords: Vec<String>,
}

impl Needle<'_> {
    /// A sentence that nothing in a novel suggests.
    pub const SENTENCE: &'static str =
        "The lighthouse keeper of Varn hides the spare key under the third blue flowerpot.";
    /// What is asked about it.
    pub const QUESTION: &'static str = "Where does the lighthouse keeper of Varn hide the spare key?";
    /// What an answer must have.
    pub const KEYWORDS: [&'static str; 3] = ["third", "blue", "flowerpot"];

    /// Checks that every key word is one of the sentence.
    ///
    /// # Errors
    ///
    /// One is not: no answer from the text could be right.
    pub fn check(&self) -> Result<(), EvalError> {
        let missing = self.keywords.iter().find(|word| word.is_empty() || !self.sentence.contains(word.as_str()));
        missing.map_or(Ok(()), |word| {
            Err(EvalError::setting("--keyword", &format!("{word:?}"), "a part of the sentence that --needle plants"))
        })
    }
}

impl Task for Needle<'_> {
    fn name(&self) -> &'static str {
        "needle"
    }

    fn seed(&self) -> u64 {
        self.grid.seed
    }

    fn settings(&self) -> Settings {
        let mut settings = self.frame.settings(self.haystack);
        settings.insert("needle".to_owned(), self.sentence.clone());
        settings.insert("question".to_owned(), self.question.clone());
        settings.insert("keywords".to_owned(), self.keywords.join(", "));
        settings
    }

    fn cases(&self) -> Vec<Case> {
        self.grid.cases()
    }

    fn sample(&self, case: Case) -> Result<Sample, EvalError> {
        let mut random = stream(self.grid.seed, self.name(), case);
        let raw = format!("\n\nQuestion: {}\nAnswer:", self.question);
        let question = if matches!(self.frame.framing, Framing::Chat { .. }) { &self.question } else { &raw };
        let goal = Goal::Keywords { expected: self.keywords.clone(), new_tokens: self.frame.new_tokens };
        let planted = Planted { sentence: &self.sentence, answers: &self.keywords, question };
        self.frame.hide(self.haystack, planted, case, &mut random, goal)
    }
}
