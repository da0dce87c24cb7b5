//! The GGUF container, versions 2 and 3: metadata, then descriptions of tensors, then their data, all little-endian
//! (<https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>).

use super::dequantize::Encoding;
use crate::checkpoint::error::{CheckpointError, GgufError, io_error};
use crate::checkpoint::fields::Fields;
use crate::checkpoint::files;
use memmap2::Mmap;
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

const MAX_FIELDS: u64 = 1 << 16;
const MAX_TENSORS: u64 = 1 << 17;
/// Elements of all arrays together.
const MAX_ELEMENTS: u64 = 1 << 24;
const MAX_RANK: u64 = 4;
const MAX_ALIGNMENT: u64 = 1 << 16;
const DEFAULT_ALIGNMENT: u64 = 32;

/// An array in the metadata.
#[derive(Debug)]
pub(super) enum Array {
    Texts(Vec<String>),
    Numbers(Vec<f64>),
}

/// A tensor in the file.
#[derive(Debug)]
pub(super) struct StoredTensor {
    /// Dimensions, innermost first.
    pub(super) shape: Vec<u64>,
    pub(super) encoding: Encoding,
    /// Where it begins, from the start of the file.
    begin: usize,
    len: usize,
}

/// A mapped GGUF file.
pub(super) struct Gguf {
    path: PathBuf,
    map: Mmap,
    header: Header,
}

/// What precedes the data.
#[derive(Debug)]
struct Header {
    /// Numbers, flags and texts by key.
    scalars: Value,
    arrays: BTreeMap<String, Array>,
    tensors: BTreeMap<String, StoredTensor>,
}

impl Gguf {
    pub(super) fn open(path: &Path) -> Result<Self, CheckpointError> {
        let (file, size) = files::open(path)?;
        let refused = |problem| CheckpointError::Gguf { path: path.to_owned(), problem };
        if size == 0 {
            return Err(refused(GgufError::NotGguf));
        }
        // SAFETY: the mapping is private and read-only and lives only as long as the import, which asks its caller not
        // to truncate the file meanwhile.
        let map = unsafe { Mmap::map(&file) }.map_err(io_error(path))?;
        let header = parse(&map).map_err(refused)?;
        Ok(Self { path: path.to_owned(), map, header })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// The metadata that are no arrays.
    pub(super) fn fields(&self) -> Result<Fields<'_>, CheckpointError> {
        Fields::of(&self.header.scalars, "", &self.path)
    }

    /// The array of strings called `key`.
    pub(super) fn texts(&self, key: &str) -> Option<&[String]> {
        match self.header.arrays.get(key) {
            Some(Array::Texts(texts)) => Some(texts),
            _ => None,
        }
    }

    /// The array of numbers called `key`.
    pub(super) fn numbers(&self, key: &str) -> Option<&[f64]> {
        match self.header.arrays.get(key) {
            Some(Array::Numbers(numbers)) => Some(numbers),
            _ => None,
        }
    }

    pub(super) fn tensors(&self) -> &BTreeMap<String, StoredTensor> {
        &self.header.tensors
    }

    /// The stored bytes of `tensor`.
    pub(super) fn bytes(&self, tensor: &StoredTensor) -> &[u8] {
        &self.map[tensor.begin..tensor.begin + tensor.len]
    }
}

fn parse(bytes: &[u8]) -> Result<Header, GgufError> {
    let mut cursor = Cursor { bytes, at: 0, elements_left: MAX_ELEMENTS };
    if bytes.get(..4) != Some(b"GGUF") {
        return Err(GgufError::NotGguf);
    }
    cursor.at = 4;
    let version = u32::from_le_bytes(cursor.take("the header")?);
    if !(2..=3).contains(&version) {
        return Err(GgufError::Version(version));
    }
    let tensor_count = cursor.count("tensors", MAX_TENSORS)?;
    let field_count = cursor.count("metadata fields", MAX_FIELDS)?;

    let mut scalars = serde_json::Map::new();
    let mut arrays = BTreeMap::new();
    for _ in 0..field_count {
        let key = cursor.text("a metadata key")?;
        if scalars.contains_key(&key) || arrays.contains_key(&key) {
            return Err(GgufError::Twice(key));
        }
        match u32::from_le_bytes(cursor.take(&key)?) {
            ARRAY => drop(arrays.insert(key.clone(), cursor.array(&key)?)),
            kind => drop(scalars.insert(key.clone(), cursor.scalar(&key, kind)?)),
        }
    }
    let alignment = match scalars.get("general.alignment") {
        None => DEFAULT_ALIGNMENT,
        Some(value) => value.as_u64().unwrap_or(0),
    };
    if !alignment.is_power_of_two() || alignment > MAX_ALIGNMENT {
        return Err(GgufError::Alignment(alignment));
    }
    let tensors = cursor.tensors(tensor_count, alignment)?;
    Ok(Header { scalars: Value::Object(scalars), arrays, tensors })
}

const BOOL: u32 = 7;
const TEXT: u32 = 8;
const ARRAY: u32 = 9;

/// The unread rest of the header.
struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
    elements_left: u64,
}

impl Cursor<'_> {
    fn slice(&mut self, len: u64, what: &str) -> Result<&[u8], GgufError> {
        let end = usize::try_from(len).ok().and_then(|len| self.at.checked_add(len));
        let slice = end.and_then(|end| self.bytes.get(self.at..end));
        let slice = slice.ok_or_else(|| GgufError::Truncated(what.to_owned()))?;
        self.at += slice.len();
        Ok(slice)
    }

    fn take<const N: usize>(&mut self, what: &str) -> Result<[u8; N], GgufError> {
        let mut out = [0; N];
        out.copy_from_slice(self.slice(N as u64, what)?);
        Ok(out)
    }

    fn count(&mut self, what: &'static str, limit: u64) -> Result<u64, GgufError> {
        let found = u64::from_le_bytes(self.take(what)?);
        if found > limit {
            return Err(GgufError::TooMany { what, found, limit });
        }
        Ok(found)
    }

    fn text(&mut self, what: &str) -> Result<String, GgufError> {
        let len = u64::from_le_bytes(self.take(what)?);
        let bytes = self.slice(len, what)?;
        String::from_utf8(bytes.to_vec()).map_err(|_| GgufError::NotUtf8(what.to_owned()))
    }

    fn scalar(&mut self, key: &str, kind: u32) -> Result<Value, GgufError> {
        match kind {
            TEXT => Ok(Value::String(self.text(key)?)),
            BOOL => Ok(Value::Bool(self.take::<1>(key)? != [0])),
            kind => self.number(key, kind).map(Number::into_json),
        }
    }

    fn number(&mut self, key: &str, kind: u32) -> Result<Number, GgufError> {
        Ok(match kind {
            0 => Number::Unsigned(u8::from_le_bytes(self.take(key)?).into()),
            1 => Number::Signed(i8::from_le_bytes(self.take(key)?).into()),
            2 => Number::Unsigned(u16::from_le_bytes(self.take(key)?).into()),
            3 => Number::Signed(i16::from_le_bytes(self.take(key)?).into()),
            4 => Number::Unsigned(u32::from_le_bytes(self.take(key)?).into()),
            5 => Number::Signed(i32::from_le_bytes(self.take(key)?).into()),
            6 => Number::Single(f32::from_le_bytes(self.take(key)?)),
            10 => Number::Unsigned(u64::from_le_bytes(self.take(key)?)),
            11 => Number::Signed(i64::from_le_bytes(self.take(key)?)),
            12 => Number::Double(f64::from_le_bytes(self.take(key)?)),
            found => return Err(GgufError::UnknownType { what: key.to_owned(), found }),
        })
    }

    /// An array of strings or numbers. Its length is a claim: it grows with what is really there.
    fn array(&mut self, key: &str) -> Result<Array, GgufError> {
        let kind = u32::from_le_bytes(self.take(key)?);
        let len = self.count("array elements", self.elements_left)?;
        self.elements_left -= len;
        if kind == TEXT {
            return (0..len).map(|_| self.text(key)).collect::<Result<_, _>>().map(Array::Texts);
        }
        let number = |cursor: &mut Self| match kind {
            BOOL => Ok(f64::from(u8::from(cursor.take::<1>(key)? != [0]))),
            kind => cursor.number(key, kind).map(|number| number.to_f64()),
        };
        (0..len).map(|_| number(self)).collect::<Result<_, _>>().map(Array::Numbers)
    }

    fn tensors(&mut self, count: u64, alignment: u64) -> Result<BTreeMap<String, StoredTensor>, GgufError> {
        let mut described = BTreeMap::new();
        for _ in 0..count {
            let name = self.text("a tensor name")?;
            let rank = u32::from_le_bytes(self.take(&name)?);
            if u64::from(rank) > MAX_RANK {
                return Err(GgufError::TooMany { what: "dimensions", found: rank.into(), limit: MAX_RANK });
            }
            let shape: Vec<u64> =
                (0..rank).map(|_| self.take(&name).map(u64::from_le_bytes)).collect::<Result<_, _>>()?;
            let id = u32::from_le_bytes(self.take(&name)?);
            let Some(encoding) = Encoding::from_id(id) else {
                return Err(GgufError::UnknownType { what: format!("tensor {name}"), found: id });
            };
            let offset = u64::from_le_bytes(self.take(&name)?);
            if described.insert(name.clone(), (shape, encoding, offset)).is_some() {
                return Err(GgufError::Twice(format!("tensor {name}")));
            }
        }
        let data_start = (self.at as u64).next_multiple_of(alignment).min(self.bytes.len() as u64);
        let available = self.bytes.len() as u64 - data_start;
        let mut tensors = BTreeMap::new();
        for (name, (shape, encoding, offset)) in described {
            let (block, block_bytes) = encoding.block();
            let elements = shape.iter().try_fold(1_u64, |n, &dim| n.checked_mul(dim)).filter(|&n| n > 0);
            let whole_blocks = shape.first().is_some_and(|row| row.is_multiple_of(block as u64));
            let len =
                elements.filter(|_| whole_blocks).and_then(|n| (n / block as u64).checked_mul(block_bytes as u64));
            let Some(len) = len else { return Err(GgufError::Shape { name, shape, block }) };
            let inside = offset.checked_add(len).is_some_and(|end| end <= available);
            if !inside || !offset.is_multiple_of(alignment) {
                return Err(GgufError::Offset { name, offset, len, available });
            }
            let begin = (data_start + offset) as usize;
            tensors.insert(name, StoredTensor { shape, encoding, begin, len: len as usize });
        }
        let mut in_file_order: Vec<_> = tensors.iter().collect();
        in_file_order.sort_by_key(|(_, tensor)| tensor.begin);
        for pair in in_file_order.windows(2) {
            let [(first, a), (second, b)] = [pair[0], pair[1]];
            if a.begin + a.len > b.begin {
                return Err(GgufError::Overlap(first.clone(), second.clone()));
            }
        }
        Ok(tensors)
    }
}

enum Number {
    Unsigned(u64),
    Signed(i64),
    Single(f32),
    Double(f64),
}

impl Number {
    /// Single precision takes the shortest decimal that means the same, so that 1e-5 does not become 9.99999975e-6.
    /// What JSON has no number for becomes text, which is then refused under the field's name.
    fn into_json(self) -> Value {
        match self {
            Self::Unsigned(n) => n.into(),
            Self::Signed(n) => n.into(),
            Self::Single(_) | Self::Double(_) => {
                let x = self.to_f64();
                serde_json::Number::from_f64(x).map_or_else(|| x.to_string().into(), Value::Number)
            }
        }
    }

    fn to_f64(&self) -> f64 {
        match *self {
            Self::Unsigned(n) => n as f64,
            Self::Signed(n) => n as f64,
            Self::Single(x) => x.to_string().parse().unwrap_or_else(|_| x.into()),
            Self::Double(x) => x,
        }
    }
}
