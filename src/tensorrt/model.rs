//! Making a serialised model ready for plugins, without parsing more of it than that takes.
//!
//! NVIDIA's parser takes a model-local function even where a plugin of its name is registered, so the functions that plugins
//! replace are left out. It also has to be told, by an attribute of the node, which inputs of a plugin decide shapes.

use super::TensorRtError;
use accordion_graphs::onnx::wire::{attribute, function, graph, model, node, parts, put_delimited, put_varint};

/// The operators that our plugin library has, and the inputs of each that decide shapes.
const PLUGINS: [(&str, &[u8]); 3] = [("TopKPrune", &[6]), ("StridedCompress", &[]), ("StridedCompressMean", &[])];
const DOMAIN: &[u8] = accordion_graphs::onnx::DOMAIN.as_bytes();

/// `AttributeProto.AttributeType.INTS`.
const INTS: u8 = 7;

/// The model `bytes` with plugins in the place of the functions they replace. `graph` is for messages.
///
/// # Errors
///
/// The bytes are not a serialised model.
pub(super) fn with_plugins(graph: &str, bytes: &[u8]) -> Result<Vec<u8>, TensorRtError> {
    let malformed = |offset| TensorRtError::Malformed { graph: graph.to_owned(), offset };
    let mut out = Vec::with_capacity(bytes.len());
    for part in parts(bytes) {
        let part = part.map_err(malformed)?;
        match (part.number, part.content) {
            (model::FUNCTIONS, Some(function)) => {
                let named = named(function, function::DOMAIN, function::NAME);
                if named.map_err(|offset| malformed(part.start + offset))?.is_none() {
                    out.extend_from_slice(part.raw);
                }
            }
            (model::GRAPH, Some(content)) => {
                let content = marked_nodes(content).map_err(|offset| malformed(part.start + offset))?;
                put_delimited(&mut out, model::GRAPH, &content);
            }
            _ => out.extend_from_slice(part.raw),
        }
    }
    Ok(out)
}

/// A graph whose nodes say which of their inputs decide shapes.
fn marked_nodes(graph: &[u8]) -> Result<Vec<u8>, usize> {
    let mut out = Vec::with_capacity(graph.len());
    for part in parts(graph) {
        let part = part?;
        let node = part.content.filter(|_| part.number == graph::NODE);
        let shape_inputs = match node {
            Some(node) => named(node, node::DOMAIN, node::OPERATOR)?.unwrap_or_default(),
            None => &[],
        };
        match node {
            // A message goes on where another attribute is appended to it.
            Some(node) if !shape_inputs.is_empty() => {
                let mut attribute = Vec::new();
                put_delimited(&mut attribute, attribute::NAME, b"tensorrt_plugin_shape_input_indices");
                put_delimited(&mut attribute, attribute::INTS, shape_inputs);
                put_varint(&mut attribute, attribute::TYPE << 3);
                attribute.push(INTS);
                let mut marked = node.to_vec();
                put_delimited(&mut marked, node::ATTRIBUTE, &attribute);
                put_delimited(&mut out, graph::NODE, &marked);
            }
            _ => out.extend_from_slice(part.raw),
        }
    }
    Ok(out)
}

/// The shape inputs of the plugin that a node calls or a function stands for, if there is one.
fn named(message: &[u8], domain_field: u64, name_field: u64) -> Result<Option<&'static [u8]>, usize> {
    let (mut domain, mut name): (&[u8], &[u8]) = (&[], &[]);
    for part in parts(message) {
        let part = part?;
        if let Some(content) = part.content {
            if part.number == domain_field {
                domain = content;
            } else if part.number == name_field {
                name = content;
            }
        }
    }
    let plugin = PLUGINS.iter().find(|(plugin, _)| domain == DOMAIN && name == plugin.as_bytes());
    Ok(plugin.map(|(_, shape_inputs)| *shape_inputs))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use onnx_protobuf::{AttributeProto, FunctionProto, GraphProto, Message, ModelProto, NodeProto, TensorProto};
    use protobuf::MessageField;

    fn node(domain: &str, op_type: &str) -> NodeProto {
        let scale = AttributeProto { name: "scale".to_owned(), f: 0.125, ..Default::default() };
        let (domain, op_type) = (domain.to_owned(), op_type.to_owned());
        NodeProto { domain, op_type, attribute: vec![scale], input: vec!["x".to_owned(); 3], ..Default::default() }
    }

    fn model() -> ModelProto {
        let function = |domain: &str, name: &str| FunctionProto {
            domain: domain.to_owned(),
            name: name.to_owned(),
            node: vec![node("ai.accordion", "TopKPrune")],
            ..Default::default()
        };
        ModelProto {
            ir_version: 10,
            functions: vec![
                function("ai.accordion", "TopKPrune"),
                function("ai.accordion", "MergeCache"),
                function("other", "TopKPrune"),
                function("ai.accordion", "StridedCompress"),
            ],
            graph: MessageField::some(GraphProto {
                node: vec![node("", "Add"), node("ai.accordion", "TopKPrune"), node("ai.accordion", "StridedCompress")],
                initializer: vec![TensorProto { raw_data: vec![7; 300], ..Default::default() }],
                ..Default::default()
            }),
            ..Default::default()
        }
    }

    #[test]
    fn functions_that_plugins_replace_are_left_out_and_shape_inputs_marked() {
        let before = model();
        let after = with_plugins("leaf", &before.write_to_bytes().unwrap()).unwrap();
        let after = ModelProto::parse_from_bytes(&after).unwrap();
        let mut expected = before;
        expected.functions.retain(|f| f.name == "MergeCache" || f.domain == "other");
        let marks = AttributeProto {
            name: "tensorrt_plugin_shape_input_indices".to_owned(),
            ints: vec![6],
            type_: onnx_protobuf::attribute_proto::AttributeType::INTS.into(),
            ..Default::default()
        };
        expected.graph.as_mut().unwrap().node[1].attribute.push(marks);
        assert_eq!(after, expected);
    }

    #[test]
    fn what_is_cut_short_is_refused_and_never_read_past_its_end() {
        let bytes = model().write_to_bytes().unwrap();
        for end in 0..bytes.len() {
            // A cut between two fields leaves a shorter message.
            if let Err(error) = with_plugins("leaf", &bytes[..end]) {
                assert!(error.to_string().contains("graph 'leaf'"), "{error}");
            }
        }
        for hostile in [&[0x3a, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x01][..], &[0x80; 12], &[0x0b]] {
            assert!(with_plugins("leaf", hostile).is_err(), "{hostile:?}");
        }
    }
}
