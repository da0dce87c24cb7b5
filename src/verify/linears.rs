//! Linear layers that are not in fp32 one by one: what a graph multiplied, and what came of it, against the reference's layer of
//! the same rows.
//!
//! With the same rows on both sides nothing adds up, so that bounds are those of fp32. Numbers that lie between two steps so
//! exactly that a unit in the last place decides may be rounded either way: what that makes of the product is taken away
//! from a difference before it is judged. Where a layer is in 16 bits the product is such a number itself: two sums of `n`
//! products in fp32 differ by no more than `SPREAD sqrt(n) u` of the sum of their magnitudes, `u = 2^-24` (Higham and
//! Mary, "A New Approach to Probabilistic Rounding Error Analysis", 2019), and what is found must be what the format makes
//! of a number that near. A runtime that computes in fp32 and converts to 16 bits in between, as ONNX Runtime does on the CPU,
//! joins conversions back and forth, and multiplies rows that were not rounded: `UNROUNDED u` of the root of the sum of
//! the products' squares, `u` the format's.

use super::error::VerifyError;
use super::verdict::{Bounds, TapResult, judge};
use crate::checkpoint::CheckpointError;
use crate::pipeline::Engines;
use crate::pipeline::observe::Observer;
use crate::reference::quantize::Weight;
use crate::reference::{Linear, to_tensor};
use crate::tensor::Tensor;
use accordion_graphs::dtype::DType;
use accordion_graphs::onnx::{GraphSignature, QuantizedLinear};
use half::{bf16, f16};
use ndarray::{Array2, Zip};
use std::collections::{BTreeMap, BTreeSet};
use std::error::Error;
use std::sync::{Arc, Mutex, PoisonError};

/// Rows that are compared of every matrix, from the first run that meets it.
pub(crate) const ROWS: usize = 64;

/// How closely a single product is compared. Whatever its scale: the sum of a row in another order, no more.
pub(crate) const BOUNDS: Bounds =
    Bounds { abs: 0.0, rel: 1e-4, norm_rel: 2e-5, min_cosine: 0.999_99, min_top_k: 0.0, max_ulps: None };

/// How many standard deviations two sums in fp32 may be apart: four for each of them.
const SPREAD: f32 = 8.0;

/// How many standard deviations a sum may be off whose terms were not rounded to 16 bits.
const UNROUNDED: f32 = 4.0;

/// Every linear layer that engines run in another precision than fp32.
pub struct LinearCheck(Arc<Mutex<State>>);

type Source = Box<dyn Fn(&str) -> Result<Weight, CheckpointError> + Send>;

struct State {
    source: Source,
    /// Whether the runtime computes in 16 bits. One that converts to fp32 and back may leave roundings of rows out.
    native: bool,
    /// By graph, those that were not met yet.
    waiting: BTreeMap<String, Vec<QuantizedLinear>>,
    results: Vec<TapResult>,
    error: Option<VerifyError>,
}

impl LinearCheck {
    /// Compares every linear layer that is not in fp32, in every graph once, as soon as `engines` meet it, with the layer that
    /// the reference makes of the tensors of `source`.
    pub fn watch(
        engines: &mut Engines<'_>,
        source: impl Fn(&str) -> Result<Weight, CheckpointError> + Send + 'static,
    ) -> Self {
        let manifest = engines.bundle().manifest();
        let rounding = manifest.quantization.as_ref().and_then(|quantization| quantization.rounding.as_ref());
        let native = rounding.is_some_and(|rounding| !rounding.emulated);
        let waiting =
            manifest.graphs.iter().map(|(name, graph)| (name.clone(), graph.signature.quantized.clone())).collect();
        let state = State { source: Box::new(source), native, waiting, results: Vec::new(), error: None };
        let check = Self(Arc::new(Mutex::new(state)));
        let observer: Arc<Mutex<dyn Observer>> = Arc::clone(&check.0) as _;
        engines.observe(observer);
        check
    }

    /// What was found, as `linears.`, the name of the graph and that of the matrix.
    ///
    /// # Errors
    ///
    /// A matrix cannot be read, or what a graph multiplied is none of its rows.
    pub fn finish(self) -> Result<Vec<TapResult>, VerifyError> {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match state.error.take() {
            Some(error) => Err(error),
            None => Ok(std::mem::take(&mut state.results)),
        }
    }
}

/// The reference's layer of `linear` over the tensors of `source`.
pub(crate) fn layer(
    linear: &QuantizedLinear,
    source: &dyn Fn(&str) -> Result<Weight, CheckpointError>,
) -> Result<Linear, VerifyError> {
    let read = |name: &str| source(name).map_err(Box::new);
    let bias = linear.bias.as_deref().map(|name| read(name).map(|bias| bias.tensor)).transpose()?;
    Ok(Linear::new(&linear.matrix, read(&linear.matrix)?, bias.as_ref())?)
}

/// Judges the `product` that a graph made of `rows` by what `layer` makes of them, as the tap `name`.
pub(crate) fn judge_product(
    name: &str,
    layer: &Linear,
    [rows, product]: [&Tensor; 2],
    bounds: &Bounds,
) -> Result<TapResult, VerifyError> {
    let (rows, product) = (matrix(rows)?, matrix(product)?);
    judged(name, product, &layer.apply(&rows), &layer.leeway(&rows), bounds)
}

/// Judges `product` by what is expected, apart from the `leeway` that every element has.
fn judged(
    name: &str,
    mut product: Array2<f32>,
    expected: &Array2<f32>,
    leeway: &Array2<f32>,
    bounds: &Bounds,
) -> Result<TapResult, VerifyError> {
    if product.dim() == expected.dim() {
        Zip::from(&mut product).and(expected).and(leeway).for_each(|found, expected, leeway| {
            *found = expected + (*found - expected).signum() * ((*found - expected).abs() - leeway).max(0.0);
        });
    }
    Ok(judge(name, &to_tensor(&product)?, &to_tensor(expected)?, None, bounds))
}

impl State {
    /// The reference's layer over the numbers that a graph multiplies by, each of which `change` is made of.
    fn layer(&self, linear: &QuantizedLinear, change: impl Fn(f32) -> f32) -> Result<Linear, VerifyError> {
        let changed = |name: &str| -> Result<Weight, CheckpointError> {
            let Weight { tensor, rounding } = (self.source)(name)?;
            let numbers = tensor.to_f32().into_iter().map(|x| change(nearest(linear.format, x))).collect();
            let tensor = Tensor::from_f32(tensor.shape(), numbers);
            let tensor = tensor.map_err(|source| CheckpointError::Tensor { name: name.to_owned(), source })?;
            Ok(Weight { tensor, rounding })
        };
        layer(linear, &changed)
    }

    fn compare(
        &self,
        graph: &str,
        linear: &QuantizedLinear,
        rows: &Tensor,
        product: &Tensor,
    ) -> Result<TapResult, VerifyError> {
        let layer = self.layer(linear, |x| x)?;
        let [rows, product] = [rows, product].map(matrix);
        let (mut rows, product) = (rows?, product?);
        let rounded = |x| nearest(linear.format, x);
        rows.mapv_inplace(rounded);
        let mut expected = layer.apply(&rows);
        let mut leeway = layer.leeway(&rows);
        if let Some(format) = linear.format {
            let magnitudes = self.layer(linear, f32::abs)?.apply(&rows.mapv(f32::abs));
            let mut spread = magnitudes * (SPREAD * (rows.ncols() as f32).sqrt() * f32::EPSILON / 2.0);
            if self.native {
                let squares = self.layer(linear, |w| w * w)?.apply(&rows.mapv(|x| x * x));
                spread += &squares.mapv(|sum| UNROUNDED * roundoff(format) * sum.sqrt());
            }
            Zip::from(&mut leeway).and(&expected).and(&spread).for_each(|leeway, sum, spread| {
                *leeway = rounded(sum + spread) - rounded(sum - spread);
            });
            expected.mapv_inplace(rounded);
        }
        judged(&format!("linears.{graph}.{}", linear.matrix), product, &expected, &leeway, &BOUNDS)
    }
}

/// How far a number of the 16-bit `format` may be from what it was rounded from, as a share of it.
fn roundoff(format: DType) -> f32 {
    f32::exp2(if format == DType::F16 { -11.0 } else { -8.0 })
}

/// The number of `format` that is nearest to `x`; `x` itself without a format.
fn nearest(format: Option<DType>, x: f32) -> f32 {
    match format {
        Some(DType::F16) => f16::from_f32(x).to_f32(),
        Some(DType::Bf16) => bf16::from_f32(x).to_f32(),
        _ => x,
    }
}

/// The first rows of `tensor [.., rows, n]`.
pub(crate) fn matrix(tensor: &Tensor) -> Result<Array2<f32>, VerifyError> {
    let columns = tensor.shape().last().copied().unwrap_or(1).max(1);
    let few = (tensor.len() / columns).min(ROWS);
    let mut numbers = tensor.to_f32();
    numbers.truncate(few * columns);
    Ok(Array2::from_shape_vec((few, columns), numbers)?)
}

impl Observer for State {
    fn values(&self, name: &str, _: &GraphSignature) -> BTreeSet<String> {
        let linears = self.waiting.get(name).into_iter().flatten();
        linears.flat_map(|linear| [linear.rows.clone(), linear.product.clone()]).collect()
    }

    fn wants(&self, name: &str, value: &str) -> bool {
        let linears = self.waiting.get(name).into_iter().flatten();
        self.error.is_none() && linears.into_iter().any(|linear| linear.rows == value || linear.product == value)
    }

    fn see(&mut self, name: &str, values: &BTreeMap<&str, &Tensor>) -> Result<(), Box<dyn Error + Send + Sync>> {
        for linear in self.waiting.remove(name).unwrap_or_default() {
            let [rows, product] = [&linear.rows, &linear.product].map(|value| values.get(value.as_str()));
            let (Some(rows), Some(product)) = (rows, product) else { continue };
            match self.compare(name, &linear, rows, product) {
                Ok(result) => self.results.push(result),
                Err(error) => self.error = Some(error),
            }
        }
        Ok(())
    }
}
