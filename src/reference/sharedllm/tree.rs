//! The context tree: a chunk is halved; one half becomes a node, the other is halved again; of the last halving both halves
//! become nodes.

use super::super::array::Scope;
use super::super::llama::Llama;
use super::super::{Result, expect_length};
use super::{Prompt, SharedLlm};
use accordion_graphs::plan::sharedllm::{Quirks, SharedLlmPlan};
use ndarray::{Array1, Array2, ArrayView};

/// A part of a chunk.
#[derive(Debug, Clone)]
pub(super) struct Node {
    pub(super) ids: Vec<u32>,
    /// Which of them are tokens and not padding.
    pub(super) mask: Vec<bool>,
}

impl Node {
    /// The first `len` tokens and the `len` after them; an odd token is dropped.
    fn halves(&self, len: usize) -> [Self; 2] {
        [0, len].map(|start| Self {
            ids: self.ids[start..start + len].to_vec(),
            mask: self.mask[start..start + len].to_vec(),
        })
    }
}

/// The nodes to encode, level by level from the root on: one per chunk, and at the last level two, beside each other.
pub(super) fn grow(
    model: &SharedLlm,
    plan: &SharedLlmPlan,
    prompt: Prompt<'_>,
    taps: &mut Scope<'_>,
) -> Result<Vec<Vec<Node>>> {
    let searches = plan.settings.retrieval && plan.levels.len() > 1;
    let query = if searches { Some(query(model, prompt, taps)?) } else { None };
    let len = plan.settings.chunk_len;
    let mut nodes: Vec<Node> = prompt
        .context
        .chunks(len)
        .zip(prompt.mask.chunks(len))
        .map(|(ids, mask)| Node { ids: ids.to_vec(), mask: mask.to_vec() })
        .collect();
    let mut levels = Vec::with_capacity(plan.levels.len());
    for (w, level) in plan.levels.iter().enumerate() {
        let mut taps = taps.within(&format!("tree.{w}."));
        let halves: Vec<[Node; 2]> = nodes.iter().map(|node| node.halves(level.node_len)).collect();
        let encoded = if w + 1 == plan.levels.len() {
            leaves(halves, plan.settings.quirks)
        } else {
            let chosen = match &query {
                Some(query) => most_similar(model, query, &halves, plan.settings.quirks, &mut taps)?,
                None => vec![1; halves.len()], // the right one is nearer to the running text
            };
            nodes = halves.iter().zip(&chosen).map(|(halves, &chosen)| halves[chosen].clone()).collect();
            let rejected = halves.iter().zip(&chosen).map(|(halves, &chosen)| match plan.settings.quirks {
                Quirks::Faithful => Node { mask: halves[chosen].mask.clone(), ids: halves[1 - chosen].ids.clone() },
                Quirks::Fixed => halves[1 - chosen].clone(),
            });
            rejected.collect()
        };
        taps.tap_ids("encoded_ids", &encoded.iter().map(|node| &node.ids[..]).collect::<Vec<_>>())?;
        let mask = Array2::from_shape_fn((encoded.len(), level.node_len), |(node, row)| {
            f32::from(u8::from(encoded[node].mask[row]))
        });
        taps.tap("encoded_mask", &mask)?;
        levels.push(encoded);
    }
    Ok(levels)
}

/// Both halves of every node, beside each other. As released, their padding is read as if it were tokens.
fn leaves(halves: Vec<[Node; 2]>, quirks: Quirks) -> Vec<Node> {
    let mut leaves: Vec<Node> = halves.into_iter().flatten().collect();
    if quirks == Quirks::Faithful {
        for leaf in &mut leaves {
            leaf.mask.fill(true);
        }
    }
    leaves
}

/// What halves are compared with, `[D]`: the query's row of the running text.
fn query(model: &SharedLlm, prompt: Prompt<'_>, taps: &mut Scope<'_>) -> Result<Array1<f32>> {
    let widths = [&model.lower, &model.upper].map(|model| model.architecture().hidden_size);
    expect_length("width of the lower model that is compared with the upper one", widths[0], widths[1])?;
    let all = after_layer_zero(&model.upper, prompt.running, &mut taps.within("query."))?;
    let query = all.row(prompt.query_index).to_owned();
    taps.tap("query.vector", &query)?;
    Ok(query)
}

/// For every node the half, 0 or 1, that is more similar to `query [D]`; the left one of equals.
fn most_similar(
    model: &SharedLlm,
    query: &Array1<f32>,
    halves: &[[Node; 2]],
    quirks: Quirks,
    taps: &mut Scope<'_>,
) -> Result<Vec<usize>> {
    // All left halves, then all right ones.
    let candidates: Vec<&[u32]> =
        [0, 1].iter().flat_map(|&side| halves.iter().map(move |halves| &halves[side].ids[..])).collect();
    let vectors = candidates
        .iter()
        .enumerate()
        .map(|(i, ids)| {
            let mut taps = taps.within(&format!("halves.{i}."));
            Ok(after_layer_zero(&model.lower, ids, &mut taps)?.row(ids.len() - 1).to_owned())
        })
        .collect::<Result<Vec<Array1<f32>>>>()?;
    let similarity: Vec<f32> = vectors.iter().map(|vector| unit(query).dot(&unit(vector))).collect();

    let count = halves.len();
    let pair = |node: usize| match quirks {
        // Neighbours in the list, as if it held the two halves of a node beside each other (Q1).
        Quirks::Faithful => [2 * node, 2 * node + 1],
        Quirks::Fixed => [node, count + node],
    };
    let right_is_larger = |[left, right]: [usize; 2]| usize::from(similarity[right] > similarity[left]);
    let chosen: Vec<usize> = (0..count).map(|node| right_is_larger(pair(node))).collect();

    taps.tap_ids("candidates", &candidates)?;
    let by_row = Array2::from_shape_fn((vectors.len(), query.len()), |(row, i)| vectors[row][i]);
    taps.tap("vectors", &by_row)?;
    taps.tap("similarity", &ArrayView::from(&similarity))?;
    taps.tap_integers("chosen", chosen.iter().map(|&half| half as i64))?;
    Ok(chosen)
}

/// `ids` after the first layer of `model` and its final norm, `[L, D]`. Padding counts as tokens, and the upper model's
/// first layer does without its cross attention.
fn after_layer_zero(model: &Llama, ids: &[u32], taps: &mut Scope<'_>) -> Result<Array2<f32>> {
    let rotary = model.rotary(&(0..ids.len() as i64).collect::<Vec<_>>());
    let mut taps = taps.within("layers.0.");
    let attended = model.attention_half(0, &model.embed(ids)?, &rotary, None, &mut taps)?;
    Ok(model.final_norm(&model.mlp_half(0, &attended.residual, &mut taps)?))
}

/// `x` divided by its length, or by 1e-6 if it is shorter.
fn unit(x: &Array1<f32>) -> Array1<f32> {
    x / x.dot(x).sqrt().max(1e-6)
}
