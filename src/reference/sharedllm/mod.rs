//! SharedLLM: every chunk of a context becomes a tree whose nodes a lower model reads one by one; a few tokens' keys and
//! values of each are kept. The bottom layers of the upper model, which reads the running text, attend to them.
//!
//! Both variants of [`Quirks`](accordion_graphs::plan::sharedllm::Quirks) are here. Where the released code cannot compute
//! something that its formulas define (a running text of 2 to n + 1 tokens), this does.

mod cross;
mod encode;
mod tree;

pub use encode::{Injected, compress};

use self::cross::CrossAttention;
use super::array::Scope;
use super::cache::Cache;
use super::decode::argmax;
use super::llama::Llama;
use super::quantize::Weight;
use super::weights::Weights;
use super::{ReferenceError, Result};
use crate::taps::TapSink;
use accordion_graphs::architecture::{self, SharedLlmModel};
use ndarray::{Array2, ArrayView1};

/// A context in whole chunks, and the text that follows it.
#[derive(Debug, Clone, Copy)]
pub struct Prompt<'a> {
    /// Token ids of the context, chunk after chunk \[n * L\].
    pub context: &'a [u32],
    /// Which of them are tokens and not padding \[n * L\].
    pub mask: &'a [bool],
    /// Token ids of the running text \[T\].
    pub running: &'a [u32],
    /// The row of the running text that the halves of a node are compared with.
    pub query_index: usize,
}

/// The two models, and what attends from one to the other.
pub struct SharedLlm {
    upper: Llama,
    /// As many layers as are injected, without an output projection.
    lower: Llama,
    /// One per injected layer.
    cross: Vec<CrossAttention>,
}

impl SharedLlm {
    /// Loads the upper model `architecture` and `model`'s lower one by the authors' names from `source`.
    ///
    /// # Errors
    ///
    /// As [`Llama::load`]; or the two models have different heads, or fewer layers than are injected.
    pub fn load<W, E>(
        architecture: &architecture::Llama,
        model: &SharedLlmModel,
        source: impl Fn(&str) -> std::result::Result<W, E>,
    ) -> Result<Self>
    where
        W: Into<Weight>,
        E: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        check(architecture, model)?;
        let lower =
            architecture::Llama { num_layers: model.injected_layers, tie_word_embeddings: true, ..model.lower.clone() };
        let upper = Llama::load(architecture, &source)?;
        let lower =
            Llama::load(&lower, |name| source(&format!("encoder.{}", name.strip_prefix("model.").unwrap_or(name))))?;
        let weights = Weights::new(source);
        let cross = (0..model.injected_layers).map(|layer| CrossAttention::load(architecture, layer, &weights));
        Ok(Self { cross: cross.collect::<Result<_>>()?, upper, lower })
    }

    /// The upper model.
    pub fn upper(&self) -> &Llama {
        &self.upper
    }
}

/// The upper model attends to keys and values as the lower one made them, layer by layer.
fn check(upper: &architecture::Llama, SharedLlmModel { lower, injected_layers }: &SharedLlmModel) -> Result<()> {
    let most = upper.num_layers.min(lower.num_layers);
    if !(1..=most).contains(injected_layers) {
        let expected = format!("1 to {most}, the layers of both models");
        return Err(ReferenceError::Architecture { what: "injected_layers", found: *injected_layers, expected });
    }
    for (what, found, expected) in [
        ("num_kv_heads of the lower model", lower.num_kv_heads, upper.num_kv_heads),
        ("head_dim of the lower model", lower.head_dim, upper.head_dim),
    ] {
        if found != expected {
            let expected = format!("{expected}, as in the upper model");
            return Err(ReferenceError::Architecture { what, found, expected });
        }
    }
    Ok(())
}

/// A running text that attends to a context. It works on a cache of its own, so that one context can have many.
#[derive(Debug, Clone)]
pub struct RunningText<'a> {
    injected: &'a Injected,
    /// Whether keys and values are kept as 8-bit integers, those of the context as well.
    rounded: bool,
    /// Keys and values of all that was fed.
    pub cache: Cache,
}

impl<'a> RunningText<'a> {
    /// An empty text.
    pub fn new(model: &SharedLlm, injected: &'a Injected) -> Self {
        Self { injected, rounded: false, cache: model.upper.empty_cache() }
    }

    /// The same, with keys and values that are kept as 8-bit integers from here on.
    #[must_use]
    pub fn rounded(self) -> Self {
        Self { cache: self.cache.rounded(), rounded: true, ..self }
    }

    /// The position of the next token. The context does not take part in the count.
    pub fn next_position(&self) -> i64 {
        self.cache.rows() as i64
    }

    /// Feeds `ids` at once and returns the logits of all of them, `[L, vocab]`. As released, a single token is not computed
    /// as it would be among others.
    ///
    /// # Errors
    ///
    /// Ids outside the vocabulary, more rows than a sliding window spans, or a single token after more chunks than the
    /// released code has rotations for. The text is then unchanged.
    pub fn feed(&mut self, model: &SharedLlm, ids: &[u32], taps: &mut dyn TapSink) -> Result<Array2<f32>> {
        let upper = &model.upper;
        let mut taps = Scope::new(taps, "");
        let positions: Vec<i64> = (self.next_position()..).take(ids.len()).collect();
        let rotary = upper.rotary(&positions);
        let mut hidden = upper.embed(ids)?;
        taps.tap("embed", &hidden)?;
        let mut grown = Cache::default();
        for (layer, past) in self.cache.layers.iter().enumerate() {
            let mut taps = taps.within(&format!("layers.{layer}."));
            let mut attended = upper.attention_half(layer, &hidden, &rotary, Some(past), &mut taps)?;
            if let Some(cross) = model.cross.get(layer) {
                attended.residual =
                    cross.attend(upper, &attended.residual, (self.injected, self.rounded), layer, &mut taps)?;
            }
            hidden = upper.mlp_half(layer, &attended.residual, &mut taps)?;
            grown.layers.push(attended.kv);
        }
        taps.tap("norm", &upper.final_norm(&hidden))?;
        self.cache = grown;
        Ok(upper.logits(&hidden))
    }

    /// Decodes greedily: the token that `last_logits [vocab]` favours, then `steps` more, each of which is fed.
    ///
    /// # Errors
    ///
    /// As [`Self::feed`].
    pub fn greedy(&mut self, model: &SharedLlm, last_logits: &ArrayView1<'_, f32>, steps: usize) -> Result<Vec<u32>> {
        let mut token = argmax(last_logits);
        let mut tokens = vec![token];
        for _ in 0..steps {
            let logits = self.feed(model, &[token], &mut crate::taps::NoTaps)?;
            token = argmax(&logits.row(0));
            tokens.push(token);
        }
        Ok(tokens)
    }
}

#[cfg(test)]
mod tests;
