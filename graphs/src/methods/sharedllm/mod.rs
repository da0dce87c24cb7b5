//! SharedLLM: the lower model over a tree of each context chunk, and the upper model's decoder, whose bottom layers attend
//! to the keys and values that were kept.
//!
//! `compress` takes `context_ids [batch, n, L]`, `first_chunk [1]` and `num_chunks [1]` (the place of these chunks among
//! all of the context) and, where similarity decides, the running text `running_ids [batch, T]` and `query_index [1]`, the
//! row of it that is compared with. It gives `injected.<l>.key` and `.value [batch, G, n * C, d]` for every injected layer
//! and, as released, `injected.<l>.single_key` for calls of one token. `compress_masked` also takes `context_mask
//! [batch, n, L]`, 1 for tokens and 0 for padding. Entries of the batch are contexts of their own.

mod pack;
mod tree;

use self::pack::Packing;
use self::tree::{Similarity, Tree};
use super::{Graphs, Source, plain};
use crate::architecture::{Architecture, SharedLlmModel};
use crate::blocks::{Group, Nodes, Transformer, unflatten};
use crate::dtype::DType;
use crate::onnx::{Dim, Scope, Value};
use crate::plan::PlanError;
use crate::plan::sharedllm::{Level, SharedLlmSettings};
use crate::precision::KvCache;

/// The graphs of the method: `compress`, `compress_masked` and `decoder`.
///
/// # Errors
///
/// As [`SharedLlmSettings::levels`].
pub fn graphs(source: &Source, model: &SharedLlmModel, settings: SharedLlmSettings) -> Result<Graphs, PlanError> {
    let levels = settings.levels()?;
    let compress = |name, masked| compress(&source.graph(name), source, model, settings, &levels, masked);
    Ok(Graphs::from([
        ("compress".to_owned(), compress("compress", false)),
        ("compress_masked".to_owned(), compress("compress_masked", true)),
        ("decoder".to_owned(), plain::decoder(source, model.injected_layers, KvCache::Fp32)),
    ]))
}

fn compress(
    g: &Scope,
    source: &Source,
    model: &SharedLlmModel,
    settings: SharedLlmSettings,
    levels: &[Level],
    masked: bool,
) -> Scope {
    let lower_arch = Architecture::from(model.lower.clone());
    let lower = Transformer::at(&lower_arch, source.target, "encoder", "lower");
    let shape = [Dim::from("batch"), "chunks".into(), settings.chunk_len.into()];
    let ids = g.input("context_ids", DType::I64, &shape);
    let mask = masked.then(|| g.input("context_mask", DType::F32, &shape));
    let packing = Packing::new(g, &source.arch, settings, levels, &ids);
    let similarity = settings.retrieval.then(|| Similarity::new(g, &lower, query(g, source), &ids, settings.quirks));

    let tree = Tree::new(g, &ids, mask.as_ref(), levels, similarity.as_ref(), settings.quirks);
    // The first layer's keys and values depend on nothing but the tokens, and comparing halves takes those of all tokens.
    let first_layer = similarity.map(|similarity| similarity.keys_values.map(|x| x.gather(&tree.rows)));
    let groups = levels
        .iter()
        .zip(tree.masks)
        .map(|(level, mask)| Group { count: level.nodes, length: level.node_len, mask })
        .collect();
    let nodes = Nodes::new(g, &lower, groups, &tree.ids);
    let mut x = lower.embed(g, &tree.ids);
    let kept = |x: &Value| nodes.pick(x, &packing.kept);
    let last = model.injected_layers - 1;
    for l in 0..last {
        let layer = lower.layer(g, l);
        let attended = nodes.attend(&layer, &x, first_layer.as_ref().filter(|_| l == 0));
        packing.output(g, l, [&attended.key, &attended.value].map(kept));
        // Of the last layer nothing but the kept rows' keys and values is used, and so of the one before it no other rows.
        let residual = if l + 1 == last { attended.residual.pick(kept) } else { attended.residual };
        x = lower.mlp_residual(&layer, &residual);
    }
    let layer = lower.layer(g, last);
    let keys_values = match first_layer.filter(|_| last == 0) {
        Some(known) => nodes.rotated(&layer, &known.each_ref().map(kept), &packing.kept),
        None if last == 0 => nodes.keys_values(&layer, &kept(&x), &packing.kept),
        None => nodes.keys_values(&layer, &x, &packing.kept),
    };
    packing.output(g, last, keys_values);
    g.clone()
}

/// What the halves of a node are compared with, `[batch, D]`: row `query_index` of the running text after the upper model's
/// first layer and final norm.
fn query(g: &Scope, source: &Source) -> Value {
    let ids = g.input("running_ids", DType::I64, &["batch".into(), "running".into()]);
    let index = g.input("query_index", DType::I64, &[1.into()]);
    let upper = source.decoder().tapped_as("query");
    let layer = upper.layer(g, 0);
    let scope = g.scope("query");
    // What follows the row does not reach it.
    let (start, end) = (scope.ints(&[0]), index.within(&scope) + scope.ints(&[1]));
    let ids = ids.within(&scope).slice(1, &start, &end, "query_index + 1".into());
    let x = upper.embed(g, &ids);
    let keys_values = upper.unrotated_keys_values(&layer, &x).map(|flat| unflatten(&flat.within(&scope), &ids));
    let last = unflatten(&x.within(&scope), &ids).last(1).reshape(&[ids.dim(0), x.dim(1)]);
    let positions = scope.range(&end.to_scalar(), ids.dim(1)).unsqueeze(0);
    let residual = upper.attend_last(&layer, &last, &positions, keys_values.each_ref());
    let vector = upper.final_norm(g, &upper.mlp_residual(&layer, &residual));
    scope.tap("vector", &vector);
    vector
}
