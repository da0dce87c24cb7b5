//! Sequences of several lengths through the layers of one model, side by side.

use super::attention::{causal_attention, heads_first, rows_first};
use super::rope::{self, Angles};
use super::{Residual, Transformer};
use crate::onnx::{Dim, Scope, Value};

/// Sequences of one length in every entry of a batch.
pub struct Group {
    /// How many there are.
    pub count: usize,
    /// Tokens of each.
    pub length: usize,
    /// Which tokens are no padding, 1 or 0, `[entries, count * length]`. Padding is not attended to, and what it attends to
    /// is zero.
    pub mask: Option<Value>,
}

/// Rows of a batch whose entries all hold the same groups of sequences, one group after the other. Every sequence starts
/// at position 0. Linear layers run over all rows at once, `[entries * rows, width]`; only attention goes group by group.
pub struct Nodes<'a> {
    model: &'a Transformer<'a>,
    groups: Vec<Group>,
    entries: Dim,
    rows: usize,
    /// `[entries, rows, d / 2]`.
    angles: Angles,
}

/// What attention over [`Nodes`] yields.
pub struct AttendedNodes {
    /// What the second half of the layer goes on with.
    pub residual: Residual,
    /// Rotated keys `[entries, rows, G * d]`.
    pub key: Value,
    /// Values `[entries, rows, G * d]`.
    pub value: Value,
}

impl<'a> Nodes<'a> {
    /// The rows of `groups` in as many entries as the first dimension of `like` has.
    pub fn new(g: &Scope, model: &'a Transformer<'a>, groups: Vec<Group>, like: &Value) -> Self {
        let g = g.scope("nodes");
        // One by one: the frequencies of some rotations depend on the length of the sequence.
        let parts: Vec<Angles> = groups
            .iter()
            .flat_map(|group| {
                let positions = g.range(&g.int(group.length as i64), group.length.into()).unsqueeze(0);
                let angles = || rope::angles(&g, model.arch.rope(), model.arch.rotary_dims(), &positions);
                (0..group.count).map(move |_| angles()).collect::<Vec<_>>()
            })
            .collect();
        let entries = like.within(&g).shape_at_run_time(0, 1);
        let rows: usize = groups.iter().map(|group| group.count * group.length).sum();
        let spread = |part: fn(&Angles) -> &Value| {
            let one = g.concat(&parts.iter().map(part).collect::<Vec<_>>(), 1);
            let shape = g.concat(&[&entries, &one.shape_at_run_time(1, 3)], 0);
            one.expand(&shape, &[like.dim(0), rows.into(), one.dim(2)])
        };
        let angles = Angles { cos: spread(|a| &a.cos), sin: spread(|a| &a.sin) };
        Self { model, groups, entries: like.dim(0), rows, angles }
    }

    /// The first half of layer `layer` over `x [entries * rows, D]`. Keys and values `[entries, rows, G * d]` that are known
    /// already, but for the rotation, are not computed again.
    pub fn attend(&self, layer: &Scope, x: &Value, known: Option<&[Value; 2]>) -> AttendedNodes {
        let arch = self.model.arch;
        let attn = self.model.attention_scope(layer);
        let normed = self.model.attention_input(layer, x);
        let [query, key, value] = match known {
            None => self.model.queries_keys_values(layer, &normed).map(|flat| self.by_entry(&flat.within(&attn))),
            Some([key, value]) => {
                let query = self.by_entry(&self.model.queries(layer, &normed).within(&attn));
                [query, key.within(&attn), value.within(&attn)]
            }
        };
        let rotate = |x: &Value, heads| x.rotary(&self.angles.cos, &self.angles.sin, heads);
        let (query, key) = (rotate(&query, arch.num_heads()), rotate(&key, arch.num_kv_heads()));
        let mut start = 0;
        let parts: Vec<Value> = self
            .groups
            .iter()
            .map(|group| {
                let rows = start..start + group.count * group.length;
                start = rows.end;
                let part = |x: &Value| {
                    let [from, to] = [rows.start, rows.end].map(|at| attn.ints(&[at as i64]));
                    let part = x.slice(1, &from, &to, rows.len().into());
                    part.reshape(&[self.sequences(group), group.length.into(), x.dim(2)])
                };
                let mixed = self.attention(&attn, group, [&query, &key, &value].map(part).each_ref());
                mixed.reshape(&[self.entries.clone(), rows.len().into(), mixed.dim(2)])
            })
            .collect();
        let mixed = attn.concat(&parts.iter().collect::<Vec<_>>(), 1);
        let projected = self.model.attention_output(layer, &mixed.flatten_rows());
        let residual = self.model.residual(layer, x, &projected);
        layer.tap("attn.q", &query);
        layer.tap("attn.k", &key);
        layer.tap("attn.v", &value);
        layer.tap("attn.out", &mixed);
        layer.tap("attn_residual", &residual.stream);
        AttendedNodes { residual, key, value }
    }

    /// The rows `rows` of every entry of `x`, `[entries * rows, width]` or `[entries, rows, width]`, one after the other:
    /// `[entries * picked, width]`.
    pub fn pick(&self, x: &Value, rows: &[i64]) -> Value {
        let Some((width, _)) = x.shape().split_last() else { return x.clone() };
        let by_entry = x.reshape(&[self.entries.clone(), self.rows.into(), width.clone()]);
        by_entry.gather_along(1, &x.scope().ints(rows)).flatten_rows()
    }

    /// Only the keys and values of layer `layer`, and only of rows `rows` of every entry, whose input is `x [entries *
    /// picked, D]`: `[entries * picked, G * d]` each, keys rotated.
    pub fn keys_values(&self, layer: &Scope, x: &Value, rows: &[i64]) -> [Value; 2] {
        self.rotated(layer, &self.model.unrotated_keys_values(layer, x), rows)
    }

    /// Keys and values `[entries * picked, G * d]` of rows `rows` of every entry, with the keys rotated.
    pub fn rotated(&self, layer: &Scope, [key, value]: &[Value; 2], rows: &[i64]) -> [Value; 2] {
        let attn = self.model.attention_scope(layer);
        let key = key.within(&attn).reshape(&[self.entries.clone(), rows.len().into(), key.dim(1)]);
        let rows = attn.ints(rows);
        let [cos, sin] = [&self.angles.cos, &self.angles.sin].map(|x| x.within(&attn).gather_along(1, &rows));
        [key.rotary(&cos, &sin, self.model.arch.num_kv_heads()).flatten_rows(), value.clone()]
    }

    /// `flat [entries * rows, width]` as `[entries, rows, width]`.
    fn by_entry(&self, flat: &Value) -> Value {
        flat.reshape(&[self.entries.clone(), self.rows.into(), flat.dim(1)])
    }

    /// The number of sequences of `group` in all entries.
    fn sequences(&self, group: &Group) -> Dim {
        &self.entries * &group.count.into()
    }

    /// Attention inside the sequences of `group`: `[sequences, length, heads * d]`.
    fn attention(&self, attn: &Scope, group: &Group, [query, key, value]: [&Value; 3]) -> Value {
        let Some(mask) = &group.mask else {
            let (mixed, ..) = causal_attention(self.model, attn, [query, key, value]);
            return mixed;
        };
        let arch = self.model.arch;
        let token = mask.within(attn).reshape(&[self.sequences(group), group.length.into()]);
        let seen = token.greater_or_equal(&attn.float(0.5)).unsqueeze(1);
        let row = attn.range(&attn.int(group.length as i64), group.length.into());
        let (from, to) = (row.unsqueeze(1), row.unsqueeze(0));
        // A padded row sees itself, so that its softmax is one of something; the result is not used.
        let visible = from.greater_or_equal(&to).and(&seen).or(&from.equal(&to)).unsqueeze(1);
        let query4 = heads_first(query, arch.num_heads());
        let [key, value] = [key, value].map(|x| heads_first(x, arch.num_kv_heads()));
        let mixed = rows_first(&query4.attention_over(&key, &value, Some(&visible)), query.dim(2));
        mixed * token.unsqueeze(2)
    }
}
