//! RCC (Huang et al. 2024): an encoder reads a text window by window, every `r`-th position of its hidden states becomes a
//! slot, and linear maps carry the slots into the embedding of a decoder and behind each of its layers.
//!
//! Slots never attend to what follows them, so that their keys and values are computed once per text, a window at a time.

use super::array::Scope;
use super::cache::Cache;
use super::decode::Continuation;
use super::mamba::Mamba;
use super::plain::run_layers;
use super::quantize::Weight;
use super::transformer::{self, Transformer};
use super::weights::{Linear, Weights};
use super::{ReferenceError, Result, expect_length};
use crate::taps::TapSink;
use accordion_graphs::architecture::{self, Architecture, RccModel};
use accordion_graphs::plan::rcc::RccSettings;
use ndarray::{Array2, Axis, Slice};

/// Encoder, maps and decoder, all weights in `f32`.
pub struct Rcc {
    settings: RccSettings,
    encoder: Encoder,
    /// From the first state to the decoder's embedding, then from the states to the stream behind each layer, `[H, He]`.
    maps: Vec<Linear>,
    decoder: Box<dyn Transformer>,
}

enum Encoder {
    Transformer(Box<dyn Transformer>),
    Mamba(Mamba),
}

impl Rcc {
    /// Loads the model by the names of its checkpoint from `source`, which may hold any float type.
    ///
    /// # Errors
    ///
    /// As [`transformer::load`]; the encoder has too few layers; or the settings contradict each other.
    pub fn load<W, E>(
        decoder: &Architecture,
        model: &RccModel,
        settings: RccSettings,
        source: impl Fn(&str) -> std::result::Result<W, E>,
    ) -> Result<Self>
    where
        W: Into<Weight>,
        E: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        settings.check()?;
        settings.check_encoder(&model.encoder, decoder.num_layers())?;
        let encoder_source = |name: &str| source(&format!("{}.{name}", model.encoder_path));
        let encoder = match &model.encoder {
            architecture::Encoder::Transformer(encoder) => {
                transformer::load(encoder, encoder_source).map(Encoder::Transformer)
            }
            architecture::Encoder::Mamba(mamba) => Mamba::load(mamba, encoder_source).map(Encoder::Mamba),
            _ => Err(ReferenceError::Family { what: "encoder" }),
        }
        .map_err(|error| error.within(&model.encoder_path))?;
        let weights = Weights::new(&source);
        let layer_maps = (0..decoder.num_layers()).map(|layer| format!("{}.{layer}", model.layer_maps));
        let maps = std::iter::once(model.embed_map.clone()).chain(layer_maps);
        let (to, from) = (decoder.hidden_size(), model.encoder.hidden_size());
        Ok(Self {
            settings,
            encoder,
            maps: maps.map(|name| weights.linear(&name, to, from, false)).collect::<Result<_>>()?,
            decoder: transformer::load(decoder, &source)?,
        })
    }

    /// The decoder, which continues a compressed text like any other.
    pub fn decoder(&self) -> &dyn Transformer {
        self.decoder.as_ref()
    }

    /// Compresses a text that is cut into `segments` of the window's length into the decoder's keys and values of its
    /// slots. Everything but those is forgotten after each segment, and every segment taps the same names.
    ///
    /// # Errors
    ///
    /// As [`Rcc::encode`] and [`Rcc::fill`].
    pub fn compress<S: AsRef<[u32]>>(
        &self,
        segments: impl IntoIterator<Item = S>,
        taps: &mut dyn TapSink,
    ) -> Result<Cache> {
        let mut cache = self.decoder.empty_cache();
        for segment in segments {
            let maps = self.encode(segment.as_ref(), taps)?;
            self.fill(&maps, &mut cache, taps)?;
        }
        Ok(cache)
    }

    /// What one segment gives its `n` slots: their embedding and, for every decoder layer, what is added behind it, each
    /// `[n, H]`. The last of them reaches no token.
    ///
    /// Taps, behind `encoder.`: `embed`, `layers.<l>...`, `norm` (the last layer's rows after the final norm), and the slots'
    /// rows of every state, `states.<m>`. Then the result, `maps.<i>`.
    ///
    /// # Errors
    ///
    /// The segment is not as long as the window, or an id is outside the vocabulary.
    pub fn encode(&self, segment: &[u32], taps: &mut dyn TapSink) -> Result<Vec<Array2<f32>>> {
        expect_length("tokens of a segment", segment.len(), self.settings.window)?;
        let mut taps = Scope::new(taps, "");
        let mut selected = Vec::new();
        let ratio = self.settings.ratio as isize;
        self.encoder.states(segment, self.settings, &mut taps.within("encoder."), &mut |taps, state| {
            // The last token of every `r` has seen the others.
            let rows = state.slice_axis(Axis(0), Slice::new(ratio - 1, None, ratio)).to_owned();
            taps.tap(&format!("states.{}", selected.len()), &rows)?;
            selected.push(rows);
            Ok(())
        })?;
        let mut result = Vec::with_capacity(self.maps.len());
        for (index, map) in self.maps.iter().enumerate() {
            let states = &selected[self.settings.states_of_map(index)];
            let mean = states.iter().skip(1).fold(states[0].clone(), |sum, state| sum + state) / states.len() as f32;
            let mapped = map.apply(&mean);
            taps.tap(&format!("maps.{index}"), &mapped)?;
            result.push(mapped);
        }
        Ok(result)
    }

    /// Runs slots through the decoder behind those in `cache`, which grows by them. Returns the rows that leave the last layer
    /// and what is added behind it, `[n, H]`. Taps are the decoder's, `embed`, and `layers.<l>.injected` for the stream after
    /// each addition.
    ///
    /// # Errors
    ///
    /// `maps` are not one more than the decoder has layers, the cache is of another number of layers, or there are more
    /// rows than a sliding window spans.
    pub fn fill(&self, maps: &[Array2<f32>], cache: &mut Cache, taps: &mut dyn TapSink) -> Result<Array2<f32>> {
        expect_length("maps", maps.len(), self.maps.len())?;
        let (embedding, layer_maps) = maps.split_at(1);
        let first = cache.rows() as i64;
        let positions: Vec<i64> = (first..).take(embedding[0].nrows()).collect();
        let mut taps = Scope::new(taps, "");
        taps.tap("embed", &embedding[0])?;
        let decoder = self.decoder.as_ref();
        run_layers(decoder, embedding[0].clone(), &positions, cache, &mut taps, &mut |layer, out, taps| {
            let injected = out + &layer_maps[layer];
            taps.tap("injected", &injected)?;
            Ok(injected)
        })
    }

    /// The forward pass of training over one sequence: its first `context_len` ids are compressed, without any padding, and
    /// the decoder reads the rest. Returns the decoder's logits over slots and ids, `[K + T, V]`.
    ///
    /// Taps are those of [`Rcc::compress`], and then the decoder's over the ids.
    ///
    /// # Errors
    ///
    /// The context is longer than the sequence or no multiple of the window, or an id is outside the vocabulary.
    pub fn train(&self, ids: &[u32], context_len: usize, taps: &mut dyn TapSink) -> Result<Array2<f32>> {
        let Some((context, rest)) = ids.split_at_checked(context_len) else {
            return Err(ReferenceError::Length { what: "ids", found: ids.len(), expected: context_len });
        };
        let mut cache = self.decoder.empty_cache();
        let mut logits = Vec::new();
        for segment in context.chunks(self.settings.window) {
            let maps = self.encode(segment, taps)?;
            logits.push(self.decoder.logits(&self.fill(&maps, &mut cache, taps)?));
        }
        logits.push(Continuation::after(cache).feed(self.decoder.as_ref(), rest, taps)?);
        let views: Vec<_> = logits.iter().map(|rows| rows.view()).collect();
        // All of them are as wide as the vocabulary.
        Ok(ndarray::concatenate(Axis(0), &views).unwrap_or_default())
    }
}

/// Takes the encoder's states one after the other.
type OnState<'a> = dyn FnMut(&mut Scope<'_>, &Array2<f32>) -> Result<()> + 'a;

impl Encoder {
    /// The states of `segment`, each `[W, He]`, as Hugging Face's `hidden_states` has them: a transformer's are its embedding
    /// and what leaves each layer, a Mamba's lack the embedding. In both, the last layer's rows are normalised: at the end
    /// of a transformer's in place of the raw ones, of a Mamba's behind them.
    fn states(
        &self,
        segment: &[u32],
        settings: RccSettings,
        taps: &mut Scope<'_>,
        on_state: &mut OnState<'_>,
    ) -> Result<()> {
        match self {
            Self::Transformer(model) => {
                let positions: Vec<i64> = (0..).take(segment.len()).collect();
                let rotary = model.rotary(&positions);
                let layer = |index, x: &Array2<f32>, taps: &mut Scope<'_>| {
                    model.layer(index, x, &rotary, None, taps).map(|(out, _)| out)
                };
                let layers = model.num_layers();
                states(model.embed(segment)?, layers, &layer, &|x| model.final_norm(x), true, taps, on_state)
            }
            Self::Mamba(model) => {
                let block = |index, x: &Array2<f32>, taps: &mut Scope<'_>| model.block(index, x, taps);
                let (blocks, embedding_first) = (model.num_blocks(), settings.first_state_is_embedding);
                states(model.embed(segment)?, blocks, &block, &|x| model.final_norm(x), embedding_first, taps, on_state)
            }
        }
    }
}

/// A layer over the rows of a segment.
type Layer<'a> = dyn Fn(usize, &Array2<f32>, &mut Scope<'_>) -> Result<Array2<f32>> + 'a;

/// Runs `embedded` through `layers` layers. Of embedding, raw rows behind each layer and normalised rows behind the last one,
/// the states leave out the raw rows of the last layer if the embedding comes first, and the embedding otherwise.
fn states(
    embedded: Array2<f32>,
    layers: usize,
    layer: &Layer<'_>,
    final_norm: &dyn Fn(&Array2<f32>) -> Array2<f32>,
    embedding_first: bool,
    taps: &mut Scope<'_>,
    on_state: &mut OnState<'_>,
) -> Result<()> {
    taps.tap("embed", &embedded)?;
    if embedding_first {
        on_state(taps, &embedded)?;
    }
    let mut x = embedded;
    for index in 0..layers {
        x = layer(index, &x, &mut taps.within(&format!("layers.{index}.")))?;
        if index + 1 < layers || !embedding_first {
            on_state(taps, &x)?;
        }
    }
    let normed = final_norm(&x);
    taps.tap("norm", &normed)?;
    on_state(taps, &normed)
}
