//! From a built graph to the bytes of an ONNX model.

use super::function::opset;
use super::modules::{ModuleNodes, function_name, modules};
use super::scope::{Constant, GraphData, NodeData};
use super::{BuildError, Dim, IR_VERSION, Scope};
use crate::dtype::DType;
use onnx_protobuf::tensor_proto::{DataLocation, DataType};
use onnx_protobuf::tensor_shape_proto::{Dimension, dimension};
use onnx_protobuf::type_proto::{Tensor as TensorType, Value as TypeValue};
use onnx_protobuf::{
    AttributeProto, GraphProto, Message, ModelProto, NodeProto, StringStringEntryProto, TensorProto, TensorShapeProto,
    TypeProto, ValueInfoProto, attribute_proto::AttributeType,
};
use protobuf::{EnumOrUnknown, MessageField};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Name, element type and symbolic shape of a graph input or output.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ValueInfo {
    /// Name in the graph.
    pub name: String,
    /// Element type.
    pub dtype: DType,
    /// Dimensions: numbers, or names of numbers known at run time.
    pub shape: Vec<String>,
}

/// A linear layer over a matrix that is not stored in fp32, or of a graph that computes in 16 bits.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct QuantizedLinear {
    /// The matrix, as the checkpoint calls it.
    pub matrix: String,
    /// The bias, as the checkpoint calls it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bias: Option<String>,
    /// The value in the graph that is multiplied, `[rows, in]`.
    pub rows: String,
    /// The value in the graph that comes of it, `[rows, out]`.
    pub product: String,
    /// The 16-bit format that rows, matrix, bias and product are rounded to, where they are.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub format: Option<DType>,
}

/// What a graph takes, gives and needs.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GraphSignature {
    /// Inputs in order.
    pub inputs: Vec<ValueInfo>,
    /// Outputs in order.
    pub outputs: Vec<ValueInfo>,
    /// Checkpoint tensors the graph links to.
    pub weights: Vec<String>,
    /// Tap name -> the value in the graph. A first dimension `batch` is a batch axis; where it is a product, the rows of
    /// all batch entries follow each other.
    pub taps: BTreeMap<String, ValueInfo>,
    /// Matrix of the checkpoint -> the values whose rows linear layers multiply by it; older bundles do not say.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub linears: BTreeMap<String, Vec<String>>,
    /// Linear layers in another precision than fp32.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub quantized: Vec<QuantizedLinear>,
    /// Number of nodes.
    pub nodes: usize,
    /// What these nodes are, by module in the order of the graph; older bundles do not say.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub modules: Vec<ModuleNodes>,
    /// Functions of the model, and how many nodes the body of each has.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub functions: BTreeMap<String, usize>,
}

/// A finished ONNX model.
#[derive(Debug, Clone)]
pub struct Model {
    /// The file's content.
    pub bytes: Vec<u8>,
    /// Its interface.
    pub signature: GraphSignature,
}

/// The ONNX code of an element type.
pub(super) fn data_type(dtype: DType) -> i32 {
    (match dtype {
        DType::F32 => DataType::FLOAT,
        DType::F16 => DataType::FLOAT16,
        DType::Bf16 => DataType::BFLOAT16,
        DType::I64 => DataType::INT64,
        DType::I32 => DataType::INT32,
        DType::Bool => DataType::BOOL,
        DType::U8 => DataType::UINT8,
        DType::I8 => DataType::INT8,
        DType::I4 => DataType::INT4,
        DType::F8E4m3 => DataType::FLOAT8E4M3FN,
    }) as i32
}

impl Scope {
    /// The finished model. `locations[i]` is where file `i` of the weight index lies, relative to the model's folder.
    ///
    /// # Errors
    ///
    /// The first inconsistency met while the graph was built.
    pub fn finish(&self, locations: &[String]) -> Result<Model, BuildError> {
        if let Some(error) = self.take_error() {
            return Err(error);
        }
        let graph = self.graph.borrow();
        let mut initializers = Vec::with_capacity(graph.linked.len() + graph.constants.len());
        for (name, (_, weight)) in &graph.linked {
            let Some(location) = locations.get(weight.file) else {
                return Err(BuildError {
                    scope: name.clone(),
                    problem: format!("no location for weight file {}", weight.file),
                });
            };
            let entry =
                |key: &str, value: String| StringStringEntryProto { key: key.to_owned(), value, ..Default::default() };
            initializers.push(TensorProto {
                name: name.clone(),
                data_type: data_type(weight.dtype),
                dims: weight.shape.iter().map(|&n| n as i64).collect(),
                data_location: DataLocation::EXTERNAL.into(),
                external_data: vec![
                    entry("location", location.clone()),
                    entry("offset", weight.offset.to_string()),
                    entry("length", weight.len.to_string()),
                ],
                ..TensorProto::default()
            });
        }
        initializers.extend(graph.constants.iter().map(|(id, c)| c.to_proto(&graph.values[*id].name)));

        // Described besides inputs and outputs: taps, so that they can be declared outputs later, and what operators of
        // other domains yield, which a stock checker cannot infer.
        let taps = graph.taps.iter().map(|(_, id)| *id);
        let foreign = graph.nodes.iter().filter(|n| !n.domain.is_empty()).flat_map(|n| n.outputs.iter().copied());
        let mut described: Vec<usize> = taps.chain(foreign).filter(|id| !graph.outputs.contains(id)).collect();
        described.sort_unstable();
        described.dedup();
        let mut domains: Vec<&str> = graph.nodes.iter().map(|n| n.domain).chain([""]).collect();
        domains.extend(graph.functions.values().flat_map(|f| f.proto().opset_import.iter().map(|o| o.domain.as_str())));
        domains.sort_unstable();
        domains.dedup();
        let proto = ModelProto {
            ir_version: IR_VERSION,
            producer_name: "accordion".to_owned(),
            producer_version: env!("CARGO_PKG_VERSION").to_owned(),
            opset_import: domains.into_iter().map(opset).collect(),
            functions: graph.functions.values().map(|f| f.proto().clone()).collect(),
            graph: MessageField::some(GraphProto {
                name: graph.name.clone(),
                node: graph.operator_nodes().collect(),
                initializer: initializers,
                input: graph.inputs.iter().map(|&id| graph.value_info_proto(id)).collect(),
                output: graph.outputs.iter().map(|&id| graph.value_info_proto(id)).collect(),
                value_info: described.into_iter().map(|id| graph.value_info_proto(id)).collect(),
                ..GraphProto::default()
            }),
            ..ModelProto::default()
        };
        let bytes = proto
            .write_to_bytes()
            .map_err(|e| BuildError { scope: graph.name.clone(), problem: format!("cannot serialise: {e}") })?;
        Ok(Model { bytes, signature: graph.signature() })
    }
}

/// Bytes that, appended to a serialised model, declare the named values graph outputs as well.
///
/// Serialised protocol buffers that are concatenated merge: repeated fields are joined, embedded messages are merged.
/// A model can therefore be given more outputs without parsing it, and what is checked is the very file on disk.
pub fn tap_outputs(names: &[&str]) -> Vec<u8> {
    further_outputs(names.iter().map(|&name| ValueInfoProto { name: name.to_owned(), ..Default::default() }).collect())
}

/// As [`tap_outputs`], with the element types, for parsers that do not look where a value comes from.
pub fn typed_outputs(values: &[&ValueInfo]) -> Vec<u8> {
    let output = |value: &&ValueInfo| {
        let tensor = TensorType { elem_type: data_type(value.dtype), ..TensorType::default() };
        ValueInfoProto {
            name: value.name.clone(),
            type_: MessageField::some(TypeProto { value: Some(TypeValue::TensorType(tensor)), ..TypeProto::default() }),
            ..ValueInfoProto::default()
        }
    };
    further_outputs(values.iter().map(output).collect())
}

fn further_outputs(output: Vec<ValueInfoProto>) -> Vec<u8> {
    let addition = ModelProto {
        graph: MessageField::some(GraphProto { output, ..GraphProto::default() }),
        ..ModelProto::default()
    };
    // Writing into memory cannot fail: the message has no required fields.
    addition.write_to_bytes().unwrap_or_default()
}

impl GraphData {
    /// Value `id` as a caller sees it.
    pub(super) fn value_info(&self, id: usize) -> ValueInfo {
        let value = &self.values[id];
        ValueInfo {
            name: value.name.clone(),
            dtype: value.dtype,
            shape: value.shape.iter().map(ToString::to_string).collect(),
        }
    }

    fn signature(&self) -> GraphSignature {
        let info = |&id: &usize| self.value_info(id);
        GraphSignature {
            inputs: self.inputs.iter().map(info).collect(),
            outputs: self.outputs.iter().map(info).collect(),
            weights: self.linked.keys().cloned().collect(),
            taps: self.taps.iter().map(|(tap, id)| (tap.clone(), info(id))).collect(),
            linears: self.linear_inputs(),
            quantized: self.quantized_linears(),
            nodes: self.nodes.len(),
            modules: modules(&self.nodes),
            functions: self
                .functions
                .values()
                .map(|f| (function_name(&f.proto().name), f.proto().node.len()))
                .collect(),
        }
    }

    /// The graph of a node: it links to no weights, and its constants are nodes, because NVIDIA's parser misreads
    /// initializers there.
    pub(super) fn to_proto(&self) -> GraphProto {
        GraphProto {
            name: self.name.clone(),
            node: self.constant_nodes().chain(self.operator_nodes()).collect(),
            input: self.inputs.iter().map(|&id| self.value_info_proto(id)).collect(),
            output: self.outputs.iter().map(|&id| self.value_info_proto(id)).collect(),
            ..GraphProto::default()
        }
    }

    pub(super) fn operator_nodes(&self) -> impl Iterator<Item = NodeProto> {
        self.nodes.iter().map(|node| self.node_proto(node))
    }

    pub(super) fn constant_nodes(&self) -> impl Iterator<Item = NodeProto> {
        self.constants.iter().map(|(id, constant)| {
            let name = &self.values[*id].name;
            NodeProto {
                name: format!("{name}/node"),
                op_type: "Constant".to_owned(),
                output: vec![name.clone()],
                attribute: vec![AttributeProto {
                    name: "value".to_owned(),
                    type_: AttributeType::TENSOR.into(),
                    t: MessageField::some(constant.to_proto("")),
                    ..AttributeProto::default()
                }],
                ..NodeProto::default()
            }
        })
    }

    fn node_proto(&self, node: &NodeData) -> NodeProto {
        let name = |id: &usize| self.values[*id].name.clone();
        NodeProto {
            name: node.name.clone(),
            op_type: node.op.clone(),
            domain: node.domain.to_owned(),
            input: node.inputs.iter().map(|id| id.as_ref().map(name).unwrap_or_default()).collect(),
            output: node.outputs.iter().map(name).collect(),
            attribute: node.attributes.iter().map(|(name, value)| value.to_proto(name)).collect(),
            ..NodeProto::default()
        }
    }

    fn value_info_proto(&self, id: usize) -> ValueInfoProto {
        let value = &self.values[id];
        let dims = value.shape.iter().map(|dim| Dimension {
            value: Some(match dim {
                Dim::Known(n) => dimension::Value::DimValue(*n as i64),
                Dim::Symbol(name) => dimension::Value::DimParam(name.to_string()),
            }),
            ..Dimension::default()
        });
        let tensor = TensorType {
            elem_type: data_type(value.dtype),
            shape: MessageField::some(TensorShapeProto { dim: dims.collect(), ..TensorShapeProto::default() }),
            ..TensorType::default()
        };
        ValueInfoProto {
            name: value.name.clone(),
            type_: MessageField::some(TypeProto { value: Some(TypeValue::TensorType(tensor)), ..TypeProto::default() }),
            ..ValueInfoProto::default()
        }
    }
}

impl Constant {
    fn to_proto(&self, name: &str) -> TensorProto {
        let (dtype, count, scalar, raw): (_, _, _, Vec<u8>) = match self {
            Self::I64 { values, scalar } => {
                (DType::I64, values.len(), *scalar, values.iter().flat_map(|v| v.to_le_bytes()).collect())
            }
            Self::F32 { values, scalar } => {
                (DType::F32, values.len(), *scalar, values.iter().flat_map(|v| v.to_le_bytes()).collect())
            }
            Self::Zero(dtype) => (*dtype, 1, true, vec![0]),
        };
        TensorProto {
            name: name.to_owned(),
            data_type: data_type(dtype),
            dims: if scalar { vec![] } else { vec![count as i64] },
            raw_data: raw,
            data_location: EnumOrUnknown::new(DataLocation::DEFAULT),
            ..TensorProto::default()
        }
    }
}
