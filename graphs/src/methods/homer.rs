//! HOMER: one graph per tree level. A leaf embeds its chunk; every other node first merges its two children. Both then
//! run the level's layers, and in the last of them drop the least significant tokens between attention and MLP.
//!
//! All stage graphs take `prefix_length` and `suffix_length [1]` and, if they have layers, `keep [1]` (rows that leave)
//! and `significance_bias [distances]` (the table's row of the last layer). They give `hidden [batch, keep, D]`,
//! `kept_position_ids [batch, keep]`, `kv [batch, n, 2, G, keep, d]` (the cache of all layers so far) and, if they have
//! layers, `keep_idx [batch, keep]`.

use super::{Graphs, Source, plain};
use crate::blocks::{Residual, Rows, unflatten};
use crate::dtype::DType;
use crate::functions;
use crate::onnx::{Dim, Scope, Value};
use crate::plan::PlanError;
use crate::plan::homer::{HomerPlan, HomerSettings};
use std::ops::Range;

/// The graphs of all stages of trees of all `heights`; heights that share a layer range share its graph.
///
/// # Errors
///
/// As [`HomerPlan::stage_layers`].
pub fn graphs(source: &Source, settings: HomerSettings, heights: &[usize]) -> Result<Graphs, PlanError> {
    let mut graphs = plain::graphs(source);
    graphs.insert("head".to_owned(), plain::output_head(source));
    for &height in heights {
        let stages = HomerPlan::stage_layers(source.arch.num_layers(), settings.layers_warmup, height)?;
        for (level, layers) in stages.iter().enumerate() {
            let name = graph_name(level, layers);
            graphs.entry(name).or_insert_with(|| if level == 0 { leaf(source, layers) } else { merge(source, layers) });
        }
    }
    Ok(graphs)
}

/// The name of the graph that runs `layers` at tree height `level`.
pub fn graph_name(level: usize, layers: &Range<usize>) -> String {
    let kind = if level == 0 { "leaf" } else { "merge" };
    if layers.is_empty() {
        format!("{kind}.{}", layers.start)
    } else {
        format!("{kind}.{}-{}", layers.start, layers.end - 1)
    }
}

/// A node's state: hidden `[batch, L, D]`, position ids `[batch, L]`, and the cache of all layers so far
/// `[batch, n, 2, G, L, d]` (none before the first layer).
struct State {
    hidden: Value,
    positions: Value,
    kv: Option<Value>,
}

/// The run-time lengths a stage takes, each `[1]`.
struct Affixes {
    prefix: Value,
    suffix: Value,
}

/// The leaf graph over `layers`, which start at 0.
///
/// Inputs of its own: `input_ids` and `position_ids [batch, length]`.
pub fn leaf(source: &Source, layers: &Range<usize>) -> Scope {
    let g = source.graph("leaf");
    let shape = [Dim::from("batch"), "length".into()];
    let [ids, positions] = ["input_ids", "position_ids"].map(|name| g.input(name, DType::I64, &shape));
    let affixes = Affixes::inputs(&g);
    let embedded = source.decoder().embed(&g, &ids);
    let hidden = unflatten(&embedded, &positions);
    stage(&g, source, layers, &State { hidden, positions, kv: None }, None, &affixes);
    g
}

/// The graph that merges two nodes and runs `layers`, possibly none.
///
/// Inputs of its own: for each of `left` and `right` `<side>.hidden`, `<side>.position_ids` and `<side>.kv`.
pub fn merge(source: &Source, layers: &Range<usize>) -> Scope {
    let g = source.graph("merge");
    let arch = &source.arch;
    let [left, right] = ["left", "right"].map(|side| {
        let [batch, rows] = [Dim::from("batch"), Dim::from(side)];
        let kv = [
            batch.clone(),
            layers.start.into(),
            2.into(),
            arch.num_kv_heads().into(),
            rows.clone(),
            arch.head_dim().into(),
        ];
        State {
            hidden: g.input(
                &format!("{side}.hidden"),
                DType::F32,
                &[batch.clone(), rows.clone(), arch.hidden_size().into()],
            ),
            positions: g.input(&format!("{side}.position_ids"), DType::I64, &[batch, rows]),
            kv: Some(g.input(&format!("{side}.kv"), DType::F32, &kv)),
        }
    });
    let affixes = Affixes::inputs(&g);
    let state = join(&g.scope("merge"), [&left, &right], &affixes);
    stage(&g, source, layers, &state, left.kv.as_ref().zip(right.kv.as_ref()), &affixes);
    g
}

/// Two nodes as one: affixes averaged, contexts one after the other. Position ids are taken from the left, the suffix's
/// from the right.
fn join(g: &Scope, [left, right]: [&State; 2], affixes: &Affixes) -> State {
    let (zero, end) = (g.ints(&[0]), g.ints(&[i64::MAX]));
    let from_end = &(&zero - &affixes.suffix.within(g));
    let prefix = &affixes.prefix.within(g);
    let part = |x: &Value, from: &Value, to: &Value, name: &str| x.within(g).slice(1, from, to, name.into());
    let (a, b) = (&left.positions, &right.positions);
    let positions = [
        part(a, &zero, prefix, "prefix"),
        part(a, prefix, from_end, "left_context"),
        part(b, prefix, from_end, "right_context"),
        part(b, from_end, &end, "suffix"),
    ];
    let merged = |a: &Value, b: &Value, axis| functions::merge_rows(g, a, b, axis, [&affixes.prefix, &affixes.suffix]);
    State {
        hidden: merged(&left.hidden, &right.hidden, 1),
        positions: g.concat(&positions.each_ref(), 1),
        kv: left.kv.as_ref().zip(right.kv.as_ref()).map(|(a, b)| merged(a, b, 4)),
    }
}

/// The layers of a stage over the node's state, and its outputs. The merged cache in `state` is a tap, and the result of a
/// stage without layers; otherwise what survives is taken from the children's caches directly, and the
/// merged one is left out as unused where the graph is run.
fn stage(
    g: &Scope,
    source: &Source,
    layers: &Range<usize>,
    state: &State,
    children: Option<(&Value, &Value)>,
    affixes: &Affixes,
) {
    let (arch, model) = (&source.arch, source.decoder());
    g.tap("in_hidden", &state.hidden);
    g.tap("in_position_ids", &state.positions);
    if let Some(kv) = &state.kv {
        g.tap("in_kv", kv);
    }
    let Some(last) = layers.clone().last() else {
        output(g, state);
        return;
    };
    let keep = g.input("keep", DType::I64, &[1.into()]);
    let bias = g.input("significance_bias", DType::F32, &["distances".into()]);
    let rows = Rows::new(g, &model, &state.positions, None);
    let mut x = state.hidden.flatten_rows();
    let mut new_kv = Vec::with_capacity(2 * layers.len());
    let mut kept = None;
    for l in layers.clone() {
        let layer = model.layer(g, l);
        let attended = rows.attend(&layer, &x, None);
        let mut residual = attended.residual;
        new_kv.extend([attended.key.clone(), attended.value]);
        if l == last {
            let prune = g.scope("prune");
            let pruned = Pruned::new(
                &prune,
                source,
                &State {
                    hidden: unflatten(&residual.stream, &state.positions),
                    positions: state.positions.clone(),
                    kv: Some(stack(&prune, arch.num_kv_heads(), &new_kv)),
                },
                [&attended.query, &attended.key],
                [&bias, &keep],
                affixes,
            );
            residual = Residual::from(pruned.state.hidden.flatten_rows());
            kept = Some(pruned);
        }
        x = model.mlp_residual(&layer, &residual);
    }
    if let Some(Pruned { state: mut end, keep_idx }) = kept {
        end.hidden = unflatten(&x.within(g), &end.positions);
        if let (Some((left, right)), Some(new)) = (children, &end.kv) {
            let shape = [new.dim(0), (last + 1).into(), 2.into(), new.dim(3), new.dim(4), new.dim(5)];
            let inputs = [left, right, &keep_idx, new, &affixes.prefix, &affixes.suffix];
            let result = vec![(DType::F32, shape.to_vec())];
            end.kv = Some(g.scope("merge").call(&functions::MERGE_CACHE, &inputs, vec![], result)[0].clone());
        }
        output(g, &end);
        g.output("keep_idx", &keep_idx);
    }
}

fn output(g: &Scope, state: &State) {
    g.output("hidden", &state.hidden);
    g.output("kept_position_ids", &state.positions);
    if let Some(kv) = &state.kv {
        g.output("kv", kv);
    }
}

/// What the reduction leaves.
struct Pruned {
    state: State,
    keep_idx: Value,
}

impl Pruned {
    fn new(
        g: &Scope,
        source: &Source,
        state: &State,
        [query, key]: [&Value; 2],
        [bias, keep]: [&Value; 2],
        affixes: &Affixes,
    ) -> Self {
        let arch = &source.arch;
        let [batch, rows] = [state.positions.dim(0), state.positions.dim(1)];
        let [heads, groups, d] = [arch.num_heads(), arch.num_kv_heads(), arch.head_dim()];
        let query_last = query.within(g).last(1).reshape(&[batch.clone(), heads.into(), d.into()]);
        let scale = (1.0 / (d as f64).sqrt()) as f32;
        let kept = Dim::from("keep");
        let kv = state.kv.as_ref().unwrap_or(key);
        let inputs =
            [&query_last, key, bias, &state.positions, &state.hidden, kv, keep, &affixes.prefix, &affixes.suffix];
        let results = vec![
            (DType::I64, vec![batch.clone(), kept.clone()]),
            (DType::F32, vec![batch.clone(), kept.clone(), arch.hidden_size().into()]),
            (DType::I64, vec![batch.clone(), kept.clone()]),
            (DType::F32, vec![batch.clone(), kv.dim(1), 2.into(), groups.into(), kept, d.into()]),
            (DType::F32, vec![batch.clone(), rows.clone()]),
            (DType::F32, vec![batch, heads.into(), rows]),
        ];
        let outputs = g.call(&functions::TOPK_PRUNE, &inputs, vec![("scale", scale.into())], results);
        g.tap("attn_out_hidden", &state.hidden);
        g.tap("keep_idx", &outputs[0]);
        g.tap("scores", &outputs[4]);
        g.tap("metric_last", &outputs[5]);
        let [keep_idx, hidden, positions, kv] = [0, 1, 2, 3].map(|i: usize| outputs[i].clone());
        Self { state: State { hidden, positions, kv: Some(kv) }, keep_idx }
    }
}

/// Keys and values of the node's own layers as one cache, `[batch, n, 2, G, L, d]`.
fn stack(g: &Scope, groups: usize, new: &[Value]) -> Value {
    let Some([batch, _, rows, d]) = new.first().map(|v| [0, 1, 2, 3].map(|axis| v.dim(axis))) else {
        g.fail("a stage with layers has no keys to stack");
        return g.int(0);
    };
    // Layer and key/value axes are one while joining.
    let parts: Vec<Value> = new.iter().map(|v| v.within(g).unsqueeze(1)).collect();
    let shape = [batch, (new.len() / 2).into(), 2.into(), groups.into(), rows, d];
    g.concat(&parts.iter().collect::<Vec<_>>(), 1).reshape(&shape)
}

impl Affixes {
    fn inputs(g: &Scope) -> Self {
        let [prefix, suffix] = ["prefix_length", "suffix_length"].map(|name| g.input(name, DType::I64, &[1.into()]));
        Self { prefix, suffix }
    }
}
