//! Linear layers on the CPU: those of `ai.accordion`, fp32 and quantized, against ONNX Runtime's own, all of them in
//! sessions with the same threads.
//!
//! - `prefill`: one layer and many rows, in operations a second.
//! - `decode`: one row, and as many layers as make up a model's weights, so that none of them stays in a cache.
//!
//! `cargo bench --bench linear -- prefill` and `-- decode` run one of both; `--rows 64` sets the rows of the first,
//! `--megabytes 500` the fp32 size of the weights of the second, `--threads 2` the threads of both; `--shape 576x1536`
//! (in x out) limits the shapes.
//! `ORT_DYLIB_PATH` names the ONNX Runtime.

// Not everything that the tests build models from and that other comparisons share is needed here.
#[allow(dead_code)]
mod common;
#[allow(dead_code)]
#[path = "../tests/operators/model.rs"]
mod model;

use common::{flag, median, number, option};
use model::Attribute::Int;
use onnx_protobuf::attribute_proto::AttributeType;
use onnx_protobuf::tensor_proto::DataType::{self, FLOAT, INT4, INT8, UINT8};
use onnx_protobuf::{AttributeProto, ModelProto, NodeProto, TensorProto};
use ort::session::{IoBinding, Session};
use ort::value::Tensor;
use protobuf::Message;
use std::time::Instant;

const ROUNDS: usize = 3;
const BLOCK: usize = 32;

/// In, out.
const SHAPES: [[usize; 2]; 5] = [[576, 576], [576, 192], [576, 1536], [1536, 576], [576, 49152]];

/// What one session computes.
#[derive(Clone, Copy)]
struct Layers {
    threads: usize,
    rows: usize,
    count: usize,
    inner: usize,
    outer: usize,
}

/// An implementation of the layer.
#[derive(Clone, Copy)]
enum Kind {
    Linear,
    Int8,
    Int8PerToken,
    Blocks { bits: usize },
    OrtGemm,
    OrtQdq,
    OrtDynamic,
    OrtBlocks { bits: usize, level: i64 },
}

/// Each with what it is called.
const KINDS: [(&str, Kind); 12] = [
    ("Linear, fp32", Kind::Linear),
    ("LinearInt8", Kind::Int8),
    ("LinearInt8PerToken", Kind::Int8PerToken),
    ("LinearBlock8", Kind::Blocks { bits: 8 }),
    ("LinearBlock4", Kind::Blocks { bits: 4 }),
    ("ORT Gemm, fp32", Kind::OrtGemm),
    ("ORT QDQ MatMul", Kind::OrtQdq),
    ("ORT DynamicQuantizeMatMul", Kind::OrtDynamic),
    ("ORT MatMulNBits 8", Kind::OrtBlocks { bits: 8, level: 0 }),
    ("ORT MatMulNBits 8, int8 x", Kind::OrtBlocks { bits: 8, level: 4 }),
    ("ORT MatMulNBits 4", Kind::OrtBlocks { bits: 4, level: 0 }),
    ("ORT MatMulNBits 4, int8 x", Kind::OrtBlocks { bits: 4, level: 4 }),
];

fn main() -> anyhow::Result<()> {
    let [prefill, decode] = ["prefill", "decode"].map(flag);
    let (rows, megabytes, threads) = (number("--rows", 2048)?, number("--megabytes", 500)?, number("--threads", 2)?);
    let wanted = option("--shape");
    let shapes = SHAPES.into_iter().filter(|[i, o]| wanted.as_ref().is_none_or(|name| *name == format!("{i}x{o}")));
    for [inner, outer] in shapes {
        let one = inner * outer;
        if (prefill || !decode) && rows * one < 1 << 32 {
            let work = 2.0 * (rows * one) as f64 / 1e9;
            println!("{rows} rows, {inner} -> {outer}, {threads} threads");
            compare(Layers { threads, rows, count: 1, inner, outer }, |seconds| {
                format!("{:6.0} GOP/s", work / seconds)
            })?;
        }
        if decode || !prefill {
            let layers = (megabytes * 1_000_000 / 4).div_ceil(one);
            let work = (layers * one) as f64 / 1e9;
            println!("1 row, {layers} layers {inner} -> {outer}, {threads} threads");
            compare(Layers { threads, rows: 1, count: layers, inner, outer }, |seconds| {
                format!("{:6.1} G weights/s", work / seconds)
            })?;
        }
    }
    Ok(())
}

/// Prints the median of every kind, the fastest run, and the ratio to the first kind.
///
/// They take turns in rounds, and only one session is alive at a time: the waiting threads of another one spin, and would
/// take a core away.
fn compare(sizes: Layers, rate: impl Fn(f64) -> String) -> anyhow::Result<()> {
    let mut seconds = vec![Vec::new(); KINDS.len()];
    for _ in 0..ROUNDS {
        for (seconds, (_, kind)) in seconds.iter_mut().zip(KINDS) {
            let mut runner = Runner::new(kind, sizes)?;
            let first = runner.run()?.max(1e-5);
            let repeats = (0.15 / first) as usize;
            for _ in 0..repeats.clamp(3, 100) {
                seconds.push(runner.run()?);
            }
        }
    }
    let fp32 = median(seconds[0].clone());
    for ((name, _), seconds) in KINDS.iter().zip(seconds) {
        let (median, fastest) = (median(seconds.clone()), seconds.iter().copied().fold(f64::MAX, f64::min));
        let (ms, best) = (median * 1e3, fastest * 1e3);
        println!("  {name:<26} {ms:8.3} ms (fastest {best:8.3}) {}  x{:.2}", rate(median), fp32 / median);
    }
    Ok(())
}

/// A session over layers that all read the same rows.
struct Runner {
    session: Session,
    binding: IoBinding,
}

impl Runner {
    fn new(kind: Kind, sizes: Layers) -> anyhow::Result<Self> {
        let Layers { threads, rows, count, inner, outer } = sizes;
        let (mut nodes, mut tensors) = (Vec::new(), Vec::new());
        for layer in 0..count {
            add(kind, layer, inner, outer, &mut nodes, &mut tensors);
        }
        let names: Vec<String> = (0..count).map(|layer| format!("y{layer}")).collect();
        let outputs: Vec<_> = names.iter().map(|name| (name.as_str(), FLOAT, 2)).collect();
        let mut proto = ModelProto::parse_from_bytes(&model::model(nodes, vec![], &[("x", FLOAT, 2)], &outputs))?;
        proto.graph.mut_or_insert_default().initializer = tensors;
        let bytes = proto.write_to_bytes()?;
        drop(proto);
        let session = model::session(&bytes, threads)?;
        let mut binding = session.create_binding()?;
        let x = (0..rows * inner).map(|i| (i as f32 * 0.37).sin()).collect::<Vec<_>>();
        binding.bind_input("x", &Tensor::from_array(([rows, inner], x))?)?;
        for name in &names {
            binding.bind_output(name, Tensor::<f32>::new(session.allocator(), [rows, outer])?)?;
        }
        Ok(Self { session, binding })
    }

    /// Seconds of one run.
    fn run(&mut self) -> anyhow::Result<f64> {
        let start = Instant::now();
        self.session.run_binding(&self.binding)?;
        Ok(start.elapsed().as_secs_f64())
    }
}

/// Adds layer number `layer` of that kind: its nodes from `x` to `y{layer}`, and its tensors.
fn add(
    kind: Kind,
    layer: usize,
    inner: usize,
    outer: usize,
    nodes: &mut Vec<NodeProto>,
    tensors: &mut Vec<TensorProto>,
) {
    let name = |part: &str| format!("{part}{layer}");
    let mut tensor = |part: &str, dtype: DataType, shape: &[usize], bytes: Vec<u8>| {
        tensors.push(TensorProto {
            name: name(part),
            data_type: dtype as i32,
            dims: shape.iter().map(|&dim| dim as i64).collect(),
            raw_data: bytes,
            ..TensorProto::default()
        });
        name(part)
    };
    let (y, blocks) = (name("y"), inner / BLOCK);
    let mut node = |domain: &str, operator: &str, inputs: &[&str], output: &str, attributes: &[(&str, i64)]| {
        let attributes: Vec<_> = attributes.iter().map(|&(name, value)| (name, Int(value))).collect();
        nodes.push(model::node(domain, operator, inputs, &[output], &attributes));
    };
    match kind {
        Kind::Linear | Kind::OrtGemm => {
            let weight = tensor("w", FLOAT, &[outer, inner], floats(inner * outer, layer, 0.01));
            match kind {
                Kind::Linear => node("ai.accordion", "Linear", &["x", &weight], &y, &[]),
                _ => node("", "Gemm", &["x", &weight], &y, &[("transB", 1)]),
            }
        }
        Kind::Int8 | Kind::Int8PerToken | Kind::OrtQdq => {
            let weight = tensor("w", INT8, &[outer, inner], bytes(inner * outer, layer));
            let scale = tensor("s", FLOAT, &[outer], floats(outer, layer, 1e-4));
            let smoothing = tensor("f", FLOAT, &[inner], floats(inner, layer, 1.0));
            let input_scale = tensor("i", FLOAT, &[], floats(1, layer, 0.01));
            let inputs = ["x", &weight, &scale, &input_scale, &smoothing];
            match kind {
                Kind::Int8 => node("ai.accordion", "LinearInt8", &inputs, &y, &[]),
                Kind::Int8PerToken => {
                    node("ai.accordion", "LinearInt8PerToken", &["x", &weight, &scale, &smoothing], &y, &[]);
                }
                _ => {
                    let zero = tensor("z", INT8, &[], vec![0]);
                    let [smoothed, quantized, x, w, transposed] = ["m", "q", "d", "e", "t"].map(name);
                    node("", "Mul", &["x", &smoothing], &smoothed, &[]);
                    node("", "QuantizeLinear", &[&smoothed, &input_scale, &zero], &quantized, &[]);
                    node("", "DequantizeLinear", &[&quantized, &input_scale, &zero], &x, &[]);
                    node("", "DequantizeLinear", &[&weight, &scale], &w, &[("axis", 0)]);
                    node("", "MatMul", &[&x, &transposed], &y, &[]);
                    nodes.push(transpose(&w, &transposed));
                }
            }
        }
        Kind::OrtDynamic => {
            let weight = tensor("w", INT8, &[inner, outer], bytes(inner * outer, layer));
            let scale = tensor("s", FLOAT, &[outer], floats(outer, layer, 1e-4));
            node("com.microsoft", "DynamicQuantizeMatMul", &["x", &weight, &scale], &y, &[]);
        }
        Kind::Blocks { bits } => {
            let dtype = if bits == 8 { INT8 } else { INT4 };
            let weight = tensor("w", dtype, &[outer, inner], bytes(inner * outer * bits / 8, layer));
            let scale = tensor("s", FLOAT, &[outer, blocks], floats(outer * blocks, layer, 1e-4));
            let operator = format!("LinearBlock{bits}");
            node("ai.accordion", &operator, &["x", &weight, &scale], &y, &[("block_size", BLOCK as i64)]);
        }
        Kind::OrtBlocks { bits, level } => {
            let shape = [outer, blocks, BLOCK * bits / 8];
            let weight = tensor("w", UINT8, &shape, bytes(inner * outer * bits / 8, layer));
            let scale = tensor("s", FLOAT, &[outer, blocks], floats(outer * blocks, layer, 1e-4));
            let attributes = [
                ("K", inner as i64),
                ("N", outer as i64),
                ("bits", bits as i64),
                ("block_size", BLOCK as i64),
                ("accuracy_level", level),
            ];
            node("com.microsoft", "MatMulNBits", &["x", &weight, &scale], &y, &attributes);
        }
    }
}

/// With its order written out: ONNX Runtime makes a product of integers behind no other.
fn transpose(input: &str, output: &str) -> NodeProto {
    let mut node = model::node("", "Transpose", &[input], &[output], &[]);
    let (ints, type_) = (vec![1, 0], AttributeType::INTS.into());
    node.attribute.push(AttributeProto { name: "perm".into(), ints, type_, ..AttributeProto::default() });
    node
}

/// Others for every layer: ONNX Runtime computes equal layers once.
fn bytes(count: usize, layer: usize) -> Vec<u8> {
    (0..count as u32).map(|i| ((i + layer as u32).wrapping_mul(2_654_435_761) >> 24) as u8).collect()
}

fn floats(count: usize, layer: usize, size: f32) -> Vec<u8> {
    let size = size * (1.0 + layer as f32 / 1024.0);
    (0..count).flat_map(|i| (size * (1.0 + (i % 7) as f32 / 8.0)).to_le_bytes()).collect()
}
