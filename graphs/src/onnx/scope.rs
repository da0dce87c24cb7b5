//! Scopes and values: the two handles a graph is built with.

use super::function::{Function, Operator};
use super::rewrite::ReplacedLinear;
use super::{Attribute, BuildError, Dim, shape};
use crate::dtype::DType;
use crate::weights::{WeightIndex, WeightRef};
use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::rc::Rc;

/// A place in the module tree of one graph. Cheap to clone; all scopes of a graph write into the same graph.
#[derive(Clone)]
pub struct Scope {
    pub(super) graph: Rc<RefCell<GraphData>>,
    path: Rc<str>,
    tap_path: Rc<str>,
}

/// A tensor of the graph: which one, its element type and its symbolic shape. Cheap to clone.
#[derive(Clone)]
pub struct Value {
    pub(super) scope: Scope,
    pub(super) id: usize,
    dtype: DType,
    shape: Rc<[Dim]>,
}

/// Everything recorded so far about one graph.
pub(super) struct GraphData {
    pub(super) name: String,
    pub(super) weights: Rc<WeightIndex>,
    pub(super) nodes: Vec<NodeData>,
    pub(super) values: Vec<ValueData>,
    pub(super) inputs: Vec<usize>,
    pub(super) outputs: Vec<usize>,
    pub(super) taps: Vec<(String, usize)>,
    /// Linear layers that were put into another precision.
    pub(super) replaced: Vec<ReplacedLinear>,
    pub(super) linked: BTreeMap<String, (usize, WeightRef)>,
    pub(super) constants: Vec<(usize, Constant)>,
    pub(super) functions: BTreeMap<&'static str, Function>,
    /// Of all names: a graph inside a node must not repeat those around it.
    prefix: String,
    names_used: HashMap<String, usize>,
    error: Option<BuildError>,
}

#[derive(Clone)]
pub(super) struct NodeData {
    pub(super) name: String,
    pub(super) domain: &'static str,
    pub(super) op: String,
    pub(super) inputs: Vec<Option<usize>>,
    pub(super) outputs: Vec<usize>,
    pub(super) attributes: Vec<(&'static str, Attribute)>,
}

#[derive(Clone)]
pub(super) struct ValueData {
    pub(super) name: String,
    pub(super) dtype: DType,
    pub(super) shape: Rc<[Dim]>,
}

/// A small tensor stored in the graph itself.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Constant {
    /// One-dimensional, or a scalar.
    I64 { values: Vec<i64>, scalar: bool },
    /// One-dimensional, or a scalar.
    F32 { values: Vec<f32>, scalar: bool },
    /// The zero of a type of one byte an element, a scalar: the zero point of numbers quantized symmetrically.
    Zero(DType),
}

impl Scope {
    /// The root scope of a new graph called `name`, over the tensors of `weights`.
    pub fn new(name: &str, weights: Rc<WeightIndex>) -> Self {
        Self::prefixed(name, String::new(), weights)
    }

    /// The root scope of a graph that a node of this one will carry.
    pub(super) fn inside(&self, name: &str) -> Self {
        let name = self.graph.borrow_mut().unique(self.join(name));
        Self::prefixed(&name, format!("{name}."), Rc::default())
    }

    fn prefixed(name: &str, prefix: String, weights: Rc<WeightIndex>) -> Self {
        let data = GraphData {
            name: name.to_owned(),
            weights,
            nodes: Vec::new(),
            values: Vec::new(),
            inputs: Vec::new(),
            outputs: Vec::new(),
            taps: Vec::new(),
            replaced: Vec::new(),
            linked: BTreeMap::new(),
            constants: Vec::new(),
            functions: BTreeMap::new(),
            prefix,
            names_used: HashMap::new(),
            error: None,
        };
        Self { graph: Rc::new(RefCell::new(data)), path: "".into(), tap_path: "".into() }
    }

    /// The scope `name` inside this one.
    #[must_use]
    pub fn scope(&self, name: impl fmt::Display) -> Self {
        let name = name.to_string();
        self.scope_tapped_as(&name, &name)
    }

    /// The scope `name` inside this one, whose taps are called as if it were the scope `tap_name`; if that is empty, as if
    /// they were taps of this one.
    #[must_use]
    pub fn scope_tapped_as(&self, name: &str, tap_name: &str) -> Self {
        let tap_path =
            if tap_name.is_empty() { Rc::clone(&self.tap_path) } else { join(&self.tap_path, tap_name).into() };
        Self { graph: Rc::clone(&self.graph), path: self.join(name).into(), tap_path }
    }

    /// The scope at `path` from the root.
    pub(super) fn at(&self, path: &str) -> Self {
        Self { graph: Rc::clone(&self.graph), path: path.into(), tap_path: path.into() }
    }

    /// Dotted path of the scope; empty for the root.
    pub fn path(&self) -> &str {
        &self.path
    }

    pub(super) fn join(&self, name: &str) -> String {
        join(&self.path, name)
    }

    /// Keeps the first problem of the graph; [`Scope::finish`] will return it.
    pub fn fail(&self, problem: impl Into<String>) {
        let scope = if self.path.is_empty() { self.graph.borrow().name.clone() } else { self.path.to_string() };
        self.graph.borrow_mut().error.get_or_insert(BuildError { scope, problem: problem.into() });
    }

    pub(super) fn take_error(&self) -> Option<BuildError> {
        self.graph.borrow_mut().error.take()
    }

    /// A graph input.
    pub fn input(&self, name: &str, dtype: DType, shape: &[Dim]) -> Value {
        let value = self.new_value(name.to_owned(), dtype, shape.to_vec());
        self.graph.borrow_mut().inputs.push(value.id);
        value
    }

    /// Declares `value` a graph output called `name`.
    pub fn output(&self, name: &str, value: &Value) {
        // An input, a weight or an already declared output keeps its name; the output is then a copy of it.
        let renameable = {
            let graph = self.graph.borrow();
            graph.nodes.iter().any(|n| n.outputs.contains(&value.id)) && !graph.outputs.contains(&value.id)
        };
        let value = if renameable { value.clone() } else { value.identity() };
        self.rename(&value, name.to_owned());
        self.graph.borrow_mut().outputs.push(value.id);
    }

    /// Makes `value` known as the tap `name` of this scope.
    pub fn tap(&self, name: &str, value: &Value) {
        let tap = join(&self.tap_path, name);
        self.graph.borrow_mut().taps.push((tap, value.id));
    }

    /// The checkpoint tensor `name` of this scope, which must have `shape`. Tensors stored in 16 bits are cast to fp32.
    pub fn weight(&self, name: &str, shape: &[usize]) -> Value {
        let stored = self.stored_weight(name, shape);
        if stored.dtype() == DType::F32 { stored } else { stored.cast(DType::F32) }
    }

    /// The checkpoint tensor `name` of this scope, which must have `shape`, in the type that it is stored in.
    pub(super) fn stored_weight(&self, name: &str, shape: &[usize]) -> Value {
        let full = self.join(name);
        let dims: Vec<Dim> = shape.iter().map(|&n| n.into()).collect();
        let known = self.graph.borrow().linked.get(&full).cloned();
        let (id, dtype) = if let Some((id, weight)) = known {
            (id, weight.dtype)
        } else {
            let found = self.graph.borrow().weights.get(&full).cloned();
            let Some(weight) = found else {
                self.fail(format!("the checkpoint has no tensor '{full}'"));
                return self.new_value(full, DType::F32, dims);
            };
            if weight.shape != shape {
                self.fail(format!("tensor '{full}' has shape {:?}, expected {shape:?}", weight.shape));
            }
            let dtype = weight.dtype;
            let value = self.new_value(full.clone(), dtype, dims.clone());
            self.graph.borrow_mut().linked.insert(full, (value.id, weight));
            (value.id, dtype)
        };
        Value { scope: self.clone(), id, dtype, shape: dims.into() }
    }

    /// A one-dimensional integer constant.
    pub fn ints(&self, values: &[i64]) -> Value {
        self.constant(Constant::I64 { values: values.to_vec(), scalar: false })
    }

    /// An integer constant without dimensions.
    pub fn int(&self, value: i64) -> Value {
        self.constant(Constant::I64 { values: vec![value], scalar: true })
    }

    /// A one-dimensional real constant.
    pub fn floats(&self, values: &[f32]) -> Value {
        self.constant(Constant::F32 { values: values.to_vec(), scalar: false })
    }

    /// A real constant without dimensions.
    pub fn float(&self, value: f32) -> Value {
        self.constant(Constant::F32 { values: vec![value], scalar: true })
    }

    /// The zero of `dtype`, of one byte an element, without dimensions.
    pub(super) fn zero(&self, dtype: DType) -> Value {
        self.constant(Constant::Zero(dtype))
    }

    fn constant(&self, constant: Constant) -> Value {
        let (dtype, shape) = match &constant {
            Constant::I64 { values, scalar } => (DType::I64, if *scalar { vec![] } else { vec![values.len().into()] }),
            Constant::F32 { values, scalar } => (DType::F32, if *scalar { vec![] } else { vec![values.len().into()] }),
            Constant::Zero(dtype) => (*dtype, vec![]),
        };
        let known = self.graph.borrow().constants.iter().find(|(_, c)| *c == constant).map(|(id, _)| *id);
        if let Some(id) = known {
            return Value { scope: self.clone(), id, dtype, shape: shape.into() };
        }
        let root = Self { graph: Rc::clone(&self.graph), path: "constant".into(), tap_path: "constant".into() };
        let value = root.new_value(root.join(&dtype.to_string()), dtype, shape);
        self.graph.borrow_mut().constants.push((value.id, constant));
        Value { scope: self.clone(), ..value }
    }

    /// A node of a standard operator. `results` are the element types and shapes of its outputs.
    pub(super) fn node(
        &self,
        op: &str,
        inputs: &[Option<&Value>],
        attributes: Vec<(&'static str, Attribute)>,
        results: Vec<(DType, Vec<Dim>)>,
    ) -> Vec<Value> {
        self.node_in("", op, inputs, attributes, results)
    }

    pub(super) fn node_in(
        &self,
        domain: &'static str,
        op: &str,
        inputs: &[Option<&Value>],
        attributes: Vec<(&'static str, Attribute)>,
        results: Vec<(DType, Vec<Dim>)>,
    ) -> Vec<Value> {
        let base = self.join(op);
        let several = results.len() > 1;
        let outputs: Vec<Value> = results
            .into_iter()
            .enumerate()
            .map(|(i, (dtype, shape))| {
                self.new_value(if several { format!("{base}.{i}") } else { base.clone() }, dtype, shape)
            })
            .collect();
        let node = NodeData {
            name: self.graph.borrow_mut().unique(format!("{base}/node")),
            domain,
            op: op.to_owned(),
            inputs: inputs.iter().map(|v| v.map(|v| v.id)).collect(),
            outputs: outputs.iter().map(|v| v.id).collect(),
            attributes,
        };
        self.graph.borrow_mut().nodes.push(node);
        outputs
    }

    /// A node of one of ONNX Runtime's contributed operators.
    pub(crate) fn contributed(
        &self,
        op: &str,
        inputs: &[Option<&Value>],
        attributes: Vec<(&'static str, Attribute)>,
        results: Vec<(DType, Vec<Dim>)>,
    ) -> Vec<Value> {
        self.node_in("com.microsoft", op, inputs, attributes, results)
    }

    /// A node of `operator`, whose function becomes part of the model with the first one.
    pub fn call(
        &self,
        operator: &Operator,
        inputs: &[&Value],
        attributes: Vec<(&'static str, Attribute)>,
        results: Vec<(DType, Vec<Dim>)>,
    ) -> Vec<Value> {
        self.define(operator);
        let inputs: Vec<Option<&Value>> = inputs.iter().map(|v| Some(*v)).collect();
        self.node_in(super::DOMAIN, operator.name, &inputs, attributes, results)
    }

    /// Makes `operator` known to the model, if it is not yet.
    pub(super) fn define(&self, operator: &Operator) {
        let known = self.graph.borrow().functions.contains_key(operator.name);
        if !known {
            match Function::new(operator) {
                Ok(function) => {
                    self.graph.borrow_mut().functions.insert(operator.name, function);
                }
                Err(error) => self.fail(error.to_string()),
            }
        }
    }

    fn new_value(&self, name: String, dtype: DType, shape: Vec<Dim>) -> Value {
        let shape: Rc<[Dim]> = shape.into();
        let mut graph = self.graph.borrow_mut();
        let name = graph.unique(name);
        graph.values.push(ValueData { name, dtype, shape: Rc::clone(&shape) });
        Value { scope: self.clone(), id: graph.values.len() - 1, dtype, shape }
    }

    fn rename(&self, value: &Value, name: String) {
        let mut graph = self.graph.borrow_mut();
        let unique = graph.unique(name);
        graph.values[value.id].name = unique;
    }
}

fn join(path: &str, name: &str) -> String {
    if path.is_empty() { name.to_owned() } else { format!("{path}.{name}") }
}

impl GraphData {
    /// `name` behind the graph's prefix, or `name_2`, `name_3`, ... if it is taken.
    pub(super) fn unique(&mut self, mut name: String) -> String {
        name.insert_str(0, &self.prefix);
        let count = self.names_used.entry(name.clone()).or_insert(0);
        *count += 1;
        if *count == 1 { name } else { format!("{name}_{count}") }
    }
}

impl Value {
    pub(super) fn new(scope: &Scope, id: usize, dtype: DType, shape: Rc<[Dim]>) -> Self {
        Self { scope: scope.clone(), id, dtype, shape }
    }

    /// Element type.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Symbolic shape.
    pub fn shape(&self) -> &[Dim] {
        &self.shape
    }

    /// Dimension `axis`.
    pub fn dim(&self, axis: usize) -> Dim {
        self.shape.get(axis).cloned().unwrap_or_else(|| {
            self.scope.fail(format!("a tensor of shape {} has no axis {axis}", shape::display(&self.shape)));
            Dim::Known(1)
        })
    }

    /// The scope that operators on this value are named after.
    pub fn scope(&self) -> &Scope {
        &self.scope
    }

    /// The same value, so that what is computed from it is named after `scope`.
    #[must_use]
    pub fn within(&self, scope: &Scope) -> Self {
        Self { scope: scope.clone(), ..self.clone() }
    }
}

impl fmt::Debug for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.dtype, shape::display(&self.shape))
    }
}
