//! Node attributes.

use super::subgraph::Subgraph;
use onnx_protobuf::{AttributeProto, attribute_proto::AttributeType};
use protobuf::MessageField;

/// The value of a node attribute.
#[derive(Debug, Clone, PartialEq)]
pub enum Attribute {
    /// A number.
    Int(i64),
    /// Several numbers.
    Ints(Vec<i64>),
    /// A real number.
    Float(f32),
    /// Inside a function body: the value the caller gives for the function's attribute of that name, an integer.
    IntOf(&'static str),
    /// Inside a function body: the value the caller gives for the function's attribute of that name, a real number.
    FloatOf(&'static str),
    /// A graph.
    Graph(Subgraph),
}

impl From<i64> for Attribute {
    fn from(n: i64) -> Self {
        Self::Int(n)
    }
}

impl From<usize> for Attribute {
    fn from(n: usize) -> Self {
        Self::Int(n as i64)
    }
}

impl From<f32> for Attribute {
    fn from(x: f32) -> Self {
        Self::Float(x)
    }
}

impl From<Vec<i64>> for Attribute {
    fn from(ns: Vec<i64>) -> Self {
        Self::Ints(ns)
    }
}

/// Numbers of the fields of [`AttributeProto`] that hold one number.
const FLOAT_FIELD: u32 = 2;
const INT_FIELD: u32 = 3;

impl Attribute {
    pub(crate) fn to_proto(&self, name: &str) -> AttributeProto {
        let mut proto = AttributeProto { name: name.to_owned(), ..AttributeProto::default() };
        // These messages leave zeros out, but ONNX's own have fields that are there or not, and a function's `Constant` is
        // refused where the caller's zero is not.
        let explicit = proto.special_fields.mut_unknown_fields();
        let kind = match self {
            Self::Int(0) => {
                explicit.add_varint(INT_FIELD, 0);
                AttributeType::INT
            }
            Self::Int(n) => {
                proto.i = *n;
                AttributeType::INT
            }
            Self::Ints(ns) => {
                proto.ints.clone_from(ns);
                AttributeType::INTS
            }
            Self::Float(x) if x.to_bits() == 0 => {
                explicit.add_fixed32(FLOAT_FIELD, 0);
                AttributeType::FLOAT
            }
            Self::Float(x) => {
                proto.f = *x;
                AttributeType::FLOAT
            }
            Self::IntOf(caller) => {
                (*caller).clone_into(&mut proto.ref_attr_name);
                AttributeType::INT
            }
            Self::FloatOf(caller) => {
                (*caller).clone_into(&mut proto.ref_attr_name);
                AttributeType::FLOAT
            }
            Self::Graph(graph) => {
                proto.g = MessageField::some(graph.proto().clone());
                AttributeType::GRAPH
            }
        };
        proto.type_ = kind.into();
        proto
    }
}
