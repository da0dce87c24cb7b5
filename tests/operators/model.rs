//! Models of a few nodes, and the runtime to run them on.

use accordion::runtime::locate::{LoadOptions, LoadedRuntime, load};
use accordion_graphs::dtype::DType;
use accordion_graphs::onnx::{self, BuildError, Dim, Operator, Scope};
use onnx_protobuf::attribute_proto::AttributeType;
use onnx_protobuf::tensor_proto::DataType;
use onnx_protobuf::tensor_shape_proto::{Dimension, dimension};
use onnx_protobuf::{
    AttributeProto, FunctionProto, GraphProto, ModelProto, NodeProto, OperatorSetIdProto, TensorShapeProto, TypeProto,
    ValueInfoProto, type_proto,
};
use ort::environment::Environment;
use ort::session::Session;
use ort::session::builder::SessionBuilder;
use protobuf::{Message, MessageField};
use std::env::consts::{DLL_PREFIX, DLL_SUFFIX};
use std::rc::Rc;

/// An attribute value.
#[derive(Clone, Copy)]
pub(crate) enum Attribute {
    Int(i64),
    Float(f32),
}

/// A node; an empty input name is an input left out.
pub(crate) fn node(
    domain: &str,
    operator: &str,
    inputs: &[&str],
    outputs: &[&str],
    attributes: &[(&str, Attribute)],
) -> NodeProto {
    NodeProto {
        domain: domain.into(),
        op_type: operator.into(),
        input: inputs.iter().map(ToString::to_string).collect(),
        output: outputs.iter().map(ToString::to_string).collect(),
        attribute: attributes
            .iter()
            .map(|&(name, value)| {
                let mut attribute = AttributeProto { name: name.into(), ..AttributeProto::default() };
                match value {
                    Attribute::Int(i) => (attribute.i, attribute.type_) = (i, AttributeType::INT.into()),
                    Attribute::Float(f) => (attribute.f, attribute.type_) = (f, AttributeType::FLOAT.into()),
                }
                attribute
            })
            .collect(),
        ..NodeProto::default()
    }
}

/// Name, type and rank of a graph input or output; every dimension is dynamic.
pub(crate) type Value<'a> = (&'a str, DataType, usize);

/// A model-local function.
pub(crate) fn function(
    domain: &str,
    name: &str,
    inputs: &[&str],
    outputs: &[&str],
    nodes: Vec<NodeProto>,
) -> FunctionProto {
    FunctionProto {
        domain: domain.into(),
        name: name.into(),
        input: inputs.iter().map(ToString::to_string).collect(),
        output: outputs.iter().map(ToString::to_string).collect(),
        node: nodes,
        opset_import: opsets(),
        ..FunctionProto::default()
    }
}

fn opsets() -> Vec<OperatorSetIdProto> {
    [("", 21), ("ai.accordion", 1), ("com.microsoft", 1)]
        .map(|(domain, version)| OperatorSetIdProto { domain: domain.into(), version, ..OperatorSetIdProto::default() })
        .to_vec()
}

/// A serialised model of these nodes and functions.
pub(crate) fn model(
    nodes: Vec<NodeProto>,
    functions: Vec<FunctionProto>,
    inputs: &[Value<'_>],
    outputs: &[Value<'_>],
) -> Vec<u8> {
    let value = |&(name, dtype, rank): &Value<'_>| ValueInfoProto {
        name: name.into(),
        type_: MessageField::some(TypeProto {
            value: Some(type_proto::Value::TensorType(type_proto::Tensor {
                elem_type: dtype as i32,
                shape: MessageField::some(TensorShapeProto {
                    dim: (0..rank)
                        .map(|axis| Dimension {
                            value: Some(dimension::Value::DimParam(format!("{name}_{axis}"))),
                            ..Dimension::default()
                        })
                        .collect(),
                    ..TensorShapeProto::default()
                }),
                ..type_proto::Tensor::default()
            })),
            ..TypeProto::default()
        }),
        ..ValueInfoProto::default()
    };
    ModelProto {
        ir_version: 10,
        opset_import: opsets(),
        functions,
        graph: MessageField::some(GraphProto {
            name: "operators".into(),
            node: nodes,
            input: inputs.iter().map(value).collect(),
            output: outputs.iter().map(value).collect(),
            ..GraphProto::default()
        }),
        ..ModelProto::default()
    }
    .write_to_bytes()
    .unwrap_or_default()
}

/// A graph of one node with inputs of these names, types and ranks and outputs of these types and ranks, called `out.0`
/// and so on. All dimensions are known at run time only.
pub(crate) fn call(
    operator: &Operator,
    inputs: &[(&'static str, DType, usize)],
    attributes: Vec<(&'static str, onnx::Attribute)>,
    outputs: &[(DType, usize)],
) -> Result<Vec<u8>, BuildError> {
    let g = Scope::new("one", Rc::default());
    let dims = |name: &str, rank: usize| (0..rank).map(|i| Dim::from(&*format!("{name}.{i}"))).collect::<Vec<_>>();
    let values: Vec<_> = inputs.iter().map(|&(name, dtype, rank)| g.input(name, dtype, &dims(name, rank))).collect();
    let result = |(i, &(dtype, rank)): (usize, &(DType, usize))| (dtype, dims(&format!("out.{i}"), rank));
    let results = outputs.iter().enumerate().map(result).collect();
    let results = g.call(operator, &values.iter().collect::<Vec<_>>(), attributes, results);
    for (i, value) in results.iter().enumerate() {
        g.output(&format!("out.{i}"), value);
    }
    Ok(g.finish(&[])?.bytes)
}

/// A session over a model, with Accordion's operators registered.
pub(crate) fn session(model: &[u8], threads: usize) -> ort::Result<Session> {
    let mut builder = builder(threads)?.with_operators(accordion_plugins::domain()?)?;
    accordion_plugins::commit(|| builder.commit_from_memory(model))
}

/// A session over a model, with the operators of the shared library that cargo builds beside the tests.
pub(crate) fn library_session(model: &[u8], threads: usize) -> ort::Result<Session> {
    let name = format!("{DLL_PREFIX}accordion_operators{DLL_SUFFIX}");
    let library = std::env::current_exe().map_err(ort::Error::wrap)?.with_file_name(name);
    let mut builder = builder(threads)?.with_operator_library(library)?;
    accordion_plugins::commit(|| builder.commit_from_memory(model))
}

/// A session over a model without any operator of Accordion's: the bodies of its functions run.
pub(crate) fn stock_session(model: &[u8], threads: usize) -> ort::Result<Session> {
    builder(threads)?.commit_from_memory(model)
}

fn builder(threads: usize) -> ort::Result<SessionBuilder> {
    Ok(Session::builder(environment()?)?.with_independent_thread_pool()?.with_intra_threads(threads)?)
}

/// The runtime, loaded.
pub(crate) fn environment() -> ort::Result<&'static Environment> {
    load(LoadOptions::fetching(&mut |_| {}))
        .map(LoadedRuntime::environment)
        .map_err(|error| ort::Error::new(error.to_string()))
}
