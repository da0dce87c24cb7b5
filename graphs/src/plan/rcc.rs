//! RCC: how a context fills encoder windows, and which positions of them become slots.

use super::{OperationCount, PlanError, PromptLengths};
use crate::architecture::{Architecture, Encoder};
use serde::{Deserialize, Serialize};
use std::ops::Range;

/// What the checkpoint does not say.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct RccSettings {
    /// Tokens of an encoder segment \[W\].
    pub window: usize,
    /// Tokens per slot \[r\]; divides the window.
    pub ratio: usize,
    /// Whether a decoder layer gets the mean of two encoder states (an encoder twice as deep; the authors' flag
    /// `layers_Equal`).
    pub pairs: bool,
    /// Whether a Mamba encoder's first state is its embedding, as a transformer's is. Hugging Face's Mamba begins with
    /// the first block's output instead.
    pub first_state_is_embedding: bool,
}

/// A prompt takes at most this many times the ratio of tokens.
const PROMPT_RATIOS: usize = 600;

/// Most tokens of a window; far above any that was trained.
const MAX_WINDOW: usize = 1 << 20;

/// Most slots a plan may have; keeps a mistyped length from asking for more than fits into any memory.
const MAX_SLOTS: usize = 1 << 24;

impl RccSettings {
    /// Checks the settings against each other.
    ///
    /// # Errors
    ///
    /// The window is empty or longer than any, or the ratio is 0 or does not divide it.
    pub fn check(&self) -> Result<(), PlanError> {
        if !(1..=MAX_WINDOW).contains(&self.window) {
            return Err(out_of_range("window", self.window, format!("1 to {MAX_WINDOW} tokens")));
        }
        if self.ratio == 0 || !self.window.is_multiple_of(self.ratio) {
            return Err(out_of_range("ratio", self.ratio, format!("a divisor of the window, {}", self.window)));
        }
        Ok(())
    }

    /// Slots of one segment \[n\].
    pub fn slots_per_segment(&self) -> usize {
        self.window / self.ratio.max(1)
    }

    /// Longest prompt that the authors' code reads; it cuts longer ones.
    pub fn longest_prompt(&self) -> usize {
        self.ratio.saturating_mul(PROMPT_RATIOS)
    }

    /// Encoder states that reach a decoder of `decoder_layers` layers: the first fills the embedding, decoder layer
    /// `i + 1` gets state `i + 1`, or with pairs the mean of states `2 i + 1` and `2 i + 2`. What the last layer would
    /// get reaches no token.
    pub fn live_states(&self, decoder_layers: usize) -> usize {
        match decoder_layers {
            0 => 0,
            n if self.pairs => 2 * n - 1,
            n => n,
        }
    }

    /// The encoder states that decoder layer input `map` is made from: map 0 is the embedding's, map `i` is added behind
    /// layer `i - 1`.
    pub fn states_of_map(&self, map: usize) -> Range<usize> {
        match map {
            0 => 0..1,
            i if self.pairs => 2 * i - 1..2 * i + 1,
            i => i..i + 1,
        }
    }

    /// Blocks that `encoder` has to run to give its first `states` states, and whether the first state is the embedding.
    pub fn encoder_states(&self, encoder: &Encoder, states: usize) -> (usize, bool) {
        let embedding_first = match encoder {
            Encoder::Transformer(_) => true,
            Encoder::Mamba(_) => self.first_state_is_embedding,
        };
        (states - usize::from(embedding_first && states > 0), embedding_first)
    }

    /// Checks that `encoder` is deep and wide enough for a decoder of `decoder_layers` layers.
    ///
    /// # Errors
    ///
    /// It has too few blocks. State `num_layers` of a transformer is normalised and would be another thing.
    pub fn check_encoder(&self, encoder: &Encoder, decoder_layers: usize) -> Result<(), PlanError> {
        let (blocks, _) = self.encoder_states(encoder, self.live_states(decoder_layers));
        // The authors build a map for the last layer too, from a state that must exist.
        let expected = if self.pairs { 2 * decoder_layers } else { decoder_layers };
        if encoder.num_layers() < expected.max(blocks) {
            let why = if self.pairs { "two for every decoder layer" } else { "one for every decoder layer" };
            let expected = format!("at least {expected}, {why}");
            return Err(out_of_range("number of encoder layers", encoder.num_layers(), expected));
        }
        Ok(())
    }
}

/// The segments and slots of one context.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RccPlan {
    /// What was asked for.
    pub settings: RccSettings,
    /// The prompt: prefix and context are compressed together, the suffix is read by the decoder.
    pub lengths: PromptLengths,
    /// Context tokens that are repeated in front \[q\]: from the end of the text.
    pub front: Range<usize>,
    /// How often the text follows.
    pub repeats: usize,
    /// Encoder segments \[S\].
    pub segments: usize,
    /// Slots, and rows of the decoder's cache \[K\].
    pub slots: usize,
}

impl RccPlan {
    /// Plans a prompt of `lengths`.
    ///
    /// A text longer than the window is preceded by its own tail, up to a multiple of the window: by a whole window if it
    /// is one already. A shorter text is repeated as often as it fits, after its own tail.
    ///
    /// # Errors
    ///
    /// The settings contradict each other, the text is empty, or the prompt behind it is longer than
    /// [`RccSettings::longest_prompt`].
    pub fn new(lengths: PromptLengths, settings: RccSettings) -> Result<Self, PlanError> {
        settings.check()?;
        let RccSettings { window, ratio, .. } = settings;
        let length = lengths.prefix.saturating_add(lengths.context);
        if length == 0 {
            return Err(out_of_range("context length", 0, "at least 1 token"));
        }
        if length / ratio > MAX_SLOTS {
            return Err(out_of_range("context length", length, format!("at most {MAX_SLOTS} slots of {ratio} tokens")));
        }
        if lengths.suffix > settings.longest_prompt() {
            let expected = format!("at most {PROMPT_RATIOS} x ratio = {}", settings.longest_prompt());
            return Err(out_of_range("prompt length", lengths.suffix, expected));
        }
        let (repeats, padding) =
            if length > window { (1, window - length % window) } else { (window / length, window % length) };
        let segments = (padding + repeats * length) / window;
        Ok(Self {
            settings,
            lengths,
            front: length - padding..length,
            repeats,
            segments,
            slots: segments * settings.slots_per_segment(),
        })
    }

    /// Tokens of the text, before padding \[N\].
    pub fn text_len(&self) -> usize {
        self.lengths.prefix + self.lengths.context
    }

    /// Operations up to the first generated token: the live blocks of `encoder` over all segments, the maps, the layers of
    /// `decoder` over the slots (of the last one only keys and values) and over the prompt behind them, with logits of its
    /// last row.
    pub fn operations(&self, decoder: &Architecture, encoder: &Encoder) -> OperationCount {
        let (layers, slots, prompt) = (decoder.num_layers(), self.slots, self.lengths.suffix);
        let (blocks, _) = self.settings.encoder_states(encoder, self.settings.live_states(layers));
        let window = self.settings.window;
        let block = match encoder {
            Encoder::Transformer(arch) => OperationCount::layer(arch, window, window),
            Encoder::Mamba(arch) => OperationCount::mamba_block(arch, window),
        };
        let map = OperationCount::linear_map(encoder.hidden_size(), decoder.hidden_size(), slots);
        let before_last = layers.saturating_sub(1);
        block.times(blocks * self.segments)
            + map.times(layers)
            + OperationCount::layer(decoder, slots, slots).times(before_last)
            + OperationCount::keys_values(decoder, slots)
            + OperationCount::layer_after(decoder, slots, prompt, prompt).times(before_last)
            + OperationCount::layer_after(decoder, slots, prompt, prompt.min(1))
            + OperationCount::lm_head(decoder, 1)
    }

    /// The tokens of segment `index` of the padded `text`, which has to be the one that was planned for.
    pub fn segment(&self, text: &[u32], index: usize) -> Vec<u32> {
        let window = self.settings.window;
        let padded = self.front.clone().chain((0..self.repeats).flat_map(|_| 0..self.text_len()));
        // `skip` over ranges is constant time per range.
        padded.skip(index * window).take(window).filter_map(|i| text.get(i).copied()).collect()
    }
}

fn out_of_range(what: &'static str, found: usize, expected: impl Into<String>) -> PlanError {
    PlanError::OutOfRange { what, found: found.to_string(), expected: expected.into() }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::architecture::{GptNeox, Rope, RopeScaling};

    fn plan(context: usize, window: usize, ratio: usize) -> Result<RccPlan, PlanError> {
        let settings = RccSettings { window, ratio, pairs: false, first_state_is_embedding: true };
        RccPlan::new(PromptLengths { prefix: 0, context, suffix: 1 }, settings)
    }

    fn padded(context: usize, window: usize) -> Vec<u32> {
        let plan = plan(context, window, 1).unwrap();
        let text: Vec<u32> = (0..context as u32).collect();
        (0..plan.segments).flat_map(|s| plan.segment(&text, s)).collect()
    }

    #[test]
    fn long_texts_are_preceded_by_their_own_tail() {
        assert_eq!(padded(5, 4), [2, 3, 4, 0, 1, 2, 3, 4]);
        // A multiple of the window gets a whole window more.
        assert_eq!(padded(8, 4), [4, 5, 6, 7, 0, 1, 2, 3, 4, 5, 6, 7]);
    }

    #[test]
    fn short_texts_are_repeated_behind_their_own_tail() {
        assert_eq!(padded(3, 8), [1, 2, 0, 1, 2, 0, 1, 2]);
        assert_eq!(padded(2, 8), [0, 1, 0, 1, 0, 1, 0, 1]);
        assert_eq!(padded(8, 8), [0, 1, 2, 3, 4, 5, 6, 7]);
        assert_eq!(padded(1, 3), [0, 0, 0]);
    }

    #[test]
    fn operations_are_those_of_what_is_live() {
        let model = Architecture::GptNeox(GptNeox {
            num_layers: 2,
            hidden_size: 4,
            intermediate_size: 8,
            num_heads: 1,
            vocab_size: 10,
            max_positions: 8,
            layer_norm_eps: 1e-5,
            rope: Rope { theta: 10_000.0, scaling: RopeScaling::None },
            rotary_dims: 2,
            parallel_residual: true,
            tie_word_embeddings: false,
            attention_bias: true,
            eos_token_ids: vec![],
            bos_token_id: None,
        });
        // One segment, 4 slots, 1 prompt token; a layer has 64 + 64 weights, and of two encoder blocks one is live.
        let found = plan(8, 8, 2).unwrap().operations(&model, &Encoder::Transformer(model.clone()));
        let encoder = 2 * 128 * 8;
        let maps = 2 * (2 * 16 * 4);
        let slots = 2 * 128 * 4 + 2 * (4 * 8) * 4;
        let prompt = 2 * (2 * 128) + 2 * 4 * 10;
        assert_eq!(found.linear, encoder + maps + slots + prompt);
        // Row pairs: in the segment, among the slots in the first layer, of the token in both.
        assert_eq!(found.attention, 4 * 4 * (36 + 10 + 2 * 5));
    }

    #[test]
    fn refusals_name_what_was_found() {
        assert_eq!(plan(0, 8, 2).unwrap_err().to_string(), "context length is 0, expected at least 1 token");
        assert_eq!(plan(9, 8, 3).unwrap_err().to_string(), "ratio is 3, expected a divisor of the window, 8");
        assert_eq!(
            plan(9, 1 << 40, 2).unwrap_err().to_string(),
            "window is 1099511627776, expected 1 to 1048576 tokens"
        );
        let settings = RccSettings { window: 8, ratio: 2, pairs: false, first_state_is_embedding: true };
        let long = PromptLengths { prefix: 0, context: 1, suffix: 1201 };
        let found = RccPlan::new(long, settings).unwrap_err().to_string();
        assert_eq!(found, "prompt length is 1201, expected at most 600 x ratio = 1200");
    }
}
