//! What the causal transformers have in common: rows in, one layer after the other, logits out.

use super::array::Scope;
use super::cache::{Cache, KeyValue};
use super::llama::Llama;
use super::neox::GptNeox;
use super::quantize::Weight;
use super::rope::Rotary;
use super::{ReferenceError, Result};
use accordion_graphs::architecture::Architecture;
use ndarray::Array2;

/// A causal transformer, whatever its family.
pub trait Transformer: Send + Sync {
    /// Number of layers.
    fn num_layers(&self) -> usize;

    /// A cache of all layers without any row.
    fn empty_cache(&self) -> Cache;

    /// The embeddings of `ids`, `[L, D]`.
    ///
    /// # Errors
    ///
    /// An id is outside the vocabulary.
    fn embed(&self, ids: &[u32]) -> Result<Array2<f32>>;

    /// The rotation of rows at `positions`.
    fn rotary(&self, positions: &[i64]) -> Rotary;

    /// Layer `layer` over `x [L, D]`, whose rows attend to themselves and to `past`. Returns the rows that leave it and the
    /// keys and values of past and new rows.
    ///
    /// # Errors
    ///
    /// There are more rows than the model's sliding window spans.
    fn layer(
        &self,
        layer: usize,
        x: &Array2<f32>,
        rotary: &Rotary,
        past: Option<&KeyValue>,
        taps: &mut Scope<'_>,
    ) -> Result<(Array2<f32>, KeyValue)>;

    /// The final norm of rows that leave the last layer, `[L, D]`.
    fn final_norm(&self, hidden: &Array2<f32>) -> Array2<f32>;

    /// Logits `[L, vocab]` of the rows that leave the last layer, `[L, D]`: final norm and output projection.
    fn logits(&self, hidden: &Array2<f32>) -> Array2<f32>;
}

/// Loads the model of `architecture` by the names of its Hugging Face checkpoint from `source`, which may hold any float
/// type.
///
/// # Errors
///
/// As [`Llama::load`].
pub fn load<W, E>(
    architecture: &Architecture,
    source: impl Fn(&str) -> std::result::Result<W, E>,
) -> Result<Box<dyn Transformer>>
where
    W: Into<Weight>,
    E: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    match architecture {
        Architecture::Llama(llama) => Ok(Box::new(Llama::load(llama, source)?)),
        Architecture::GptNeox(neox) => Ok(Box::new(GptNeox::load(neox, source)?)),
        _ => Err(ReferenceError::Family { what: "transformer" }),
    }
}
