//! Serialised messages of ONNX, field by field, without taking them apart further: how a finished model is changed a little.
//! Nothing is allocated, and nothing follows a message into its messages unasked, so that no model can ask for too much.

/// Fields of `ModelProto`.
pub mod model {
    /// The graph; several of them are one, cut into pieces.
    pub const GRAPH: u64 = 7;
    /// Model-local functions.
    pub const FUNCTIONS: u64 = 25;
}

/// Fields of `GraphProto`.
pub mod graph {
    /// Its nodes, each behind those whose results it reads.
    pub const NODE: u64 = 1;
    /// Its outputs.
    pub const OUTPUT: u64 = 12;
}

/// Fields of `NodeProto`.
pub mod node {
    /// Names of what it reads.
    pub const INPUT: u64 = 1;
    /// Names of what it gives.
    pub const OUTPUT: u64 = 2;
    /// The operator.
    pub const OPERATOR: u64 = 4;
    /// Its attributes.
    pub const ATTRIBUTE: u64 = 5;
    /// The operator's domain.
    pub const DOMAIN: u64 = 7;
}

/// Fields of `FunctionProto`.
pub mod function {
    /// The operator that it is the body of.
    pub const NAME: u64 = 1;
    /// The operator's domain.
    pub const DOMAIN: u64 = 10;
}

/// Fields of `AttributeProto`.
pub mod attribute {
    /// Its name.
    pub const NAME: u64 = 1;
    /// A graph, such as a branch.
    pub const GRAPH: u64 = 6;
    /// Integers.
    pub const INTS: u64 = 8;
    /// Several graphs.
    pub const GRAPHS: u64 = 11;
    /// Which of the fields has its value.
    pub const TYPE: u64 = 20;
}

/// Fields of `ValueInfoProto`.
pub mod value_info {
    /// The value's name.
    pub const NAME: u64 = 1;
}

/// The wire type of text, messages and packed lists.
const DELIMITED: u64 = 2;

/// One field of a message.
pub struct Part<'a> {
    /// Its number in the message's definition.
    pub number: u64,
    /// With tag and length.
    pub raw: &'a [u8],
    /// What is inside, of text and messages.
    pub content: Option<&'a [u8]>,
    /// Where the content begins in the message.
    pub start: usize,
}

/// The fields of a message; an error is the offset at which it stops being one.
pub fn parts(message: &[u8]) -> impl Iterator<Item = Result<Part<'_>, usize>> {
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

/// Appends a number.
pub fn put_varint(out: &mut Vec<u8>, mut number: u64) {
    while number >= 0x80 {
        out.push(number as u8 | 0x80);
        number >>= 7;
    }
    out.push(number as u8);
}

/// Appends the field `number`, text or a message.
pub fn put_delimited(out: &mut Vec<u8>, number: u64, content: &[u8]) {
    put_varint(out, number << 3 | DELIMITED);
    put_varint(out, content.len() as u64);
    out.extend_from_slice(content);
}
