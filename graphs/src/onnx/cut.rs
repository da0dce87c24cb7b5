//! Parts of a built graph: what a value is computed from, and that part as a graph of its own.

use super::scope::NodeData;
use super::{BuildError, Scope, ValueInfo};
use crate::weights::WeightIndex;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::rc::Rc;

/// A value that can be observed: a tap or an output that a node computes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Point {
    /// The tap's name, or the output's where there is no tap of that value.
    pub name: String,
    /// The value in the graph.
    pub value: ValueInfo,
}

/// The nodes that compute one value from others.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Part {
    /// Name of the computed value.
    pub wanted: String,
    /// The nodes, in the order of the computation.
    pub nodes: Vec<PartNode>,
    /// The values that are read and not computed: given ones and inputs of the graph.
    pub reads: Vec<ValueInfo>,
    /// Names of the tensors that are read.
    pub weights: Vec<String>,
}

/// A node of a [`Part`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PartNode {
    /// Its place in the whole graph.
    pub index: usize,
    /// Its name: the path of its module, the operator, and `/node`.
    pub name: String,
    /// Its operator, behind its domain where that is not the default one.
    pub operator: String,
    /// Names of the values it computes that the part needs.
    pub needed: Vec<String>,
}

impl PartNode {
    /// Path of the module that the node belongs to; empty where it belongs to the graph as a whole.
    pub fn module(&self) -> &str {
        self.name.rsplit_once('.').map_or("", |(module, _)| module)
    }
}

impl Scope {
    /// Every tap and output that a node computes, each value once, in the order of the computation.
    pub fn points(&self) -> Vec<Point> {
        let graph = self.graph.borrow();
        let mut names: HashMap<usize, &str> =
            graph.outputs.iter().map(|&id| (id, graph.values[id].name.as_str())).collect();
        names.extend(graph.taps.iter().map(|(tap, id)| (*id, tap.as_str())));
        let computed = graph.nodes.iter().flat_map(|node| &node.outputs);
        computed
            .filter_map(|id| Some(Point { name: (*names.get(id)?).to_owned(), value: graph.value_info(*id) }))
            .collect()
    }

    /// What computes the value `wanted` from those called `given` and the graph's inputs; `None` where no node does.
    pub fn part(&self, wanted: &str, given: &BTreeSet<&str>) -> Option<Part> {
        let graph = self.graph.borrow();
        let producers: HashMap<usize, usize> =
            graph.nodes.iter().enumerate().flat_map(|(i, node)| node.outputs.iter().map(move |&id| (id, i))).collect();
        let linked: HashMap<usize, &str> = graph.linked.iter().map(|(name, (id, _))| (*id, name.as_str())).collect();
        let (&last, _) = producers.iter().find(|&(&id, _)| graph.values[id].name == wanted)?;
        let mut nodes: BTreeMap<usize, BTreeSet<usize>> = BTreeMap::new();
        let (mut stops, mut weights) = (BTreeSet::new(), BTreeSet::new());
        let mut open = vec![last];
        while let Some(id) = open.pop() {
            if id != last && given.contains(graph.values[id].name.as_str()) || graph.inputs.contains(&id) {
                stops.insert(id);
            } else if let Some(&node) = producers.get(&id) {
                if !nodes.contains_key(&node) {
                    open.extend(graph.nodes[node].inputs.iter().flatten());
                }
                nodes.entry(node).or_default().insert(id);
            } else if let Some(weight) = linked.get(&id) {
                weights.insert((*weight).to_owned());
            }
        }
        // A given value that a node of the part computes beside another one would be there twice.
        let (again, reads): (Vec<usize>, Vec<usize>) =
            stops.into_iter().partition(|id| producers.get(id).is_some_and(|node| nodes.contains_key(node)));
        for id in again {
            nodes.entry(producers[&id]).or_default().insert(id);
        }
        let name = |id: &usize| graph.values[*id].name.clone();
        Some(Part {
            wanted: wanted.to_owned(),
            reads: reads.into_iter().map(|id| graph.value_info(id)).collect(),
            nodes: nodes
                .into_iter()
                .map(|(i, needed)| part_node(i, &graph.nodes[i], needed.iter().map(name).collect()))
                .collect(),
            weights: weights.into_iter().collect(),
        })
    }

    /// `part` of this graph as a graph of its own: its inputs are what the part reads, its output what it computes. Its
    /// tensors are those of `weights`, which need not be in the places that this graph knows.
    ///
    /// # Errors
    ///
    /// `weights` lacks a tensor, or it has another shape or element type.
    pub fn cut(&self, part: &Part, weights: &WeightIndex) -> Result<Self, BuildError> {
        let whole = self.graph.borrow();
        let mut linked = BTreeMap::new();
        for name in &part.weights {
            let known = whole.linked.get(name).zip(weights.get(name));
            let unchanged = known.filter(|((_, old), new)| (&old.shape, old.dtype) == (&new.shape, new.dtype));
            let Some(((id, _), new)) = unchanged else {
                let problem = format!("there is no tensor '{name}' of the shape and element type it had");
                return Err(BuildError { scope: part.wanted.clone(), problem });
            };
            linked.insert(name.clone(), (*id, new.clone()));
        }
        let nodes: Vec<NodeData> = part.nodes.iter().filter_map(|n| whole.nodes.get(n.index).cloned()).collect();
        let read: BTreeSet<usize> = nodes.iter().flat_map(|n| n.inputs.iter().flatten().copied()).collect();
        let ids: HashMap<&str, usize> = whole.values.iter().enumerate().map(|(i, v)| (v.name.as_str(), i)).collect();
        let named = |name: &str| ids.get(name).copied();
        let cut = Self::new(&format!("{}.{}", whole.name, part.wanted), Rc::default());
        {
            let mut graph = cut.graph.borrow_mut();
            graph.values.clone_from(&whole.values);
            graph.inputs = part.reads.iter().filter_map(|value| named(&value.name)).collect();
            graph.outputs = named(&part.wanted).into_iter().collect();
            graph.constants = whole.constants.iter().filter(|(id, _)| read.contains(id)).cloned().collect();
            let called = |name: &str| nodes.iter().any(|n| n.domain == super::DOMAIN && n.op == name);
            graph.functions = whole.functions.iter().filter(|(n, _)| called(n)).map(|(n, f)| (*n, f.clone())).collect();
            graph.linked = linked;
            graph.nodes = nodes;
        }
        Ok(cut)
    }
}

fn part_node(index: usize, node: &NodeData, needed: Vec<String>) -> PartNode {
    let operator = if node.domain.is_empty() { node.op.clone() } else { format!("{}.{}", node.domain, node.op) };
    PartNode { index, name: node.name.clone(), operator, needed }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::dtype::DType;
    use crate::weights::WeightRef;
    use onnx_protobuf::{Message, ModelProto};

    fn index(offset: u64, shape: Vec<usize>) -> WeightIndex {
        let weight = WeightRef { file: 0, offset, len: 16, shape, dtype: DType::F32 };
        WeightIndex::new(vec!["w".into()], BTreeMap::from([("b.gain".to_owned(), weight)]))
    }

    /// `x -> a.t -> b.u (reads b.gain) -> out`, and beside it `a.t -> b.side`.
    fn chain() -> Scope {
        let g = Scope::new("g", Rc::new(index(8, vec![4])));
        let x = g.input("x", DType::F32, &["rows".into(), 4.into()]);
        let (a, b) = (g.scope("a"), g.scope("b"));
        let t = x.within(&a).sigmoid();
        a.tap("t", &t);
        let u = t.within(&b).rms_norm(&b.weight("gain", &[4]), 1e-5);
        b.tap("u", &u);
        b.tap("side", &t.within(&b).cos());
        g.output("out", &(u.within(&g) + g.float(1.0)));
        g
    }

    fn names<'a>(values: impl IntoIterator<Item = &'a ValueInfo>) -> Vec<&'a str> {
        values.into_iter().map(|v| v.name.as_str()).collect()
    }

    #[test]
    fn points_are_in_the_order_of_the_computation() {
        let points = chain().points();
        let found: Vec<&str> = points.iter().map(|p| p.name.as_str()).collect();
        assert_eq!(found, ["a.t", "b.u", "b.side", "out"]);
        assert_eq!(points[0].value.name, "a.Sigmoid");
    }

    #[test]
    fn a_part_ends_at_what_is_given() {
        let g = chain();
        let whole = g.part("out", &BTreeSet::new()).unwrap();
        assert_eq!(names(&whole.reads), ["x"]);
        let modules: Vec<&str> = whole.nodes.iter().map(PartNode::module).collect();
        assert_eq!(modules, ["a", "b", ""]);
        let part = g.part("out", &BTreeSet::from(["a.Sigmoid"])).unwrap();
        assert_eq!((names(&part.reads), part.nodes.len()), (vec!["a.Sigmoid"], 2));
        assert_eq!(part.weights, ["b.gain"]);
        assert_eq!(whole.nodes[0].needed, ["a.Sigmoid"]);
        // What is wanted is computed even if it is given.
        assert_eq!(g.part("out", &BTreeSet::from(["out"])).unwrap(), whole);
        assert_eq!(g.part("x", &BTreeSet::new()), None);
    }

    #[test]
    fn a_cut_is_a_model_of_its_own() {
        let g = chain();
        let part = g.part("out", &BTreeSet::from(["a.Sigmoid"])).unwrap();
        let model = g.cut(&part, &index(96, vec![4])).unwrap().finish(&["w".to_owned()]).unwrap();
        assert_eq!(names(&model.signature.inputs), ["a.Sigmoid"]);
        assert_eq!(names(&model.signature.outputs), ["out"]);
        let graph = ModelProto::parse_from_bytes(&model.bytes).unwrap().graph.unwrap();
        let operators: Vec<&str> = graph.node.iter().map(|n| n.op_type.as_str()).collect();
        assert_eq!(operators, ["RMSNormalization", "Add"]);
        let offset = &graph.initializer.iter().find(|w| w.name == "b.gain").unwrap().external_data[1];
        assert_eq!((offset.key.as_str(), offset.value.as_str()), ("offset", "96"));
        // The whole graph is as it was.
        assert_eq!(g.finish(&["w".to_owned()]).unwrap().signature.nodes, 4);
    }

    #[test]
    fn a_cut_takes_no_other_tensor() {
        let g = chain();
        let part = g.part("out", &BTreeSet::new()).unwrap();
        assert!(g.cut(&part, &index(0, vec![2, 2])).is_err());
        assert!(g.cut(&part, &WeightIndex::default()).is_err());
    }
}
