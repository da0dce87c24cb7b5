//! HOMER (Song et al., ICLR 2024): a context is cut into chunks, the least significant tokens of every chunk are
//! dropped, and chunks are merged pairwise up a tree whose levels share the layers of the model among them.

use super::array::Scope;
use super::cache::{Cache, KeyValue};
use super::llama::{Attended, Llama};
use super::{ReferenceError, Result, expect_length};
use crate::taps::TapSink;
use accordion_graphs::plan::homer::{HomerNode, HomerPlan};
use ndarray::{Array, Array1, Array2, Array3, ArrayView, Axis, RemoveAxis, Slice, concatenate};

/// The three parts of a prompt. Prefix and suffix are attached to every chunk of the context.
#[derive(Debug, Clone, Copy)]
pub struct Prompt<'a> {
    /// Token ids before the context \[P\].
    pub prefix: &'a [u32],
    /// Token ids of the context \[C\].
    pub context: &'a [u32],
    /// Token ids after the context \[S\].
    pub suffix: &'a [u32],
}

/// The significance table: row `layer` holds, for every distance from the last token, the score that is to be expected
/// there. An empty row stands for a layer that the table lacks.
pub type Significance<'a> = &'a dyn Fn(usize) -> &'a [f32];

/// A compressed context.
#[derive(Debug, Clone)]
pub struct ContextState {
    /// Keys and values of the survivors in every layer.
    pub cache: Cache,
    /// Position ids of the survivors.
    pub position_ids: Vec<i64>,
    /// The survivors' rows as they leave the last layer, `[Lr, D]`, before the final norm.
    pub last_hidden: Array2<f32>,
}

impl ContextState {
    /// The position of the last suffix token.
    pub fn last_position(&self) -> i64 {
        self.position_ids.last().copied().unwrap_or(-1)
    }
}

/// A node that is being, or has been, run.
struct Chunk {
    hidden: Array2<f32>,
    position_ids: Vec<i64>,
    /// False on affix rows, which are never dropped.
    is_context: Vec<bool>,
    cache: Cache,
}

/// A tree under construction, one node at a time, so that what a node taps can be compared and forgotten before the
/// next one runs.
pub struct Compression<'a> {
    model: &'a Llama,
    plan: &'a HomerPlan,
    prompt: Prompt<'a>,
    significance: Significance<'a>,
    next: usize,
    /// Finished nodes that await their sibling or parent: at most one per height and the one just finished.
    finished: Vec<Chunk>,
}

/// Compresses `prompt` as `plan` says.
///
/// # Errors
///
/// As [`Compression::new`] and [`Compression::step`].
pub fn compress<'a>(
    model: &'a Llama,
    plan: &'a HomerPlan,
    prompt: Prompt<'a>,
    significance: Significance<'a>,
    taps: &mut dyn TapSink,
) -> Result<ContextState> {
    let mut compression = Compression::new(model, plan, prompt, significance)?;
    while compression.step(taps)?.is_some() {}
    compression.finish(taps)
}

impl<'a> Compression<'a> {
    /// Prepares to compress `prompt` as `plan` says.
    ///
    /// # Errors
    ///
    /// The plan is for other lengths or another number of layers.
    pub fn new(
        model: &'a Llama,
        plan: &'a HomerPlan,
        prompt: Prompt<'a>,
        significance: Significance<'a>,
    ) -> Result<Self> {
        expect_length("prefix tokens", prompt.prefix.len(), plan.lengths.prefix)?;
        expect_length("context tokens", prompt.context.len(), plan.lengths.context)?;
        expect_length("suffix tokens", prompt.suffix.len(), plan.lengths.suffix)?;
        let planned_layers = plan.layers.last().map_or(0, |range| range.end);
        expect_length("layers of the plan", planned_layers, model.architecture().num_layers)?;
        Ok(Self { model, plan, prompt, significance, next: 0, finished: Vec::new() })
    }

    /// Runs the next node and returns it; `None` when the root has run.
    ///
    /// # Errors
    ///
    /// Token ids outside the vocabulary, a significance table that does not reach far enough, or a node longer than the
    /// model's sliding window.
    pub fn step(&mut self, taps: &mut dyn TapSink) -> Result<Option<&'a HomerNode>> {
        let Some(node) = self.plan.nodes.get(self.next) else { return Ok(None) };
        let mut taps = Scope::new(taps, format!("{}.", node.tap_scope()));
        // Children come before their parent and left before right: the two on top are this node's.
        let entering = match node.children {
            None => self.leaf(node)?,
            Some(_) => match (self.finished.pop(), self.finished.pop()) {
                (Some(right), Some(left)) => self.merge(&left, &right),
                _ => return Err(ReferenceError::Length { what: "finished children", found: 0, expected: 2 }),
            },
        };
        taps.tap("in_hidden", &entering.hidden)?;
        taps.tap_integers("in_position_ids", entering.position_ids.iter().copied())?;
        taps.tap_flags("in_reduction_mask", &entering.is_context)?;
        for (layer, kv) in entering.cache.layers.iter().enumerate() {
            taps.tap(&format!("in_k.{layer}"), &kv.k)?;
            taps.tap(&format!("in_v.{layer}"), &kv.v)?;
        }
        let leaving = self.run_layers(node, entering, &mut taps)?;
        taps.tap("out_hidden", &leaving.hidden)?;
        taps.tap_integers("out_position_ids", leaving.position_ids.iter().copied())?;
        self.finished.push(leaving);
        self.next += 1;
        Ok(Some(node))
    }

    /// What the node that ran last leaves, if one has run: as if the tree ended there.
    pub fn last(&self) -> Option<ContextState> {
        self.finished.last().map(|chunk| ContextState {
            cache: chunk.cache.clone(),
            position_ids: chunk.position_ids.clone(),
            last_hidden: chunk.hidden.clone(),
        })
    }

    /// The context state, once every node has run.
    ///
    /// # Errors
    ///
    /// Nodes are left to run.
    pub fn finish(mut self, taps: &mut dyn TapSink) -> Result<ContextState> {
        expect_length("nodes that have run", self.next, self.plan.nodes.len())?;
        let Some(Chunk { hidden: last_hidden, position_ids, cache, .. }) = self.finished.pop() else {
            return Err(ReferenceError::Length { what: "finished nodes", found: 0, expected: 1 });
        };
        let mut taps = Scope::new(taps, "");
        taps.tap("prefix.last_hidden", &last_hidden)?;
        taps.tap_integers("prefix.position_ids", position_ids.iter().copied())?;
        for (layer, kv) in cache.layers.iter().enumerate() {
            taps.tap(&format!("cache.k.{layer}"), &kv.k)?;
            taps.tap(&format!("cache.v.{layer}"), &kv.v)?;
        }
        Ok(ContextState { cache, position_ids, last_hidden })
    }

    /// A leaf before its first layer: the affixes around its part of the context.
    fn leaf(&self, node: &HomerNode) -> Result<Chunk> {
        let Prompt { prefix, context, suffix } = self.prompt;
        let part = &context[node.context.clone()];
        let is_context = [vec![false; prefix.len()], vec![true; part.len()], vec![false; suffix.len()]].concat();
        Ok(Chunk {
            hidden: self.model.embed(&[prefix, part, suffix].concat())?,
            position_ids: self.plan.leaf_positions(node),
            is_context,
            cache: Cache::default(),
        })
    }

    /// Two finished children as one chunk: affixes averaged, contexts one after the other. Keys are averaged after their
    /// rotation, which is sound because the affixes sit at the same positions on both sides.
    fn merge(&self, left: &Chunk, right: &Chunk) -> Chunk {
        let (prefix, suffix) = (self.prompt.prefix.len(), self.prompt.suffix.len());
        let join = |left: &Array3<f32>, right: &Array3<f32>| join_rows(left, right, Axis(1), prefix, suffix);
        let layers = left.cache.layers.iter().zip(&right.cache.layers);
        Chunk {
            hidden: join_rows(&left.hidden, &right.hidden, Axis(0), prefix, suffix),
            position_ids: without_tail(&left.position_ids, suffix, &right.position_ids[prefix..]),
            is_context: without_tail(&left.is_context, suffix, &right.is_context[prefix..]),
            cache: Cache { layers: layers.map(|(l, r)| KeyValue::new(join(&l.k, &r.k), join(&l.v, &r.v))).collect() },
        }
    }

    fn run_layers(&self, node: &HomerNode, mut chunk: Chunk, taps: &mut Scope<'_>) -> Result<Chunk> {
        let rotary = self.model.rotary(&chunk.position_ids);
        for layer in node.layers.clone() {
            let scope = format!("layers.{layer}.");
            let mut attended =
                self.model.attention_half(layer, &chunk.hidden, &rotary, None, &mut taps.within(&scope))?;
            chunk.cache.layers.push(attended.kv.clone());
            // All rows attend, only the survivors go on to the MLP.
            if layer + 1 == node.layers.end && node.removed() > 0 {
                attended.residual = self.prune(node, layer, &mut chunk, &attended, taps)?;
            }
            chunk.hidden = self.model.mlp_half(layer, &attended.residual, &mut taps.within(&scope))?;
        }
        Ok(chunk)
    }

    /// Drops the least significant rows of `chunk` and of its cache in all layers so far. Returns the survivors'
    /// residual rows.
    fn prune(
        &self,
        node: &HomerNode,
        layer: usize,
        chunk: &mut Chunk,
        attended: &Attended,
        taps: &mut Scope<'_>,
    ) -> Result<Array2<f32>> {
        let last_row_logits = last_row_logits(attended);
        let scores = self.scores(node, layer, chunk, &last_row_logits)?;
        let keep = most_significant(&scores, node.out_len);
        taps.tap("prune.metric_last", &last_row_logits)?;
        taps.tap("prune.scores", &ArrayView::from(&scores))?;
        taps.tap("prune.attn_out_hidden", &attended.residual)?;
        taps.tap_integers("prune.keep_idx", keep.iter().map(|&row| row as i64))?;
        let dropped: Vec<usize> = (0..scores.len()).filter(|row| keep.binary_search(row).is_err()).collect();
        taps.tap_integers("prune.remove_idx", dropped.iter().map(|&row| row as i64))?;

        chunk.position_ids = keep.iter().map(|&row| chunk.position_ids[row]).collect();
        chunk.is_context = keep.iter().map(|&row| chunk.is_context[row]).collect();
        chunk.cache = chunk.cache.select(&keep);
        Ok(attended.residual.select(Axis(0), &keep))
    }

    /// How significant each row is: the largest logit that the last row gives it, less what is to be expected at that
    /// distance; affix rows are infinitely significant.
    fn scores(&self, node: &HomerNode, layer: usize, chunk: &Chunk, logits: &Array2<f32>) -> Result<Vec<f32>> {
        let expected = (self.significance)(layer);
        let last = chunk.position_ids.last().copied().unwrap_or(0);
        let rows = chunk.position_ids.iter().zip(&chunk.is_context).zip(logits.columns());
        rows.map(|((&position, &is_context), logits)| {
            if !is_context {
                return Ok(f32::INFINITY);
            }
            let distance = last - position;
            let expected =
                usize::try_from(distance).ok().and_then(|distance| expected.get(distance)).ok_or_else(|| {
                    ReferenceError::SignificanceTooShort {
                        layer,
                        node: node.tap_scope(),
                        found: expected.len(),
                        largest_distance: last - chunk.position_ids.iter().min().copied().unwrap_or(0),
                    }
                })?;
            Ok(logits.fold(f32::NEG_INFINITY, |largest, &logit| largest.max(logit)) - expected)
        })
        .collect()
    }
}

/// `<q_h[L - 1], k_g(h)[j]> / sqrt(d)` for every head and row, `[H, L]`.
fn last_row_logits(Attended { q, kv, .. }: &Attended) -> Array2<f32> {
    let (heads, rows, dim) = q.dim();
    let queries_per_key = heads / kv.k.len_of(Axis(0));
    let scale = (dim as f32).sqrt();
    let mut logits = Array2::zeros((heads, kv.rows()));
    for (head, mut logits) in logits.rows_mut().into_iter().enumerate() {
        let q = q.index_axis(Axis(0), head);
        let k = kv.k.index_axis(Axis(0), head / queries_per_key);
        let products: Array1<f32> = k.dot(&q.row(rows - 1));
        logits.assign(&(products / scale));
    }
    logits
}

/// The `count` rows with the largest scores, in their original order; of equal scores the earlier row stays.
fn most_significant(scores: &[f32], count: usize) -> Vec<usize> {
    let mut rows: Vec<usize> = (0..scores.len()).collect();
    // Adding zero makes -0 a +0, which `total_cmp` would tell apart. The sort is stable.
    rows.sort_by(|&a, &b| (scores[b] + 0.0).total_cmp(&(scores[a] + 0.0)));
    rows.truncate(count);
    rows.sort_unstable();
    rows
}

/// `left` without its last `tail` elements, then `right`.
fn without_tail<T: Copy>(left: &[T], tail: usize, right: &[T]) -> Vec<T> {
    [&left[..left.len() - tail], right].concat()
}

/// Along `axis`: the mean of the prefixes, the rest of left, the rest of right, the mean of the suffixes.
fn join_rows<D: RemoveAxis>(
    left: &Array<f32, D>,
    right: &Array<f32, D>,
    axis: Axis,
    prefix: usize,
    suffix: usize,
) -> Array<f32, D> {
    let parts = |side: &Array<f32, D>| {
        let rows = side.len_of(axis);
        [0..prefix, prefix..rows - suffix, rows - suffix..rows]
            .map(|range| side.slice_axis(axis, Slice::from(range)).to_owned())
    };
    let [left_prefix, left_context, left_suffix] = parts(left);
    let [right_prefix, right_context, right_suffix] = parts(right);
    let mean = |a: Array<f32, D>, b: Array<f32, D>| (a + b) / 2.0;
    concatenate![axis, mean(left_prefix, right_prefix), left_context, right_context, mean(left_suffix, right_suffix)]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_equal_scores_the_earlier_row_stays() {
        let inf = f32::INFINITY;
        assert_eq!(most_significant(&[1.0, 2.0, 1.0, 2.0, 1.0], 3), [0, 1, 3]);
        assert_eq!(most_significant(&[inf, 0.0, -0.0, 0.0, inf], 3), [0, 1, 4]);
        assert_eq!(most_significant(&[inf, -0.0, 0.0, -1.0, inf], 3), [0, 1, 4]);
        assert_eq!(most_significant(&[3.0, 3.0], 0), [] as [usize; 0]);
    }

    #[test]
    fn a_merge_averages_the_affixes_and_joins_the_rest() {
        let left = Array2::from_shape_vec((4, 1), vec![1.0, 2.0, 3.0, 4.0]).unwrap_or_default();
        let right = Array2::from_shape_vec((3, 1), vec![3.0, 20.0, 8.0]).unwrap_or_default();
        let joined = join_rows(&left, &right, Axis(0), 1, 1);
        assert_eq!(joined.into_raw_vec_and_offset().0, [2.0, 2.0, 3.0, 20.0, 6.0]);
    }
}
