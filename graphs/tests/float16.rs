//! Graphs in 16-bit floating point: every node reads numbers of one type, what must not is not rounded, and nobody outside
//! notices.

#![allow(clippy::unwrap_used, clippy::panic)]

use accordion_graphs::dtype::DType;
use accordion_graphs::onnx::{Model, Scope};
use accordion_graphs::precision::{Arithmetic, Decision, Keep, float16};
use accordion_graphs::weights::{WeightIndex, WeightRef};
use onnx_protobuf::{GraphProto, Message, ModelProto, NodeProto, TensorProto};
use std::collections::{BTreeMap, HashMap};
use std::rc::Rc;

const WEIGHTS: [(&str, &[usize]); 4] =
    [("embed.weight", &[7, 8]), ("norm.weight", &[8]), ("up.weight", &[8, 8]), ("down.weight", &[8, 8])];

fn index(dtype: impl Fn(&str) -> DType) -> Rc<WeightIndex> {
    let mut offset = 0;
    let entries = WEIGHTS.iter().map(|&(name, shape)| {
        let len = dtype(name).bytes_of_shape(shape).unwrap() as u64;
        offset += len;
        let weight = WeightRef { file: 0, offset: offset - len, len, shape: shape.to_vec(), dtype: dtype(name) };
        (name.to_owned(), weight)
    });
    Rc::new(WeightIndex::new(vec!["w".into()], entries.collect::<BTreeMap<_, _>>()))
}

/// `embed[ids] -> norm -> up -> rotated by cos(positions) -> down -> + embed[ids] -> y`, from weights of type `stored`.
fn graph(stored: DType) -> Scope {
    let g = Scope::new("graph", index(|_| stored));
    let ids = g.input("ids", DType::I64, &[1.into(), "rows".into()]);
    let angle = ids.within(&g.scope("rotary")).cast(DType::F32).unsqueeze(2) * g.floats(&[1.0, 0.5, 0.25, 0.125]);
    let embedded = g.scope("embed").weight("weight", &[7, 8]).gather(&ids).flatten_rows();
    g.tap("embedded", &embedded);
    let norm = g.scope("norm");
    let x = embedded.within(&norm).rms_norm(&norm.weight("weight", &[8]), 1e-5);
    let up = x.linear(&g.scope("up").weight("weight", &[8, 8]), None);
    g.tap("up", &up);
    let by_row = up.within(&g.scope("rotate")).reshape(&[1.into(), "rows".into(), 8.into()]);
    let rotated = by_row.rotary(&angle.cos(), &angle.sin(), 1).flatten_rows();
    let down = rotated.within(&g.scope("out")).linear(&g.scope("down").weight("weight", &[8, 8]), None);
    g.output("y", &(down + embedded));
    g
}

/// The graph in `arithmetic`, its tensors stored as was decided.
fn rounded(stored: DType, keep: &Keep, arithmetic: Arithmetic) -> (Decision, Model) {
    let g = graph(stored);
    let decision = Decision::new(&g, keep);
    let dtype = |name: &str| if decision.weights[name] { arithmetic.format } else { stored };
    float16(&g, &decision, arithmetic, &index(dtype));
    (decision, g.finish(&["w".into()]).unwrap())
}

const NATIVE: Arithmetic = Arithmetic { format: DType::F16, emulated: false };
const FLOAT: i32 = 1;
const INT64: i32 = 7;
const FLOAT16: i32 = 10;

fn proto(model: &Model) -> GraphProto {
    ModelProto::parse_from_bytes(&model.bytes).unwrap().graph.unwrap()
}

/// The type of every value, where all floating-point numbers that a node reads are of one type.
fn types(graph: &GraphProto) -> HashMap<String, i32> {
    let inputs = graph.input.iter().map(|v| (v.name.clone(), v.type_.tensor_type().elem_type));
    let tensors = graph.initializer.iter().map(|t: &TensorProto| (t.name.clone(), t.data_type));
    let mut types: HashMap<String, i32> = inputs.chain(tensors).collect();
    for node in &graph.node {
        let read: Vec<i32> = node.input.iter().map(|name| types[name]).filter(|&t| t != INT64).collect();
        assert!(read.windows(2).all(|pair| pair[0] == pair[1]), "{} reads {read:?}", node.name);
        let to = node.attribute.iter().find(|a| node.op_type == "Cast" && a.name == "to").map(|a| a.i as i32);
        let result = to.or_else(|| read.first().copied()).unwrap_or(INT64);
        types.extend(node.output.iter().map(|name| (name.clone(), result)));
    }
    for output in &graph.output {
        assert_eq!(types[&output.name], output.type_.tensor_type().elem_type, "{}", output.name);
    }
    types
}

fn node<'g>(graph: &'g GraphProto, op: &str) -> &'g NodeProto {
    graph.node.iter().find(|node| node.op_type == op).unwrap()
}

fn casts(graph: &GraphProto) -> usize {
    graph.node.iter().filter(|node| node.op_type == "Cast").count()
}

#[test]
fn what_computes_in_16_bits_is_stored_and_read_so() {
    for stored in [DType::F32, DType::Bf16] {
        let (decision, model) = rounded(stored, &Keep::default(), NATIVE);
        assert!(decision.weights.values().all(|half| *half), "{:?}", decision.weights);
        let graph = proto(&model);
        let types = types(&graph);
        for op in ["Gather", "RMSNormalization", "Gemm", "RotaryEmbedding", "Add"] {
            assert_eq!(types[&node(&graph, op).output[0]], FLOAT16, "{op}");
        }
        // The positions, cosines and sines after they were computed, and the output.
        assert_eq!(casts(&graph), 4);
        assert_eq!(types[&node(&graph, "Cos").output[0]], FLOAT);
        assert_eq!((graph.output[0].name.as_str(), types["y"]), ("y", FLOAT));
        assert_eq!(model.signature.outputs[0].dtype, DType::F32);
        assert_eq!(model.signature.taps["up"].dtype, DType::F16);
        assert!(decision.kept.keys().any(|node| node == "rotary Cos"), "{:?}", decision.kept);
    }
}

#[test]
fn a_tap_that_is_too_wide_is_computed_and_read_in_fp32() {
    let keep = Keep { taps: BTreeMap::from([("up".to_owned(), "too wide".to_owned())]), ..Keep::default() };
    let (decision, model) = rounded(DType::F32, &keep, NATIVE);
    let graph = proto(&model);
    let types = types(&graph);
    assert_eq!(model.signature.taps["up"].dtype, DType::F32);
    // The rows are only laid out otherwise on the way to the rotation.
    assert_eq!(types[&node(&graph, "RotaryEmbedding").output[0]], FLOAT);
    assert_eq!(types[&node(&graph, "RMSNormalization").output[0]], FLOAT16);
    let kept: Vec<&str> = decision.kept.iter().filter(|(_, why)| *why == "too wide").map(|(name, _)| &**name).collect();
    assert_eq!(kept, ["norm Gemm", "rotate RotaryEmbedding"]);
    assert!(!decision.weights["up.weight"]);
    assert!(decision.weights["down.weight"]);
}

#[test]
fn rows_that_are_too_wide_for_a_matrix_are_not_rounded_before_it() {
    let keep = Keep { inputs: BTreeMap::from([("down.weight".to_owned(), "wide".to_owned())]), ..Keep::default() };
    let (_, model) = rounded(DType::F32, &keep, NATIVE);
    let graph = proto(&model);
    let types = types(&graph);
    assert_eq!(types[&node(&graph, "RotaryEmbedding").output[0]], FLOAT);
    let products: Vec<i32> =
        graph.node.iter().filter(|node| node.op_type == "Gemm").map(|node| types[&node.output[0]]).collect();
    assert_eq!(products, [FLOAT16, FLOAT]);
}

#[test]
fn a_matrix_that_is_asked_for_stays_as_it_is() {
    let keep = Keep { matrices: BTreeMap::from([("embed.weight".to_owned(), "asked".to_owned())]), ..Keep::default() };
    let (decision, model) = rounded(DType::F32, &keep, NATIVE);
    assert!(!decision.weights["embed.weight"]);
    let graph = proto(&model);
    assert_eq!(types(&graph)[&node(&graph, "Gather").output[0]], FLOAT);
}

#[test]
fn emulation_rounds_wherever_the_graph_would_be_in_16_bits() {
    let (_, model) = rounded(DType::F32, &Keep::default(), Arithmetic { emulated: true, ..NATIVE });
    let graph = proto(&model);
    let types = types(&graph);
    for node in graph.node.iter().filter(|node| node.op_type != "Cast") {
        assert!(node.output.iter().all(|name| types[name] != FLOAT16), "{} is in 16 bits", node.name);
    }
    let rounds = |name: &str| {
        let reader = graph.node.iter().find(|node| node.input.iter().any(|input| input == name)).unwrap();
        (reader.op_type.as_str(), types[&reader.output[0]]) == ("Cast", FLOAT16)
    };
    for op in ["RMSNormalization", "Gemm", "RotaryEmbedding", "Add"] {
        assert!(rounds(&node(&graph, op).output[0]), "{op} is not rounded");
    }
    // What is only moved was rounded before.
    assert!(!rounds(&node(&graph, "Gather").output[0]));
    assert_eq!(model.signature.taps["up"].dtype, DType::F32);
}

#[test]
fn storage_alone_leaves_the_computation_in_fp32() {
    let g = graph(DType::F32);
    let decision = Decision::storage(&g, &Keep::default());
    assert!(!decision.weights["norm.weight"]);
    float16(&g, &decision, NATIVE, &index(|name| if decision.weights[name] { DType::F16 } else { DType::F32 }));
    let graph = proto(&g.finish(&["w".into()]).unwrap());
    let types = types(&graph);
    assert!(["Gemm", "Add", "Gather"].iter().all(|op| types[&node(&graph, op).output[0]] == FLOAT));
    let stored: Vec<i32> = graph.initializer.iter().map(|t| t.data_type).collect();
    assert_eq!(stored.iter().filter(|&&t| t == FLOAT16).count(), 3);
}
