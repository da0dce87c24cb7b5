//! What a run begins with: the questions, and the compressed context they are asked about.

use super::Arguments;
use crate::cli::framing::context_ids;
use crate::cli::method::MethodName;
use crate::cli::output::Output;
use accordion::bundle::{Bundle, Method};
use accordion::checkpoint::Tokenizer;
use accordion::pipeline::compress::Compression;
use accordion::pipeline::generate::Recompression;
use accordion::pipeline::prompt::PromptIds;
use accordion::pipeline::state_file::SavedState;
use accordion::pipeline::{ContextState, Engines};
use accordion_graphs::plan::PromptLengths;
use accordion_graphs::plan::rcc::RccPlan;
use anyhow::{Context, ensure};
use std::time::Instant;

/// The questions, and what is written around the context for them.
pub(super) struct Questions {
    /// As they were asked; empty for what was read with a saved state.
    pub(super) texts: Vec<String>,
    /// Before the context.
    pub(super) prefix: Vec<u32>,
    /// Behind the context, one per question.
    pub(super) suffixes: Vec<Vec<u32>>,
}

/// Where the compressed context comes from.
pub(super) enum Source {
    /// A file.
    Saved(Box<SavedState>),
    /// It is compressed for the first question.
    Context { compression: Box<Compression>, prompt: PromptIds },
}

/// The compressed context that all questions are asked about.
pub(super) struct Start {
    pub(super) state: ContextState,
    /// The tokens of its last rows: what has been read already need not be read again.
    pub(super) suffix: Vec<u32>,
    /// Of prefix, context and that suffix.
    pub(super) lengths: PromptLengths,
    /// What compressing took.
    pub(super) seconds: f64,
}

/// A context with one question behind it, to be compressed again as the text grows.
pub(super) struct Past<'a> {
    compression: &'a Compression,
    prompt: PromptIds,
    every: usize,
}

impl Questions {
    /// Those that were given, or the one that a saved state was made for.
    pub(super) fn new(
        arguments: &Arguments,
        (bundle, tokenizer): (&Bundle, &Tokenizer),
        method: MethodName,
        saved: Option<&SavedState>,
        output: &Output,
    ) -> anyhow::Result<Self> {
        if let Some(saved) = saved.filter(|_| arguments.prompts.is_empty()) {
            ensure!(!saved.suffix_ids.is_empty(), "no question was read with the state: give one with --prompt");
            let (prefix, suffixes) = (saved.prefix_ids.clone(), vec![saved.suffix_ids.clone()]);
            return Ok(Self { texts: vec![String::new()], prefix, suffixes });
        }
        let (prefix, mut suffixes) = arguments.framing.affixes(tokenizer, method, &arguments.prompts)?;
        arguments.compression.truncate(bundle, &mut suffixes, output);
        ensure!(
            saved.is_none_or(|saved| saved.prefix_ids == prefix),
            "the state was made with another text before the context: give the same --system, --prefix and \
             --no-chat-template as to `accordion compress`"
        );
        Ok(Self { texts: arguments.prompts.clone(), prefix, suffixes })
    }

    fn longest(&self) -> usize {
        self.suffixes.iter().map(Vec::len).max().unwrap_or_default()
    }
}

impl Source {
    /// A saved state, if the questions can be asked about it.
    pub(super) fn saved(saved: SavedState, questions: &Questions, bundle: &Bundle) -> anyhow::Result<Self> {
        if let (MethodName::Rcc, Method::Rcc { settings }) =
            (MethodName::of_state(&saved.origin.method), &bundle.manifest().method)
        {
            RccPlan::new(PromptLengths { suffix: questions.longest(), ..saved.origin.lengths }, *settings)?;
        }
        Ok(Self::Saved(Box::new(saved)))
    }

    /// A context, if it can be compressed for the questions.
    pub(super) fn context(
        arguments: &Arguments,
        (bundle, tokenizer): (&Bundle, &Tokenizer),
        method: MethodName,
        questions: &Questions,
    ) -> anyhow::Result<Self> {
        let compression = arguments.compression.compression(method, Some(&arguments.homer), bundle)?;
        let file = arguments.context.as_deref().unwrap_or_default();
        let text = arguments.framing.text(file, arguments.prompts.first().map(String::as_str))?;
        let context = context_ids(tokenizer, &text, file)?;
        let (prefix, length) = (questions.prefix.len(), context.len());
        for (number, suffix) in questions.suffixes.iter().enumerate() {
            let lengths = PromptLengths { prefix, context: length, suffix: suffix.len() };
            // Further questions are not compressed for; rcc has a longest prompt.
            if number == 0 || method == MethodName::Rcc {
                compression.check(bundle, lengths)?;
            }
            arguments.check_recompressions(bundle, &compression, lengths)?;
        }
        let suffix = questions.suffixes.first().cloned().unwrap_or_default();
        let prompt = PromptIds { prefix: questions.prefix.clone(), context, suffix };
        Ok(Self::Context { compression: Box::new(compression), prompt })
    }

    /// What has to be kept to compress the past anew after every `every` tokens; nothing where the context is gone.
    pub(super) fn past(&self, suffix: &[u32], every: u32) -> Option<Past<'_>> {
        match self {
            Self::Saved(_) => None,
            Self::Context { compression, prompt } => {
                let prompt = PromptIds { suffix: suffix.to_vec(), ..prompt.clone() };
                Some(Past { compression, prompt, every: every as usize })
            }
        }
    }

    /// The compressed context.
    pub(super) fn start(&self, engines: &mut Engines<'_>, output: &Output) -> anyhow::Result<Start> {
        match self {
            Self::Saved(saved) => {
                let SavedState { state, suffix_ids, origin, .. } = saved.as_ref();
                Ok(Start { state: state.clone(), suffix: suffix_ids.clone(), lengths: origin.lengths, seconds: 0.0 })
            }
            Self::Context { compression, prompt } => {
                let bar = output.bar("compressing", 0);
                let started = Instant::now();
                let state = compression.compress(engines, prompt, &mut |done, total| {
                    bar.set_length(total as u64);
                    bar.set_position(done as u64);
                })?;
                bar.finish_and_clear();
                let seconds = started.elapsed().as_secs_f64();
                let (name, lengths) = (compression.method(), prompt.lengths());
                output.remark(format!(
                    "{name}: kept {} of {} tokens, {seconds:.2} s",
                    state.tokens_kept(),
                    lengths.total()
                ));
                Ok(Start { state, suffix: prompt.suffix.clone(), lengths, seconds })
            }
        }
    }
}

impl Past<'_> {
    /// As [`generate`](accordion::pipeline::generate::generate) takes it.
    pub(super) fn recompression(&self) -> Recompression<'_> {
        Recompression { compression: self.compression, prompt: &self.prompt, every: self.every }
    }
}

impl Start {
    /// RCC's slots and prompt may take more positions than the decoder was trained for: it computes on, as its authors'
    /// code does.
    pub(super) fn warn_of_positions(&self, bundle: &Bundle, questions: &Questions, output: &Output) {
        let trained = bundle.architecture().max_positions();
        let (slots, longest) = (self.state.len() - self.suffix.len(), questions.longest());
        if slots + longest > trained {
            output.warning(format!(
                "{slots} slots and a prompt of {longest} tokens are more than the {trained} positions that the decoder \
                 was trained for"
            ));
        }
    }
}

impl Arguments {
    /// Whether every past that will be compressed again can be, so that no text breaks off in the middle.
    fn check_recompressions(
        &self,
        bundle: &Bundle,
        compression: &Compression,
        lengths: PromptLengths,
    ) -> anyhow::Result<()> {
        let Some(every) = self.generation.recompress_every else { return Ok(()) };
        for generated in (every as usize..self.generation.max_tokens).step_by(every as usize) {
            let past = PromptLengths { context: lengths.context.saturating_add(generated), ..lengths };
            compression
                .check(bundle, past)
                .with_context(|| format!("--recompress-every {every}: compressing again after {generated} tokens"))?;
        }
        Ok(())
    }
}
