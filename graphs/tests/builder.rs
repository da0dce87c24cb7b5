//! The builder's promises: inconsistencies are found at build time and named, values are shared, outputs can be added
//! to a serialised model.

#![allow(clippy::unwrap_used, clippy::panic)]

use accordion_graphs::dtype::DType;
use accordion_graphs::onnx::{Dim, Model, Scope, Step, Value, tap_outputs, without_unused};
use accordion_graphs::weights::{WeightIndex, WeightRef};
use onnx_protobuf::{Message, ModelProto};
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

fn weights(entries: &[(&str, &[usize], DType)]) -> Rc<WeightIndex> {
    let mut offset = 100;
    let entries = entries.iter().map(|(name, shape, dtype)| {
        let len = (shape.iter().product::<usize>() * dtype.size()) as u64;
        let weight = WeightRef { file: 0, offset, len, shape: shape.to_vec(), dtype: *dtype };
        offset += len;
        ((*name).to_owned(), weight)
    });
    Rc::new(WeightIndex::new(vec!["w".into()], entries.collect::<BTreeMap<_, _>>()))
}

fn rows(g: &Scope, name: &str, width: usize) -> Value {
    g.input(name, DType::F32, &["rows".into(), width.into()])
}

fn error(g: &Scope) -> String {
    g.finish(&["w".into()]).unwrap_err().to_string()
}

fn parsed(model: &Model) -> ModelProto {
    ModelProto::parse_from_bytes(&model.bytes).unwrap()
}

#[test]
fn shapes_that_do_not_fit_are_named_with_their_scope() {
    type Build = fn(&Scope);
    let cases: [(&str, Build); 6] = [
        ("Add of fp32 [rows, 3] and fp32 [rows, 4]: shapes do not broadcast", |g| {
            let _ = rows(g, "a", 3) + rows(g, "b", 4);
        }),
        ("Gemm of fp32 [rows, 3] and fp32 [5, 4]: inner dimensions differ", |g| {
            let _ = rows(g, "a", 3).linear(&g.input("w", DType::F32, &[5.into(), 4.into()]), None);
        }),
        ("Concat of fp32 [rows, 3] and fp32 [rows, 4] along axis 0", |g| {
            let _ = g.concat(&[&rows(g, "a", 3), &rows(g, "b", 4)], 0);
        }),
        ("two dimensions to infer", |g| {
            let _ = rows(g, "a", 12).reshape(&["x".into(), "y".into(), 2.into()]);
        }),
        ("element counts differ", |g| {
            let _ = g.input("a", DType::F32, &[2.into(), 3.into()]).reshape(&[7.into()]);
        }),
        ("element types differ", |g| {
            let _ = rows(g, "a", 3) + g.input("b", DType::I64, &["rows".into(), 3.into()]);
        }),
    ];
    for (expected, build) in cases {
        let g = Scope::new("graph", weights(&[]));
        build(&g.scope("layers").scope(3));
        let message = error(&g);
        assert!(message.contains(expected), "'{message}' does not contain '{expected}'");
        assert!(message.contains("'layers.3'"), "'{message}' does not name the scope");
    }
}

#[test]
fn only_the_first_problem_is_reported() {
    let g = Scope::new("graph", weights(&[]));
    g.scope("first").fail("one");
    g.scope("second").fail("two");
    assert_eq!(error(&g), "graph construction failed in 'first': one");
}

#[test]
fn a_weight_is_found_by_its_scope_and_its_shape_is_checked() {
    let index = weights(&[("model.norm.weight", &[4], DType::F32)]);
    let norm = |g: &Scope| g.scope("model.norm");
    let g = Scope::new("graph", Rc::clone(&index));
    norm(&g).weight("weight", &[5]);
    assert!(error(&g).contains("tensor 'model.norm.weight' has shape [4], expected [5]"));
    let g = Scope::new("graph", Rc::clone(&index));
    norm(&g).weight("bias", &[4]);
    assert!(error(&g).contains("the checkpoint has no tensor 'model.norm.bias'"));

    let g = Scope::new("graph", index);
    let x = rows(&g, "x", 4);
    let (a, b) = (norm(&g).weight("weight", &[4]), norm(&g).weight("weight", &[4]));
    g.output("y", &(x * a + b));
    let model = g.finish(&["shard.safetensors".into()]).unwrap();
    let proto = parsed(&model);
    let [initializer] = proto.graph.initializer.as_slice() else { panic!("used twice, stored once") };
    let external: Vec<(&str, &str)> = initializer.external_data.iter().map(|e| (&*e.key, &*e.value)).collect();
    assert_eq!(external, [("location", "shard.safetensors"), ("offset", "100"), ("length", "16")]);
    assert_eq!(model.signature.weights, ["model.norm.weight"]);
}

#[test]
fn narrow_weights_are_linked_as_they_are_and_cast() {
    let g = Scope::new("graph", weights(&[("w", &[4], DType::Bf16)]));
    let w = g.weight("w", &[4]);
    assert_eq!(w.dtype(), DType::F32);
    g.output("y", &(rows(&g, "x", 4) * w));
    let proto = parsed(&g.finish(&["w".into()]).unwrap());
    assert_eq!(proto.graph.initializer[0].data_type, 16, "BFLOAT16");
    assert_eq!(proto.graph.node[0].op_type, "Cast");
}

#[test]
fn taps_become_outputs_by_appending_bytes() {
    let g = Scope::new("graph", weights(&[]));
    let x = rows(&g, "x", 4);
    let layer = g.scope_tapped_as("model", "").scope("layers").scope(0);
    let squared = x.within(&layer) * &x;
    layer.tap("squared", &squared);
    g.output("y", &(&squared + &x));
    let mut model = g.finish(&[]).unwrap();
    let value = &model.signature.taps["layers.0.squared"];
    let name = value.name.clone();
    assert_eq!((value.dtype, value.shape.as_slice()), (DType::F32, &["rows".to_owned(), "4".to_owned()][..]));
    // What is appended declares the outputs and nothing else. (The merging itself is what every engine that is given
    // taps relies on; this package's own parser keeps only the last of two embedded messages.)
    model.bytes = tap_outputs(&[&name, "other"]);
    let addition = parsed(&model);
    let outputs: Vec<&str> = addition.graph.output.iter().map(|o| o.name.as_str()).collect();
    assert_eq!(outputs, [&*name, "other"]);
    let mut rest = addition;
    rest.graph.as_mut().unwrap().output.clear();
    assert_eq!(rest.graph.as_ref(), Some(&onnx_protobuf::GraphProto::default()));
    rest.graph = protobuf::MessageField::none();
    assert_eq!(rest, ModelProto::default());
}

#[test]
fn what_no_output_needs_is_left_out() {
    let g = Scope::new("graph", weights(&[]));
    let x = rows(&g, "x", 4);
    let doubled = &x + &x;
    let tapped = doubled.sigmoid() * &x;
    g.tap("tapped", &tapped);
    g.output("y", &doubled);
    let mut model = g.finish(&[]).unwrap();
    let whole = model.bytes.clone();
    model.bytes = without_unused(&whole).into_owned();
    let mut graph = parsed(&model).graph.unwrap();
    let operators: Vec<&str> = graph.node.iter().map(|n| n.op_type.as_str()).collect();
    assert_eq!(operators, ["Add"]);
    assert_eq!(*without_unused(&model.bytes), model.bytes, "nothing is left to leave out");

    // A branch reads values of the graph around it without naming them as inputs.
    let name = graph.node[0].output[0].clone();
    let within = onnx_protobuf::NodeProto { input: vec![name], output: vec!["z".into()], ..Default::default() };
    let branch = onnx_protobuf::GraphProto { node: vec![within], ..Default::default() };
    let attribute = onnx_protobuf::AttributeProto { g: Some(branch).into(), ..Default::default() };
    graph.node.push(onnx_protobuf::NodeProto {
        attribute: vec![attribute],
        output: vec!["chosen".into()],
        ..Default::default()
    });
    graph.output[0].name = "chosen".into();
    let branching = ModelProto { graph: Some(graph).into(), ..Default::default() }.write_to_bytes().unwrap();
    assert_eq!(*without_unused(&branching), branching, "a branch needs the sum");

    let declared = [whole, tap_outputs(&[&model.signature.taps["tapped"].name])].concat();
    assert_eq!(*without_unused(&declared), declared, "a tap that is an output is needed");
    assert_eq!(&*without_unused(b"no model"), b"no model");
}

#[test]
fn an_input_and_a_repeated_value_can_be_outputs() {
    let g = Scope::new("graph", weights(&[]));
    let x = rows(&g, "x", 4);
    let y = x.sigmoid();
    for (name, value) in [("same", &x), ("one", &y), ("two", &y)] {
        g.output(name, value);
    }
    let proto = parsed(&g.finish(&[]).unwrap());
    let outputs: Vec<&str> = proto.graph.output.iter().map(|o| o.name.as_str()).collect();
    assert_eq!(outputs, ["same", "one", "two"]);
    let produced: Vec<&str> = proto.graph.node.iter().flat_map(|n| n.output.iter().map(String::as_str)).collect();
    assert!(outputs.iter().all(|o| produced.contains(o)), "{outputs:?} are produced by nodes: {produced:?}");
}

#[test]
fn building_twice_gives_the_same_bytes() {
    let build = || {
        let g = Scope::new("graph", weights(&[("a.weight", &[4], DType::F32), ("b.weight", &[4], DType::F16)]));
        let x = rows(&g, "x", 4);
        let y = &x * g.scope("b").weight("weight", &[4]) + g.scope("a").weight("weight", &[4]);
        g.output("y", &y.last(0).reshape(&[4.into()]));
        g.finish(&["w".into()]).unwrap().bytes
    };
    assert_eq!(build(), build());
}

#[test]
fn dimensions_add_and_multiply_symbolically() {
    let g = Scope::new("graph", weights(&[]));
    let [a, b] = ["a", "b"].map(|n| g.input(n, DType::F32, &["batch".into(), n.into(), 2.into()]));
    let joined = g.concat(&[&a, &b], 1);
    assert_eq!(joined.shape(), ["batch".into(), "a + b".into(), Dim::Known(2)]);
    assert_eq!(joined.flatten_rows().shape(), ["batch * (a + b)".into(), Dim::Known(2)]);
}

/// A running sum along axis 1, and twice what was seen.
fn running_sum(g: &Scope, step: impl FnOnce(&Value) -> Value) -> Step {
    let x = g.input("x", DType::F32, &["batch".into(), "time".into(), 4.into()]);
    let zeros = g.input("zeros", DType::F32, &["batch".into(), 4.into()]);
    g.scan(&[&zeros], &[&x], 1, |body, state, now| {
        let sum = step(&(&state[0] + &now[0]));
        let seen = &sum * body.float(2.0);
        Step { state: vec![sum], results: vec![seen] }
    })
}

#[test]
fn a_loop_carries_its_body_and_no_name_comes_twice() {
    let g = Scope::new("graph", weights(&[]));
    let looped = running_sum(&g, Value::sigmoid);
    assert_eq!(looped.state[0].shape(), ["batch".into(), Dim::Known(4)]);
    assert_eq!(looped.results[0].shape(), ["batch".into(), "time".into(), Dim::Known(4)]);
    // Operators and a constant of the same names outside the loop.
    let sum = (&looped.state[0] + &looped.state[0]).sigmoid();
    g.output("y", &(sum * g.float(2.0)));
    let proto = parsed(&g.finish(&[]).unwrap());
    let scan = proto.graph.node.iter().find(|node| node.op_type == "Scan").unwrap();
    let attribute = |name: &str| scan.attribute.iter().find(|a| a.name == name).unwrap();
    assert_eq!((attribute("num_scan_inputs").i, &attribute("scan_input_axes").ints), (1, &vec![1]));
    let body = &attribute("body").g;
    assert_eq!((body.input.len(), body.output.len()), (2, 2));
    let mut names = BTreeSet::new();
    for graph in [&proto.graph, body] {
        let produced = graph.node.iter().flat_map(|node| node.output.iter().chain([&node.name]));
        let given = graph.input.iter().map(|i| &i.name).chain(graph.initializer.iter().map(|i| &i.name));
        for name in produced.chain(given) {
            assert!(names.insert(name), "'{name}' comes twice");
        }
    }
}

#[test]
fn a_loop_that_changes_its_state_or_reads_weights_is_refused() {
    let g = Scope::new("graph", weights(&[]));
    running_sum(&g, |sum| sum.unsqueeze(0));
    assert!(error(&g).contains("a loop with the state [fp32 [batch, 4]] leaves [fp32 [1, batch, 4]]"));
    let g = Scope::new("graph", weights(&[]));
    running_sum(&g, |sum| sum + sum.scope().weight("w", &[4]));
    assert!(error(&g).contains("the checkpoint has no tensor"));
    let g = Scope::new("graph", weights(&[]));
    running_sum(&g, |sum| sum + rows(sum.scope(), "other", 3));
    assert!(error(&g).contains("shapes do not broadcast"));
}
