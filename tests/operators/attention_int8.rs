//! `GroupQueryAttentionInt8` inside sessions: the kernel against the body of its function, caches bound in place, refusals.

use super::model::{call, session, stock_session};
use super::{HEADS, KV_HEADS, integers, noise, tensor};
use accordion_graphs::dtype::DType;
use accordion_graphs::functions::CACHED_ATTENTION_INT8;
use ort::session::{Session, SessionOutputs};
use ort::value::{DynValue, Tensor};

const DIM: usize = 16;

fn graph() -> Vec<u8> {
    let (f32, i8) = (DType::F32, DType::I8);
    let inputs = [
        ("query", f32, 3),
        ("key", f32, 3),
        ("value", f32, 3),
        ("past_key", i8, 4),
        ("past_value", i8, 4),
        ("past_key_scale", f32, 4),
        ("past_value_scale", f32, 4),
        ("past_length", DType::I64, 1),
    ];
    call(&CACHED_ATTENTION_INT8, &inputs, vec![], &[(f32, 3), (i8, 4), (i8, 4), (f32, 4), (f32, 4)]).unwrap()
}

fn bytes(len: usize, step: f32) -> Vec<i8> {
    noise(len, step).iter().map(|x| (x * 127.0) as i8).collect()
}

fn entries(shape: [usize; 4], data: Vec<i8>) -> DynValue {
    Tensor::from_array((shape.to_vec(), data)).unwrap().into_dyn()
}

/// What is fed for `rows` new positions behind `past` of `capacity`, the new numbers `large` times as large as the cache has
/// room for.
fn feed(rows: usize, past: usize, capacity: usize, large: f32) -> Vec<(&'static str, DynValue)> {
    let cache = [1, KV_HEADS, capacity, DIM];
    let len = cache.iter().product();
    let scale = |step| noise(KV_HEADS * DIM, step).iter().map(|x| (x.abs() + 0.1) / 127.0).collect();
    let new = |step| noise(rows * KV_HEADS * DIM, step).iter().map(|x| x * large).collect();
    vec![
        ("query", tensor([1, rows, HEADS * DIM], noise(rows * HEADS * DIM, 0.7))),
        ("key", tensor([1, rows, KV_HEADS * DIM], new(0.3))),
        ("value", tensor([1, rows, KV_HEADS * DIM], new(0.11))),
        ("past_key", entries(cache, bytes(len, 0.9))),
        ("past_value", entries(cache, bytes(len, 1.1))),
        ("past_key_scale", tensor([1, KV_HEADS, 1, DIM], scale(0.5))),
        ("past_value_scale", tensor([1, KV_HEADS, 1, DIM], scale(0.6))),
        ("past_length", integers(&[past as i64])),
    ]
}

struct Found {
    output: Vec<f32>,
    caches: [(Vec<i64>, Vec<i8>); 2],
    scales: [Vec<f32>; 2],
}

fn found(outputs: &SessionOutputs<'_>) -> Found {
    let floats = |i: usize| outputs[i].try_extract_tensor::<f32>().unwrap().1.to_vec();
    let cache = |i: usize| {
        let (shape, data) = outputs[i].try_extract_tensor::<i8>().unwrap();
        (shape.to_vec(), data.to_vec())
    };
    Found { output: floats(0), caches: [cache(1), cache(2)], scales: [floats(3), floats(4)] }
}

fn run(session: &mut Session, inputs: Vec<(&str, DynValue)>) -> Result<Found, String> {
    session.run(inputs).map(|outputs| found(&outputs)).map_err(|error| error.to_string())
}

/// The valid rows of every head.
fn valid((shape, data): &(Vec<i64>, Vec<i8>), rows: usize) -> Vec<i8> {
    let plane = shape[2] as usize * DIM;
    data.chunks_exact(plane).flat_map(|head| &head[..rows * DIM]).copied().collect()
}

#[test]
fn the_kernel_agrees_with_the_body_of_its_function() {
    let graph = graph();
    let (mut kernel, mut body) = (session(&graph, 2).unwrap(), stock_session(&graph, 2).unwrap());
    for (rows, past, room) in [(1, 0, 3), (1, 700, 1), (3, 40, 9), (1, 20, 0), (30, 17, 5), (60, 0, 0)] {
        for large in [0.01, 1.0, 7.0] {
            let capacity = if room == 0 { past } else { past + rows + room };
            let inputs = || feed(rows, past, capacity, large);
            let (found, expected) = (run(&mut kernel, inputs()).unwrap(), run(&mut body, inputs()).unwrap());
            let what = format!("{rows} rows behind {past}, {large} times as large");
            assert_eq!(found.scales, expected.scales, "{what}");
            for (found, expected) in found.caches.iter().zip(&expected.caches) {
                assert_eq!(found.0, expected.0, "{what}");
                assert_eq!(valid(found, past + rows), valid(expected, past + rows), "{what}");
                assert!(found.1.iter().all(|&entry| entry != -128), "{what}");
            }
            for (found, expected) in found.output.iter().zip(&expected.output) {
                assert!((found - expected).abs() <= 2e-5 * large.max(1.0), "{what}: {found}, expected {expected}");
            }
        }
    }
}

#[test]
fn caches_bound_to_past_and_present_are_written_in_place() {
    let mut session = session(&graph(), 2).unwrap();
    let (rows, past, capacity) = (2, 40, 64);
    let expected = run(&mut session, feed(rows, past, capacity, 3.0)).unwrap();
    let mut binding = session.create_binding().unwrap();
    let inputs = feed(rows, past, capacity, 3.0);
    for (name, value) in inputs.iter().filter(|(name, _)| !["past_key", "past_value"].contains(name)) {
        binding.bind_input(*name, value).unwrap();
    }
    let mut caches = Vec::new();
    for (name, output, step) in [("past_key", "out.1", 0.9), ("past_value", "out.2", 1.1)] {
        let mut tensor = Tensor::<i8>::new(session.allocator(), [1, KV_HEADS, capacity, DIM]).unwrap();
        tensor.extract_tensor_mut().1.copy_from_slice(&bytes(KV_HEADS * capacity * DIM, step));
        binding.bind_input(name, &tensor).unwrap();
        binding.bind_output(output, &mut tensor).unwrap();
        caches.push(tensor);
    }
    for output in ["out.0", "out.3", "out.4"] {
        binding.bind_output_to_device(output, session.allocator().memory_info()).unwrap();
    }
    let outputs = session.run_binding(&binding).unwrap();
    assert_eq!(outputs["out.0"].try_extract_tensor::<f32>().unwrap().1, expected.output);
    assert_eq!(outputs["out.3"].try_extract_tensor::<f32>().unwrap().1, expected.scales[0]);
    drop(outputs);
    for (cache, (expected, step)) in caches.iter().zip(expected.caches.iter().zip([0.9, 1.1])) {
        let before = bytes(KV_HEADS * capacity * DIM, step);
        let (after, end) = (cache.extract_tensor().1, (past + rows) * DIM);
        for (head, after) in after.chunks_exact(capacity * DIM).enumerate() {
            let plane = head * capacity * DIM;
            assert_eq!(after[..end], expected.1[plane..plane + end], "head {head}");
            assert_eq!(after[end..], before[plane + end..plane + capacity * DIM], "the room of head {head}");
        }
    }
}

#[test]
fn it_refuses_with_the_name_of_what_is_wrong() {
    let mut session = session(&graph(), 1).unwrap();
    let replaced = |name: &'static str, value: DynValue| {
        let kept = feed(2, 3, 5, 1.0).into_iter().filter(move |(other, _)| *other != name);
        kept.chain([(name, value)]).collect::<Vec<_>>()
    };
    let scale = |channels: usize| tensor([1, KV_HEADS, 1, channels], vec![1.0; KV_HEADS * channels]);
    for (inputs, expected) in [
        (replaced("past_key_scale", scale(8)), "past_key_scale has shape [1, 2, 1, 8], expected [1, 2, 1, 16]"),
        // Heads and channels exchanged.
        (
            replaced("past_value_scale", tensor([1, DIM, 1, KV_HEADS], vec![1.0; 32])),
            "past_value_scale has shape [1, 16, 1, 2], expected [1, 2, 1, 16]",
        ),
        (replaced("past_length", integers(&[6])), "past_length is 6, but past_key has 5 positions"),
        (replaced("past_length", integers(&[-1])), "past_length is -1"),
        (replaced("query", tensor([1, 2, 40], vec![0.0; 80])), "query has 40 columns"),
        (replaced("key", tensor([1, 2, 16], vec![0.0; 32])), "key has shape [1, 2, 16], expected [1, 2, 32]"),
        (
            replaced("past_value", entries([1, KV_HEADS, 4, DIM], vec![0; 128])),
            "past_value has shape [1, 2, 4, 16], expected [1, 2, 5, 16]",
        ),
    ] {
        let message = run(&mut session, inputs).err().unwrap();
        assert!(message.contains(expected), "{message}");
    }
}
