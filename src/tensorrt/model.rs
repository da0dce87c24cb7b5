//! Making a serialised model ready for plugins, without parsing more of it than that takes.
//!
//! NVIDIA's parser takes a model-local function even where a plugin of its name is registered, so the functions that plugins
//! replace are left out. It also has to be told, by an attribute of the node, which inputs of a plugin decide shapes.

use super::TensorRtError;

/// The operators that our plugin library has, and the inputs of each that decide shapes.
const PLUGINS: [(&str, &[u8]); 3] = [("TopKPrune", &[6]), ("StridedCompress", &[]), ("StridedCompressMean", &[])];
const DOMAIN: &[u8] = accordion_graphs::onnx::DOMAIN.as_bytes();

/// Field numbers of ONNX's messages.
mod field {
    pub(super) const MODEL_GRAPH: u64 = 7;
    pub(super) const MODEL_FUNCTIONS: u64 = 25;
    pub(super) const GRAPH_NODE: u64 = 1;
    pub(super) const NODE_OPERATOR: u64 = 4;
    pub(super) const NODE_ATTRIBUTE: u64 = 5;
    pub(super) const NODE_DOMAIN: u64 = 7;
    pub(super) const FUNCTION_NAME: u64 = 1;
    pub(super) const FUNCTION_DOMAIN: u64 = 10;
    pub(super) const ATTRIBUTE_NAME: u64 = 1;
    pub(super) const ATTRIBUTE_INTS: u64 = 8;
    pub(super) const ATTRIBUTE_TYPE: u64 = 20;
}

/// `AttributeProto.AttributeType.INTS`.
const INTS: u8 = 7;
/// The wire type of text, messages and packed lists.
const DELIMITED: u64 = 2;

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
            (field::MODEL_FUNCTIONS, Some(function)) => {
                let named = named(function, field::FUNCTION_DOMAIN, field::FUNCTION_NAME);
                if named.map_err(|offset| malformed(part.start + offset))?.is_none() {
                    out.extend_from_slice(part.raw);
                }
            }
            (field::MODEL_GRAPH, Some(content)) => {
                let content = marked_nodes(content).map_err(|offset| malformed(part.start + offset))?;
                put_delimited(&mut out, field::MODEL_GRAPH, &content);
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
        let node = part.content.filter(|_| part.number == field::GRAPH_NODE);
        let shape_inputs = match node {
            Some(node) => named(node, field::NODE_DOMAIN, field::NODE_OPERATOR)?.unwrap_or_default(),
            None => &[],
        };
        match node {
            // A message goes on where another attribute is appended to it.
            Some(node) if !shape_inputs.is_empty() => {
                let mut attribute = Vec::new();
                put_delimited(&mut attribute, field::ATTRIBUTE_NAME, b"tensorrt_plugin_shape_input_indices");
                put_delimited(&mut attribute, field::ATTRIBUTE_INTS, shape_inputs);
                put_varint(&mut attribute, field::ATTRIBUTE_TYPE << 3);
                attribute.push(INTS);
                let mut marked = node.to_vec();
                put_delimited(&mut marked, field::NODE_ATTRIBUTE, &attribute);
                put_delimited(&mut out, field::GRAPH_NODE, &marked);
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

/// One field of a message.
struct Part<'a> {
    number: u64,
    /// With tag and length.
    raw: &'a [u8],
    /// What is inside, of text and messages.
    content: Option<&'a [u8]>,
    /// Where the content begins in the message.
    start: usize,
}

/// The fields of a message; an error is the offset at which it stops being one.
fn parts(message: &[u8]) -> impl Iterator<Item = Result<Part<'_>, usize>> {
    let mut at = 0;
    std::iter::from_fn(move || {
        (at < message.len()).then(|| {
            let begin = at;
            let part = part(message, begin);
            at = part.as_ref().map_or(message.len(), |part| begin + part.raw.len());
            part.ok_or(begin)
        })
    })
}

fn part(message: &[u8], begin: usize) -> Option<Part<'_>> {
    let (tag, after_tag) = varint(message, begin)?;
    let (start, end) = match tag & 7 {
        0 => (after_tag, varint(message, after_tag)?.1),
        1 => (after_tag, after_tag.checked_add(8)?),
        DELIMITED => {
            let (length, start) = varint(message, after_tag)?;
            (start, start.checked_add(usize::try_from(length).ok()?)?)
        }
        5 => (after_tag, after_tag.checked_add(4)?),
        _ => return None,
    };
    let content = message.get(start..end)?;
    let content = (tag & 7 == DELIMITED).then_some(content);
    Some(Part { number: tag >> 3, raw: message.get(begin..end)?, content, start })
}

/// The number at `begin`, and where it ends.
fn varint(message: &[u8], begin: usize) -> Option<(u64, usize)> {
    let mut number = 0_u64;
    for (i, byte) in message.get(begin..)?.iter().take(10).enumerate() {
        number |= u64::from(byte & 0x7f).checked_shl(7 * i as u32)?;
        if byte & 0x80 == 0 {
            return Some((number, begin + i + 1));
        }
    }
    None
}

fn put_varint(out: &mut Vec<u8>, mut number: u64) {
    while number >= 0x80 {
        out.push(number as u8 | 0x80);
        number >>= 7;
    }
    out.push(number as u8);
}

fn put_delimited(out: &mut Vec<u8>, number: u64, content: &[u8]) {
    put_varint(out, number << 3 | DELIMITED);
    put_varint(out, content.len() as u64);
    out.extend_from_slice(content);
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
