//! Linear layers over quantized weights: kernels, bodies of the functions and the definition agree.

use super::model::{session, stock_session};
use super::{noise, run, tensor};
use accordion_graphs::dtype::DType;
use accordion_graphs::functions::{LINEAR_BLOCK_4, LINEAR_BLOCK_8, LINEAR_INT8, LINEAR_INT8_PER_TOKEN};
use accordion_graphs::onnx::{Attribute, Dim, Operator, Scope};
use onnx_protobuf::tensor_proto::DataType;
use onnx_protobuf::{ModelProto, TensorProto};
use protobuf::Message;
use std::rc::Rc;

/// A tensor stored in the model.
#[derive(Clone)]
struct Stored {
    name: &'static str,
    dtype: DType,
    shape: Vec<usize>,
    bytes: Vec<u8>,
}

impl Stored {
    fn floats(name: &'static str, shape: Vec<usize>, data: &[f32]) -> Self {
        Self { name, dtype: DType::F32, shape, bytes: data.iter().flat_map(|x| x.to_le_bytes()).collect() }
    }

    fn int8(shape: Vec<usize>, data: &[i8]) -> Self {
        Self { name: "weight", dtype: DType::I8, shape, bytes: data.iter().map(|&x| x as u8).collect() }
    }

    /// Two numbers to a byte, the first of them in the lower half.
    fn int4(shape: Vec<usize>, data: &[i8]) -> Self {
        let byte = |pair: &[i8]| (pair[0] as u8 & 15) | (pair.get(1).map_or(0, |&x| x as u8) << 4);
        Self { name: "weight", dtype: DType::I4, shape, bytes: data.chunks(2).map(byte).collect() }
    }

    fn proto(&self) -> TensorProto {
        let dtype = match self.dtype {
            DType::I8 => DataType::INT8,
            DType::I4 => DataType::INT4,
            _ => DataType::FLOAT,
        };
        TensorProto {
            name: self.name.into(),
            data_type: dtype as i32,
            dims: self.shape.iter().map(|&dim| dim as i64).collect(),
            raw_data: self.bytes.clone(),
            ..TensorProto::default()
        }
    }
}

/// A graph of one node: `x [rows, in]`, with any number of rows, and tensors that are stored in it.
fn graph(operator: &Operator, stored: &[Stored], attributes: Vec<(&'static str, Attribute)>) -> Vec<u8> {
    let g = Scope::new("one", Rc::default());
    let mut values = vec![g.input("x", DType::F32, &["rows".into(), "in".into()])];
    values.extend(stored.iter().map(|tensor| {
        let dims: Vec<Dim> = tensor.shape.iter().map(|&n| n.into()).collect();
        g.input(tensor.name, tensor.dtype, &dims)
    }));
    let result = vec![(DType::F32, vec!["rows".into(), "out".into()])];
    g.output("y", &g.call(operator, &values.iter().collect::<Vec<_>>(), attributes, result)[0]);
    let mut model = ModelProto::parse_from_bytes(&g.finish(&[]).unwrap().bytes).unwrap();
    let graph = model.graph.as_mut().unwrap();
    graph.input.truncate(1);
    graph.initializer.extend(stored.iter().map(Stored::proto));
    model.write_to_bytes().unwrap()
}

/// Numbers of `bits` bits, all of which occur if there are enough places.
fn integers(count: usize, bits: u32, seed: u32) -> Vec<i8> {
    let spread = |i: u32| (i.wrapping_mul(2_654_435_761).wrapping_add(seed) >> (32 - bits)) as i32;
    (0..count as u32).map(|i| (spread(i) - (1 << (bits - 1))) as i8).collect()
}

/// `x * weight^T` in double precision, `x [rows, inner]`: entries, and the sums of the magnitudes they are made of.
fn product(x: &[f64], weight: &[f64], inner: usize) -> Vec<[f64; 2]> {
    let add = |[sum, size]: [f64; 2], (x, w): (&f64, &f64)| [sum + x * w, size + (x * w).abs()];
    let dot = |x: &[f64], w: &[f64]| x.iter().zip(w).fold([0.0; 2], add);
    x.chunks(inner).flat_map(|x| weight.chunks(inner).map(move |w| dot(x, w))).collect()
}

/// The shapes tried: rows, in, out.
const SHAPES: [(usize, usize, usize); 7] =
    [(1, 64, 40), (4, 96, 33), (5, 32, 1), (9, 160, 70), (64, 64, 64), (77, 608, 100), (130, 32, 19)];

#[test]
fn the_static_operator_is_its_definition() {
    for (rows, inner, outer) in SHAPES {
        // Some entries saturate.
        let input_scale = 0.013_f32;
        let x: Vec<f32> = noise(rows * inner, 0.37).iter().map(|x| 2.0 * x).collect();
        let weight = integers(outer * inner, 8, 7);
        let weight_scale: Vec<f32> = noise(outer, 0.7).iter().map(|x| 0.01 + 0.005 * x).collect();
        let smoothing: Vec<f32> = noise(inner, 0.21).iter().map(|x| 1.0 + 0.5 * x).collect();
        let stored = [
            Stored::int8(vec![outer, inner], &weight),
            Stored::floats("weight_scale", vec![outer], &weight_scale),
            Stored::floats("input_scale", vec![], &[input_scale]),
            Stored::floats("smoothing", vec![inner], &smoothing),
        ];
        let quantized = |(i, x): (usize, &f32)| {
            let steps = (x * smoothing[i % inner] / input_scale).round_ties_even().clamp(-128.0, 127.0);
            f64::from(steps) * f64::from(input_scale)
        };
        let quantized: Vec<f64> = x.iter().enumerate().map(quantized).collect();
        let weight: Vec<f64> =
            weight.iter().enumerate().map(|(i, w)| f64::from(*w) * f64::from(weight_scale[i / inner])).collect();
        let expected = product(&quantized, &weight, inner);
        check(&graph(&LINEAR_INT8, &stored, vec![]), [rows, inner], &x, &expected);
    }
}

#[test]
fn the_dynamic_operator_is_its_definition() {
    for (rows, inner, outer) in SHAPES {
        let mut x = noise(rows * inner, 0.37);
        // A row of zeros among others, and rows of different sizes.
        for (row, x) in x.chunks_mut(inner).enumerate() {
            for x in x {
                *x *= ((row + 1) % 4) as f32 * 10_f32.powi(row as i32 % 5);
            }
        }
        let weight = integers(outer * inner, 8, 7);
        let weight_scale: Vec<f32> = noise(outer, 0.7).iter().map(|x| 0.01 + 0.005 * x).collect();
        let smoothing: Vec<f32> = noise(inner, 0.21).iter().map(|x| 1.0 + 0.5 * x).collect();
        let stored = [
            Stored::int8(vec![outer, inner], &weight),
            Stored::floats("weight_scale", vec![outer], &weight_scale),
            Stored::floats("smoothing", vec![inner], &smoothing),
        ];
        let quantized: Vec<f64> = x
            .chunks(inner)
            .flat_map(|x| {
                let x: Vec<f32> = x.iter().zip(&smoothing).map(|(x, s)| x * s).collect();
                let scale = (x.iter().fold(0.0, |most: f32, x| most.max(x.abs())) / 127.0).max(f32::MIN_POSITIVE);
                x.into_iter().map(move |x| f64::from((x / scale).round_ties_even()) * f64::from(scale))
            })
            .collect();
        let weight: Vec<f64> =
            weight.iter().enumerate().map(|(i, w)| f64::from(*w) * f64::from(weight_scale[i / inner])).collect();
        let expected = product(&quantized, &weight, inner);
        check(&graph(&LINEAR_INT8_PER_TOKEN, &stored, vec![]), [rows, inner], &x, &expected);
    }
}

#[test]
fn operators_of_blocks_are_their_definition() {
    for (rows, inner, outer) in SHAPES {
        for (operator, bits) in [(&LINEAR_BLOCK_8, 8), (&LINEAR_BLOCK_4, 4)] {
            for block in [16, 32] {
                let x = noise(rows * inner, 0.37);
                let weight = integers(outer * inner, bits, 7);
                let scale: Vec<f32> = noise(outer * inner / block, 0.7).iter().map(|x| 0.01 + 0.005 * x).collect();
                let shape = vec![outer, inner];
                let stored = [
                    if bits == 8 { Stored::int8(shape, &weight) } else { Stored::int4(shape, &weight) },
                    Stored::floats("scale", vec![outer, inner / block], &scale),
                ];
                let weight: Vec<f64> =
                    weight.iter().enumerate().map(|(i, w)| f64::from(*w) * f64::from(scale[i / block])).collect();
                let expected = product(&x.iter().map(|&x| x.into()).collect::<Vec<_>>(), &weight, inner);
                let attributes = vec![("block_size", block.into())];
                check(&graph(operator, &stored, attributes), [rows, inner], &x, &expected);
            }
        }
    }
}

/// Runs the model with our kernels and without, and compares with `expected`, the entries of `y` from [`product`]. The bound
/// is some roundings of a sum in fp32, and less than one step of one quantized number.
fn check(model: &[u8], shape: [usize; 2], x: &[f32], expected: &[[f64; 2]]) {
    assert!(expected.iter().any(|[y, _]| y.abs() > 0.01), "nothing is computed");
    for (who, made) in [("kernel", session(model, 2)), ("body", stock_session(model, 2))] {
        let (_, found) = run(&mut made.unwrap(), vec![("x", tensor(shape, x.to_vec()))]).unwrap().remove(0);
        assert_eq!(found.len(), expected.len(), "{who} of {shape:?}");
        for (i, (found, [expected, size])) in found.into_iter().map(f64::from).zip(expected).enumerate() {
            assert!((found - expected).abs() <= 1e-6 * size, "{who} of {shape:?} at {i}: {found}, expected {expected}");
        }
    }
}

/// More numbers than are kept in fp32 at a time.
#[test]
fn a_large_weight_of_blocks_is_multiplied_in_panels() {
    let (rows, inner, outer, block) = (33, 512, 8200, 256);
    let x = noise(rows * inner, 0.37);
    let weight = integers(outer * inner, 4, 7);
    let scale = vec![0.01; outer * inner / block];
    let stored =
        [Stored::int4(vec![outer, inner], &weight), Stored::floats("scale", vec![outer, inner / block], &scale)];
    let weight: Vec<f64> = weight.iter().map(|w| f64::from(*w) * f64::from(0.01_f32)).collect();
    let expected = product(&x.iter().map(|&x| x.into()).collect::<Vec<_>>(), &weight, inner);
    check(&graph(&LINEAR_BLOCK_4, &stored, vec![("block_size", block.into())]), [rows, inner], &x, &expected);
}

#[test]
fn operators_refuse_with_the_name_of_what_is_wrong() {
    let zeros = |name, shape: &[usize]| Stored::floats(name, shape.to_vec(), &vec![0.0; shape.iter().product()]);
    let int8 = |shape: [usize; 2]| Stored::int8(shape.to_vec(), &vec![0; shape[0] * shape[1]]);
    let block = |size: i64| vec![("block_size", size.into())];
    let scale = || zeros("weight_scale", &[5]);
    let cases = [
        (
            &LINEAR_INT8_PER_TOKEN,
            vec![int8([5, 31]), scale(), zeros("smoothing", &[32])],
            vec![],
            "weight has 31 columns, expected those of x, 32",
        ),
        (
            &LINEAR_INT8_PER_TOKEN,
            vec![int8([4, 32]), scale(), zeros("smoothing", &[32])],
            vec![],
            "weight_scale has shape [5], expected [4]",
        ),
        (
            &LINEAR_INT8_PER_TOKEN,
            vec![int8([5, 32]), scale(), zeros("smoothing", &[1])],
            vec![],
            "smoothing has shape [1], expected [32]",
        ),
        (
            &LINEAR_INT8,
            vec![int8([5, 32]), scale(), zeros("input_scale", &[]), zeros("smoothing", &[32])],
            vec![],
            "input_scale is 0, expected a positive number",
        ),
        (
            &LINEAR_BLOCK_8,
            vec![int8([5, 32]), zeros("scale", &[5, 2])],
            block(24),
            "attribute block_size is 24, expected a power of two of at least 16",
        ),
        (
            &LINEAR_BLOCK_8,
            vec![int8([5, 32]), zeros("scale", &[5, 1])],
            block(64),
            "x has 32 columns, expected a multiple of block_size, 64",
        ),
        (
            &LINEAR_BLOCK_8,
            vec![int8([5, 32]), zeros("scale", &[5, 1])],
            block(16),
            "scale has shape [5, 1], expected [5, 2]",
        ),
        (
            &LINEAR_BLOCK_8,
            vec![int8([5, 16]), zeros("scale", &[5, 1])],
            block(16),
            "weight has 16 columns, expected those of x, 32",
        ),
    ];
    for (operator, stored, attributes, expected) in cases {
        let made = session(&graph(operator, &stored, attributes), 1);
        let message = match made {
            Ok(mut session) => run(&mut session, vec![("x", tensor([1, 32], vec![1.0; 32]))]).unwrap_err(),
            Err(error) => error.to_string(),
        };
        assert!(message.contains(expected), "{message}");
    }
}
