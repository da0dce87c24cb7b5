//! The context tree: every chunk is halved level by level; one half becomes a node of the tree, the other is halved again,
//! and in the end both halves become nodes.

use crate::blocks::Transformer;
use crate::onnx::{Dim, Scope, Value, product};
use crate::plan::sharedllm::{Level, Quirks};

/// The nodes of all chunks.
pub(super) struct Tree {
    /// Which tokens of all chunks, one chunk after the other, `[batch * n, rows]`: node by node, the levels from the root on.
    pub(super) rows: Value,
    /// Their ids.
    pub(super) ids: Value,
    /// Per level, which of its nodes' tokens are no padding, `[batch * n, nodes * length]`, if that matters.
    pub(super) masks: Vec<Option<Value>>,
}

/// What decides which half is halved again: the one that is more similar to the running text. Without it, the right one,
/// which is nearer to it.
pub(super) struct Similarity<'a> {
    /// Its first layer describes the halves.
    lower: &'a Transformer<'a>,
    /// The running text, `[batch, D]`.
    query: Value,
    /// The embedding of all tokens, `[batch * n * L, D]`.
    embedded: Value,
    /// Keys and values of the first layer for all tokens, `[batch * n * L, G * d]`, not rotated.
    pub(super) keys_values: [Value; 2],
    /// Which halves are compared.
    quirks: Quirks,
}

impl Tree {
    /// The tree of the chunks `ids [batch, n, L]` with `mask` of the same shape.
    pub(super) fn new(
        g: &Scope,
        ids: &Value,
        mask: Option<&Value>,
        levels: &[Level],
        similarity: Option<&Similarity<'_>>,
        quirks: Quirks,
    ) -> Self {
        let tree = g.scope("tree");
        let tokens = ids.within(&tree).reshape(&[product(ids.shape())]);
        let rows = tree.range(&tokens.shape_at_run_time(0, 1).to_scalar(), tokens.dim(0));
        let rows = rows.reshape_as(&ids.within(&tree).shape_at_run_time(0, 3), ids.shape());
        let (mut node, mut node_mask) = (rows, mask.cloned());
        let mut encoded = Vec::with_capacity(levels.len());
        let mut masks = Vec::with_capacity(levels.len());
        for (w, level) in levels.iter().enumerate() {
            let scope = tree.scope(w);
            let split = |node: &Value| halves(&node.within(&scope), level.node_len);
            let rows = split(&node);
            let mask = node_mask.as_ref().map(split);
            if level.nodes == 2 {
                scope.tap("encoded_ids", &tokens.gather(&rows));
                encoded.push(leaves(&rows, quirks, w));
                masks.push(match quirks {
                    // As released, padding of the last level is read as if it were tokens.
                    Quirks::Faithful => None,
                    Quirks::Fixed => mask.map(|mask| leaves(&mask, quirks, w)),
                });
                break;
            }
            let chosen = similarity.map(|similarity| similarity.choose(g, &scope, &tokens, &rows));
            let [next, kept] = [true, false].map(|next| {
                let half = Half { chosen: chosen.as_ref(), next };
                move |halves: &Value| half.of(halves)
            });
            let this = kept(&rows);
            scope.tap("encoded_ids", &tokens.gather(&this));
            encoded.push(this);
            masks.push(mask.as_ref().map(|mask| match quirks {
                // As released, the mask is that of the other half.
                Quirks::Faithful => next(mask),
                Quirks::Fixed => kept(mask),
            }));
            (node, node_mask) = (next(&rows), mask.as_ref().map(next));
        }
        let by_chunk = |x: &Value| x.within(&tree).flatten_rows();
        let rows = by_chunk(&tree.concat(&encoded.iter().collect::<Vec<_>>(), 2));
        let ids = tokens.gather(&rows);
        Self { rows, ids, masks: masks.iter().map(|mask| mask.as_ref().map(by_chunk)).collect() }
    }
}

/// `node [batch, n, l]` as its two halves of length `half`, `[batch, n, 2, half]`. A token over is dropped.
fn halves(node: &Value, half: usize) -> Value {
    let g = node.scope();
    let even = Dim::from(2 * half);
    let both = if node.dim(2) == even {
        node.clone()
    } else {
        node.slice(2, &g.ints(&[0]), &g.ints(&[2 * half as i64]), even)
    };
    both.reshape(&[node.dim(0), node.dim(1), 2.into(), half.into()])
}

/// One half of every node.
struct Half<'a> {
    /// Which half is halved again, `[batch, n]`; the right ones if that is not chosen.
    chosen: Option<&'a Value>,
    /// Whether this is it.
    next: bool,
}

impl Half<'_> {
    /// Its part `[batch, n, half]` of `halves [batch, n, 2, half]`.
    fn of(&self, halves: &Value) -> Value {
        let g = halves.scope();
        let one = if let Some(chosen) = self.chosen {
            let chosen = chosen.within(g);
            let side = if self.next { chosen } else { g.int(1) - chosen };
            halves.gather_rows(&side.unsqueeze(2), 2)
        } else {
            let side = i64::from(self.next);
            halves.slice(2, &g.ints(&[side]), &g.ints(&[side + 1]), 1.into())
        };
        one.reshape(&[halves.dim(0), halves.dim(1), halves.dim(3)])
    }
}

/// The two leaves `[batch, n, 2 * half]` of every chunk, of `halves [batch, n, 2, half]`.
fn leaves(halves: &Value, quirks: Quirks, level: usize) -> Value {
    let [batch, chunks, two, half] = [0, 1, 2, 3].map(|axis| halves.dim(axis));
    let own = match quirks {
        // As released, chunk `r` gets leaves `r` and `n + r` of the list of all leaves, unless they are the whole tree.
        Quirks::Faithful if level > 0 => {
            halves.reshape(&[batch.clone(), two, chunks.clone(), half.clone()]).transpose(&[0, 2, 1, 3])
        }
        _ => halves.clone(),
    };
    own.reshape(&[batch, chunks, &Dim::from(2) * &half])
}

impl<'a> Similarity<'a> {
    /// Similarity of parts of the chunks `ids [batch, n, L]`, described by `lower`, to `query`.
    pub(super) fn new(g: &Scope, lower: &'a Transformer<'a>, query: Value, ids: &Value, quirks: Quirks) -> Self {
        let embedded = lower.embed(g, ids);
        let keys_values = lower.unrotated_keys_values(&lower.layer(g, 0), &embedded);
        Self { lower, query, embedded, keys_values, quirks }
    }

    /// Which half of every node is the more similar one, `[batch, n]`: of the rows `halves [batch, n, 2, half]` of `tokens`.
    fn choose(&self, g: &Scope, level: &Scope, tokens: &Value, halves: &Value) -> Value {
        let candidates = halves.transpose(&[0, 2, 1, 3]).flatten_rows();
        let vectors = self.describe(g, level, &candidates).within(level);
        let listed = [halves.dim(0), &Dim::from(2) * &halves.dim(1), vectors.dim(1)];
        let width = vectors.shape_at_run_time(1, 2);
        let shape = level.concat(&[&halves.shape_at_run_time(0, 1), &level.ints(&[-1]), &width], 0);
        let unit = |x: &Value| x.div(&x.norm_l2(x.shape().len() - 1).maximum(&level.float(1e-6)));
        let query = unit(&self.query.within(level)).unsqueeze(2);
        let similarity = unit(&vectors.reshape_as(&shape, &listed)).matmul(&query).reshape(&listed[..2]);
        let [batch, chunks] = [halves.dim(0), halves.dim(1)];
        let pairs = match self.quirks {
            // As released, entries `2i` and `2i + 1` of the list of all left and then all right halves decide for chunk `i`.
            Quirks::Faithful => similarity.reshape(&[batch, chunks, 2.into()]),
            Quirks::Fixed => similarity.reshape(&[batch, 2.into(), chunks]).transpose(&[0, 2, 1]),
        };
        let chosen = pairs.arg_max(2);
        level.tap("candidates", &tokens.within(level).gather(&candidates));
        level.tap("vectors", &vectors);
        level.tap("similarity", &similarity);
        level.tap("chosen", &chosen);
        chosen
    }

    /// The last row of every candidate `[candidates, half]` after the lower model's first layer and final norm,
    /// `[candidates, D]`.
    fn describe(&self, g: &Scope, level: &Scope, candidates: &Value) -> Value {
        let lower = self.lower.tapped_as(&format!("{}.lower", level.path()));
        let layer = lower.layer(g, 0);
        let of = |x: &Value, rows: &Value| x.within(level).gather(rows);
        let last = candidates.last(1).reshape(&[candidates.dim(0)]);
        let keys_values = self.keys_values.each_ref().map(|x| of(x, candidates));
        let half = candidates.shape_at_run_time(1, 2).to_scalar();
        let positions = level.range(&half, candidates.dim(1)).unsqueeze(0);
        let residual = lower.attend_last(&layer, &of(&self.embedded, &last), &positions, keys_values.each_ref());
        lower.final_norm(g, &lower.mlp_residual(&layer, &residual))
    }
}
