#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod rcc;

use super::array::Scope;
use super::cache::{Cache, KeyValue};
use super::decode::{Continuation, ContinuationOffset, EndOfText};
use super::homer::{Compression, ContextState, Prompt, compress};
use super::llama::Llama;
use super::rope::Rotary;
use super::transformer::Transformer;
use super::{ReferenceError, plain};
use crate::taps::NoTaps;
use crate::tensor::Tensor;
use accordion_graphs::architecture::{self, Rope, RopeScaling};
use accordion_graphs::plan::PromptLengths;
use accordion_graphs::plan::homer::{HomerPlan, HomerSettings};
use ndarray::Array2;
use std::collections::BTreeMap;

/// Multi-query, a head width of its own, every bias, tied embeddings: what no golden model has.
fn multi_query_with_biases() -> architecture::Llama {
    architecture::Llama {
        num_layers: 3,
        hidden_size: 20,
        intermediate_size: 24,
        num_heads: 3,
        num_kv_heads: 1,
        head_dim: 8,
        vocab_size: 40,
        max_positions: 64,
        rms_norm_eps: 1e-5,
        rope: Rope { theta: 10000.0, scaling: RopeScaling::None },
        tie_word_embeddings: true,
        qkv_bias: true,
        o_bias: true,
        mlp_bias: true,
        sliding_window: None,
        eos_token_ids: vec![],
        bos_token_id: None,
    }
}

/// Reproducible weights for `a`, by name.
fn weights(a: &architecture::Llama) -> BTreeMap<String, Tensor> {
    let mut shapes = vec![
        ("model.embed_tokens.weight".to_owned(), vec![a.vocab_size, a.hidden_size]),
        ("model.norm.weight".to_owned(), vec![a.hidden_size]),
    ];
    let (q, kv) = (a.num_heads * a.head_dim, a.num_kv_heads * a.head_dim);
    for layer in 0..a.num_layers {
        for norm in ["input_layernorm", "post_attention_layernorm"] {
            shapes.push((format!("model.layers.{layer}.{norm}.weight"), vec![a.hidden_size]));
        }
        for (linear, out, inner) in [
            ("self_attn.q_proj", q, a.hidden_size),
            ("self_attn.k_proj", kv, a.hidden_size),
            ("self_attn.v_proj", kv, a.hidden_size),
            ("self_attn.o_proj", a.hidden_size, q),
            ("mlp.gate_proj", a.intermediate_size, a.hidden_size),
            ("mlp.up_proj", a.intermediate_size, a.hidden_size),
            ("mlp.down_proj", a.hidden_size, a.intermediate_size),
        ] {
            shapes.push((format!("model.layers.{layer}.{linear}.weight"), vec![out, inner]));
            shapes.push((format!("model.layers.{layer}.{linear}.bias"), vec![out]));
        }
    }
    random(shapes)
}

/// Tensors of `shapes` with reproducible values between -1/2 and 1/2.
fn random(shapes: Vec<(String, Vec<usize>)>) -> BTreeMap<String, Tensor> {
    let mut state = 1_u32;
    let mut random = move || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 24) as f32 - 0.5
    };
    let mut tensor = |shape: Vec<usize>| {
        let values = (0..shape.iter().product()).map(|_| random()).collect();
        Tensor::from_f32(shape, values).unwrap()
    };
    shapes.into_iter().map(|(name, shape)| (name, tensor(shape))).collect()
}

fn load(a: &architecture::Llama) -> Llama {
    let weights = weights(a);
    Llama::load(a, |name| weights.get(name).cloned().ok_or("no such tensor")).unwrap()
}

#[track_caller]
fn assert_close(found: &Array2<f32>, expected: &Array2<f32>) {
    assert_eq!(found.dim(), expected.dim());
    let worst = (found - expected).fold(0.0_f32, |worst, e| if e.is_nan() { f32::NAN } else { worst.max(e.abs()) });
    assert!(worst < 1e-5, "off by {worst}");
}

fn ids(count: usize) -> Vec<u32> {
    (0..count as u32).map(|i| i * 7 % 40).collect()
}

fn plan_of(context: usize, max_chunk_len: usize, target_len: usize) -> HomerPlan {
    let settings = HomerSettings { max_chunk_len, max_initial_chunk_len: None, target_len, layers_warmup: 1 };
    HomerPlan::new(3, PromptLengths { prefix: 2, context, suffix: 3 }, settings).unwrap()
}

fn compressed(model: &Llama, plan: &HomerPlan, ids: &[u32]) -> Result<ContextState, ReferenceError> {
    let (prefix, rest) = ids.split_at(2);
    let (context, suffix) = rest.split_at(plan.lengths.context);
    let table = [0.0; 12];
    compress(model, plan, Prompt { prefix, context, suffix }, &|_| &table, &mut NoTaps)
}

#[test]
fn tokens_one_by_one_are_tokens_at_once() {
    let model = load(&multi_query_with_biases());
    let ids = ids(9);
    let mut cache = model.empty_cache();
    let all = plain::forward(&model, &ids, &[0, 1, 2, 3, 4, 5, 6, 7, 8], &mut cache, &mut NoTaps).unwrap();
    let mut stepwise = model.empty_cache();
    for (row, &id) in ids.iter().enumerate() {
        let one = plain::forward(&model, &[id], &[row as i64], &mut stepwise, &mut NoTaps).unwrap();
        assert_close(&one, &all.slice(ndarray::s![row..=row, ..]).to_owned());
    }
    assert_eq!((cache.rows(), stepwise.rows()), (9, 9));
}

#[test]
fn one_leaf_that_drops_nothing_is_the_plain_model() {
    let model = load(&multi_query_with_biases());
    let ids = ids(15);
    let context = compressed(&model, &plan_of(10, 15, 15), &ids).unwrap();
    let positions: Vec<i64> = (0..15).collect();
    let plain = plain::forward(&model, &ids, &positions, &mut model.empty_cache(), &mut NoTaps).unwrap();
    assert_close(&context.last_hidden, &plain);
    assert_eq!(context.position_ids, positions);
}

#[test]
fn a_context_can_be_continued_twice() {
    let model = load(&multi_query_with_biases());
    let context = compressed(&model, &plan_of(16, 14, 10), &ids(21)).unwrap();
    let feed = || {
        let mut continuation = Continuation::new(&context, ContinuationOffset::AfterLast);
        continuation.feed(&model, &[5, 6], &mut NoTaps).unwrap()
    };
    assert_eq!(feed(), feed());
    assert_eq!(context.cache.rows(), 10);
}

/// A model that counts to three: after 0 comes 1, after 1 comes 2, after 2 comes 0.
struct Counter;

impl Transformer for Counter {
    fn num_layers(&self) -> usize {
        0
    }

    fn empty_cache(&self) -> Cache {
        Cache::default()
    }

    fn embed(&self, ids: &[u32]) -> Result<Array2<f32>, ReferenceError> {
        Ok(Array2::from_shape_fn((ids.len(), 1), |(row, _)| ids[row] as f32))
    }

    fn rotary(&self, positions: &[i64]) -> Rotary {
        Rotary::new(&multi_query_with_biases().rope, 2, positions)
    }

    fn layer(
        &self,
        _layer: usize,
        _x: &Array2<f32>,
        _rotary: &Rotary,
        _past: Option<&KeyValue>,
        _taps: &mut Scope<'_>,
    ) -> Result<(Array2<f32>, KeyValue), ReferenceError> {
        panic!("there is no layer")
    }

    fn final_norm(&self, hidden: &Array2<f32>) -> Array2<f32> {
        hidden.clone()
    }

    fn logits(&self, hidden: &Array2<f32>) -> Array2<f32> {
        Array2::from_shape_fn((hidden.nrows(), 3), |(row, id)| {
            f32::from(u8::from(id == (hidden[[row, 0]] as usize + 1) % 3))
        })
    }
}

#[test]
fn an_id_ends_a_text_at_once_or_from_the_second_on() {
    let decode = |ids: &[u32], keeps_first| {
        let mut continuation = Continuation::after(Cache::default());
        let logits = continuation.feed(&Counter, &[0, 1, 2], &mut NoTaps).unwrap();
        let end = EndOfText { ids, keeps_first };
        let generated = continuation.greedy(&Counter, &logits.row(2), 4, end, &mut NoTaps).unwrap();
        // One row of logits per step, the one that ended the text included.
        assert_eq!(generated.step_logits.nrows(), generated.position_ids.len());
        assert_eq!(continuation.next_position, 3 + generated.position_ids.len() as i64);
        generated.tokens
    };
    for keeps_first in [false, true] {
        assert_eq!(decode(&[], keeps_first), [0, 1, 2, 0, 1]);
        assert_eq!(decode(&[7, 2], keeps_first), [0, 1]);
    }
    assert_eq!(decode(&[0], false), [] as [u32; 0]);
    assert_eq!(decode(&[0], true), [0, 1, 2]);
}

#[test]
fn a_short_significance_table_is_named() {
    let model = load(&multi_query_with_biases());
    // The leaf's last token is at 14: distances of context tokens reach 12, one beyond the table.
    let error = compressed(&model, &plan_of(10, 15, 12), &ids(15)).unwrap_err();
    let ReferenceError::SignificanceTooShort { layer: 2, found: 12, largest_distance: 14, ref node } = error else {
        panic!("{error}")
    };
    assert_eq!(node, "node.h0.i0");
}

#[test]
fn wrong_inputs_are_refused() {
    let mut a = multi_query_with_biases();
    let model = load(&a);
    let plan = plan_of(10, 15, 15);
    let prompt = |context| Prompt { prefix: &[1, 2], context, suffix: &[3, 4, 5] };
    let table = |_| &[][..];
    assert!(matches!(
        Compression::new(&model, &plan, prompt(&[1; 9]), &table),
        Err(ReferenceError::Length { what: "context tokens", found: 9, expected: 10 })
    ));
    assert!(matches!(
        compress(&model, &plan, prompt(&[40; 10]), &table, &mut NoTaps),
        Err(ReferenceError::TokenId { id: 40, vocab_size: 40 })
    ));
    assert!(matches!(
        plain::forward(&model, &[1], &[0], &mut Cache::default(), &mut NoTaps),
        Err(ReferenceError::Length { what: "layers of the cache", .. })
    ));

    a.sliding_window = Some(14);
    assert!(matches!(
        compress(&load(&a), &plan, prompt(&[1; 10]), &table, &mut NoTaps),
        Err(ReferenceError::SlidingWindow { rows: 15, window: 14 })
    ));
    a.num_kv_heads = 2;
    assert!(matches!(
        Llama::load(&a, |_| Err::<Tensor, _>("unused")),
        Err(ReferenceError::Architecture { what: "num_kv_heads", found: 2, .. })
    ));
}

#[test]
fn weights_that_are_missing_or_misshapen_are_named() {
    let a = multi_query_with_biases();
    let mut weights = weights(&a);
    let name = "model.layers.1.self_attn.k_proj.bias";
    let bias = weights.remove(name).unwrap();
    let refused = |weights: &BTreeMap<String, Tensor>| {
        Llama::load(&a, |name| weights.get(name).cloned().ok_or("no such tensor")).err().unwrap().to_string()
    };
    assert_eq!(refused(&weights), format!("weight `{name}` could not be read"));
    weights.insert(name.to_owned(), bias.rows(0..7));
    assert_eq!(refused(&weights), format!("weight `{name}` has shape [7], the architecture expects [8]"));
}

/// Every path into the workspace that a source text mentions outside comments.
fn workspace_paths(source: &str) -> Vec<String> {
    let code: String = source.lines().filter(|line| !line.trim_start().starts_with("//")).collect();
    let mut paths = Vec::new();
    for root in ["crate::", "accordion_graphs::", "accordion_plugins::", "accordion_calibration::"] {
        for (start, _) in code.match_indices(root) {
            let end = code[start + root.len()..].find([':', ';', ',', ' ', ')', '{']).unwrap();
            paths.push(code[start..start + root.len() + end].to_owned());
        }
    }
    paths
}

#[test]
fn the_reference_uses_nothing_of_the_workspace_but_the_shared_facts() {
    let allowed = [
        "crate::tensor",
        "crate::taps",
        "accordion_graphs::architecture",
        "accordion_graphs::plan",
        "accordion_graphs::dtype",
    ];
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("src/reference");
    let mut found = 0;
    for file in std::fs::read_dir(folder).unwrap() {
        let path = file.unwrap().path();
        if path.is_dir() || path.ends_with("tests.rs") {
            continue; // names the others, to look for them
        }
        for used in workspace_paths(&std::fs::read_to_string(&path).unwrap()) {
            assert!(allowed.contains(&used.as_str()), "{} uses {used}", path.display());
            found += 1;
        }
    }
    assert!(found > 5, "only {found} paths were seen: the search itself is broken");
}
