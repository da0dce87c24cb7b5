//! The operators of `ai.accordion` inside ONNX Runtime sessions: registration, shapes, optional inputs and outputs, shared
//! caches, refusals. Their numbers are tested in `accordion-plugins` without a runtime.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod attention_int8;
mod functions;
mod model;
mod properties;
mod quantized;

use model::Attribute::{Float, Int};
use model::{function, library_session, model, node, session};
use onnx_protobuf::tensor_proto::DataType::{FLOAT, INT64};
use ort::session::Session;
use ort::value::{DynValue, Tensor};

const HEADS: usize = 4;
const KV_HEADS: usize = 2;
const DIM: usize = 16;

fn noise(len: usize, step: f32) -> Vec<f32> {
    (0..len).map(|i| (i as f32 * step).sin()).collect()
}

fn tensor(shape: impl Into<Vec<usize>>, data: Vec<f32>) -> DynValue {
    Tensor::from_array((shape.into(), data)).unwrap().into_dyn()
}

fn integers(data: &[i64]) -> DynValue {
    Tensor::from_array(([data.len()], data.to_vec())).unwrap().into_dyn()
}

fn attention(cached: bool) -> Session {
    let mut inputs = vec![("query", FLOAT, 3), ("key", FLOAT, 3), ("value", FLOAT, 3)];
    if cached {
        inputs.extend([("past_key", FLOAT, 4), ("past_value", FLOAT, 4), ("past_length", INT64, 1)]);
    }
    let mut names: Vec<&str> = inputs.iter().map(|input| input.0).collect();
    // Optional inputs that are left out by name are as good as absent ones.
    names.resize(6, "");
    let outputs = [("output", FLOAT, 3), ("present_key", FLOAT, 4), ("present_value", FLOAT, 4)];
    let attributes = [("num_heads", Int(HEADS as i64)), ("kv_num_heads", Int(KV_HEADS as i64)), ("scale", Float(0.5))];
    let node = node("ai.accordion", "GroupQueryAttention", &names, &outputs.map(|output| output.0), &attributes);
    session(&model(vec![node], vec![], &inputs, &outputs), 2).unwrap()
}

/// Rows `from..to` of `[1, T, heads * DIM]`.
fn rows(data: &[f32], heads: usize, from: usize, to: usize) -> DynValue {
    let width = heads * DIM;
    tensor([1, to - from, width], data[from * width..to * width].to_vec())
}

/// Shape and elements.
type Output = (Vec<i64>, Vec<f32>);

fn run(session: &mut Session, inputs: Vec<(&str, DynValue)>) -> Result<Vec<Output>, String> {
    let outputs = session.run(inputs).map_err(|error| error.to_string())?;
    Ok((0..outputs.len())
        .map(|i| {
            let (shape, data) = outputs[i].try_extract_tensor::<f32>().unwrap();
            (shape.to_vec(), data.to_vec())
        })
        .collect())
}

#[test]
fn attention_in_steps_equals_attention_at_once() {
    let total = 300;
    let query = noise(total * HEADS * DIM, 0.7);
    let key = noise(total * KV_HEADS * DIM, 0.3);
    let value = noise(total * KV_HEADS * DIM, 0.11);
    let step = |from, to| {
        vec![
            ("query", rows(&query, HEADS, from, to)),
            ("key", rows(&key, KV_HEADS, from, to)),
            ("value", rows(&value, KV_HEADS, from, to)),
        ]
    };
    let whole = run(&mut attention(false), step(0, total)).unwrap();
    assert_eq!(whole[0].0, [1, 300, 64]);
    assert_eq!(whole[1].0, [1, 2, 300, 16]);

    // Once with a cache that grows by the new rows, once with one that has room from the start.
    for capacity in [0, 310] {
        let mut session = attention(true);
        let empty = || tensor([1, KV_HEADS, capacity, DIM], vec![7.0; KV_HEADS * capacity * DIM]);
        let (mut past_key, mut past_value) = (empty(), empty());
        let mut output = Vec::new();
        for (from, to) in [(0, 100), (100, 103), (103, 299), (299, 300)] {
            let mut inputs = step(from, to);
            inputs.extend([
                ("past_key", past_key),
                ("past_value", past_value),
                ("past_length", integers(&[from as i64])),
            ]);
            let mut outputs = run(&mut session, inputs).unwrap();
            let cache: Vec<usize> = outputs[1].0.iter().map(|&dim| dim as usize).collect();
            assert_eq!(cache, [1, KV_HEADS, capacity.max(to), DIM]);
            past_value = tensor(cache.clone(), outputs.pop().unwrap().1);
            past_key = tensor(cache, outputs.pop().unwrap().1);
            output.extend(outputs.pop().unwrap().1);
        }
        let worst = output.iter().zip(&whole[0].1).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(output.len() == whole[0].1.len() && worst < 1e-5, "capacity {capacity}: differs by {worst}");
    }
}

#[test]
fn a_cache_bound_to_past_and_present_is_written_in_place() {
    let (past, capacity) = (40, 64);
    let mut session = attention(true);
    let cache = |step| noise(KV_HEADS * capacity * DIM, step);
    let new = |heads, step| (vec![1, 1, heads * DIM], noise(heads * DIM, step));
    let inputs = || {
        let (q, k, v) = (new(HEADS, 0.7), new(KV_HEADS, 0.3), new(KV_HEADS, 0.2));
        vec![
            ("query", tensor(q.0, q.1)),
            ("key", tensor(k.0, k.1)),
            ("value", tensor(v.0, v.1)),
            ("past_length", integers(&[past as i64])),
        ]
    };
    let mut copied = inputs();
    copied.extend([
        ("past_key", tensor([1, KV_HEADS, capacity, DIM], cache(0.9))),
        ("past_value", tensor([1, KV_HEADS, capacity, DIM], cache(1.1))),
    ]);
    let expected = run(&mut session, copied).unwrap();

    let mut binding = session.create_binding().unwrap();
    for (name, value) in &inputs() {
        binding.bind_input(*name, value).unwrap();
    }
    let mut caches = Vec::new();
    for (name, step) in [("key", 0.9), ("value", 1.1)] {
        let mut tensor = Tensor::<f32>::new(session.allocator(), [1, KV_HEADS, capacity, DIM]).unwrap();
        tensor.extract_tensor_mut().1.copy_from_slice(&cache(step));
        binding.bind_input(format!("past_{name}"), &tensor).unwrap();
        binding.bind_output(format!("present_{name}"), &mut tensor).unwrap();
        caches.push(tensor);
    }
    binding.bind_output_to_device("output", session.allocator().memory_info()).unwrap();
    let outputs = session.run_binding(&binding).unwrap();
    assert_eq!(outputs["output"].try_extract_tensor::<f32>().unwrap().1, expected[0].1);
    drop(outputs);
    for (which, (cache_after, step)) in caches.iter().zip([0.9, 1.1]).enumerate() {
        let after = cache_after.extract_tensor().1;
        let before = cache(step);
        for head in 0..KV_HEADS {
            let row = |data: &[f32], row: usize| data[(head * capacity + row) * DIM..][..DIM].to_vec();
            assert_eq!(row(after, past), row(&expected[which + 1].1, past), "the new row of head {head}");
            for other in (0..capacity).filter(|&other| other != past) {
                assert_eq!(row(after, other), row(&before, other), "row {other} of head {head} was touched");
            }
        }
    }
}

#[test]
fn a_cache_bound_half_in_place_is_refused() {
    let mut session = attention(true);
    let mut binding = session.create_binding().unwrap();
    for (name, heads) in [("query", HEADS), ("key", KV_HEADS), ("value", KV_HEADS)] {
        binding.bind_input(name, &tensor([1, 1, heads * DIM], noise(heads * DIM, 0.3))).unwrap();
    }
    binding.bind_input("past_length", &integers(&[3])).unwrap();
    let cache = || Tensor::<f32>::new(session.allocator(), [1, KV_HEADS, 8, DIM]).unwrap();
    let (mut shared, mut apart) = (cache(), cache());
    binding.bind_input("past_key", &shared).unwrap();
    binding.bind_input("past_value", &cache()).unwrap();
    // The keys' cache receives the values.
    binding.bind_output("present_value", &mut shared).unwrap();
    binding.bind_output("present_key", &mut apart).unwrap();
    binding.bind_output_to_device("output", session.allocator().memory_info()).unwrap();
    let message = session.run_binding(&binding).err().unwrap().to_string();
    assert!(message.contains("past and present overlap"), "{message}");
}

#[test]
fn attention_refuses_with_the_name_of_what_is_wrong() {
    let inputs = |value_width: usize, past: i64, past_dim: usize| {
        vec![
            ("query", tensor([1, 2, 64], noise(128, 0.1))),
            ("key", tensor([1, 2, 32], noise(64, 0.1))),
            ("value", tensor([1, 2, value_width], noise(2 * value_width, 0.1))),
            ("past_key", tensor([1, 2, 3, 16], noise(96, 0.1))),
            ("past_value", tensor([1, 2, 3, past_dim], noise(6 * past_dim, 0.1))),
            ("past_length", integers(&[past])),
        ]
    };
    let mut session = attention(true);
    assert!(run(&mut session, inputs(32, 3, 16)).is_ok());
    for (inputs, expected) in [
        (inputs(48, 3, 16), "value has shape [1, 2, 48], expected [1, 2, 32]"),
        (inputs(32, 4, 16), "past_length is 4, but past_key has 3 positions"),
        (inputs(32, -1, 16), "past_length is -1"),
        (inputs(32, 3, 8), "past_value has shape [1, 2, 3, 8], expected [1, 2, 3, 16]"),
    ] {
        let message = run(&mut session, inputs).unwrap_err();
        assert!(message.contains(expected), "{message}");
    }
}

#[test]
fn a_registered_operator_wins_over_the_function_of_its_name() {
    // The function's body is deliberately something else: it returns `up`.
    let body = function("ai.accordion", "SwiGlu", &["a", "b"], &["c"], vec![node("", "Identity", &["b"], &["c"], &[])]);
    let nodes = vec![node("ai.accordion", "SwiGlu", &["gate", "up"], &["out"], &[])];
    let bytes = model(nodes, vec![body], &[("gate", FLOAT, 2), ("up", FLOAT, 2)], &[("out", FLOAT, 2)]);
    let (gate, up) = (noise(21, 0.9), noise(21, 0.4));
    for mut session in [session(&bytes, 1).unwrap(), library_session(&bytes, 1).unwrap()] {
        let inputs = vec![("gate", tensor([3, 7], gate.clone())), ("up", tensor([3, 7], up.clone()))];
        let found = run(&mut session, inputs).unwrap();
        assert_eq!(found[0].0, [3, 7]);
        for ((found, gate), up) in found[0].1.iter().zip(&gate).zip(&up) {
            assert!((found - gate / (1.0 + (-gate).exp()) * up).abs() < 1e-6);
        }
    }
}

#[test]
fn pruning_keeps_the_best_and_may_leave_the_metric_out() {
    let inputs = [
        ("query_last", FLOAT, 3),
        ("key", FLOAT, 4),
        ("bias", FLOAT, 1),
        ("position_ids", INT64, 2),
        ("hidden", FLOAT, 3),
        ("kv", FLOAT, 6),
        ("keep", INT64, 1),
        ("prefix_length", INT64, 1),
        ("suffix_length", INT64, 1),
    ];
    let outputs = [
        ("keep_idx", INT64, 2),
        ("kept_hidden", FLOAT, 3),
        ("kept_position_ids", INT64, 2),
        ("kept_kv", FLOAT, 6),
        ("scores", FLOAT, 2),
        ("metric", FLOAT, 3),
    ];
    // One head of dimension 1 and query 1: the scores are the keys, less the bias.
    let feed = |keep: i64| {
        vec![
            ("query_last", tensor([1, 1, 1], vec![1.0])),
            ("key", tensor([1, 1, 5, 1], vec![9.0, 1.0, 4.0, 3.0, 0.0])),
            ("bias", tensor([5], vec![0.0, 0.0, 2.0, 0.0, 0.0])),
            ("position_ids", Tensor::from_array(([1, 5], vec![0i64, 1, 2, 3, 4])).unwrap().into_dyn()),
            ("hidden", tensor([1, 5, 2], (0..10).map(|i| i as f32).collect())),
            ("kv", tensor([1, 1, 2, 1, 5, 1], (0..10).map(|i| i as f32).collect())),
            ("keep", integers(&[keep])),
            ("prefix_length", integers(&[1])),
            ("suffix_length", integers(&[1])),
        ]
    };
    for count in [5, 6] {
        let names = outputs.map(|output| output.0);
        let operator =
            node("ai.accordion", "TopKPrune", &inputs.map(|input| input.0), &names[..count], &[("scale", Float(1.0))]);
        let mut session = session(&model(vec![operator], vec![], &inputs, &outputs[..count]), 2).unwrap();
        {
            let found = session.run(feed(3)).unwrap();
            // The bias pushes token 2 (score 4 - 2) behind token 3.
            assert_eq!(found["keep_idx"].try_extract_tensor::<i64>().unwrap().1, [0, 3, 4]);
            assert_eq!(found["kept_position_ids"].try_extract_tensor::<i64>().unwrap().1, [0, 3, 4]);
            let float = |name: &str| found[name].try_extract_tensor::<f32>().unwrap().1.to_vec();
            assert_eq!(float("kept_hidden"), [0.0, 1.0, 6.0, 7.0, 8.0, 9.0]);
            assert_eq!(float("kept_kv"), [0.0, 3.0, 4.0, 5.0, 8.0, 9.0]);
            assert_eq!(float("scores"), [f32::INFINITY, 1.0, 2.0, 3.0, f32::INFINITY]);
            if count == 6 {
                assert_eq!(float("metric"), [9.0, 1.0, 4.0, 3.0, 0.0]);
            }
        }
        for (keep, expected) in
            [(6, "keep is 6, but there are 5 tokens"), (1, "keep is 1, expected at least"), (-1, "keep is -1")]
        {
            let message = session.run(feed(keep)).err().unwrap().to_string();
            assert!(message.contains(expected), "{message}");
        }
    }
}
