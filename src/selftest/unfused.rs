//! The fused operators against the chains of standard operators that they stand for, both run by one runtime on its device.
//!
//! An operator's function body is that chain: `TopK` and `Gather`, a strided `Slice` and `Gemm`. Under another name, which no
//! kernel has, the same loader runs the body; so both sides take the same tensors where they lie on the device, and leave their
//! results there. Times are those of a caller, from the call to the end of the work.
//!
//! Numbers are chosen so that every sum is exact in every order and no two scores are equal: both sides must agree in every bit.

use super::numbers::identities;
use super::schema::Unfused;
use super::shapes::{COMPRESSED, CompressShape, PRUNED, PruneShape};
use crate::cuda::Element;
use crate::runtime::{Engine, EngineError, Loader};
use crate::tensor::{Tensor, TensorError};
use accordion_graphs::dtype::DType;
use accordion_graphs::functions::{STRIDED_COMPRESS, STRIDED_COMPRESS_MEAN, TOPK_PRUNE, TOPK_PRUNE_16};
use accordion_graphs::onnx::{Attribute, BuildError, Dim, Operator, Scope};
use half::{bf16, f16};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore as _, SeedableRng as _};
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Runs of each side before any that counts.
const WARM_UP: usize = 2;
/// Runs of each side that count: at least and at most, and no more once this long has passed.
const FEWEST: usize = 10;
const MOST: usize = 100;
const LONG_ENOUGH: Duration = Duration::from_secs(1);

const UNFUSED_PRUNE: Operator = renamed("TopKPruneUnfused", &TOPK_PRUNE);
const UNFUSED_PRUNE_16: Operator = renamed("TopKPruneUnfused", &TOPK_PRUNE_16);
const UNFUSED_COMPRESS: Operator = renamed("StridedCompressUnfused", &STRIDED_COMPRESS);
const UNFUSED_COMPRESS_MEAN: Operator = renamed("StridedCompressMeanUnfused", &STRIDED_COMPRESS_MEAN);

const fn renamed(name: &'static str, operator: &Operator) -> Operator {
    Operator { name, attributes: operator.attributes, body: operator.body }
}

/// Why there is no comparison.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum UnfusedError {
    /// The graph of one node cannot be built.
    #[error(transparent)]
    Build(#[from] BuildError),
    /// The runtime refuses a graph, or fails.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// A tensor cannot be made or read.
    #[error(transparent)]
    Tensor(#[from] TensorError),
}

type Named = (&'static str, Tensor);

/// A call that both sides make.
struct Call {
    operators: [&'static Operator; 2],
    shape: &'static str,
    element: Element,
    attributes: Vec<(&'static str, Attribute)>,
    /// In the order of the operator: tensors that are put on the device, then lengths, which stay on the host.
    tensors: Vec<Named>,
    lengths: Vec<Named>,
    /// Names, types and ranks.
    outputs: Vec<(&'static str, DType, usize)>,
    /// How many of them, from the first on, are read.
    read: usize,
}

/// `TopKPrune` at the sizes of `shape`, in tensors of `element`. `loader` has a kernel for it.
///
/// # Errors
///
/// The runtime has no kernels for either side, or not as much memory. Results that differ are no error.
pub fn prune(loader: &dyn Loader, shape: &PruneShape, element: Element) -> Result<Unfused, UnfusedError> {
    let PruneShape { heads, kv_heads, head_dim, length, hidden, layers, keep, affix, .. } = *shape;
    let dtype = dtype(element);
    // The scale is a power of two and a query's product with a key an integer: the distance, in units that sum up to less than the
    // scale, decides between equal ones.
    let scale = 0.125_f32;
    let unit = scale / (length as f32).log2().ceil().exp2().max(1.0);
    let bias: Vec<f32> = (0..length).map(|distance| distance as f32 * unit).collect();
    let positions = (0..length as i64).collect();
    let operators =
        if element == Element::F32 { [&TOPK_PRUNE, &UNFUSED_PRUNE] } else { [&TOPK_PRUNE_16, &UNFUSED_PRUNE_16] };
    let call = Call {
        operators,
        shape: shape.name,
        element,
        attributes: vec![("scale", scale.into())],
        tensors: vec![
            ("query_last", numbers(element, &[1, heads, head_dim], 2, 1)?),
            ("key", numbers(element, &[1, kv_heads, length, head_dim], 2, 2)?),
            ("bias", Tensor::from_f32([length], bias)?),
            ("position_ids", Tensor::from_i64([1, length], positions)?),
            ("hidden", numbers(element, &[1, length, hidden], 1000, 3)?),
            ("kv", numbers(element, &[1, layers, 2, kv_heads, length, head_dim], 1000, 4)?),
        ],
        lengths: [("keep", keep), ("prefix_length", affix), ("suffix_length", affix)]
            .into_iter()
            .map(|(name, length)| Ok((name, Tensor::from_i64([1], vec![length as i64])?)))
            .collect::<Result<_, TensorError>>()?,
        outputs: vec![
            ("keep_idx", DType::I64, 2),
            ("kept_hidden", dtype, 3),
            ("kept_position_ids", DType::I64, 2),
            ("kept_kv", dtype, 6),
            ("scores", DType::F32, 2),
            ("metric", DType::F32, 3),
        ],
        read: 5,
    };
    call.compare(loader)
}

/// `StridedCompress` at the sizes of `shape`, in tensors of `element`; with `mean`, `StridedCompressMean`.
///
/// # Errors
///
/// As [`prune`].
pub fn compress(
    loader: &dyn Loader,
    shape: &CompressShape,
    element: Element,
    mean: bool,
) -> Result<Unfused, UnfusedError> {
    let CompressShape { segments, window, ratio, width, .. } = *shape;
    // The sum of as many products as a row has elements is exact in 16 bits up to 2048 of them; halves are exact, too.
    let x = |seed| numbers(element, &[segments, window, width], 1, seed);
    let mut tensors = vec![("x", x(1)?)];
    if mean {
        tensors.push(("x2", x(2)?));
    }
    tensors.push(("weight", numbers(element, &[width, width], 1, 3)?));
    let operators =
        if mean { [&STRIDED_COMPRESS_MEAN, &UNFUSED_COMPRESS_MEAN] } else { [&STRIDED_COMPRESS, &UNFUSED_COMPRESS] };
    let call = Call {
        operators,
        shape: shape.name,
        element,
        attributes: vec![("ratio", ratio.into()), ("offset", ratio.saturating_sub(1).into())],
        tensors,
        lengths: Vec::new(),
        outputs: vec![("y", dtype(element), 2)],
        read: 1,
    };
    call.compare(loader)
}

/// All shapes, in half precision, as far as they fit into the memory. What the runtime refuses becomes a line of `missing`.
pub(super) fn all(loader: &dyn Loader, free_bytes: u64, missing: &mut Vec<String>) -> Vec<Unfused> {
    /// Inputs are there twice while they are copied; both sides keep outputs and what they computed on the way.
    const COPIES: u64 = 5;
    let element = Element::F16;
    let mut all = Vec::new();
    let mut add = |what: &str, bytes: u64, compare: &dyn Fn() -> Result<Unfused, UnfusedError>| {
        if bytes.saturating_mul(COPIES) > free_bytes {
            missing.push(format!("{what} against unfused operators: {free_bytes} free bytes are too few"));
            return;
        }
        match compare() {
            Ok(compared) => all.push(compared),
            Err(error) => missing.push(format!("{what} against unfused operators: {error}")),
        }
    };
    for shape in &PRUNED {
        add(&format!("TopKPrune, {}", shape.name), shape.bytes(element), &|| prune(loader, shape, element));
    }
    for shape in &COMPRESSED {
        for (name, mean) in [("StridedCompress", false), ("StridedCompressMean", true)] {
            let what = format!("{name}, {}", shape.name);
            add(&what, shape.bytes(element), &|| compress(loader, shape, element, mean));
        }
    }
    all
}

impl Call {
    fn compare(mut self, loader: &dyn Loader) -> Result<Unfused, UnfusedError> {
        let [fused, unfused] = self.operators;
        let load =
            |operator: &Operator| Ok::<_, UnfusedError>(loader.load(operator.name, &self.graph(operator)?, &[])?);
        let (mut fused_side, mut unfused_side) = (load(fused)?, load(unfused)?);
        let on_device = self.to_device(loader)?;
        // What they were copied from is as large as they are.
        self.tensors.clear();
        let inputs: Vec<(&str, &Tensor)> =
            on_device.iter().chain(&self.lengths).map(|(name, tensor)| (*name, tensor)).collect();
        let outputs: Vec<&str> = self.read().map(|(name, ..)| *name).collect();
        let run = |engine: &mut Box<dyn Engine>| {
            let begin = Instant::now();
            let results = engine.run(&inputs, &mut [], &outputs)?;
            Ok::<_, EngineError>((begin.elapsed(), results))
        };
        for _ in 0..WARM_UP {
            run(&mut fused_side)?;
            run(&mut unfused_side)?;
        }
        let begin = Instant::now();
        let (mut fused_times, mut unfused_times) = (Vec::new(), Vec::new());
        while fused_times.len() < FEWEST || (fused_times.len() < MOST && begin.elapsed() < LONG_ENOUGH) {
            fused_times.push(run(&mut fused_side)?.0);
            unfused_times.push(run(&mut unfused_side)?.0);
        }
        let (found, expected) = (run(&mut fused_side)?.1, run(&mut unfused_side)?.1);
        let difference = self.difference(found, expected)?;
        let runs = fused_times.len();
        let [fused_ms, unfused_ms] = [fused_times, unfused_times].map(median_ms);
        Ok(Unfused {
            operator: fused.name.to_owned(),
            shape: self.shape.to_owned(),
            element: self.element.name().to_owned(),
            runs,
            fused_ms,
            unfused_ms,
            ratio: unfused_ms / fused_ms,
            passed: difference.is_none(),
            difference: difference.unwrap_or_default(),
        })
    }

    fn read(&self) -> impl Iterator<Item = &(&'static str, DType, usize)> {
        self.outputs.iter().take(self.read)
    }

    /// The graph of one node.
    fn graph(&self, operator: &Operator) -> Result<Vec<u8>, BuildError> {
        let g = Scope::new(operator.name, Rc::default());
        let input = |(name, tensor): &Named| g.input(name, tensor.dtype(), &dims(name, tensor.shape().len()));
        let values: Vec<_> = self.tensors.iter().chain(&self.lengths).map(input).collect();
        let results = self.outputs.iter().map(|&(name, dtype, rank)| (dtype, dims(name, rank))).collect();
        let results = g.call(operator, &values.iter().collect::<Vec<_>>(), self.attributes.clone(), results);
        for ((name, ..), value) in self.read().zip(&results) {
            g.output(name, value);
        }
        Ok(g.finish(&[])?.bytes)
    }

    /// The tensors as copies that the device made.
    fn to_device(&self, loader: &dyn Loader) -> Result<Vec<Named>, UnfusedError> {
        let copy = |(name, tensor): &Named| {
            let g = Scope::new("copy", Rc::default());
            g.output("copy", &g.input("tensor", tensor.dtype(), &dims(name, tensor.shape().len())));
            let mut engine = loader.load("copy", &g.finish(&[])?.bytes, &[])?;
            let mut copies = engine.run(&[("tensor", tensor)], &mut [], &["copy"])?;
            Ok((*name, copies.swap_remove(0)))
        };
        self.tensors.iter().map(copy).collect()
    }

    /// The first output in which the sides differ, and where.
    fn difference(&self, found: Vec<Tensor>, expected: Vec<Tensor>) -> Result<Option<String>, TensorError> {
        for ((&(name, ..), found), expected) in self.read().zip(found).zip(expected) {
            let (found, expected) = (found.on_host()?, expected.on_host()?);
            if found.shape() != expected.shape() {
                return Ok(Some(format!("{name} is {found:?}, and {expected:?} unfused")));
            }
            if found.bytes() == expected.bytes() {
                continue;
            }
            let (found, expected) = (found.to_f32(), expected.to_f32());
            let pairs = identities(&found).into_iter().zip(identities(&expected));
            if let Some(at) = pairs.into_iter().position(|(found, expected)| found != expected) {
                return Ok(Some(format!("{name}[{at}] is {}, and {} unfused", found[at], expected[at])));
            }
        }
        Ok(None)
    }
}

fn dims(name: &str, rank: usize) -> Vec<Dim> {
    (0..rank).map(|axis| Dim::from(&*format!("{name}.{axis}"))).collect()
}

fn dtype(element: Element) -> DType {
    match element {
        Element::F32 => DType::F32,
        Element::F16 => DType::F16,
        Element::Bf16 => DType::Bf16,
    }
}

/// Whole numbers from `-most` to `most`, up to 2048 exact in half precision. They repeat after a prime number of them, so that no
/// two rows of the same head are the same.
fn numbers(element: Element, shape: &[usize], most: u32, seed: u64) -> Result<Tensor, TensorError> {
    const PERIOD: usize = 65_521;
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let count = shape.iter().product();
    let block = (0..PERIOD).map(|_| (random.next_u32() % (2 * most + 1)) as f32 - most as f32);
    match element {
        Element::F32 => Tensor::from_f32(shape, repeated(&block.collect::<Vec<_>>(), count)),
        Element::F16 => {
            let halves = repeated(&block.map(f16::from_f32).collect::<Vec<_>>(), count);
            Tensor::from_storage(DType::F16, shape, Arc::new(halves), 0)
        }
        Element::Bf16 => {
            let halves = repeated(&block.map(bf16::from_f32).collect::<Vec<_>>(), count);
            Tensor::from_storage(DType::Bf16, shape, Arc::new(halves), 0)
        }
    }
}

fn repeated<T: Clone>(block: &[T], count: usize) -> Vec<T> {
    let mut all = Vec::with_capacity(count);
    while all.len() < count {
        all.extend_from_slice(&block[..block.len().min(count - all.len())]);
    }
    all
}

fn median_ms(mut times: Vec<Duration>) -> f64 {
    times.sort();
    times.get(times.len() / 2).map_or(0.0, |time| time.as_secs_f64() * 1e3)
}
