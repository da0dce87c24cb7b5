//! What is written around a context on the command line.

use super::method::MethodName;
use accordion::checkpoint::Tokenizer;
use accordion::pipeline::instruction::Instruction;
use accordion::pipeline::prompt::{Framing, encode_affixes, encode_context, read_text};
use anyhow::{Context, ensure};
use clap::{Args, ValueEnum};

/// What is written around the context.
#[derive(Debug, Args)]
#[command(next_help_heading = "Prompt")]
pub(crate) struct FramingArguments {
    /// System message of the chat template
    #[arg(long, value_name = "TEXT", conflicts_with_all = ["no_chat_template", "prefix"])]
    system: Option<String>,
    /// Put the question behind the context as it is, without the chat template; rcc always does
    #[arg(long)]
    no_chat_template: bool,
    /// Text before the context, where there is no chat template or it is not used
    #[arg(long, value_name = "TEXT")]
    prefix: Option<String>,
    /// Instruct RCC's published model: the question is compressed with the context, and only the answer is shown
    #[arg(long, value_enum)]
    instruction: Option<InstructionName>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum InstructionName {
    /// The model reconstructs the question before it answers
    Reconstruct,
    /// The question is the decoder's prompt too
    Manual,
}

impl FramingArguments {
    /// The instruction mode, if there is one.
    pub(crate) fn instruction(&self) -> Option<Instruction> {
        self.instruction.map(|name| match name {
            InstructionName::Reconstruct => Instruction::Reconstruct,
            InstructionName::Manual => Instruction::Manual,
        })
    }

    /// Whether the flags fit the method and the number of questions.
    pub(crate) fn check(&self, method: MethodName, questions: usize) -> anyhow::Result<()> {
        let rcc = method == MethodName::Rcc;
        ensure!(!rcc || self.system.is_none(), "--system needs a chat template, and rcc uses none; use --prefix");
        if self.instruction.is_some() {
            ensure!(rcc, "--instruction is for rcc, and the method is {}", method.name());
            ensure!(
                questions == 1,
                "--instruction compresses the question with the context: give exactly one --prompt"
            );
        }
        Ok(())
    }

    /// The text to compress, which is read from `file`: the context, and the question where it is compressed with it.
    pub(crate) fn text(&self, file: &str, question: Option<&str>) -> anyhow::Result<String> {
        let text = read_text(file)?;
        Ok(match (self.instruction, question) {
            // An empty context is refused by name, whatever stands behind it.
            (Some(_), Some(question)) if !text.is_empty() => Instruction::compressed_text(&text, question),
            _ => text,
        })
    }

    /// The ids before and behind a context for every question: the former are the same for all.
    pub(crate) fn affixes(
        &self,
        tokenizer: &Tokenizer,
        method: MethodName,
        questions: &[String],
    ) -> anyhow::Result<(Vec<u32>, Vec<Vec<u32>>)> {
        let framing = self.framing(tokenizer, method)?;
        let (mut prefixes, mut suffixes) = (Vec::new(), Vec::new());
        for question in questions {
            let told = self.instruction().map(|instruction| instruction.prompt(question));
            let (prefix, suffix) = encode_affixes(tokenizer, framing, told.as_deref().unwrap_or(question))?;
            prefixes.push(prefix);
            suffixes.push(suffix);
        }
        ensure!(
            prefixes.windows(2).all(|pair| pair[0] == pair[1]),
            "the chat template writes the question before the context: ask one at a time"
        );
        Ok((prefixes.pop().unwrap_or_default(), suffixes))
    }

    /// The ids before a context about which nothing is asked yet.
    pub(crate) fn prefix(&self, tokenizer: &Tokenizer, method: MethodName) -> anyhow::Result<Vec<u32>> {
        // What stands before the context does not depend on the question; an empty one would be refused.
        Ok(encode_affixes(tokenizer, self.framing(tokenizer, method)?, "?")?.0)
    }

    fn framing(&self, tokenizer: &Tokenizer, method: MethodName) -> anyhow::Result<Framing<'_>> {
        let Self { system, no_chat_template, prefix, .. } = self;
        if tokenizer.has_chat_template() && !no_chat_template && method != MethodName::Rcc {
            ensure!(
                prefix.is_none(),
                "--prefix has no place in the chat template; use --system, or add --no-chat-template"
            );
            return Ok(Framing::Chat { system: system.as_deref() });
        }
        ensure!(system.is_none(), "--system needs a chat template, and the bundle's tokenizer has none; use --prefix");
        Ok(Framing::Raw { prefix: prefix.as_deref().unwrap_or_default() })
    }
}

/// The ids of the context `text`, read from `file`.
pub(crate) fn context_ids(tokenizer: &Tokenizer, text: &str, file: &str) -> anyhow::Result<Vec<u32>> {
    encode_context(tokenizer, text).with_context(|| format!("--context {file}"))
}
