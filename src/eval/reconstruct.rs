//! Reconstruction: a passage of the compressed text is begun, and has to be continued as it stands there.
//!
//! This is what RCC is trained for: the cue is 10 to 20 tokens of the text (its training script draws their number evenly),
//! and the model finds the passage by it.

use super::EvalError;
use super::haystack::Haystack;
use super::task::{Case, Goal, Sample, Settings, Task, below, stream};
use crate::pipeline::prompt::PromptIds;

/// Fewest and most tokens of a cue.
const CUE: [usize; 2] = [10, 20];

/// Continuations of passages. A case's length is that of the context.
#[derive(Debug)]
pub struct Reconstruct<'a> {
    /// The text.
    pub text: &'a Haystack,
    /// What the tokenizer puts before every text.
    pub leading: Vec<u32>,
    /// Tokens of the context.
    pub lengths: Vec<usize>,
    /// Passages at every length.
    pub samples: usize,
    /// Tokens to continue by.
    pub new_tokens: usize,
    /// Seed of everything random.
    pub seed: u64,
}

impl Task for Reconstruct<'_> {
    fn name(&self) -> &'static str {
        "reconstruct"
    }

    fn seed(&self) -> u64 {
        self.seed
    }

    fn settings(&self) -> Settings {
        Settings::from([
            ("text".to_owned(), self.text.sha256.clone()),
            ("new_tokens".to_owned(), self.new_tokens.to_string()),
        ])
    }

    fn cases(&self) -> Vec<Case> {
        let case =
            |&length: &usize| (0..self.samples).map(move |sample| Case { length, depth: None, sample, opening: false });
        self.lengths.iter().flat_map(case).collect()
    }

    fn sample(&self, case: Case) -> Result<Sample, EvalError> {
        let mut random = stream(self.seed, self.name(), case);
        let [fewest, most] = CUE;
        let cue = fewest + below(&mut random, most - fewest + 1);
        let Some(last) = case.length.checked_sub(most + self.new_tokens) else {
            let expected = format!("at least {} tokens, cue and continuation", most + self.new_tokens);
            return Err(EvalError::setting("--length", &case.length, expected));
        };
        let context = self.text.window(&mut random, case.length)?.to_vec();
        let start = below(&mut random, last + 1);
        let passage = &context[start + cue..start + cue + self.new_tokens];
        let goal = Goal::Continue { expected: passage.to_vec() };
        let suffix = context[start..start + cue].to_vec();
        let marked = (start + cue..start + cue + self.new_tokens).collect();
        let prompt = PromptIds { prefix: self.leading.clone(), context, suffix };
        Ok(Sample { prompt, lead: self.leading.len(), goal, marked })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn the_cue_is_in_the_context_and_what_follows_it_is_wanted() {
        let text = Haystack { text: String::new(), ids: (0..5000).collect(), sha256: String::new(), flag: "--text" };
        let task =
            Reconstruct { text: &text, leading: vec![7777], lengths: vec![60], samples: 200, new_tokens: 30, seed: 0 };
        let mut cues = Vec::new();
        for case in task.cases() {
            let Sample { prompt, goal, marked, .. } = task.sample(case).unwrap();
            let Goal::Continue { expected } = goal else { unreachable!() };
            assert_eq!((prompt.prefix.as_slice(), prompt.context.len(), expected.len()), (&[7777][..], 60, 30));
            let passage = [prompt.suffix.as_slice(), &expected].concat();
            assert!(prompt.context.windows(passage.len()).any(|window| window == passage));
            assert_eq!(marked.iter().map(|&i| prompt.context[i]).collect::<Vec<_>>(), expected);
            cues.push(prompt.suffix.len());
        }
        assert_eq!((cues.iter().min(), cues.iter().max()), (Some(&10), Some(&20)));
        let short = Case { length: 49, depth: None, sample: 0, opening: false };
        assert!(task.sample(short).unwrap_err().to_string().starts_with("--length is 49, expected at least 50"));
    }
}
