//! Giving the floating-point values of a built graph other types.

use super::Scope;
use super::function::{Function, Operator};
use super::modules::module_path;
use super::rewrite::ReplacedLinear;
use super::scope::{GraphData, NodeData};
use crate::dtype::DType;
use crate::weights::WeightIndex;
use std::collections::{HashMap, HashSet};
use std::rc::Rc;

/// A node that reads or yields floating-point numbers.
pub(crate) struct FloatNode {
    /// Its place among the nodes of the graph.
    pub(crate) index: usize,
    /// Path of the module it belongs to.
    pub(crate) module: String,
    pub(crate) domain: &'static str,
    pub(crate) op: String,
    /// What it reads; `None` where that is no floating-point number.
    pub(crate) inputs: Vec<Option<Operand>>,
    /// The values it yields; `None` as above.
    pub(crate) outputs: Vec<Option<usize>>,
}

/// A floating-point value that a node reads.
pub(crate) struct Operand {
    /// Which value.
    pub(crate) id: usize,
    /// Number of its dimensions.
    pub(crate) rank: usize,
    pub(crate) source: Source,
}

/// Where a value comes from.
#[derive(PartialEq, Eq)]
pub(crate) enum Source {
    /// Numbers of the graph itself.
    Constant,
    /// The tensor of the checkpoint that is called so.
    Weight(String),
    /// The graph input that is called so.
    Input(String),
    /// Another node.
    Node,
}

/// The number of bits that a floating-point value has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Width {
    /// 32.
    Full,
    /// 16.
    Half,
}

/// The types of a node's inputs and outputs, one entry each; those of other types than floating-point numbers are ignored.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Ports {
    pub(crate) inputs: Vec<Width>,
    pub(crate) outputs: Vec<Width>,
    /// Whether the node yields no other numbers than it reads.
    pub(crate) moves: bool,
}

/// The 16-bit numbers of a graph.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Arithmetic {
    /// [`DType::F16`] or [`DType::Bf16`].
    pub format: DType,
    /// Whether all values are fp32 and only rounded to what the format can say, wherever they would be in it: for runtimes
    /// that cannot compute in the format.
    pub emulated: bool,
}

impl Scope {
    /// The nodes that read or yield floating-point numbers, in the order of the computation. Casts of stored tensors are
    /// none of them: who reads such a cast reads the tensor.
    pub(crate) fn float_nodes(&self) -> Vec<FloatNode> {
        let graph = self.graph.borrow();
        let matrices = graph.matrices();
        let constants: HashSet<usize> = graph.constants.iter().map(|(id, _)| *id).collect();
        let operand = |id: usize| {
            let value = &graph.values[id];
            let source = match matrices.get(&id) {
                Some(&name) => Source::Weight(name.to_owned()),
                None if constants.contains(&id) => Source::Constant,
                None if graph.inputs.contains(&id) => Source::Input(value.name.clone()),
                None => Source::Node,
            };
            value.dtype.is_float().then(|| Operand { id, rank: value.shape.len(), source })
        };
        let nodes = graph.nodes.iter().enumerate();
        let own = nodes.filter(|(_, node)| !node.outputs.iter().all(|id| matrices.contains_key(id)));
        let described = own.map(|(index, node)| FloatNode {
            index,
            module: module_path(&node.name, &node.op).to_owned(),
            domain: node.domain,
            op: node.op.clone(),
            inputs: node.inputs.iter().map(|id| id.and_then(operand)).collect(),
            outputs: node.outputs.iter().map(|&id| graph.values[id].dtype.is_float().then_some(id)).collect(),
        });
        described
            .filter(|node| node.inputs.iter().any(Option::is_some) || node.outputs.iter().any(Option::is_some))
            .collect()
    }

    /// Every tap of a floating-point value, and which value.
    pub(crate) fn float_taps(&self) -> Vec<(String, usize)> {
        let graph = self.graph.borrow();
        graph.taps.iter().filter(|(_, id)| graph.values[*id].dtype.is_float()).cloned().collect()
    }

    /// Gives the values of the nodes that `ports` names the types it says, in the format of `arithmetic`; casts are put
    /// wherever a value is needed in another type. Inputs and outputs of the graph stay fp32. The tensors are those of
    /// `weights`, whatever their types. `functions` take the places of the functions of their names where these are called.
    pub(crate) fn retype(
        &self,
        ports: &HashMap<usize, Ports>,
        arithmetic: Arithmetic,
        weights: &Rc<WeightIndex>,
        functions: &[&Operator],
    ) {
        let nodes = self.graph.borrow().nodes.clone();
        let linears = self.linears_in(&nodes, ports, arithmetic.format);
        let stored = self.take_types_of(weights);
        self.graph.borrow_mut().nodes.clear();
        let mut casts = Casts { graph: self, arithmetic, stored, rounded: HashSet::new(), known: HashMap::new() };
        for (index, mut node) in nodes.into_iter().enumerate() {
            let Some(ports) = ports.get(&index) else {
                if !node.outputs.iter().all(|id| casts.stored.contains_key(id)) {
                    self.graph.borrow_mut().nodes.push(node);
                }
                continue;
            };
            let scope = self.at(module_path(&node.name, &node.op));
            for (input, &width) in node.inputs.iter_mut().zip(&ports.inputs) {
                *input = input.map(|id| casts.read(&scope, id, width));
            }
            casts.push(&scope, node, ports);
        }
        casts.restore_outputs();
        let called: Vec<&Operator> = {
            let mut graph = self.graph.borrow_mut();
            graph.drop_unused_tensors();
            graph.replaced.extend(linears);
            functions.iter().filter(|operator| graph.functions.contains_key(operator.name)).copied().collect()
        };
        for operator in called {
            match Function::new(operator) {
                Ok(function) => drop(self.graph.borrow_mut().functions.insert(operator.name, function)),
                Err(error) => self.fail(error.to_string()),
            }
        }
    }

    /// The linear layers among `nodes`, those that `ports` has in 16 bits in `format`.
    fn linears_in(&self, nodes: &[NodeData], ports: &HashMap<usize, Ports>, format: DType) -> Vec<ReplacedLinear> {
        let graph = self.graph.borrow();
        let matrices = graph.matrices();
        let linear = |(index, node): (usize, &NodeData)| {
            let half = ports.get(&index)?.outputs.first() == Some(&Width::Half);
            node.replaced_linear(&matrices, *node.outputs.first()?, half.then_some(format))
        };
        nodes.iter().enumerate().filter_map(linear).collect()
    }

    /// Points the linked tensors at their places in `weights`, and takes over their types. Returns the values that are one of
    /// them, as stored or cast, with the value that is the stored one.
    fn take_types_of(&self, weights: &Rc<WeightIndex>) -> HashMap<usize, usize> {
        let mut problem = None;
        let stored = {
            let mut graph = self.graph.borrow_mut();
            let ids: HashMap<&str, usize> = graph.linked.iter().map(|(name, (id, _))| (name.as_str(), *id)).collect();
            let stored: HashMap<usize, usize> =
                graph.matrices().into_iter().filter_map(|(id, name)| Some((id, *ids.get(name)?))).collect();
            let GraphData { linked, values, .. } = &mut *graph;
            for (name, (id, weight)) in linked {
                match weights.get(name) {
                    Some(found) if found.shape == weight.shape => {
                        values[*id].dtype = found.dtype;
                        *weight = found.clone();
                    }
                    _ => {
                        let shape = &weight.shape;
                        problem = Some(format!("the weights in this precision have no tensor '{name}' {shape:?}"));
                    }
                }
            }
            graph.weights = Rc::clone(weights);
            stored
        };
        if let Some(problem) = problem {
            self.fail(problem);
        }
        stored
    }
}

/// The casts of a graph, each value to each type once.
struct Casts<'a> {
    graph: &'a Scope,
    arithmetic: Arithmetic,
    /// Values that are tensors of the checkpoint -> the stored tensor.
    stored: HashMap<usize, usize>,
    /// fp32 values that are numbers of the 16-bit format already.
    rounded: HashSet<usize>,
    known: HashMap<(usize, Width), usize>,
}

impl Casts<'_> {
    /// The value `id` as a node of `scope` reads it in `width`.
    fn read(&mut self, scope: &Scope, id: usize, width: Width) -> usize {
        let id = *self.stored.get(&id).unwrap_or(&id);
        let dtype = self.graph.graph.borrow().values[id].dtype;
        if !dtype.is_float() {
            return id;
        }
        if let Some(&known) = self.known.get(&(id, width)) {
            return known;
        }
        let value = self.graph.value(scope, id);
        let format = self.arithmetic.format;
        let cast = match width {
            Width::Full if dtype == DType::F32 => return id,
            Width::Full => value.cast(DType::F32).id,
            Width::Half if !self.arithmetic.emulated && dtype == format => return id,
            Width::Half if !self.arithmetic.emulated => value.cast(format).id,
            Width::Half if self.rounded.contains(&id) => return id,
            Width::Half if dtype == format => value.cast(DType::F32).id,
            Width::Half => value.cast(format).cast(DType::F32).id,
        };
        self.known.insert((id, width), cast);
        cast
    }

    /// Adds `node` of `scope`, whose outputs are those of `ports`.
    fn push(&mut self, scope: &Scope, mut node: NodeData, ports: &Ports) {
        let format = self.arithmetic.format;
        let mut exact = Vec::new();
        {
            let mut graph = self.graph.graph.borrow_mut();
            let half = node.outputs.iter_mut().zip(&ports.outputs).filter(|(_, width)| **width == Width::Half);
            for (output, _) in half {
                if !graph.values[*output].dtype.is_float() {
                    continue;
                }
                if !self.arithmetic.emulated {
                    graph.values[*output].dtype = format;
                } else if ports.moves {
                    self.rounded.insert(*output);
                } else {
                    let id = *output;
                    *output = graph.another(id, ".exact", DType::F32);
                    exact.push((*output, id));
                }
            }
            graph.nodes.push(node);
        }
        for (exact, id) in exact {
            let _ = self.graph.value(scope, exact).cast(format).cast(DType::F32);
            if let Some(cast) = self.graph.graph.borrow_mut().nodes.last_mut() {
                cast.outputs = vec![id];
            }
            self.rounded.insert(id);
        }
    }

    /// Makes the outputs of the graph fp32, under their names.
    fn restore_outputs(&mut self) {
        let outputs = self.graph.graph.borrow().outputs.clone();
        for (place, id) in outputs.into_iter().enumerate() {
            if self.graph.graph.borrow().values[id].dtype != self.arithmetic.format {
                continue;
            }
            let cast = self.graph.value(self.graph, id).cast(DType::F32).id;
            let mut graph = self.graph.graph.borrow_mut();
            let name = graph.values[id].name.clone();
            graph.values[id].name = graph.unique(format!("{name}.{}", self.arithmetic.format));
            graph.values[cast].name = name;
            graph.outputs[place] = cast;
        }
    }
}

impl GraphData {
    /// A new value of the shape of `id`, and of its name with `suffix`.
    fn another(&mut self, id: usize, suffix: &str, dtype: DType) -> usize {
        let mut value = self.values[id].clone();
        value.name = self.unique(format!("{}{suffix}", value.name));
        value.dtype = dtype;
        self.values.push(value);
        self.values.len() - 1
    }
}
