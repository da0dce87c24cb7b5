//! Graphs that compute in 16-bit floating point, and what of them stays in fp32.
//!
//! A node computes in 16 bits if it is a product, a norm, attention, a rotation, or works on what such a node left. In fp32
//! are, by rule: rotary angles up to their cosines and sines, the recurrence of a state space model, the scores that a
//! choice is made by, products with a cache as it comes in, and softmax where it is a node of its own; and inside norms their
//! statistics (`stash_type` 1, ONNX's default). Where softmax is inside attention, its precision is the runtime's: NVIDIA's
//! parser refuses nodes that ask for one (`softmax_precision`). What else is in fp32 is derived from measured ranges, or asked
//! for: see [`Keep`].

use crate::functions::{
    MERGE_CACHE, SELECTIVE_SCAN, STRIDED_COMPRESS, STRIDED_COMPRESS_MEAN, TOPK_PRUNE, TOPK_PRUNE_16,
};
use crate::onnx::{Arithmetic, DOMAIN, FloatNode, Operand, Operator, Ports, Scope, Source, Width, module_pattern};
use crate::weights::WeightIndex;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, HashMap};
use std::rc::Rc;

/// Graph inputs that are no activations: the scores of [`TOPK_PRUNE`] are taken from the one, the other is compared with.
const FP32_INPUTS: [&str; 2] = ["significance_bias", "context_mask"];

/// What must be in fp32, and why.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Keep {
    /// Taps: what computes them and what reads them.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub taps: BTreeMap<String, String>,
    /// Matrices: what is multiplied by them, what computes and reads that.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub inputs: BTreeMap<String, String>,
    /// Matrices themselves, and what reads them.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub matrices: BTreeMap<String, String>,
}

/// What was decided for a graph.
#[derive(Debug, Clone, PartialEq)]
pub struct Decision {
    ports: HashMap<usize, Ports>,
    /// Every tensor that the graph reads, and whether all that read it take it in 16 bits.
    pub weights: BTreeMap<String, bool>,
    /// What is in fp32: nodes as `module operator`, numbers in the module's path replaced by `*` where that is by rule, and
    /// the reason.
    pub kept: BTreeMap<String, String>,
}

/// What a node is to be computed in.
enum Rule {
    /// 16 bits.
    Half,
    /// 16 bits, with the part of it in fp32 that the text names.
    HalfBut(&'static str),
    /// fp32, for that reason.
    Full(&'static str),
    /// What its inputs are in: it computes.
    Follow,
    /// What its inputs are in: it only moves numbers.
    Move,
    /// [`TOPK_PRUNE`].
    Prune,
}

const ANGLES: &str = "rotary angles are rounded last";
const RECURRENCE: &str = "a recurrence adds up its rounding";
const CACHE: &str = "a cache that is only read is not converted at every step";
const SUM: &str = "exponentials are added up in fp32";
const CHOICE: &str = "a choice is made by it";
const SCORES: &str = "scores are in fp32: a choice is made by them";

fn rule(node: &FloatNode) -> Rule {
    if node.domain == DOMAIN {
        return match node.op.as_str() {
            op if op == STRIDED_COMPRESS.name || op == STRIDED_COMPRESS_MEAN.name => Rule::Half,
            op if op == MERGE_CACHE.name => Rule::Follow,
            op if op == TOPK_PRUNE.name => Rule::Prune,
            op if op == SELECTIVE_SCAN.name => Rule::Full(RECURRENCE),
            _ => Rule::Full("its kernel takes fp32"),
        };
    }
    match node.op.as_str() {
        "Gemm" | "Conv" | "RotaryEmbedding" | "Attention" => Rule::Half,
        "RMSNormalization" | "LayerNormalization" => Rule::HalfBut("statistics are in fp32 (stash_type)"),
        "Cos" | "Sin" => Rule::Full(ANGLES),
        "Softplus" | "Exp" => Rule::Full(RECURRENCE),
        "ReduceL2" | "Div" | "ArgMax" => Rule::Full(CHOICE),
        "Softmax" => Rule::Full(SUM),
        "MatMul" if node.inputs.iter().flatten().any(|x| matches!(x.source, Source::Input(_))) => Rule::Full(CACHE),
        "Add" | "Sub" | "Mul" | "Max" | "ReduceMean" | "Neg" | "Pow" | "Sigmoid" | "Gelu" | "MatMul"
        | "GreaterOrEqual" => Rule::Follow,
        "Reshape" | "Transpose" | "Slice" | "Concat" | "Expand" | "Unsqueeze" | "Gather" | "GatherND" | "Where"
        | "Identity" => Rule::Move,
        "Cast" => Rule::Full(""),
        _ => Rule::Full("there is no rule for it"),
    }
}

impl Keep {
    /// Whether the rules alone decide.
    pub fn is_empty(&self) -> bool {
        self.taps.is_empty() && self.inputs.is_empty() && self.matrices.is_empty()
    }
}

impl Decision {
    /// What of `graph` computes in 16 bits.
    pub fn new(graph: &Scope, keep: &Keep) -> Self {
        let nodes = graph.float_nodes();
        let must = must_stay(graph, &nodes, keep);
        let mut widths = Widths { must, of: HashMap::new() };
        let mut decision = Self { ports: HashMap::new(), weights: BTreeMap::new(), kept: BTreeMap::new() };
        for node in nodes.iter().filter(|node| node.op != "Shape") {
            let ports = widths.decide(node, keep, &mut decision.kept);
            for (id, width) in node.outputs.iter().zip(&ports.outputs) {
                if let Some(id) = id {
                    widths.of.insert(*id, *width);
                }
            }
            for (operand, width) in node.inputs.iter().zip(&ports.inputs) {
                if let Some(Operand { source: Source::Weight(name), .. }) = operand {
                    let all = decision.weights.entry(name.clone()).or_insert(true);
                    *all &= *width == Width::Half;
                }
            }
            decision.ports.insert(node.index, ports);
        }
        decision
    }

    /// Only the storage is in 16 bits, that of matrices and embeddings which `keep` does not name: `graph` computes in fp32.
    pub fn storage(graph: &Scope, keep: &Keep) -> Self {
        let mut decision = Self { ports: HashMap::new(), weights: BTreeMap::new(), kept: BTreeMap::new() };
        for node in graph.float_nodes().into_iter().filter(|node| node.op != "Shape") {
            let product = matches!(node.op.as_str(), "Gemm" | "Linear" | "LinearBias" | "Gather")
                || [STRIDED_COMPRESS.name, STRIDED_COMPRESS_MEAN.name].contains(&node.op.as_str());
            for operand in node.inputs.iter().flatten() {
                if let Source::Weight(name) = &operand.source {
                    let all = decision.weights.entry(name.clone()).or_insert(true);
                    *all &= product && operand.rank == 2 && !keep.matrices.contains_key(name);
                }
            }
            decision.ports.insert(node.index, ports(&node, Width::Full));
        }
        decision.kept.insert("computation".to_owned(), "kernels for this target take fp32".to_owned());
        decision.kept.extend(keep.matrices.clone());
        decision
    }
}

/// Puts `graph` into 16-bit floating point as `decision`, which was made for it, says. Every tensor that the graph reads must
/// be in `weights`, of any floating-point type.
pub fn float16(graph: &Scope, decision: &Decision, arithmetic: Arithmetic, weights: &Rc<WeightIndex>) {
    let half = decision.ports.values().any(|ports| ports.outputs.contains(&Width::Half));
    let functions: &[&Operator] = if half { &[&TOPK_PRUNE_16] } else { &[] };
    graph.retype(&decision.ports, arithmetic, weights, functions);
}

/// The values that must be in fp32, and why.
fn must_stay(graph: &Scope, nodes: &[FloatNode], keep: &Keep) -> HashMap<usize, Rc<str>> {
    let mut must: HashMap<usize, Rc<str>> = HashMap::new();
    for (tap, id) in graph.float_taps() {
        if let Some(reason) = keep.taps.get(&tap) {
            must.insert(id, reason.as_str().into());
        }
    }
    for node in nodes.iter().filter(|node| matches!(rule(node), Rule::Half)) {
        let of_matrix = node.weights().find_map(|name| keep.inputs.get(name));
        if let (Some(reason), Some(Some(rows))) = (of_matrix, node.inputs.first()) {
            must.insert(rows.id, reason.as_str().into());
        }
    }
    // What is only moved was as large before, and is as large after.
    for node in nodes.iter().rev().filter(|node| matches!(rule(node), Rule::Move)) {
        if let Some(reason) = node.outputs.iter().flatten().find_map(|id| must.get(id)).cloned() {
            for operand in node.inputs.iter().flatten().filter(|operand| operand.source == Source::Node) {
                must.entry(operand.id).or_insert_with(|| Rc::clone(&reason));
            }
        }
    }
    for node in nodes.iter().filter(|node| matches!(rule(node), Rule::Move)) {
        if let Some(reason) = node.inputs.iter().flatten().find_map(|operand| must.get(&operand.id)).cloned() {
            for id in node.outputs.iter().flatten() {
                must.entry(*id).or_insert_with(|| Rc::clone(&reason));
            }
        }
    }
    must
}

/// The widths of the values so far.
struct Widths {
    must: HashMap<usize, Rc<str>>,
    of: HashMap<usize, Width>,
}

impl Widths {
    fn decide(&self, node: &FloatNode, keep: &Keep, kept: &mut BTreeMap<String, String>) -> Ports {
        let exactly = || format!("{} {}", node.module, node.op);
        let alike = || format!("{} {}", module_pattern(&node.module), node.op);
        let rule = rule(node);
        if let Rule::Prune = rule {
            kept.insert(alike(), SCORES.to_owned());
            return self.prune(node);
        }
        if let Rule::Full(reason) = rule {
            if !reason.is_empty() {
                kept.insert(alike(), reason.to_owned());
            }
            return ports(node, Width::Full);
        }
        let derived =
            self.reason(node).or_else(|| node.weights().find_map(|name| keep.matrices.get(name)).map(String::as_str));
        if let Some(reason) = derived {
            if !matches!(rule, Rule::Move) {
                kept.insert(exactly(), reason.to_owned());
            }
            return ports(node, Width::Full);
        }
        match rule {
            Rule::Follow | Rule::Move if !node.inputs.iter().flatten().any(|operand| self.is_half(operand)) => {
                ports(node, Width::Full)
            }
            Rule::HalfBut(part) => {
                kept.insert(alike(), part.to_owned());
                ports(node, Width::Half)
            }
            _ => ports(node, Width::Half),
        }
    }

    /// Why the node cannot be in 16 bits.
    fn reason(&self, node: &FloatNode) -> Option<&str> {
        let inputs = node.inputs.iter().flatten().map(|operand| &operand.id);
        inputs.chain(node.outputs.iter().flatten()).find_map(|id| self.must.get(id)).map(|reason| &**reason)
    }

    fn is_half(&self, operand: &Operand) -> bool {
        match &operand.source {
            Source::Constant => false,
            Source::Weight(_) => true,
            Source::Input(name) => !FP32_INPUTS.contains(&name.as_str()),
            Source::Node => self.of.get(&operand.id) == Some(&Width::Half),
        }
    }

    /// Queries, keys and caches are of one type, hidden states of one of their own.
    fn prune(&self, node: &FloatNode) -> Ports {
        let width = |places: &[usize], outputs: &[usize]| {
            let inputs = places.iter().filter_map(|&i| node.inputs.get(i)?.as_ref()).map(|operand| operand.id);
            let outputs = outputs.iter().filter_map(|&i| *node.outputs.get(i)?);
            if inputs.chain(outputs).any(|id| self.must.contains_key(&id)) { Width::Full } else { Width::Half }
        };
        let (cache, hidden) = (width(&[0, 1, 5], &[3]), width(&[4], &[1]));
        let mut ports = ports(node, Width::Full);
        for (place, width) in [(0, cache), (1, cache), (5, cache), (4, hidden)] {
            if let Some(input) = ports.inputs.get_mut(place) {
                *input = width;
            }
        }
        for (place, width) in [(3, cache), (1, hidden)] {
            if let Some(output) = ports.outputs.get_mut(place) {
                *output = width;
            }
        }
        ports
    }
}

impl FloatNode {
    /// The tensors of the checkpoint that the node reads.
    fn weights(&self) -> impl Iterator<Item = &str> {
        self.inputs.iter().flatten().filter_map(|operand| match &operand.source {
            Source::Weight(name) => Some(name.as_str()),
            _ => None,
        })
    }
}

/// All of one width.
fn ports(node: &FloatNode, width: Width) -> Ports {
    let moves = matches!(rule(node), Rule::Move);
    Ports { inputs: vec![width; node.inputs.len()], outputs: vec![width; node.outputs.len()], moves }
}
