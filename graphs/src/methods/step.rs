//! The decoder for one token after the other, over a cache that stays where it is: nothing changes its shape from token to
//! token, and what is decoded so far is only read.

use super::Source;
use super::layers::{Layers, injected_rows, past_rows};
use crate::blocks::{CachedRows, Rows};
use crate::dtype::DType;
use crate::onnx::{Dim, Scope};
use crate::precision::KvCache;

/// Name of the graph.
pub const DECODER_STEP: &str = "decoder_step";

/// One step of the decoder.
///
/// Inputs: `input_ids` and `position_ids [batch, 1]`, `past_length [1]`, and per layer `past_key_values.<l>.key` and `.value
/// [batch, G, capacity, d]`, of which the first `past_length` rows are valid and all others hold finite numbers, zeros for
/// instance. Outputs: `logits [batch, 1, V]` and per layer `new.<l>.key` and `.value [batch, G, 1, d]`, the rows of the token,
/// which belong behind the valid ones. No shape depends on the value of an input.
///
/// The bottom `injected_layers` attend to a compressed context, as those of [`super::plain::decoder`] do.
pub fn decoder_step(source: &Source, injected_layers: usize) -> Scope {
    let g = source.graph(DECODER_STEP);
    let (arch, model) = (&source.arch, source.decoder());
    let [batch, capacity] = [Dim::from("batch"), Dim::from("capacity")];
    let [ids, positions] =
        ["input_ids", "position_ids"].map(|name| g.input(name, DType::I64, &[batch.clone(), 1.into()]));
    let past_length = g.input("past_length", DType::I64, &[1.into()]);
    let extents = [batch.clone(), capacity.clone()];
    let past = past_rows(&g, arch, arch.num_layers(), extents, KvCache::Fp32);
    let injected = injected_rows(&g, source, injected_layers, batch.clone(), KvCache::Fp32);
    let cache = past.first().map(|past| {
        let g = g.scope("visible");
        let row = g.range(&past.rows[0].within(&g).shape_at_run_time(2, 3).to_scalar(), capacity);
        CachedRows::Fixed { visible: row.less(&past_length) }
    });
    let rows = Rows::new(&g, &model, &positions, cache);
    let layers = Layers { model: &model, positions: &positions, rows, past: &past, injected: &injected };
    let x = layers.run(&g, &ids, Clone::clone, |l, attended| {
        g.output(&format!("new.{l}.key"), &attended.key);
        g.output(&format!("new.{l}.value"), &attended.value);
    });
    let logits = model.head(&g, &x).within(&g);
    g.output("logits", &logits.reshape(&[batch, 1.into(), arch.vocab_size().into()]));
    g
}
