//! The standard operators the graphs use, with their shape rules.

use super::shape::{broadcast, display, product};
use super::{Attribute, Dim, Scope, Value};
use crate::dtype::DType;
use std::ops::{Add, Mul, Sub};

/// First dimensions of a shape, then others.
fn with(leading: &[Dim], rest: &[Dim]) -> Vec<Dim> {
    leading.iter().chain(rest).cloned().collect()
}

impl Value {
    fn one(
        &self,
        op: &str,
        more: &[&Value],
        attributes: Vec<(&'static str, Attribute)>,
        dtype: DType,
        shape: Vec<Dim>,
    ) -> Value {
        let inputs: Vec<Option<&Value>> = std::iter::once(Some(self)).chain(more.iter().map(|v| Some(*v))).collect();
        self.scope.node(op, &inputs, attributes, vec![(dtype, shape)]).remove(0)
    }

    fn elementwise(&self, op: &str) -> Value {
        self.one(op, &[], vec![], self.dtype(), self.shape().to_vec())
    }

    fn binary(&self, op: &str, other: &Value, dtype: DType) -> Value {
        if self.dtype() != other.dtype() {
            self.scope.fail(format!("{op} of {self:?} and {other:?}: element types differ"));
        }
        let shape = broadcast(self.shape(), other.shape()).unwrap_or_else(|| {
            self.scope.fail(format!("{op} of {self:?} and {other:?}: shapes do not broadcast"));
            self.shape().to_vec()
        });
        self.one(op, &[other], vec![], dtype, shape)
    }

    fn expect_rank(&self, op: &str, rank: usize) {
        if self.shape().len() != rank {
            self.scope.fail(format!("{op} of {self:?}: expected {rank} dimensions"));
        }
    }

    pub(super) fn identity(&self) -> Value {
        self.elementwise("Identity")
    }

    /// Gaussian error linear unit, with the error function itself.
    #[must_use]
    pub fn gelu(&self) -> Value {
        self.elementwise("Gelu")
    }

    /// Logistic function.
    #[must_use]
    pub fn sigmoid(&self) -> Value {
        self.elementwise("Sigmoid")
    }

    /// `ln(1 + e^x)`.
    #[must_use]
    pub fn softplus(&self) -> Value {
        self.elementwise("Softplus")
    }

    /// `e^x`.
    #[must_use]
    pub fn exp(&self) -> Value {
        self.elementwise("Exp")
    }

    /// `-x`.
    #[must_use]
    pub fn neg(&self) -> Value {
        self.elementwise("Neg")
    }

    /// Cosine.
    #[must_use]
    pub fn cos(&self) -> Value {
        self.elementwise("Cos")
    }

    /// Sine.
    #[must_use]
    pub fn sin(&self) -> Value {
        self.elementwise("Sin")
    }

    /// `self / other`.
    #[must_use]
    pub fn div(&self, other: &Value) -> Value {
        self.binary("Div", other, self.dtype())
    }

    /// `self ^ other`.
    #[must_use]
    pub fn pow(&self, other: &Value) -> Value {
        self.binary("Pow", other, self.dtype())
    }

    /// Whether each element is NaN.
    #[must_use]
    pub fn is_nan(&self) -> Value {
        self.one("IsNaN", &[], vec![], DType::Bool, self.shape().to_vec())
    }

    /// `(self + other) / 2`, of one shape and any type of floating-point numbers.
    #[must_use]
    pub fn mean(&self, other: &Value) -> Value {
        // Not `Mean`, which ONNX Runtime's CUDA provider has no kernel for.
        self.scope().concat(&[&self.unsqueeze(0), &other.unsqueeze(0)], 0).reduce("ReduceMean", 0)
    }

    /// Elementwise maximum.
    #[must_use]
    pub fn maximum(&self, other: &Value) -> Value {
        self.binary("Max", other, self.dtype())
    }

    /// Remainder of the integer division `self / other`.
    #[must_use]
    pub fn modulo(&self, other: &Value) -> Value {
        self.binary("Mod", other, self.dtype())
    }

    /// `self < other`.
    #[must_use]
    pub fn less(&self, other: &Value) -> Value {
        self.binary("Less", other, DType::Bool)
    }

    /// `self == other`.
    #[must_use]
    pub fn equal(&self, other: &Value) -> Value {
        self.binary("Equal", other, DType::Bool)
    }

    /// `self >= other`.
    #[must_use]
    pub fn greater_or_equal(&self, other: &Value) -> Value {
        self.binary("GreaterOrEqual", other, DType::Bool)
    }

    /// Logical and.
    #[must_use]
    pub fn and(&self, other: &Value) -> Value {
        self.binary("And", other, DType::Bool)
    }

    /// Logical or.
    #[must_use]
    pub fn or(&self, other: &Value) -> Value {
        self.binary("Or", other, DType::Bool)
    }

    /// Where this condition holds `then`, elsewhere `otherwise`.
    #[must_use]
    pub fn select(&self, then: &Value, otherwise: &Value) -> Value {
        let shape = broadcast(self.shape(), then.shape()).and_then(|s| broadcast(&s, otherwise.shape()));
        let shape = shape.unwrap_or_else(|| {
            self.scope.fail(format!("Where of {self:?}, {then:?} and {otherwise:?}: shapes do not broadcast"));
            otherwise.shape().to_vec()
        });
        self.one("Where", &[then, otherwise], vec![], otherwise.dtype(), shape)
    }

    /// Converted to `dtype`.
    #[must_use]
    pub fn cast(&self, dtype: DType) -> Value {
        let to = Attribute::Int(i64::from(super::serialize::data_type(dtype)));
        self.one("Cast", &[], vec![("to", to)], dtype, self.shape().to_vec())
    }

    /// `round(self / scale)` to the nearest number of `dtype`, symmetrically about 0, ties to even, beyond its range the
    /// largest. `scale` has no dimensions.
    #[must_use]
    pub fn quantize(&self, scale: &Value, dtype: DType) -> Value {
        let zero = self.scope.zero(dtype);
        self.one("QuantizeLinear", &[scale, &zero], vec![], dtype, self.shape().to_vec())
    }

    /// `self * scale`, `scale` without dimensions or, with `axis`, one number per entry of that axis; with `block` as well,
    /// one per `block` entries of it and per entry of every other axis.
    #[must_use]
    pub fn dequantize(&self, scale: &Value, axis: Option<usize>, block: Option<Attribute>) -> Value {
        let rank = if block.is_some() { self.shape().len() } else { usize::from(axis.is_some()) };
        let mut attributes: Vec<_> = axis.map(|axis| ("axis", axis.into())).into_iter().collect();
        attributes.extend(block.map(|block| ("block_size", block)));
        scale.expect_rank("DequantizeLinear", rank);
        self.one("DequantizeLinear", &[scale], attributes, DType::F32, self.shape().to_vec())
    }

    /// Absolute value.
    #[must_use]
    pub fn abs(&self) -> Value {
        self.elementwise("Abs")
    }

    /// The nearest whole number, ties to even.
    #[must_use]
    pub fn round(&self) -> Value {
        self.elementwise("Round")
    }

    /// `self [rows, in] x weight [out, in]^T (+ bias [out])`: a linear layer over a weight as Hugging Face stores it.
    #[must_use]
    pub fn linear(&self, weight: &Value, bias: Option<&Value>) -> Value {
        self.expect_rank("Gemm", 2);
        weight.expect_rank("Gemm", 2);
        if self.dim(1) != weight.dim(1) {
            self.scope.fail(format!("Gemm of {self:?} and {weight:?}: inner dimensions differ"));
        }
        let inputs: Vec<&Value> = std::iter::once(weight).chain(bias).collect();
        self.one("Gemm", &inputs, vec![("transB", 1_i64.into())], self.dtype(), vec![self.dim(0), weight.dim(0)])
    }

    /// Batched matrix product; leading dimensions must be equal.
    #[must_use]
    pub fn matmul(&self, other: &Value) -> Value {
        let (a, b) = (self.shape(), other.shape());
        let (n, m) = (a.len(), b.len());
        if n < 2 || n != m || a[n - 1] != b[m - 2] || a[..n - 2] != b[..m - 2] {
            self.scope.fail(format!("MatMul of {self:?} and {other:?}: shapes do not fit"));
            return self.clone();
        }
        let shape = with(&a[..n - 1], &b[m - 1..]);
        self.one("MatMul", &[other], vec![], self.dtype(), shape)
    }

    /// A convolution of every channel by itself along the last axis, `self [batch, D, length]`, `weight [D, 1, k]`: each
    /// place sees the `k - 1` before it, zeros in front of the first, and itself.
    #[must_use]
    pub fn causal_depthwise_conv(&self, weight: &Value, bias: Option<&Value>) -> Value {
        self.expect_rank("Conv", 3);
        weight.expect_rank("Conv", 3);
        let (Dim::Known(channels), Dim::Known(kernel @ 1..)) = (weight.dim(0), weight.dim(2)) else {
            self.scope
                .fail(format!("Conv of {self:?} with {weight:?}: expected known channels and a kernel of 1 or more"));
            return self.clone();
        };
        if self.dim(1) != weight.dim(0) {
            self.scope.fail(format!("Conv of {self:?} with {weight:?}: channels differ"));
        }
        let attributes = vec![
            ("group", channels.into()),
            ("kernel_shape", Attribute::Ints(vec![kernel as i64])),
            ("pads", Attribute::Ints(vec![kernel as i64 - 1, 0])),
        ];
        let inputs: Vec<&Value> = std::iter::once(weight).chain(bias).collect();
        self.one("Conv", &inputs, attributes, self.dtype(), self.shape().to_vec())
    }

    /// RMS normalisation over the last dimension, times `gain`.
    #[must_use]
    pub fn rms_norm(&self, gain: &Value, epsilon: f64) -> Value {
        if self.shape().last() != gain.shape().last() {
            self.scope.fail(format!("RMSNormalization of {self:?} with gain {gain:?}: widths differ"));
        }
        let attributes = vec![("axis", Attribute::Int(-1)), ("epsilon", Attribute::Float(epsilon as f32))];
        self.one("RMSNormalization", &[gain], attributes, self.dtype(), self.shape().to_vec())
    }

    /// Layer normalisation over the last dimension, times `gain`, plus `bias`.
    #[must_use]
    pub fn layer_norm(&self, gain: &Value, bias: &Value, epsilon: f64) -> Value {
        if self.shape().last() != gain.shape().last() {
            self.scope.fail(format!("LayerNormalization of {self:?} with gain {gain:?}: widths differ"));
        }
        let attributes = vec![("axis", Attribute::Int(-1)), ("epsilon", Attribute::Float(epsilon as f32))];
        self.one("LayerNormalization", &[gain, bias], attributes, self.dtype(), self.shape().to_vec())
    }

    /// Rotary embedding in the rotate-half layout of whole heads: `self [batch, heads, sequence, d]`, `cos` and `sin`
    /// `[batch, sequence, d / 2]`.
    #[must_use]
    pub fn rotary_heads(&self, cos: &Value, sin: &Value) -> Value {
        self.expect_rank("RotaryEmbedding", 4);
        if cos.shape()[..2] != [self.dim(0), self.dim(2)] {
            self.scope.fail(format!("RotaryEmbedding of {self:?} with angles {cos:?}: rows differ"));
        }
        self.one("RotaryEmbedding", &[cos, sin], vec![], self.dtype(), self.shape().to_vec())
    }

    /// Rotary embedding in the rotate-half layout of the first `r` dimensions of every head: `self [batch, sequence,
    /// num_heads * d]`, `cos` and `sin` `[batch, sequence, r / 2]`.
    #[must_use]
    pub fn rotary(&self, cos: &Value, sin: &Value, num_heads: usize) -> Value {
        self.expect_rank("RotaryEmbedding", 3);
        if cos.shape()[..2] != self.shape()[..2] {
            self.scope.fail(format!("RotaryEmbedding of {self:?} with angles {cos:?}: rows differ"));
        }
        let mut attributes = vec![("num_heads", num_heads.into())];
        if let (Dim::Known(width), Dim::Known(half)) = (self.dim(2), cos.dim(2))
            && 2 * half * num_heads != width
        {
            attributes.push(("rotary_embedding_dim", (2 * half).into()));
        }
        self.one("RotaryEmbedding", &[cos, sin], attributes, self.dtype(), self.shape().to_vec())
    }

    /// Scaled causal attention by row index, `self` being the queries `[batch, H, T, d]`, over keys and values
    /// `[batch, G, T, d]`.
    #[must_use]
    pub fn causal_attention(&self, key: &Value, value: &Value) -> Value {
        for v in [self, key, value] {
            v.expect_rank("Attention", 4);
        }
        self.one("Attention", &[key, value], vec![("is_causal", 1_i64.into())], self.dtype(), self.shape().to_vec())
    }

    /// Scaled attention of the queries `self [batch, H, T, d]` over all of `key` and `value` `[batch, G, S, d]`, or over
    /// those that `visible`, which broadcasts to `[batch, H, T, S]`, says.
    #[must_use]
    pub fn attention_over(&self, key: &Value, value: &Value, visible: Option<&Value>) -> Value {
        for v in [self, key, value] {
            v.expect_rank("Attention", 4);
        }
        let inputs: Vec<&Value> = [key, value].into_iter().chain(visible).collect();
        self.one("Attention", &inputs, vec![], self.dtype(), self.shape().to_vec())
    }

    /// Softmax over the last dimension.
    #[must_use]
    pub fn softmax(&self) -> Value {
        self.one("Softmax", &[], vec![("axis", Attribute::Int(-1))], self.dtype(), self.shape().to_vec())
    }

    /// The same elements as `shape`. Dimensions that are not known are copied from the same place of the input where
    /// the names agree; one more may be inferred.
    #[must_use]
    pub fn reshape(&self, shape: &[Dim]) -> Value {
        let mut inferred = false;
        let mut target = Vec::with_capacity(shape.len());
        for (i, dim) in shape.iter().enumerate() {
            target.push(match dim {
                Dim::Known(n) => *n as i64,
                symbol if self.shape().get(i) == Some(symbol) => 0,
                Dim::Symbol(_) => {
                    if std::mem::replace(&mut inferred, true) {
                        self.scope.fail(format!("Reshape of {self:?} to {}: two dimensions to infer", display(shape)));
                    }
                    -1
                }
            });
        }
        let known = |s: &[Dim]| match product(s) {
            Dim::Known(n) => Some(n),
            Dim::Symbol(_) => None,
        };
        if let (Some(a), Some(b)) = (known(self.shape()), known(shape))
            && a != b
        {
            self.scope.fail(format!("Reshape of {self:?} to {}: element counts differ", display(shape)));
        }
        let target = self.scope.ints(&target);
        self.reshape_as(&target, shape)
    }

    /// The same elements as `shape`, whose numbers the integer tensor `target` holds at run time.
    #[must_use]
    pub fn reshape_as(&self, target: &Value, shape: &[Dim]) -> Value {
        self.one("Reshape", &[target], vec![], self.dtype(), shape.to_vec())
    }

    /// All leading dimensions in one: `[a, b, c] -> [a * b, c]`.
    #[must_use]
    pub fn flatten_rows(&self) -> Value {
        let Some((width, leading)) = self.shape().split_last() else {
            self.scope.fail("a scalar has no rows to flatten");
            return self.clone();
        };
        let (width, rows) = (width.clone(), product(leading));
        self.reshape(&[rows, width])
    }

    /// Dimensions reordered: output dimension `i` is input dimension `order[i]`.
    #[must_use]
    pub fn transpose(&self, order: &[usize]) -> Value {
        if order.len() != self.shape().len() {
            self.scope.fail(format!("Transpose of {self:?} by {order:?}: ranks differ"));
        }
        let shape = order.iter().map(|&axis| self.dim(axis)).collect();
        let order: Vec<i64> = order.iter().map(|&axis| axis as i64).collect();
        self.one("Transpose", &[], vec![("perm", order.into())], self.dtype(), shape)
    }

    /// A dimension of 1 inserted at `axis`.
    #[must_use]
    pub fn unsqueeze(&self, axis: usize) -> Value {
        let mut shape = self.shape().to_vec();
        if axis > shape.len() {
            self.scope.fail(format!("Unsqueeze of {self:?} at axis {axis}"));
            return self.clone();
        }
        shape.insert(axis, Dim::Known(1));
        let axes = self.scope.ints(&[axis as i64]);
        self.one("Unsqueeze", &[&axes], vec![], self.dtype(), shape)
    }

    /// Broadcast to `shape`, whose numbers the integer tensor `target` holds at run time.
    #[must_use]
    pub fn expand(&self, target: &Value, shape: &[Dim]) -> Value {
        self.one("Expand", &[target], vec![], self.dtype(), shape.to_vec())
    }

    /// Rows `start .. end` along `axis`, both integer tensors `[1]` (negative counts from the end); `extent` names the
    /// resulting dimension.
    #[must_use]
    pub fn slice(&self, axis: usize, start: &Value, end: &Value, extent: Dim) -> Value {
        let mut shape = self.shape().to_vec();
        if axis >= shape.len() {
            self.scope.fail(format!("Slice of {self:?} along axis {axis}"));
            return self.clone();
        }
        shape[axis] = extent;
        let axes = self.scope.ints(&[axis as i64]);
        self.one("Slice", &[start, end, &axes], vec![], self.dtype(), shape)
    }

    /// The last row along `axis`, which stays as a dimension of 1. Not a slice: NVIDIA's parser does not see that its result
    /// has one row.
    #[must_use]
    pub fn last(&self, axis: usize) -> Value {
        self.gather_along(axis, &self.scope.ints(&[-1]))
    }

    /// `self[indices]` along the first dimension.
    #[must_use]
    pub fn gather(&self, indices: &Value) -> Value {
        self.gather_along(0, indices)
    }

    /// The entries `indices` of dimension `axis`, whose place the dimensions of `indices` take.
    #[must_use]
    pub fn gather_along(&self, axis: usize, indices: &Value) -> Value {
        let (before, after) = self.shape().split_at(axis.min(self.shape().len()));
        let shape = with(&with(before, indices.shape()), after.get(1..).unwrap_or_default());
        self.one("Gather", &[indices], vec![("axis", axis.into())], self.dtype(), shape)
    }

    /// For every entry of the first `batch_dims` dimensions, the rows that `indices [..batch.., K]` name.
    #[must_use]
    pub fn gather_rows(&self, indices: &Value, batch_dims: usize) -> Value {
        if self.shape().len() <= batch_dims || indices.shape().len() != batch_dims + 1 {
            self.scope.fail(format!("GatherND of {self:?} by {indices:?} with {batch_dims} batch dimensions"));
            return self.clone();
        }
        let shape = with(indices.shape(), &self.shape()[batch_dims + 1..]);
        let indices = indices.unsqueeze(batch_dims + 1);
        self.one("GatherND", &[&indices], vec![("batch_dims", batch_dims.into())], self.dtype(), shape)
    }

    /// Maximum along `axis`, which disappears.
    #[must_use]
    pub fn reduce_max(&self, axis: usize) -> Value {
        self.reduce("ReduceMax", axis)
    }

    /// Sum along `axis`, which disappears.
    #[must_use]
    pub fn reduce_sum(&self, axis: usize) -> Value {
        self.reduce("ReduceSum", axis)
    }

    fn reduce(&self, op: &str, axis: usize) -> Value {
        let mut shape = self.shape().to_vec();
        if axis < shape.len() {
            shape.remove(axis);
        }
        let axes = self.scope.ints(&[axis as i64]);
        self.one(op, &[&axes], vec![("keepdims", 0_i64.into())], self.dtype(), shape)
    }

    /// Euclidean norm along `axis`, which stays as a dimension of 1.
    #[must_use]
    pub fn norm_l2(&self, axis: usize) -> Value {
        let mut shape = self.shape().to_vec();
        if let Some(dim) = shape.get_mut(axis) {
            *dim = Dim::Known(1);
        }
        let axes = self.scope.ints(&[axis as i64]);
        self.one("ReduceL2", &[&axes], vec![("keepdims", 1_i64.into())], self.dtype(), shape)
    }

    /// Index of the largest entry along `axis`, which disappears; among equals the first.
    #[must_use]
    pub fn arg_max(&self, axis: usize) -> Value {
        let mut shape = self.shape().to_vec();
        if axis < shape.len() {
            shape.remove(axis);
        }
        let attributes = vec![("axis", axis.into()), ("keepdims", 0_i64.into())];
        self.one("ArgMax", &[], attributes, DType::I64, shape)
    }

    /// The largest element, without dimensions.
    #[must_use]
    pub fn max_element(&self) -> Value {
        self.one("ReduceMax", &[], vec![("keepdims", 0_i64.into())], self.dtype(), vec![])
    }

    /// Indices of the `count [1]` largest (or smallest) entries along the last axis, in order of value; among equals
    /// the lower index comes first. `extent` names the resulting dimension. Returns values and indices.
    #[must_use]
    pub fn top_k(&self, count: &Value, largest: bool, extent: Dim) -> [Value; 2] {
        let mut shape = self.shape().to_vec();
        if let Some(last) = shape.last_mut() {
            *last = extent;
        }
        let attributes =
            vec![("largest", i64::from(largest).into()), ("sorted", 1_i64.into()), ("axis", Attribute::Int(-1))];
        let results = vec![(self.dtype(), shape.clone()), (DType::I64, shape)];
        let mut outputs = self.scope.node("TopK", &[Some(self), Some(count)], attributes, results).into_iter();
        match (outputs.next(), outputs.next()) {
            (Some(values), Some(indices)) => [values, indices],
            _ => [self.clone(), self.clone()],
        }
    }

    /// The shape at run time, as integers; of dimensions `start .. end` only.
    #[must_use]
    pub fn shape_at_run_time(&self, start: usize, end: usize) -> Value {
        if start > end || end > self.shape().len() {
            self.scope.fail(format!("Shape of {self:?} from {start} to {end}"));
        }
        let attributes = vec![("start", start.into()), ("end", end.into())];
        self.one("Shape", &[], attributes, DType::I64, vec![end.saturating_sub(start).into()])
    }

    /// An integer tensor of one element without its dimension.
    #[must_use]
    pub fn to_scalar(&self) -> Value {
        let none = self.scope.ints(&[]);
        self.one("Reshape", &[&none], vec![], self.dtype(), vec![])
    }
}

impl Scope {
    /// Tensors joined along `axis`.
    pub fn concat(&self, values: &[&Value], axis: usize) -> Value {
        let Some((first, rest)) = values.split_first() else {
            self.fail("Concat of nothing");
            return self.int(0);
        };
        let mut shape = first.shape().to_vec();
        if axis >= shape.len() {
            self.fail(format!("Concat of {first:?} along axis {axis}"));
            return (*first).clone();
        }
        for value in rest {
            let differs = value.shape().len() != shape.len()
                || value.dtype() != first.dtype()
                || value.shape().iter().zip(&shape).enumerate().any(|(i, (a, b))| i != axis && a != b);
            if differs {
                self.fail(format!("Concat of {first:?} and {value:?} along axis {axis}: shapes or types do not fit"));
                return (*first).clone();
            }
            shape[axis] = &shape[axis] + &value.dim(axis);
        }
        let inputs: Vec<Option<&Value>> = values.iter().map(|v| Some(*v)).collect();
        self.node("Concat", &inputs, vec![("axis", axis.into())], vec![(first.dtype(), shape)]).remove(0)
    }

    /// `0, 1, ..., count - 1` as integers, `count` without dimensions; `extent` names the resulting dimension.
    pub fn range(&self, count: &Value, extent: Dim) -> Value {
        let (zero, one) = (self.int(0), self.int(1));
        self.node("Range", &[Some(&zero), Some(count), Some(&one)], vec![], vec![(DType::I64, vec![extent])]).remove(0)
    }

    /// In a function body: the caller's integer attribute `name`, `[1]`.
    pub fn integer_attribute(&self, name: &'static str) -> Value {
        let scalar = self
            .node("Constant", &[], vec![("value_int", Attribute::IntOf(name))], vec![(DType::I64, vec![])])
            .remove(0);
        scalar.reshape(&[1.into()])
    }

    /// In a function body: the caller's real attribute `name`, without dimensions.
    pub fn attribute(&self, name: &'static str) -> Value {
        self.node("Constant", &[], vec![("value_float", Attribute::FloatOf(name))], vec![(DType::F32, vec![])])
            .remove(0)
    }
}

macro_rules! operator {
    ($trait:ident, $method:ident, $op:literal) => {
        impl $trait for &Value {
            type Output = Value;
            fn $method(self, other: &Value) -> Value {
                self.binary($op, other, self.dtype())
            }
        }
        impl $trait<Value> for Value {
            type Output = Value;
            fn $method(self, other: Value) -> Value {
                (&self).$method(&other)
            }
        }
        impl $trait<&Value> for Value {
            type Output = Value;
            fn $method(self, other: &Value) -> Value {
                (&self).$method(other)
            }
        }
        impl $trait<Value> for &Value {
            type Output = Value;
            fn $method(self, other: Value) -> Value {
                self.$method(&other)
            }
        }
    };
}
operator!(Add, add, "Add");
operator!(Sub, sub, "Sub");
operator!(Mul, mul, "Mul");
