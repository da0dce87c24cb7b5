//! What is kept of the lower model's keys and values, how it is laid out, and the rotation that places chunks.

use crate::architecture::Architecture;
use crate::blocks::rope::{Angles, frequencies};
use crate::dtype::DType;
use crate::onnx::{Scope, Value};
use crate::plan::sharedllm::{Level, Quirks, SharedLlmSettings};

/// How keys and values of all nodes become those that the upper model attends to.
pub(super) struct Packing {
    heads: usize,
    head_dim: usize,
    /// Rows of a chunk's nodes that are kept \[C\], in the order they are attended to.
    pub(super) kept: Vec<i64>,
    /// Shape of the chunks, `[batch, n, L]`.
    ids: Value,
    /// Rotation of the keys for calls of several tokens.
    angles: Angles,
    /// And for calls of one token, where it is another.
    single: Option<Angles>,
}

impl Packing {
    /// The packing of the chunks `ids [batch, n, L]` for the upper model `arch`. Takes the inputs `first_chunk` and
    /// `num_chunks`.
    pub(super) fn new(
        g: &Scope,
        arch: &Architecture,
        settings: SharedLlmSettings,
        levels: &[Level],
        ids: &Value,
    ) -> Self {
        let [first, total] = ["first_chunk", "num_chunks"].map(|name| g.input(name, DType::I64, &[1.into()]));
        let g = g.scope("placement");
        let kept = kept_rows(levels);
        let (frequencies, _) = frequencies(arch.rope(), arch.head_dim());
        let frequencies = g.floats(&frequencies.iter().map(|&f| f as f32).collect::<Vec<_>>());
        let slots = kept.len();
        let position = chunk_positions(&g, settings, slots, &first, ids).cast(DType::F32).unsqueeze(2);
        let query = total.within(&g) * g.ints(&[settings.entries_per_chunk() as i64]) + g.ints(&[1]);
        // Only the difference between the angles of a key and a query matters: the keys get all of it.
        let spread = |angle: &Value| {
            let [batch, chunks, pairs] = [ids.dim(0), ids.dim(1), angle.dim(2)];
            let shape = g.concat(&[&ids.within(&g).shape_at_run_time(0, 2), &angle.shape_at_run_time(1, 3)], 0);
            let every = |x: &Value| {
                let all = x.expand(&shape, &[batch.clone(), chunks.clone(), slots.into(), pairs.clone()]);
                all.reshape(&[&batch * &chunks, slots.into(), pairs.clone()])
            };
            Angles { cos: every(&angle.cos()), sin: every(&angle.sin()) }
        };
        let angles = spread(&((&position - &query.cast(DType::F32)) * &frequencies));
        let single = (settings.quirks == Quirks::Faithful).then(|| {
            // As released, the query of a single token is turned by one angle in all pairs of dimensions.
            let pair = query.modulo(&g.ints(&[arch.head_dim() as i64 / 2]));
            let angle = query.cast(DType::F32) * frequencies.gather(&pair);
            spread(&(&position * &frequencies - angle))
        });
        Self { heads: arch.num_kv_heads(), head_dim: arch.head_dim(), kept, ids: ids.clone(), angles, single }
    }

    /// Declares the outputs of layer `layer` from the keys, rotated inside their nodes, and values of the kept rows, each
    /// `[batch * n * C, G * d]`.
    pub(super) fn output(&self, g: &Scope, layer: usize, keys_values: [Value; 2]) {
        let scope = g.scope("kv").scope(layer);
        let entries = &self.ids.dim(0) * &self.ids.dim(1);
        let by_head = [entries, self.kept.len().into(), self.heads.into(), self.head_dim.into()];
        let [key, value] = keys_values.map(|kept| kept.within(&scope).reshape(&by_head).transpose(&[0, 2, 1, 3]));
        scope.tap("key", &key);
        scope.tap("value", &value);
        let placed = |angles: &Angles| self.flat(&key.rotary_heads(&angles.cos, &angles.sin));
        g.output(&format!("injected.{layer}.key"), &placed(&self.angles));
        if let Some(single) = &self.single {
            g.output(&format!("injected.{layer}.single_key"), &placed(single));
        }
        g.output(&format!("injected.{layer}.value"), &self.flat(&value));
    }

    /// `x [batch * n, G, C, d]` as `[batch, G, n * C, d]`.
    fn flat(&self, x: &Value) -> Value {
        let g = x.scope();
        let [batch, chunks] = [self.ids.dim(0), self.ids.dim(1)];
        let [heads, slots, d] = [x.dim(1), x.dim(2), x.dim(3)];
        let shape = g.concat(&[&self.ids.within(g).shape_at_run_time(0, 2), &x.shape_at_run_time(1, 4)], 0);
        let by_chunk = x.reshape_as(&shape, &[batch.clone(), chunks.clone(), heads.clone(), slots.clone(), d.clone()]);
        by_chunk.transpose(&[0, 2, 1, 3, 4]).reshape(&[batch, heads, &chunks * &slots, d])
    }
}

/// The kept rows among those of a chunk's nodes, which lie in the order of `levels`: the deepest level first.
fn kept_rows(levels: &[Level]) -> Vec<i64> {
    let mut end = levels.iter().map(|level| level.nodes * level.node_len).sum::<usize>();
    let mut kept = Vec::new();
    for level in levels.iter().rev() {
        end -= level.nodes * level.node_len;
        for node in 0..level.nodes {
            let start = end + node * level.node_len;
            kept.extend((start..start + level.node_len).step_by(level.step).map(|row| row as i64));
        }
    }
    kept
}

/// The position of every kept row, `[n, slots]`: the number of its chunk, counted from `first [1]`.
fn chunk_positions(g: &Scope, settings: SharedLlmSettings, slots: usize, first: &Value, ids: &Value) -> Value {
    let chunk = g.range(&ids.within(g).shape_at_run_time(1, 2).to_scalar(), ids.dim(1)) + &first.within(g);
    let slot = g.range(&g.int(slots as i64), slots.into());
    let row = chunk.unsqueeze(1) * g.int(slots as i64) + slot.unsqueeze(0);
    let of_part = g.int((slots / settings.entries_per_chunk()) as i64);
    let number = row.div(&of_part);
    match settings.quirks {
        // As released, positions are looked up in a table that had been gathered by position already.
        Quirks::Faithful => number.div(&of_part),
        Quirks::Fixed => number,
    }
}
