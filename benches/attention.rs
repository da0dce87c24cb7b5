//! Causal attention on the CPU: `ai.accordion::GroupQueryAttention` against `com.microsoft::GroupQueryAttention`, both
//! in ONNX Runtime sessions with the same threads.
//!
//! Prefill counts the useful half of the work, `4 d H L (L + 1) / 2` operations; decode counts the bytes of the keys and
//! values read, with the cache bound in place. `cargo bench --bench attention -- 2048 8192` limits the lengths;
//! `ORT_DYLIB_PATH` names the ONNX Runtime.

// Not everything that the tests build models from is needed here.
#[allow(dead_code)]
#[path = "../tests/operators/model.rs"]
mod model;

use std::time::Instant;

use model::Attribute::{Float, Int};
use onnx_protobuf::tensor_proto::DataType;
use ort::session::IoBinding;
use ort::session::Session;
use ort::value::Tensor;

const HEADS: usize = 9;
const KV_HEADS: usize = 3;
const DIM: usize = 64;
const THREADS: usize = 2;
const ROUNDS: usize = 3;

type Outcome<T> = Result<T, Box<dyn std::error::Error>>;

fn main() -> Outcome<()> {
    let wanted: Vec<usize> = std::env::args().filter_map(|arg| arg.parse().ok()).collect();
    let is_wanted = |length: &usize| wanted.is_empty() || wanted.contains(length);
    println!("{HEADS}/{KV_HEADS} heads, d {DIM}, {THREADS} threads, medians: ai.accordion, com.microsoft");
    for length in [1148, 2048, 8192, 32768].into_iter().filter(is_wanted) {
        let work = (4 * DIM * HEADS) as f64 * length as f64 * (length as f64 + 1.0) / 2.0;
        let repeats = (60e9 / work) as usize | 3;
        report("prefill", length, compare(length, 0, repeats)?, work / 1e9, "GFLOP/s");
    }
    for length in [2048, 8192, 32768].into_iter().filter(is_wanted) {
        let bytes = (2 * KV_HEADS * DIM * size_of::<f32>() * length) as f64;
        report("decode", length, compare(1, length - 1, 101)?, bytes / 1e9, "GB/s");
    }
    Ok(())
}

fn report(what: &str, keys: usize, seconds: [f64; 2], amount: f64, unit: &str) {
    let [ours, theirs] = seconds.map(|s| format!("{:.3} ms = {:.0} {unit}", s * 1e3, amount / s));
    println!("{what:>8} {keys:>6}  {ours:>24}  {theirs:>24}  x{:.2}", seconds[1] / seconds[0]);
}

/// Median seconds of both operators for `rows` new positions behind `past`.
///
/// They take turns in rounds, and only one session is alive at a time: the waiting threads of another one spin, and would
/// take a core away.
fn compare(rows: usize, past: usize, repeats: usize) -> Outcome<[f64; 2]> {
    let mut seconds = [Vec::new(), Vec::new()];
    let mut outputs = [Vec::new(), Vec::new()];
    for _ in 0..ROUNDS {
        for (which, domain) in ["ai.accordion", "com.microsoft"].into_iter().enumerate() {
            let mut runner = Runner::new(domain, rows, past)?;
            runner.run()?;
            for _ in 0..repeats.div_ceil(ROUNDS) {
                seconds[which].push(runner.run()?);
            }
            outputs[which] = runner.output.extract_tensor().1.to_vec();
        }
    }
    let worst = outputs[0].iter().zip(&outputs[1]).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    if worst.is_nan() || worst > 1e-4 {
        return Err(format!("the operators differ by {worst} for {rows} rows behind {past}").into());
    }
    Ok(seconds.map(|mut s| {
        s.sort_by(f64::total_cmp);
        s[s.len() / 2]
    }))
}

/// A session over one attention node with everything bound.
struct Runner {
    session: Session,
    binding: IoBinding,
    output: Tensor<f32>,
}

impl Runner {
    fn new(domain: &str, rows: usize, past: usize) -> Outcome<Self> {
        let (float, int) = (DataType::FLOAT, DataType::INT32);
        let mut inputs = vec![("query", float, 3), ("key", float, 3), ("value", float, 3)];
        let cached = past > 0;
        if cached {
            inputs.extend([("past_key", float, 4), ("past_value", float, 4)]);
        }
        let names: Vec<&str> = if domain == "com.microsoft" {
            inputs.extend([("seqlens_k", int, 1), ("total_length", int, 1)]);
            let past = if cached { ["past_key", "past_value"] } else { [""; 2] };
            vec!["query", "key", "value", past[0], past[1], "seqlens_k", "total_length"]
        } else if cached {
            inputs.push(("past_length", DataType::INT64, 1));
            vec!["query", "key", "value", "past_key", "past_value", "past_length"]
        } else {
            vec!["query", "key", "value"]
        };
        let outputs = ["output", "present_key", "present_value"];
        let attributes =
            [("num_heads", Int(HEADS as i64)), ("kv_num_heads", Int(KV_HEADS as i64)), ("scale", Float(0.125))];
        let node = model::node(domain, "GroupQueryAttention", &names, &outputs, &attributes);
        let outputs = [("output", float, 3), ("present_key", float, 4), ("present_value", float, 4)];
        let session = model::session(&model::model(vec![node], vec![], &inputs, &outputs), THREADS)?;

        let mut binding = session.create_binding()?;
        let noise = |shape: &[usize], step: f32| -> Outcome<Tensor<f32>> {
            let mut tensor = Tensor::<f32>::new(session.allocator(), shape.to_vec())?;
            let values = tensor.extract_tensor_mut().1.iter_mut().enumerate();
            values.for_each(|(i, x)| *x = (i as f32 * step).sin() * 2.0);
            Ok(tensor)
        };
        for (name, heads, step) in [("query", HEADS, 0.7), ("key", KV_HEADS, 0.3), ("value", KV_HEADS, 0.5)] {
            binding.bind_input(name, &noise(&[1, rows, heads * DIM], step)?)?;
        }
        let total = past + rows;
        for (name, step) in [("key", 0.9), ("value", 1.1)] {
            let mut cache = noise(&[1, KV_HEADS, total, DIM], step)?;
            if cached {
                binding.bind_input(format!("past_{name}"), &cache)?;
            }
            binding.bind_output(format!("present_{name}"), &mut cache)?;
        }
        if domain == "com.microsoft" {
            binding.bind_input("seqlens_k", &Tensor::from_array(([1], vec![total as i32 - 1]))?)?;
            binding.bind_input("total_length", &Tensor::from_array(([1], vec![total as i32]))?)?;
        } else if cached {
            binding.bind_input("past_length", &Tensor::from_array(([1], vec![past as i64]))?)?;
        }
        let mut output = Tensor::<f32>::new(session.allocator(), [1, rows, HEADS * DIM])?;
        binding.bind_output("output", &mut output)?;
        Ok(Self { session, binding, output })
    }

    /// Seconds of one run.
    fn run(&mut self) -> Outcome<f64> {
        let start = Instant::now();
        self.session.run_binding(&self.binding)?;
        Ok(start.elapsed().as_secs_f64())
    }
}
