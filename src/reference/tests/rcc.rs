//! RCC where the golden models do not reach: encoders of another width, tied embeddings, missing and additional biases, a
//! Mamba that begins with its embedding, and what is refused.

use super::{assert_close, multi_query_with_biases, random, weights};
use crate::reference::ReferenceError;
use crate::reference::decode::Continuation;
use crate::reference::rcc::Rcc;
use crate::reference::transformer;
use crate::taps::NoTaps;
use crate::tensor::Tensor;
use accordion_graphs::architecture::{Architecture, Encoder, GptNeox, Mamba, RccModel, Rope, RopeScaling};
use accordion_graphs::plan::rcc::RccSettings;
use ndarray::{Array2, Axis, concatenate, s};
use std::collections::BTreeMap;

type Tensors = BTreeMap<String, Tensor>;

/// Tied, without attention biases, in sequence, half rotary.
fn neox() -> GptNeox {
    GptNeox {
        num_layers: 2,
        hidden_size: 12,
        intermediate_size: 16,
        num_heads: 3,
        vocab_size: 40,
        max_positions: 64,
        layer_norm_eps: 1e-5,
        rope: Rope { theta: 10000.0, scaling: RopeScaling::None },
        rotary_dims: 2,
        parallel_residual: false,
        tie_word_embeddings: true,
        attention_bias: false,
        eos_token_ids: vec![],
        bos_token_id: None,
    }
}

/// Four blocks, with projection biases and without one of the convolution.
fn mamba() -> Mamba {
    Mamba {
        num_layers: 4,
        hidden_size: 10,
        intermediate_size: 14,
        state_size: 3,
        conv_kernel: 2,
        time_step_rank: 2,
        vocab_size: 40,
        rms_norm_eps: 1e-5,
        use_bias: true,
        use_conv_bias: false,
    }
}

fn neox_shapes(a: &GptNeox) -> Vec<(String, Vec<usize>)> {
    let [d, f] = [a.hidden_size, a.intermediate_size];
    let mut shapes = vec![("gpt_neox.embed_in.weight".to_owned(), vec![a.vocab_size, d])];
    let mut norm = |name: String| shapes.extend(["weight", "bias"].map(|part| (format!("{name}.{part}"), vec![d])));
    norm("gpt_neox.final_layer_norm".to_owned());
    for layer in 0..a.num_layers {
        norm(format!("gpt_neox.layers.{layer}.input_layernorm"));
        norm(format!("gpt_neox.layers.{layer}.post_attention_layernorm"));
    }
    for layer in 0..a.num_layers {
        let at = |name: &str| format!("gpt_neox.layers.{layer}.{name}");
        shapes.push((at("attention.query_key_value.weight"), vec![3 * d, d]));
        shapes.push((at("attention.dense.weight"), vec![d, d]));
        for (name, out, inner) in [("mlp.dense_h_to_4h", f, d), ("mlp.dense_4h_to_h", d, f)] {
            shapes.push((at(&format!("{name}.weight")), vec![out, inner]));
            shapes.push((at(&format!("{name}.bias")), vec![out]));
        }
    }
    shapes
}

fn mamba_shapes(a: &Mamba) -> Vec<(String, Vec<usize>)> {
    let [d, f, n, rank] = [a.hidden_size, a.intermediate_size, a.state_size, a.time_step_rank];
    let mut shapes = vec![
        ("backbone.embeddings.weight".to_owned(), vec![a.vocab_size, d]),
        ("backbone.norm_f.weight".to_owned(), vec![d]),
    ];
    for layer in 0..a.num_layers {
        shapes.push((format!("backbone.layers.{layer}.norm.weight"), vec![d]));
        for (name, shape) in [
            ("in_proj.weight", vec![2 * f, d]),
            ("in_proj.bias", vec![2 * f]),
            ("conv1d.weight", vec![f, 1, a.conv_kernel]),
            ("x_proj.weight", vec![rank + 2 * n, f]),
            ("dt_proj.weight", vec![f, rank]),
            ("dt_proj.bias", vec![f]),
            ("A_log", vec![f, n]),
            ("D", vec![f]),
            ("out_proj.weight", vec![d, f]),
            ("out_proj.bias", vec![d]),
        ] {
            shapes.push((format!("backbone.layers.{layer}.mixer.{name}"), shape));
        }
    }
    shapes
}

const MAMBA: RccSettings = RccSettings { window: 8, ratio: 4, pairs: true, first_state_is_embedding: false };
const LLAMA: RccSettings = RccSettings { window: 8, ratio: 2, pairs: false, first_state_is_embedding: true };

/// A model with `encoder`, whose tensors by the names of a checkpoint of its own are `own`.
fn load(encoder: Encoder, own: Tensors, settings: RccSettings) -> Result<Rcc, ReferenceError> {
    let decoder = neox();
    let maps = (0..decoder.num_layers).map(|i| format!("maps.{i}.weight")).chain(["embed_map.weight".to_owned()]);
    let shape = vec![decoder.hidden_size, encoder.hidden_size()];
    let mut tensors = random(maps.map(|name| (name, shape.clone())).chain(neox_shapes(&decoder)).collect());
    tensors.extend(own.into_iter().map(|(name, tensor)| (format!("encoder.{name}"), tensor)));
    let [encoder_path, embed_map, layer_maps] = ["encoder", "embed_map", "maps"].map(str::to_owned);
    let model = RccModel { encoder, encoder_path, embed_map, layer_maps };
    Rcc::load(&Architecture::GptNeox(decoder), &model, settings, |name| tensors.get(name).cloned().ok_or("missing"))
}

fn with_mamba(settings: RccSettings) -> Rcc {
    load(Encoder::Mamba(mamba()), random(mamba_shapes(&mamba())), settings).unwrap()
}

fn with_llama() -> Rcc {
    let llama = multi_query_with_biases();
    load(Encoder::Transformer(Architecture::Llama(llama.clone())), weights(&llama), LLAMA).unwrap()
}

fn segment(first: u32) -> Vec<u32> {
    (first..first + 8).map(|i| i * 7 % 40).collect()
}

fn array(tensor: &Tensor) -> Array2<f32> {
    Array2::from_shape_vec((tensor.shape()[0], tensor.shape()[1]), tensor.to_f32()).unwrap()
}

#[test]
fn slots_of_segments_one_by_one_are_slots_at_once() {
    for rcc in [with_mamba(MAMBA), with_llama()] {
        let segments = [segment(1), segment(20), segment(3)];
        let stepwise = rcc.compress(&segments, &mut NoTaps).unwrap();
        let maps: Vec<_> = segments.iter().map(|ids| rcc.encode(ids, &mut NoTaps).unwrap()).collect();
        let joined: Vec<_> = (0..maps[0].len())
            .map(|i| concatenate(Axis(0), &maps.iter().map(|m| m[i].view()).collect::<Vec<_>>()).unwrap())
            .collect();
        let mut at_once = rcc.decoder().empty_cache();
        rcc.fill(&joined, &mut at_once, &mut NoTaps).unwrap();
        for (one, all) in stepwise.layers.iter().zip(&at_once.layers) {
            let flat = |x: &ndarray::Array3<f32>| x.flatten().insert_axis(Axis(0)).to_owned();
            assert_close(&flat(&one.k), &flat(&all.k));
            assert_close(&flat(&one.v), &flat(&all.v));
        }
    }
}

#[test]
fn a_state_is_the_rows_behind_every_ratio_tokens() {
    for rcc in [with_mamba(MAMBA), with_llama()] {
        let mut taps = Tensors::new();
        rcc.encode(&segment(5), &mut taps).unwrap();
        let second = array(&taps["encoder.layers.1.out"]);
        let ratio = second.nrows() / array(&taps["maps.0"]).nrows();
        let (state, expected) = if ratio == 4 { (1, [3, 7].to_vec()) } else { (2, [1, 3, 5, 7].to_vec()) };
        assert_close(&array(&taps[&format!("encoder.states.{state}")]), &second.select(Axis(0), &expected));
    }
}

#[test]
fn a_mamba_may_begin_with_its_embedding() {
    let states = |first_state_is_embedding| {
        let mut taps = Tensors::new();
        let rcc = with_mamba(RccSettings { first_state_is_embedding, ..MAMBA });
        rcc.encode(&segment(2), &mut taps).unwrap();
        let rows = |name: &str| array(&taps[name]).slice(s![3..;4, ..]).to_owned();
        let sources = ["embed", "layers.0.out", "layers.1.out", "layers.2.out", "layers.3.out", "norm"];
        let sources = sources.map(|name| rows(&format!("encoder.{name}")));
        let states: Vec<_> = (0..5).map(|m| array(&taps[&format!("encoder.states.{m}")])).collect();
        assert!(!taps.contains_key("encoder.states.5"));
        (states, sources)
    };
    for (embedding_first, from) in [(true, [0, 1, 2, 3, 5]), (false, [1, 2, 3, 4, 5])] {
        let (states, sources) = states(embedding_first);
        for (state, source) in states.iter().zip(from) {
            assert_eq!(state, &sources[source]);
        }
    }
}

#[test]
fn rows_of_a_mamba_do_not_see_those_behind_them() {
    let run = |ids: &[u32]| {
        let mut taps = Tensors::new();
        with_mamba(MAMBA).encode(ids, &mut taps).unwrap();
        array(&taps["encoder.layers.3.out"])
    };
    let mut changed = segment(1);
    changed[5] = 39;
    let (before, after) = (run(&segment(1)), run(&changed));
    assert_eq!(before.slice(s![..5, ..]), after.slice(s![..5, ..]));
    assert!((5..8).all(|row| before.row(row) != after.row(row)));
}

#[test]
fn training_is_compression_without_padding_and_a_continuation() {
    let rcc = with_llama();
    let ids = [segment(1), segment(9), vec![4, 5, 6]].concat();
    let logits = rcc.train(&ids, 16, &mut NoTaps).unwrap();
    let cache = rcc.compress(ids[..16].chunks(8), &mut NoTaps).unwrap();
    let rest = Continuation::after(cache).feed(rcc.decoder(), &ids[16..], &mut NoTaps).unwrap();
    assert_eq!(logits.dim(), (8 + 3, 40));
    assert_close(&logits.slice(s![8.., ..]).to_owned(), &rest);
    for (context_len, found) in [(12, 4), (20, 19)] {
        let error = rcc.train(&ids, context_len, &mut NoTaps).unwrap_err();
        assert!(matches!(error, ReferenceError::Length { found: f, .. } if f == found), "{error}");
    }
}

#[test]
fn wrong_inputs_are_refused() {
    let rcc = with_llama();
    assert!(matches!(
        rcc.encode(&[1; 7], &mut NoTaps),
        Err(ReferenceError::Length { what: "tokens of a segment", found: 7, expected: 8 })
    ));
    assert!(matches!(rcc.encode(&[40; 8], &mut NoTaps), Err(ReferenceError::TokenId { id: 40, .. })));
    let maps = rcc.encode(&segment(1), &mut NoTaps).unwrap();
    let mut cache = rcc.decoder().empty_cache();
    assert!(matches!(
        rcc.fill(&maps[..2], &mut cache, &mut NoTaps),
        Err(ReferenceError::Length { what: "maps", found: 2, expected: 3 })
    ));
    let shallow = load(Encoder::Mamba(Mamba { num_layers: 3, ..mamba() }), Tensors::new(), MAMBA).err().unwrap();
    assert!(shallow.to_string().contains("number of encoder layers is 3"), "{shallow}");
    let missing = load(Encoder::Mamba(mamba()), Tensors::new(), MAMBA).err().unwrap();
    assert_eq!(missing.to_string(), "weight `encoder.backbone.embeddings.weight` could not be read");
}

#[test]
fn contradictory_architectures_are_refused() {
    let refused = |a: GptNeox| {
        transformer::load(&Architecture::GptNeox(a), |_| Err::<Tensor, _>("unused")).err().unwrap().to_string()
    };
    assert!(refused(GptNeox { num_heads: 5, ..neox() }).contains("num_heads is 5"));
    assert!(refused(GptNeox { rotary_dims: 3, ..neox() }).contains("rotary_dims is 3"));
    assert!(refused(GptNeox { rotary_dims: 6, ..neox() }).contains("rotary_dims is 6"));
}
