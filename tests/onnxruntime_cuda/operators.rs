//! Our operators in the real provider: their kernels run in the emulator, so that here the numbers are those of a GPU.

use accordion::checkpoint::WeightMaps;
use accordion::cuda::Origin;
use accordion::runtime::Loader;
use accordion::runtime::locate::LoadedRuntime;
use accordion::runtime::ort_cpu::{OrtCpu, OrtOptions};
use accordion::runtime::ort_cuda::{self, OrtCudaOptions};
use accordion::tensor::Tensor;
use accordion_graphs::dtype::DType::{self, Bf16, F16, F32, I64};
use accordion_graphs::functions::{STRIDED_COMPRESS, STRIDED_COMPRESS_MEAN, TOPK_PRUNE, TOPK_PRUNE_16};
use accordion_graphs::onnx::{Attribute, Dim, Operator, Scope};
use half::{bf16, f16};
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;

type Named = (&'static str, Tensor);

/// A graph of one node with inputs like these and outputs of these types and ranks, called `out.0` and so on.
fn graph(
    operator: &Operator,
    inputs: &[Named],
    attributes: Vec<(&'static str, Attribute)>,
    outputs: &[(DType, usize)],
) -> Vec<u8> {
    let g = Scope::new("one", Rc::default());
    let dims = |name: &str, rank: usize| (0..rank).map(|i| Dim::from(&*format!("{name}.{i}"))).collect::<Vec<_>>();
    let input = |(name, tensor): &Named| g.input(name, tensor.dtype(), &dims(name, tensor.shape().len()));
    let values: Vec<_> = inputs.iter().map(input).collect();
    let result = |(i, &(dtype, rank)): (usize, &(DType, usize))| (dtype, dims(&format!("out.{i}"), rank));
    let results = outputs.iter().enumerate().map(result).collect();
    for (i, value) in g.call(operator, &values.iter().collect::<Vec<_>>(), attributes, results).iter().enumerate() {
        g.output(&format!("out.{i}"), value);
    }
    g.finish(&[]).unwrap().bytes
}

fn run(loader: &dyn Loader, graph: &[u8], inputs: &[Named], outputs: usize) -> Vec<Vec<f32>> {
    let names: Vec<String> = (0..outputs).map(|i| format!("out.{i}")).collect();
    let inputs: Vec<(&str, &Tensor)> = inputs.iter().map(|(name, tensor)| (*name, tensor)).collect();
    let mut engine = loader.load("one", graph, &[]).unwrap();
    let results = engine.run(&inputs, &mut [], &names.iter().map(String::as_str).collect::<Vec<_>>()).unwrap();
    results.into_iter().map(|tensor| tensor.on_host().unwrap().to_f32()).collect()
}

/// Whole numbers from -3 to 3, exact in every type and in every order of a sum.
fn whole(dtype: DType, shape: &[usize], seed: usize) -> Tensor {
    let count: usize = shape.iter().product();
    let numbers: Vec<f32> = (0..count).map(|i| ((i * 7919 + i * i * 31 + seed * 104_729) % 7) as f32 - 3.0).collect();
    match dtype {
        F16 => {
            let halves: Vec<f16> = numbers.into_iter().map(f16::from_f32).collect();
            Tensor::from_storage(F16, shape, Arc::new(halves), 0).unwrap()
        }
        Bf16 => {
            let halves: Vec<bf16> = numbers.into_iter().map(bf16::from_f32).collect();
            Tensor::from_storage(Bf16, shape, Arc::new(halves), 0).unwrap()
        }
        _ => Tensor::from_f32(shape, numbers).unwrap(),
    }
}

fn integers(shape: &[usize], numbers: impl IntoIterator<Item = i64>) -> Tensor {
    Tensor::from_i64(shape, numbers.into_iter().collect()).unwrap()
}

/// Compares every operator in every element type with the engine of the CPU, in float32.
pub(super) fn check(runtime: &'static LoadedRuntime, weights: &WeightMaps, kernels: &Path) {
    let options = |kernels| OrtCudaOptions { device: 0, kernels, allow_fallback: false };
    let cuda = ort_cuda::open(runtime, weights.clone(), &options(Some(Origin::Folder(kernels.to_owned())))).unwrap();
    let cpu = OrtCpu::new(runtime, weights.clone(), &OrtOptions { fused_operators: true }).unwrap();
    for element in [F32, F16, Bf16] {
        let (b, h, g, l, d, width, n, keep) = (2, 4, 2, 37, 8, 24, 3, 17);
        let inputs = |element| -> Vec<Named> {
            vec![
                ("query_last", whole(element, &[b, h, d], 1)),
                ("key", whole(element, &[b, g, l, d], 2)),
                ("bias", whole(F32, &[2 * l], 3)),
                ("position_ids", integers(&[b, l], (0..b * l).map(|i| (i % l * 3 / 2) as i64))),
                ("hidden", whole(element, &[b, l, width], 4)),
                ("kv", whole(element, &[b, n, 2, g, l, d], 5)),
                ("keep", integers(&[1], [keep])),
                ("prefix_length", integers(&[1], [2])),
                ("suffix_length", integers(&[1], [3])),
            ]
        };
        let outputs = |element| [(I64, 2), (element, 3), (I64, 2), (element, 6), (F32, 2), (F32, 3)];
        let prune =
            |operator, element| graph(operator, &inputs(element), vec![("scale", 0.5_f32.into())], &outputs(element));
        let expected = run(&cpu, &prune(&TOPK_PRUNE, F32), &inputs(F32), 6);
        let operator = if element == F32 { &TOPK_PRUNE } else { &TOPK_PRUNE_16 };
        let found = run(&cuda, &prune(operator, element), &inputs(element), 6);
        assert_eq!(found, expected, "TopKPrune, {element}");

        for (operator, mean) in [(&STRIDED_COMPRESS, false), (&STRIDED_COMPRESS_MEAN, true)] {
            let (segments, window, width, out_width) = (3, 8, 16, 24);
            let inputs = |element| -> Vec<Named> {
                let mut inputs = vec![("x", whole(element, &[segments, window, width], 6))];
                if mean {
                    inputs.push(("x2", whole(element, &[segments, window, width], 7)));
                }
                inputs.push(("weight", whole(element, &[out_width, width], 8)));
                inputs
            };
            let compress = |element| {
                let attributes = vec![("ratio", 4_usize.into()), ("offset", 3_usize.into())];
                graph(operator, &inputs(element), attributes, &[(element, 2)])
            };
            let expected = run(&cpu, &compress(F32), &inputs(F32), 1);
            assert_eq!(run(&cuda, &compress(element), &inputs(element), 1), expected, "{}, {element}", operator.name);
        }
    }
}
