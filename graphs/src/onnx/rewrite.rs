//! Replacing nodes of a built graph.

use super::modules::module_path;
use super::scope::{GraphData, NodeData};
use super::serialize::QuantizedLinear;
use super::{DOMAIN, Operator, Scope, Value};
use crate::dtype::DType;
use crate::weights::WeightIndex;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::rc::Rc;

/// What a graph does with a tensor of the checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Uses {
    /// Linear layers multiply rows by it.
    pub linear: bool,
    /// Rows of it are looked up.
    pub gather: bool,
    /// Anything else.
    pub other: bool,
}

/// A use of a matrix that can be replaced.
pub(crate) enum MatrixUse<'n> {
    /// `x [rows, in]` times the matrix `[out, in]` transposed, plus a bias.
    Linear { weight: &'n str, x: Value, bias: Option<Value> },
    /// The rows of the matrix that `ids` name.
    Gather { weight: &'n str, ids: Value },
}

impl Scope {
    /// Every tensor that the graph links to, and what for.
    pub fn weight_uses(&self) -> BTreeMap<String, Uses> {
        let graph = self.graph.borrow();
        let matrices = graph.matrices();
        let mut uses: BTreeMap<String, Uses> =
            graph.linked.keys().map(|name| (name.clone(), Uses::default())).collect();
        for node in &graph.nodes {
            for (place, id) in node.inputs.iter().enumerate() {
                let Some(entry) = id.and_then(|id| matrices.get(&id)).and_then(|&name| uses.get_mut(name)) else {
                    continue;
                };
                match (place, node.linear(&matrices).is_some(), node.is_row_lookup()) {
                    (1, true, _) => entry.linear = true,
                    (0, _, true) => entry.gather = true,
                    // What the cast of a stored tensor is used for is counted there.
                    _ if node.outputs.iter().all(|id| matrices.contains_key(id)) => {}
                    _ => entry.other = true,
                }
            }
        }
        uses
    }

    /// Builds the graph again over the tensors of `weights`, node by node: what `replace` returns for a use of a matrix takes
    /// its place. Every tensor that is still used must be in `weights` under its name.
    pub(crate) fn replace_matrices(
        &self,
        weights: &Rc<WeightIndex>,
        mut replace: impl FnMut(&Scope, &MatrixUse<'_>) -> Option<Value>,
    ) {
        let names: HashMap<usize, String> =
            self.graph.borrow().matrices().into_iter().map(|(id, name)| (id, name.to_owned())).collect();
        let nodes = {
            let mut graph = self.graph.borrow_mut();
            graph.weights = Rc::clone(weights);
            std::mem::take(&mut graph.nodes)
        };
        let by_id: HashMap<usize, &str> = names.iter().map(|(&id, name)| (id, name.as_str())).collect();
        for node in nodes {
            let scope = self.at(module_path(&node.name, &node.op));
            let replacement = self.matrix_use(&scope, &node, &by_id).and_then(|matrix| replace(&scope, &matrix));
            match (replacement, &node.outputs[..]) {
                (Some(value), &[output]) => {
                    self.take_place(&value, output);
                    self.graph.borrow_mut().replaced.extend(node.replaced_linear(&by_id, output, None));
                }
                _ => self.graph.borrow_mut().nodes.push(node),
            }
        }
        self.graph.borrow_mut().drop_unused_tensors();
        self.relink(weights);
    }

    /// Makes calls of `operator` with `inputs` inputs calls of `other`, which takes and gives the same.
    pub(crate) fn replace_calls(&self, operator: &Operator, inputs: usize, other: &Operator) {
        let mut replaced = false;
        for node in &mut self.graph.borrow_mut().nodes {
            if node.domain == DOMAIN && node.op == operator.name && node.inputs.len() == inputs {
                node.name = node.name.replace(&format!("{}/", node.op), &format!("{}/", other.name));
                other.name.clone_into(&mut node.op);
                replaced = true;
            }
        }
        if replaced {
            self.define(other);
            self.graph.borrow_mut().drop_unused_tensors();
        }
    }

    fn matrix_use<'n>(
        &self,
        scope: &Scope,
        node: &NodeData,
        matrices: &HashMap<usize, &'n str>,
    ) -> Option<MatrixUse<'n>> {
        let value = |id: usize| self.value(scope, id);
        if let Some(linear) = node.linear(matrices) {
            let bias = node.inputs.get(2).copied().flatten().map(value);
            return Some(MatrixUse::Linear { weight: linear.weight, x: value(linear.input), bias });
        }
        match node.inputs[..] {
            [Some(matrix), Some(ids)] if node.is_row_lookup() => {
                matrices.get(&matrix).map(|weight| MatrixUse::Gather { weight, ids: value(ids) })
            }
            _ => None,
        }
    }

    /// The value `id` of the graph, for building on in `scope`.
    pub(super) fn value(&self, scope: &Scope, id: usize) -> Value {
        let graph = self.graph.borrow();
        let data = &graph.values[id];
        Value::new(scope, id, data.dtype, Rc::clone(&data.shape))
    }

    /// Makes the node that computes `value`, the last one, compute the value `id` instead.
    fn take_place(&self, value: &Value, id: usize) {
        let mut graph = self.graph.borrow_mut();
        let fits = graph.values[id].dtype == value.dtype() && *graph.values[id].shape == *value.shape();
        let node = graph.nodes.last_mut().filter(|node| node.outputs == [value.id]);
        match node {
            Some(node) if fits => node.outputs = vec![id],
            _ => {
                let name = graph.values[id].name.clone();
                drop(graph);
                self.fail(format!("{value:?} cannot take the place of '{name}'"));
            }
        }
    }

    /// Points the tensors that are linked by the same name at their places in `weights`.
    fn relink(&self, weights: &WeightIndex) {
        let names: Vec<String> = self.graph.borrow().linked.keys().cloned().collect();
        for name in names {
            let Some(found) = weights.get(&name).cloned() else {
                self.fail(format!("the weights in this precision have no tensor '{name}'"));
                continue;
            };
            let mut graph = self.graph.borrow_mut();
            let expected = graph.linked.get(&name).map(|(_, weight)| (weight.dtype, weight.shape.clone()));
            if expected != Some((found.dtype, found.shape.clone())) {
                drop(graph);
                self.fail(format!("tensor '{name}' is {} {:?}, expected {expected:?}", found.dtype, found.shape));
                continue;
            }
            if let Some((_, weight)) = graph.linked.get_mut(&name) {
                *weight = found;
            }
        }
    }
}

/// A linear layer that was put into another precision.
pub(super) struct ReplacedLinear {
    matrix: String,
    bias: Option<String>,
    /// The value that holds the rows, `[rows, in]`.
    rows: usize,
    /// The value that holds their product, `[rows, out]`.
    product: usize,
    /// The 16-bit format that all of it is rounded to.
    format: Option<DType>,
}

impl NodeData {
    /// What the node, which yielded the value `product`, was, if it was a linear layer; `format` is what it is in now.
    pub(super) fn replaced_linear(
        &self,
        matrices: &HashMap<usize, &str>,
        product: usize,
        format: Option<DType>,
    ) -> Option<ReplacedLinear> {
        let linear = self.linear(matrices)?;
        let bias = self.inputs.get(2).copied().flatten().and_then(|bias| matrices.get(&bias));
        let (matrix, bias) = (linear.weight.to_owned(), bias.map(|&name| name.to_owned()));
        Some(ReplacedLinear { matrix, bias, rows: linear.input, product, format })
    }

    /// Whether the node looks up rows of its first input.
    fn is_row_lookup(&self) -> bool {
        let along_rows = self.attributes.iter().all(|(name, value)| *name != "axis" || *value == 0_i64.into());
        self.domain.is_empty() && self.op == "Gather" && along_rows
    }
}

impl GraphData {
    /// Every linear layer that was put into another precision, in the order of the graph.
    pub(super) fn quantized_linears(&self) -> Vec<QuantizedLinear> {
        let name = |id: usize| self.values[id].name.clone();
        let linear = |linear: &ReplacedLinear| QuantizedLinear {
            matrix: linear.matrix.clone(),
            bias: linear.bias.clone(),
            rows: name(linear.rows),
            product: name(linear.product),
            format: linear.format,
        };
        self.replaced.iter().map(linear).collect()
    }

    /// Removes casts of tensors that nothing reads any more, the tensors that nothing reads, and the functions that nothing
    /// calls.
    pub(super) fn drop_unused_tensors(&mut self) {
        let stored: HashSet<usize> = self.linked.values().map(|(id, _)| *id).collect();
        let read = |nodes: &[NodeData]| -> HashSet<usize> {
            nodes.iter().flat_map(|node| node.inputs.iter().copied().flatten()).collect()
        };
        let before = read(&self.nodes);
        self.nodes.retain(|node| {
            let of_tensor = node.op == "Cast" && node.inputs.iter().flatten().all(|id| stored.contains(id));
            !of_tensor || node.outputs.iter().any(|id| before.contains(id))
        });
        let after = read(&self.nodes);
        self.linked.retain(|_, (id, _)| after.contains(id));
        let called: HashSet<&str> = self.nodes.iter().map(|node| node.op.as_str()).collect();
        self.functions.retain(|name, _| called.contains(name));
    }
}

impl Value {
    /// The tensor as it is stored, whatever its type: that of `dtype` and `shape` called `name`, wherever the scope is.
    pub(crate) fn stored(scope: &Scope, name: &str, dtype: DType, shape: &[usize]) -> Self {
        let value = scope.at("").stored_weight(name, shape);
        if value.dtype() != dtype {
            scope.fail(format!("tensor '{name}' is {}, expected {dtype}", value.dtype()));
        }
        value.within(scope)
    }
}
