//! Linear layers over quantized matrices one by one: what a graph multiplied, and what came of it, against the reference's
//! layer of the same rows.
//!
//! With the same rows on both sides nothing adds up, so that bounds are those of fp32. Numbers that lie between two steps so
//! exactly that a unit in the last place decides may be rounded either way: what that makes of the product is taken away
//! from a difference before it is judged.

use super::error::VerifyError;
use super::verdict::{Bounds, TapResult, judge};
use crate::checkpoint::CheckpointError;
use crate::pipeline::Engines;
use crate::pipeline::observe::Observer;
use crate::reference::quantize::Weight;
use crate::reference::{Linear, to_tensor};
use crate::tensor::Tensor;
use accordion_graphs::onnx::{GraphSignature, QuantizedLinear};
use ndarray::{Array2, Zip};
use std::collections::{BTreeMap, BTreeSet};
use std::error::Error;
use std::sync::{Arc, Mutex, PoisonError};

/// Rows that are compared of every matrix, from the first run that meets it.
pub(crate) const ROWS: usize = 64;

/// How closely a single product is compared. Whatever its scale: the sum of a row in another order, no more.
pub(crate) const BOUNDS: Bounds =
    Bounds { abs: 0.0, rel: 1e-4, norm_rel: 2e-5, min_cosine: 0.999_99, min_top_k: 0.0, max_ulps: None };

/// Every linear layer over a quantized matrix that engines run.
pub struct LinearCheck(Arc<Mutex<State>>);

type Source = Box<dyn Fn(&str) -> Result<Weight, CheckpointError> + Send>;

struct State {
    source: Source,
    /// By graph, those that were not met yet.
    waiting: BTreeMap<String, Vec<QuantizedLinear>>,
    results: Vec<TapResult>,
    error: Option<VerifyError>,
}

impl LinearCheck {
    /// Compares every linear layer over a quantized matrix, in every graph once, as soon as `engines` meet it, with the layer that the reference
    /// makes of the tensors of `source`.
    pub fn watch(
        engines: &mut Engines<'_>,
        source: impl Fn(&str) -> Result<Weight, CheckpointError> + Send + 'static,
    ) -> Self {
        let graphs = &engines.bundle().manifest().graphs;
        let waiting = graphs.iter().map(|(name, graph)| (name.clone(), graph.signature.quantized.clone())).collect();
        let state = State { source: Box::new(source), waiting, results: Vec::new(), error: None };
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
    let (rows, mut product) = (matrix(rows)?, matrix(product)?);
    let expected = layer.apply(&rows);
    if product.dim() == expected.dim() {
        Zip::from(&mut product).and(&expected).and(&layer.leeway(&rows)).for_each(|found, expected, leeway| {
            *found = expected + (*found - expected).signum() * ((*found - expected).abs() - leeway).max(0.0);
        });
    }
    Ok(judge(name, &to_tensor(&product)?, &to_tensor(&expected)?, None, bounds))
}

impl State {
    fn compare(
        &self,
        graph: &str,
        linear: &QuantizedLinear,
        rows: &Tensor,
        product: &Tensor,
    ) -> Result<TapResult, VerifyError> {
        let name = format!("linears.{graph}.{}", linear.matrix);
        judge_product(&name, &layer(linear, &*self.source)?, [rows, product], &BOUNDS)
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
