//! The model as it is: every token attends to all before it.

use super::array::Scope;
use super::cache::Cache;
use super::transformer::Transformer;
use super::{Result, expect_length};
use crate::taps::TapSink;
use ndarray::Array2;

/// Runs `ids` at `positions` after the rows of `cache`, which grows by them. Returns the rows that leave the last layer,
/// `[L, D]`, before the final norm; [`Transformer::logits`] takes them from there.
///
/// # Errors
///
/// Ids outside the vocabulary, as many positions as ids missing, a cache of another number of layers, or more rows than a
/// sliding window spans; the cache is then unchanged.
pub fn forward(
    model: &dyn Transformer,
    ids: &[u32],
    positions: &[i64],
    cache: &mut Cache,
    taps: &mut dyn TapSink,
) -> Result<Array2<f32>> {
    expect_length("position ids", positions.len(), ids.len())?;
    let embedded = model.embed(ids)?;
    run_layers(model, embedded, positions, cache, &mut Scope::new(taps, ""), &mut |_, out, _| Ok(out))
}

/// What happens to the rows that leave a layer before the next one reads them.
pub(super) type AfterLayer<'a> = dyn FnMut(usize, Array2<f32>, &mut Scope<'_>) -> Result<Array2<f32>> + 'a;

/// Runs the rows `hidden [L, D]` at `positions` through all layers, as [`forward`] does from the embedding on.
pub(super) fn run_layers(
    model: &dyn Transformer,
    mut hidden: Array2<f32>,
    positions: &[i64],
    cache: &mut Cache,
    taps: &mut Scope<'_>,
    after: &mut AfterLayer<'_>,
) -> Result<Array2<f32>> {
    expect_length("layers of the cache", cache.layers.len(), model.num_layers())?;
    let rotary = model.rotary(positions);
    let mut grown = Cache::default();
    for (layer, past) in cache.layers.iter().enumerate() {
        let mut taps = taps.within(&format!("layers.{layer}."));
        let (out, kv) = model.layer(layer, &hidden, &rotary, Some(past), &mut taps)?;
        hidden = after(layer, out, &mut taps)?;
        grown.layers.push(kv);
    }
    *cache = grown;
    Ok(hidden)
}
