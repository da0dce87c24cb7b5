//! How RCC's published model is instructed: what it is to do is compressed with the context, and the decoder is prompted
//! with the opening of a conversation in which it says so itself.

/// What the decoder's prompt says of the instruction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Instruction {
    /// Nothing: the model reconstructs it from the compressed text before it answers.
    Reconstruct,
    /// The instruction itself.
    Manual,
}

/// The opening of a conversation, up to where the user speaks. In vocabularies without these markers they are ordinary
/// text.
const OPENING: &str = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n";
/// Behind it the model answers.
const ANSWER: &str = "assistant\n";

impl Instruction {
    /// The text to compress: the context, a blank line and what is to be done.
    pub fn compressed_text(context: &str, instruction: &str) -> String {
        format!("{context}\n\n{instruction}")
    }

    /// The decoder's prompt.
    pub fn prompt(self, instruction: &str) -> String {
        match self {
            Self::Reconstruct => OPENING.to_owned(),
            Self::Manual => format!("{OPENING}{instruction}"),
        }
    }

    /// The answer in what the model wrote: the text behind the last mark of its turn, or all of it where there is none.
    pub fn answer(written: &str) -> &str {
        written.rsplit_once(ANSWER).map_or(written, |(_, answer)| answer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_instruction_is_compressed_and_told_only_when_manual() {
        assert_eq!(Instruction::compressed_text("A text.", "Who?"), "A text.\n\nWho?");
        assert!(Instruction::Reconstruct.prompt("Who?").ends_with("<|im_start|>user\n"));
        assert_eq!(Instruction::Manual.prompt("Who?"), Instruction::Reconstruct.prompt("") + "Who?");
    }

    #[test]
    fn the_answer_is_behind_the_last_turn() {
        assert_eq!(Instruction::answer("Who?<|im_end|>\n<|im_start|>assistant\nNobody."), "Nobody.");
        assert_eq!(Instruction::answer("assistant\na assistant\nb\n"), "b\n");
        assert_eq!(Instruction::answer("no turn"), "no turn");
    }
}
