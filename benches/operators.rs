//! Operators of `ai.accordion` against the bodies of their functions, which is what ONNX Runtime runs without our kernels, at
//! the sizes of SmolLM2-135M; `StridedCompress`, which has no kernel on the CPU, against a slice and a product.
//! `GroupQueryAttention` has a comparison of its own, `attention`.
//!
//! `cargo bench --bench operators [-- [--busy] [NAME...]]`; `ORT_DYLIB_PATH` names the ONNX Runtime. `--busy` is for a machine
//! that has other work: it takes one thread, and only the time in which that thread has a processor.

// Not everything that the tests build models from is needed here.
#[allow(dead_code)]
#[path = "../tests/operators/model.rs"]
mod model;

use accordion_graphs::dtype::DType::{self, F32, I64};
use accordion_graphs::functions::{
    LINEAR, MERGE_CACHE, SELECTIVE_SCAN, STRIDED_COMPRESS, STRIDED_COMPRESS_MEAN, SWIGLU, TOPK_PRUNE,
};
use accordion_graphs::onnx::{Attribute, Operator};
use onnx_protobuf::tensor_proto::DataType::{self, FLOAT, INT64};
use ort::memory::Allocator;
use ort::session::{Session, SessionInputValue};
use ort::value::{DynValue, Tensor};
use std::sync::LazyLock;
use std::time::Instant;

const ROUNDS: usize = 15;
/// What the two sides of a round run for, in seconds.
const ROUND: f64 = 0.1;

type Outcome<T> = Result<T, Box<dyn std::error::Error>>;

/// A node and what it is run on.
struct Case {
    name: &'static str,
    operator: &'static Operator,
    attributes: Vec<(&'static str, Attribute)>,
    inputs: Vec<Input>,
    outputs: Vec<(DType, usize)>,
}

struct Input {
    name: &'static str,
    shape: Vec<usize>,
    /// Integers; noise if there are none.
    integers: Option<Vec<i64>>,
}

fn noise(name: &'static str, shape: &[usize]) -> Input {
    Input { name, shape: shape.to_vec(), integers: None }
}

fn integers(name: &'static str, shape: &[usize], data: impl IntoIterator<Item = usize>) -> Input {
    Input { name, shape: shape.to_vec(), integers: Some(data.into_iter().map(|x| x as i64).collect()) }
}

impl Input {
    fn value(&self) -> ort::Result<DynValue> {
        let shape = self.shape.clone();
        if let Some(data) = &self.integers {
            return Ok(Tensor::from_array((shape, data.clone()))?.into_dyn());
        }
        let noise = |i: u32| (i.wrapping_mul(2_654_435_761) >> 8) as f32 / (1 << 23) as f32 - 1.0;
        // Of the runtime's own memory, aligned as what one node hands to the next.
        let mut tensor = Tensor::<f32>::new(&Allocator::default(), shape)?;
        (0..).zip(tensor.extract_tensor_mut().1).for_each(|(i, x)| *x = noise(i));
        Ok(tensor.into_dyn())
    }

    /// Name, type and rank.
    fn declared(&self) -> (&'static str, DType, usize) {
        (self.name, if self.integers.is_some() { I64 } else { F32 }, self.shape.len())
    }
}

/// How time is taken.
#[derive(Clone, Copy)]
struct Manner {
    threads: usize,
    /// Seconds since some moment.
    now: fn() -> f64,
}

impl Manner {
    fn from_arguments() -> Self {
        if std::env::args().any(|argument| argument == "--busy") {
            Self { threads: 1, now: thread_seconds }
        } else {
            Self { threads: 2, now: wall_seconds }
        }
    }
}

fn wall_seconds() -> f64 {
    static START: LazyLock<Instant> = LazyLock::new(Instant::now);
    START.elapsed().as_secs_f64()
}

/// Seconds for which the calling thread has had a processor.
fn thread_seconds() -> f64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the clock is one that every Linux has, and the call only writes `time`.
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut time) };
    time.tv_sec as f64 + time.tv_nsec as f64 * 1e-9
}

/// One of the two things that are compared; the session has as many threads as it is told.
struct Side<'a> {
    name: &'static str,
    session: &'a dyn Fn(usize) -> ort::Result<Session>,
    inputs: &'a [(&'static str, DynValue)],
}

fn values(inputs: &[Input]) -> ort::Result<Vec<(&'static str, DynValue)>> {
    inputs.iter().map(|input| Ok((input.name, input.value()?))).collect()
}

/// Prints the least seconds of both sides: what else the machine does only adds to them. They take turns, and only one
/// session is alive at a time: the waiting threads of another one spin, and would take a core away.
fn compare(manner: Manner, what: &str, sides: &[Side<'_>; 2]) -> Outcome<()> {
    let mut least = [f64::INFINITY; 2];
    for _ in 0..ROUNDS {
        for (side, least) in sides.iter().zip(&mut least) {
            let mut session = (side.session)(manner.threads)?;
            let mut run = || -> ort::Result<f64> {
                let inputs: Vec<_> =
                    side.inputs.iter().map(|(name, value)| (*name, SessionInputValue::from(value))).collect();
                let start = (manner.now)();
                session.run(inputs)?;
                Ok((manner.now)() - start)
            };
            run()?;
            let begin = Instant::now();
            while begin.elapsed().as_secs_f64() < ROUND {
                *least = least.min(run()?);
            }
        }
    }
    let [ours, theirs] = least;
    let shown = |side: &Side<'_>, seconds: f64| format!("{} {:.3} ms", side.name, seconds * 1e3);
    println!("{what}: {}, {}, x{:.2}", shown(&sides[0], ours), shown(&sides[1], theirs), theirs / ours);
    Ok(())
}

fn main() -> Outcome<()> {
    let wanted: Vec<String> = std::env::args().skip(1).filter(|arg| !arg.starts_with('-')).collect();
    let is_wanted = |name: &str| wanted.is_empty() || wanted.iter().any(|wanted| name.contains(wanted.as_str()));
    // Values are made by the runtime too.
    model::environment()?;
    let manner = Manner::from_arguments();
    println!("threads: {}; the best of {ROUNDS} rounds", manner.threads);
    for case in cases().into_iter().filter(|case| is_wanted(case.name)) {
        let types: Vec<_> = case.inputs.iter().map(Input::declared).collect();
        let bytes = model::call(case.operator, &types, case.attributes, &case.outputs)?;
        let inputs = values(&case.inputs)?;
        let kernel = Side { name: "kernel", session: &|threads| model::session(&bytes, threads), inputs: &inputs };
        let body = Side { name: "body", session: &|threads| model::stock_session(&bytes, threads), inputs: &inputs };
        compare(manner, case.name, &[kernel, body])?;
    }
    for (segments, ratio, width) in [(1, 32, 2048), (4, 32, 2048), (1, 8, 2048), (4, 4, 576)] {
        for operator in [&STRIDED_COMPRESS, &STRIDED_COMPRESS_MEAN] {
            let what = format!("{} of {segments} x 2048 x {width}, ratio {ratio}", operator.name);
            if is_wanted(&what) {
                strided_compress(manner, &what, operator, segments, ratio, width)?;
            }
        }
    }
    Ok(())
}

fn cases() -> Vec<Case> {
    let (l, k, layers, g, h, d, width) = (2048, 1024, 30, 3, 9, 64, 576);
    // Every other row, in runs as long as survivors come in.
    let survivors = |rows: usize| (0..rows).filter(|i| i / 3 % 2 == 0).take(rows / 2).collect::<Vec<_>>();
    let merged = survivors(l);
    let (scan, by_state) = (vec![1, 512, 4096], vec![1, 512, 16]);
    vec![
        Case {
            name: "TopKPrune of 2048 rows to 1024, 30 layers",
            operator: &TOPK_PRUNE,
            attributes: vec![("scale", 0.125_f32.into())],
            inputs: vec![
                noise("query_last", &[1, h, d]),
                noise("key", &[1, g, l, d]),
                noise("bias", &[l]),
                integers("position_ids", &[1, l], 0..l),
                noise("hidden", &[1, l, width]),
                noise("kv", &[1, layers, 2, g, l, d]),
                integers("keep", &[1], [k]),
                integers("prefix_length", &[1], [4]),
                integers("suffix_length", &[1], [20]),
            ],
            outputs: vec![(I64, 2), (F32, 3), (I64, 2), (F32, 6), (F32, 2), (F32, 3)],
        },
        Case {
            name: "MergeCache of 2 x 1024 rows to 1023, 24 layers and 6",
            operator: &MERGE_CACHE,
            attributes: vec![],
            inputs: vec![
                noise("left_kv", &[1, 24, 2, g, 1036, d]),
                noise("right_kv", &[1, 24, 2, g, 1036, d]),
                integers("keep_idx", &[1, merged.len()], merged.clone()),
                noise("new_kv", &[1, 6, 2, g, merged.len(), d]),
                integers("prefix_length", &[1], [4]),
                integers("suffix_length", &[1], [20]),
            ],
            outputs: vec![(F32, 6)],
        },
        Case {
            name: "SwiGlu of 2048 x 1536",
            operator: &SWIGLU,
            attributes: vec![],
            inputs: vec![noise("gate", &[2048, 1536]), noise("up", &[2048, 1536])],
            outputs: vec![(F32, 2)],
        },
        Case {
            name: "Linear of 1 row, 576 to 49152",
            operator: &LINEAR,
            attributes: vec![],
            inputs: vec![noise("x", &[1, width]), noise("weight", &[49_152, width])],
            outputs: vec![(F32, 2)],
        },
        Case {
            name: "SelectiveScan of 512 steps, 4096 channels",
            operator: &SELECTIVE_SCAN,
            attributes: vec![],
            inputs: vec![
                noise("u", &scan),
                noise("dt", &scan),
                noise("A", &[4096, 16]),
                noise("B", &by_state),
                noise("C", &by_state),
                noise("skip", &[4096]),
            ],
            outputs: vec![(F32, 3)],
        },
    ]
}

/// The operator against a `Slice` with a step and a `MatMul` whose matrix lies as it likes it, as a model of standard nodes
/// would have it.
fn strided_compress(
    manner: Manner,
    what: &str,
    operator: &Operator,
    segments: usize,
    ratio: usize,
    width: usize,
) -> Outcome<()> {
    let xs: &[(&str, &str)] =
        if operator.name == STRIDED_COMPRESS.name { &[("x", "rows")] } else { &[("x", "rows"), ("x2", "rows2")] };
    let mut inputs: Vec<Input> = xs.iter().map(|(x, _)| noise(x, &[segments, 2048, width])).collect();
    inputs.push(noise("weight", &[width, width]));
    let types: Vec<_> = inputs.iter().map(Input::declared).collect();
    let attributes = vec![("ratio", ratio.into()), ("offset", (ratio - 1).into())];
    let body = model::call(operator, &types, attributes, &[(F32, 2)])?;
    let body_inputs = values(&inputs)?;

    let bounds = [("start", ratio - 1), ("end", 2048), ("axis", 1), ("step", ratio)];
    inputs.extend(bounds.map(|(name, value)| integers(name, &[1], [value])));
    let sliced =
        |(x, rows): &(&str, &str)| model::node("", "Slice", &[x, "start", "end", "axis", "step"], &[rows], &[]);
    let mut nodes: Vec<_> = xs.iter().map(sliced).collect();
    let rows = if xs.len() == 1 {
        "rows"
    } else {
        inputs.push(noise("half", &[1]));
        nodes.push(model::node("", "Add", &["rows", "rows2"], &["sum"], &[]));
        nodes.push(model::node("", "Mul", &["sum", "half"], &["mean"], &[]));
        "mean"
    };
    nodes.push(model::node("", "MatMul", &[rows, "weight"], &["y"], &[]));
    let types: Vec<_> =
        inputs.iter().map(Input::declared).map(|(name, dtype, rank)| (name, onnx_type(dtype), rank)).collect();
    let standard = model::model(nodes, vec![], &types, &[("y", FLOAT, 3)]);
    let standard_inputs = values(&inputs)?;

    let body = Side { name: "body", session: &|threads| model::session(&body, threads), inputs: &body_inputs };
    let standard = Side {
        name: "slice and product",
        session: &|threads| model::stock_session(&standard, threads),
        inputs: &standard_inputs,
    };
    compare(manner, what, &[body, standard])
}

fn onnx_type(dtype: DType) -> DataType {
    if dtype == F32 { FLOAT } else { INT64 }
}
