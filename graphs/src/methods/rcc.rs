//! RCC: an encoder that turns segments into slots, the decoder's layers over the slots, and the decoder.
//!
//! Slots never attend to tokens, so the decoder's cache over them is computed once per context; prompt and decode are
//! then those of an ordinary decoder with a past.

use super::{Graphs, Source, plain};
use crate::architecture::{Encoder, RccModel};
use crate::blocks::{Mamba, Rows, Transformer, unflatten};
use crate::dtype::DType;
use crate::functions::{self, select_rows};
use crate::onnx::{Dim, Scope, Value};
use crate::plan::rcc::RccSettings;
use crate::precision::KvCache;

/// The graphs of the method: `encoder`, `slots` and `decoder`.
pub fn graphs(source: &Source, model: &RccModel, settings: RccSettings) -> Graphs {
    let mut graphs = plain::graphs(source);
    graphs.insert("encoder".to_owned(), encoder(source, model, settings));
    graphs.insert("slots".to_owned(), slots(source));
    graphs
}

/// The encoder over segments, and what of it reaches the decoder's layers.
///
/// Input `input_ids [segments, W]`; output `maps [L, segments * W / ratio, H]`, rows in the order of the segments. Map 0 is
/// the embedding of the slots, map `i + 1` is added behind decoder layer `i`.
pub fn encoder(source: &Source, model: &RccModel, settings: RccSettings) -> Scope {
    let g = source.graph("encoder");
    let decoder = &source.arch;
    let ids = g.input("input_ids", DType::I64, &["segments".into(), settings.window.into()]);
    let states = states(&g, source, model, settings, &ids);
    let compress = Compress { settings, ids: &ids, width: [model.encoder.hidden_size(), decoder.hidden_size()] };
    for (m, state) in states.iter().enumerate() {
        g.scope("encoder.states").tap(&m.to_string(), &compress.selected(&g, state));
    }
    let maps: Vec<Value> = (0..decoder.num_layers())
        .map(|map| {
            let place = match map {
                0 => g.scope(&model.embed_map),
                i => g.scope(&model.layer_maps).scope(i - 1),
            };
            compress.projected(&place, &states[settings.states_of_map(map)])
        })
        .collect();
    for (i, map) in maps.iter().enumerate() {
        g.scope("maps").tap(&i.to_string(), map);
    }
    g.output("maps", &stacked(&g, &maps));
    g
}

/// Tensors stacked along a new first axis.
///
/// ONNX Runtime computes first what the last made of a node's inputs needs. Made from the back, the maps are computed in
/// their order, and a state is freed as soon as its map is done; made from the front, all states are kept to the end.
fn stacked(g: &Scope, maps: &[Value]) -> Value {
    let mut rows: Vec<Value> = maps.iter().rev().map(|map| map.within(g).unsqueeze(0)).collect();
    rows.reverse();
    g.concat(&rows.iter().collect::<Vec<_>>(), 0)
}

/// The encoder's states that reach the decoder, each `[segments * W, He]`.
fn states(g: &Scope, source: &Source, model: &RccModel, settings: RccSettings, ids: &Value) -> Vec<Value> {
    let live = settings.live_states(source.arch.num_layers());
    let (blocks, embedding_first) = settings.encoder_states(&model.encoder, live);
    match &model.encoder {
        Encoder::Transformer(arch) => {
            let path = format!("{}.{}", model.encoder_path, Transformer::body_of(arch));
            let encoder = Transformer::at(arch, source.target, &path, "encoder");
            let rows = Rows::new(g, &encoder, &segment_positions(g, ids), None);
            let mut states = vec![encoder.embed(g, ids)];
            g.scope("encoder").tap("embed", &states[0]);
            for l in 0..blocks {
                let layer = encoder.layer(g, l);
                let attended = rows.attend(&layer, &states[l], None);
                states.push(encoder.mlp_residual(&layer, &attended.residual));
            }
            states
        }
        Encoder::Mamba(arch) => {
            let encoder = Mamba::at(arch, source.target, &model.encoder_path, "encoder");
            let mut x = encoder.embed(g, ids);
            g.scope("encoder").tap("embed", &x);
            let mut states = if embedding_first { vec![x.clone()] } else { Vec::new() };
            for l in 0..blocks {
                x = encoder.block(g, l, &x, ids);
                states.push(x.clone());
            }
            states
        }
    }
}

/// Positions start at 0 in every segment of `ids [segments, W]`.
fn segment_positions(g: &Scope, ids: &Value) -> Value {
    let g = g.scope("positions");
    let ids = ids.within(&g);
    let row = g.range(&ids.shape_at_run_time(1, 2).to_scalar(), ids.dim(1));
    row.expand(&ids.shape_at_run_time(0, 2), ids.shape())
}

/// The strided compression of states `[segments * W, He]`.
struct Compress<'a> {
    settings: RccSettings,
    ids: &'a Value,
    /// Of the encoder and of the decoder.
    width: [usize; 2],
}

impl Compress<'_> {
    /// A slot takes the last of its tokens, which has seen the others.
    fn stride(&self) -> [usize; 2] {
        [self.settings.ratio, self.settings.ratio - 1]
    }

    fn rows(&self) -> Dim {
        &self.ids.dim(0) * &self.settings.slots_per_segment().into()
    }

    /// The rows of `state` that become slots.
    fn selected(&self, g: &Scope, state: &Value) -> Value {
        let g = g.scope("selected");
        let [ratio, offset] = self.stride().map(|n| g.ints(&[n as i64]));
        select_rows(&unflatten(&state.within(&g), self.ids), [&ratio, &offset], self.rows())
    }

    /// These rows of one state, or of the mean of two, through the map at `place`: `[slots, H]`.
    fn projected(&self, place: &Scope, states: &[Value]) -> Value {
        let [from, to] = self.width;
        let weight = place.weight("weight", &[to, from]);
        let mut inputs: Vec<Value> = states.iter().map(|x| unflatten(&x.within(place), self.ids)).collect();
        inputs.push(weight);
        let operator = if states.len() > 1 { &functions::STRIDED_COMPRESS_MEAN } else { &functions::STRIDED_COMPRESS };
        let [ratio, offset] = self.stride();
        let attributes = vec![("ratio", ratio.into()), ("offset", offset.into())];
        let result = vec![(DType::F32, vec![self.rows(), to.into()])];
        place.call(operator, &inputs.iter().collect::<Vec<_>>(), attributes, result).remove(0)
    }
}

/// The decoder's layers over slots, for their keys and values alone.
///
/// Inputs: `maps [batch, L, slots, H]`, `position_ids [batch, slots]` and the cache of all layers but the last, as the
/// decoder takes it ([`plain::decoder`]). Outputs: `present.<l>.key` and `.value` of those layers, and `last.key` and
/// `last.value [batch, G, slots, d]`, the new rows of the last layer, whose attention and MLP reach no token.
pub fn slots(source: &Source) -> Scope {
    let g = source.graph("slots");
    let (arch, model) = (&source.arch, source.decoder());
    let [batch, slots] = [Dim::from("batch"), Dim::from("slots")];
    let layers = arch.num_layers();
    let shape = [batch.clone(), layers.into(), slots.clone(), arch.hidden_size().into()];
    let maps = g.input("maps", DType::F32, &shape);
    let positions = g.input("position_ids", DType::I64, &[batch, slots]);
    let inner = layers.saturating_sub(1);
    let (past, cache) = plain::past_inputs(&g, source, inner, &positions, KvCache::Fp32);
    let rows = Rows::new(&g, &model, &positions, cache);
    let map = |i: usize| {
        let g = g.scope("maps");
        let [from, to] = [i, i + 1].map(|n| g.ints(&[n as i64]));
        let map = maps.within(&g).slice(1, &from, &to, 1.into());
        map.reshape(&[&maps.dim(0) * &maps.dim(2), arch.hidden_size().into()])
    };
    let mut x = map(0);
    g.tap("embed", &x);
    for (l, past) in past.iter().enumerate() {
        let layer = model.layer(&g, l);
        let attended = rows.attend(&layer, &x, Some(past));
        x = model.mlp_residual(&layer, &attended.residual).within(&layer) + map(l + 1);
        layer.tap("injected", &x);
        g.output(&format!("present.{l}.key"), &attended.key);
        g.output(&format!("present.{l}.value"), &attended.value);
    }
    let last = rows.keys_values(&model.layer(&g, inner), &x);
    for (part, value) in ["key", "value"].iter().zip(&last) {
        g.output(&format!("last.{part}"), value);
    }
    g
}
