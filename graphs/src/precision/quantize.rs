//! Linear layers and embeddings over quantized matrices.

use super::{MatrixForm, MatrixPart};
use crate::blocks::Target;
use crate::dtype::DType;
use crate::functions::{
    CACHED_ATTENTION, CACHED_ATTENTION_BF16, CAUSAL_ATTENTION, CAUSAL_ATTENTION_BF16, LINEAR_BLOCK_4, LINEAR_BLOCK_8,
    LINEAR_INT8, LINEAR_INT8_PER_TOKEN, linear_block, linear_int8, linear_int8_per_token,
};
use crate::onnx::{Dim, MatrixUse, Operator, Scope, Value};
use crate::weights::WeightIndex;
use std::collections::BTreeMap;
use std::rc::Rc;

/// Replaces the matrices of `graph` that `forms` names, shapes `[out, in]`, by their parts in `weights`, which also holds
/// every other tensor of the graph. A matrix whose rows are looked up as well must be in blocks.
///
/// Where activations become integers of 8 bits, causal attention for ONNX Runtime multiplies numbers of 8 significant bits
/// as well: with as many of them to a vector as fp32 has, it would take longer than all linear layers.
pub fn quantize(
    graph: &Scope,
    target: Target,
    forms: &BTreeMap<String, (MatrixForm, [usize; 2])>,
    weights: &Rc<WeightIndex>,
) {
    graph.replace_matrices(weights, |g, matrix| match matrix {
        MatrixUse::Linear { weight, x, bias } => {
            let matrix = Matrix::new(g, weight, forms)?;
            let y = matrix.linear(target, x);
            Some(bias.as_ref().map_or_else(|| y.clone(), |bias| &y + bias))
        }
        MatrixUse::Gather { weight, ids } => Some(Matrix::new(g, weight, forms)?.rows(target, ids)),
    });
    if forms.values().any(|(form, _)| matches!(form, MatrixForm::Int8 { .. } | MatrixForm::Int8PerToken { .. })) {
        graph.replace_calls(&CAUSAL_ATTENTION, 3, &CAUSAL_ATTENTION_BF16);
        graph.replace_calls(&CACHED_ATTENTION, 6, &CACHED_ATTENTION_BF16);
    }
}

/// A quantized matrix in a place of a graph.
struct Matrix<'a> {
    g: &'a Scope,
    name: &'a str,
    form: MatrixForm,
    shape: [usize; 2],
}

impl<'a> Matrix<'a> {
    fn new(g: &'a Scope, name: &'a str, forms: &BTreeMap<String, (MatrixForm, [usize; 2])>) -> Option<Self> {
        let &(form, shape) = forms.get(name)?;
        Some(Self { g, name, form, shape })
    }

    fn part(&self, wanted: MatrixPart) -> Value {
        let parts = self.form.parts(self.shape);
        let Some((_, dtype, shape)) = parts.iter().find(|(part, ..)| *part == wanted) else {
            self.g.fail(format!("matrix '{}' in form {:?} has no {wanted:?}", self.name, self.form));
            return self.g.float(0.0);
        };
        Value::stored(self.g, &self.form.part_name(self.name, wanted), *dtype, shape)
    }

    /// `x [rows, in]` times the matrix transposed.
    fn linear(&self, target: Target, x: &Value) -> Value {
        use MatrixPart::{Entries, InputScale, Scale};
        let x = &x.within(self.g);
        let (entries, scale) = (self.part(Entries), self.part(Scale));
        match (self.form, target) {
            (MatrixForm::Int8 { smoothed }, Target::Portable) => {
                linear_int8(x, &entries, &scale, &self.part(InputScale), self.smoothing(smoothed).as_ref())
            }
            (MatrixForm::Int8 { smoothed }, Target::OrtCpu) => {
                let inputs = [x, &entries, &scale, &self.part(InputScale), &self.smoothing_or_ones(smoothed)];
                self.call(&LINEAR_INT8, &inputs, None)
            }
            (MatrixForm::Int8PerToken { smoothed }, Target::Portable) => {
                linear_int8_per_token(x, &entries, &scale, self.smoothing(smoothed).as_ref())
            }
            (MatrixForm::Int8PerToken { smoothed }, Target::OrtCpu) => {
                let inputs = [x, &entries, &scale, &self.smoothing_or_ones(smoothed)];
                self.call(&LINEAR_INT8_PER_TOKEN, &inputs, None)
            }
            (MatrixForm::Block { block, .. }, Target::Portable) => linear_block(x, &entries, &scale, block.into()),
            (MatrixForm::Block { bits, block }, Target::OrtCpu) => {
                let operator = if bits == 8 { &LINEAR_BLOCK_8 } else { &LINEAR_BLOCK_4 };
                self.call(operator, &[x, &entries, &scale], Some(block))
            }
            (MatrixForm::Fp8, _) => {
                let input_scale = self.part(InputScale);
                let x = x.quantize(&input_scale, DType::F8E4m3).dequantize(&input_scale, None, None);
                x.linear(&entries.dequantize(&scale, None, None), None)
            }
        }
    }

    fn smoothing(&self, smoothed: bool) -> Option<Value> {
        smoothed.then(|| self.part(MatrixPart::Smoothing))
    }

    /// A function's inputs are all there.
    fn smoothing_or_ones(&self, smoothed: bool) -> Value {
        self.smoothing(smoothed).unwrap_or_else(|| self.g.floats(&vec![1.0; self.shape[1]]))
    }

    fn call(&self, operator: &Operator, inputs: &[&Value], block: Option<usize>) -> Value {
        let shape = vec![inputs[0].dim(0), self.shape[0].into()];
        let attributes = block.map(|block| ("block_size", block.into())).into_iter().collect();
        self.g.call(operator, inputs, attributes, vec![(DType::F32, shape)]).remove(0)
    }

    /// The rows that `ids` name, `[..ids.., in]`.
    fn rows(&self, target: Target, ids: &Value) -> Value {
        let MatrixForm::Block { block, .. } = self.form else {
            self.g.fail(format!(
                "rows of matrix '{}' are looked up: it must be in blocks, not {:?}",
                self.name, self.form
            ));
            return ids.clone();
        };
        let ids = ids.within(self.g);
        if target == Target::Portable {
            // NVIDIA's builder takes quantized numbers from a `DequantizeLinear` only.
            let (entries, scale) = (self.part(MatrixPart::Entries), self.part(MatrixPart::Scale));
            return entries.dequantize(&scale, Some(1), Some(block.into())).gather(&ids);
        }
        let with = |last: &[usize]| -> Vec<Dim> {
            ids.shape().iter().cloned().chain(last.iter().map(|&n| n.into())).collect()
        };
        let blocks = self.shape[1] / block.max(1);
        let entries = self.part(MatrixPart::Entries).gather(&ids).cast(DType::F32).reshape(&with(&[blocks, block]));
        let scale = self.part(MatrixPart::Scale).gather(&ids).unsqueeze(ids.shape().len() + 1);
        (entries * scale).reshape(&with(&[self.shape[1]]))
    }
}
