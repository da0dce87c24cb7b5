//! The model as it is: every token attends to all before it.

use super::array::Scope;
use super::cache::Cache;
use super::llama::Llama;
use super::{Result, expect_length};
use crate::taps::TapSink;
use ndarray::Array2;

/// Runs `ids` at `positions` after the rows of `cache`, which grows by them. Returns the rows that leave the last layer,
/// `[L, D]`, before the final norm; [`Llama::logits`] takes them from there.
///
/// # Errors
///
/// Ids outside the vocabulary, as many positions as ids missing, a cache of another number of layers, or more rows than a
/// sliding window spans; the cache is then unchanged.
pub fn forward(
    model: &Llama,
    ids: &[u32],
    positions: &[i64],
    cache: &mut Cache,
    taps: &mut dyn TapSink,
) -> Result<Array2<f32>> {
    expect_length("position ids", positions.len(), ids.len())?;
    expect_length("layers of the cache", cache.layers.len(), model.architecture().num_layers)?;
    let mut taps = Scope::new(taps, "");
    let rotary = model.rotary(positions);
    let mut hidden = model.embed(ids)?;
    let mut grown = Cache::default();
    for (layer, past) in cache.layers.iter().enumerate() {
        let mut taps = taps.within(&format!("layers.{layer}."));
        let attended = model.attention_half(layer, &hidden, &rotary, Some(past), &mut taps)?;
        hidden = model.mlp_half(layer, &attended.residual, &mut taps)?;
        grown.layers.push(attended.kv);
    }
    *cache = grown;
    Ok(hidden)
}
