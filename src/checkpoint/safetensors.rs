//! Safetensors files, single and sharded, to a [`WeightIndex`]. Only headers are read.
//!
//! A file is an unsigned 64-bit length `n`, `n` bytes of JSON, and the data. The JSON maps each name to a type, a shape
//! and the range of its bytes in the data; the ranges must cover the data without overlap and without holes
//! (<https://huggingface.co/docs/safetensors>).

use super::aliases;
use super::error::{CheckpointError, HeaderError, io_error};
use super::files;
use accordion_graphs::dtype::DType;
use accordion_graphs::weights::{WeightIndex, WeightRef};
use serde::Deserialize;
use serde::de::{Deserializer, Error as _, MapAccess, Visitor};
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};
use std::collections::{BTreeMap, BTreeSet};
use std::io::Read;
use std::marker::PhantomData;
use std::path::{Component, Path, PathBuf};

/// The single-file form's name.
pub(crate) const SINGLE: &str = "model.safetensors";
/// The index of several files.
pub(crate) const INDEX: &str = "model.safetensors.index.json";
const LENGTH_BYTES: u64 = 8;
/// The format's own limit.
const MAX_HEADER: u64 = 100_000_000;
const MAX_INDEX: u64 = 64 << 20;

/// The weights of the checkpoint in `dir` under all of their names, and a digest over the headers of its files and its
/// aliases.
pub(crate) fn index(dir: &Path) -> Result<(WeightIndex, Sha256), CheckpointError> {
    let (mut weights, digest) = stored(dir)?;
    let path = dir.join(aliases::ALIASES);
    if !files::exists(&path)? {
        return Ok((weights, digest));
    }
    let text = aliases::add(&path, &mut weights)?;
    Ok((weights, digest.chain_update(text)))
}

fn stored(dir: &Path) -> Result<(WeightIndex, Sha256), CheckpointError> {
    let mut digest = Sha256::new();
    let single = dir.join(SINGLE);
    if files::exists(&single)? {
        let entries = read_header(&single, 0, &mut digest)?;
        return Ok((WeightIndex::new(vec![single], entries), digest));
    }
    let index = dir.join(INDEX);
    if files::exists(&index)? {
        return sharded(dir, &index, digest);
    }
    Err(CheckpointError::NoWeights { path: dir.to_owned() })
}

/// Where every tensor of `files` lies. The files need not belong to a checkpoint.
///
/// # Errors
///
/// A file is missing or malformed, or two of them have a tensor of the same name.
pub fn read_index(files: &[PathBuf]) -> Result<WeightIndex, CheckpointError> {
    let mut entries = BTreeMap::new();
    for (file, path) in files.iter().enumerate() {
        for (name, weight) in read_header(path, file, &mut Sha256::new())? {
            if entries.insert(name.clone(), weight).is_some() {
                return Err(CheckpointError::Shard {
                    path: path.clone(),
                    tensor: name,
                    shard: path.display().to_string(),
                    problem: "another file has a tensor of this name too",
                });
            }
        }
    }
    Ok(WeightIndex::new(files.to_vec(), entries))
}

#[derive(Deserialize)]
struct ShardIndex {
    weight_map: Entries<String>,
}

fn sharded(dir: &Path, path: &Path, mut digest: Sha256) -> Result<(WeightIndex, Sha256), CheckpointError> {
    let text = files::read_bounded(path, MAX_INDEX)?;
    let ShardIndex { weight_map: Entries(names) } =
        serde_json::from_slice(&text).map_err(|source| CheckpointError::Json { path: path.to_owned(), source })?;
    let problem = |tensor: &str, shard: &str, problem| CheckpointError::Shard {
        path: path.to_owned(),
        tensor: tensor.to_owned(),
        shard: shard.to_owned(),
        problem,
    };
    for (tensor, shard) in &names {
        if !is_plain_file_name(shard) {
            return Err(problem(tensor, shard, "a shard must be a plain file name in the checkpoint's own folder"));
        }
        if !files::exists(&dir.join(shard))? {
            return Err(problem(tensor, shard, "the file does not exist"));
        }
    }
    let shards: Vec<&String> = names.values().collect::<BTreeSet<_>>().into_iter().collect();
    let mut found = Vec::with_capacity(shards.len());
    for (file, shard) in shards.iter().enumerate() {
        found.push(read_header(&dir.join(shard), file, &mut digest)?);
    }
    let mut entries = BTreeMap::new();
    for (tensor, shard) in &names {
        let weight = shards.binary_search(&shard).ok().and_then(|file| found[file].remove(tensor));
        let weight = weight.ok_or_else(|| problem(tensor, shard, "the file has no such tensor"))?;
        entries.insert(tensor.clone(), weight);
    }
    let paths = shards.into_iter().map(|shard| dir.join(shard)).collect();
    Ok((WeightIndex::new(paths, entries), digest))
}

/// Whether `name` can only mean a file directly in the folder it is joined to, on any system.
fn is_plain_file_name(name: &str) -> bool {
    let mut components = Path::new(name).components();
    matches!((components.next(), components.next()), (Some(Component::Normal(only)), None) if only == name)
        && !name.contains(['\\', ':', '\0'])
}

fn read_header(path: &Path, file: usize, digest: &mut Sha256) -> Result<BTreeMap<String, WeightRef>, CheckpointError> {
    let (mut source, size) = files::open(path)?;
    let header_error = |problem| CheckpointError::Header { path: path.to_owned(), problem };
    if size < LENGTH_BYTES {
        return Err(header_error(HeaderError::TooShort { found: size }));
    }
    let mut length = [0; LENGTH_BYTES as usize];
    source.read_exact(&mut length).map_err(io_error(path))?;
    let header_len = checked_header_len(length, size).map_err(header_error)?;
    let mut header = vec![0; header_len as usize];
    source.read_exact(&mut header).map_err(io_error(path))?;
    digest.update(length);
    digest.update(&header);
    parse_header(&header, size - LENGTH_BYTES - header_len, file).map_err(header_error)
}

fn checked_header_len(length: [u8; LENGTH_BYTES as usize], size: u64) -> Result<u64, HeaderError> {
    let claimed = u64::from_le_bytes(length);
    let available = (size - LENGTH_BYTES).min(MAX_HEADER);
    if claimed > available {
        return Err(HeaderError::HeaderLength { claimed, available });
    }
    Ok(claimed)
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct TensorInfo {
    dtype: String,
    shape: Vec<u64>,
    data_offsets: (u64, u64),
}

/// The tensors of a header that is followed by `data_len` bytes of data; offsets become offsets into the file.
fn parse_header(header: &[u8], data_len: u64, file: usize) -> Result<BTreeMap<String, WeightRef>, HeaderError> {
    let Entries(infos): Entries<TensorInfo> =
        serde_json::from_slice(header).map_err(|e| HeaderError::Json(e.to_string()))?;
    let data_start = LENGTH_BYTES + header.len() as u64;
    let mut in_file_order: Vec<(String, TensorInfo)> = infos.into_iter().collect();
    in_file_order.sort_by_key(|(_, info)| info.data_offsets);
    let mut entries = BTreeMap::new();
    let mut previous_end = 0;
    for (name, TensorInfo { dtype, shape, data_offsets: (begin, end) }) in in_file_order {
        let Some(dtype) = dtype_of(&dtype) else {
            return Err(HeaderError::UnknownType { name, found: dtype });
        };
        let expected = shape.iter().try_fold(dtype.size() as u64, |n, &dim| n.checked_mul(dim));
        let dims: Option<Vec<usize>> = shape.iter().map(|&dim| usize::try_from(dim).ok()).collect();
        let (Some(expected), Some(dims)) = (expected, dims) else {
            return Err(HeaderError::ShapeOverflow { name, shape });
        };
        let Some((dtype, dims)) = unpacked(&name, dtype, dims) else {
            return Err(HeaderError::ShapeOverflow { name, shape });
        };
        if begin < previous_end {
            return Err(HeaderError::Overlap { name, begin, previous_end });
        }
        if begin > previous_end {
            return Err(HeaderError::Hole { begin: previous_end, end: begin });
        }
        if end.checked_sub(begin) != Some(expected) {
            return Err(HeaderError::WrongSize { name, shape, expected, begin, end });
        }
        if end > data_len {
            return Err(HeaderError::Truncated { name, end, available: data_len });
        }
        previous_end = end;
        entries.insert(name, WeightRef { file, offset: data_start + begin, len: expected, shape: dims, dtype });
    }
    if previous_end < data_len {
        return Err(HeaderError::Hole { begin: previous_end, end: data_len });
    }
    Ok(entries)
}

/// What the name of a tensor ends in whose bytes hold two 4-bit integers each: the format has no type for them.
pub(crate) const INT4_SUFFIX: &str = ".int4";

/// Element type and shape that a tensor stands for, if they can be told.
fn unpacked(name: &str, dtype: DType, mut dims: Vec<usize>) -> Option<(DType, Vec<usize>)> {
    match dims.last_mut() {
        Some(last) if dtype == DType::U8 && name.ends_with(INT4_SUFFIX) => {
            *last = last.checked_mul(2)?;
            Some((DType::I4, dims))
        }
        _ => Some((dtype, dims)),
    }
}

const DTYPES: [(&str, DType); 9] = [
    ("F32", DType::F32),
    ("F16", DType::F16),
    ("BF16", DType::Bf16),
    ("I64", DType::I64),
    ("I32", DType::I32),
    ("BOOL", DType::Bool),
    ("U8", DType::U8),
    ("I8", DType::I8),
    ("F8_E4M3", DType::F8E4m3),
];

fn dtype_of(name: &str) -> Option<DType> {
    DTYPES.iter().find(|(known, _)| *known == name).map(|(_, dtype)| *dtype)
}

/// As [`mixed_header`], for tensors of one type.
pub(crate) fn header(dtype: DType, tensors: impl IntoIterator<Item = (String, Vec<usize>)>) -> Vec<u8> {
    mixed_header(tensors.into_iter().map(|(name, shape)| (name, dtype, shape)))
}

/// The header of a file with those tensors in that order, padded so that the data begin at a multiple of 64 bytes: what
/// every processor's vectors load best. The sizes are those of a checked architecture and do not overflow. The last dimension
/// of 4-bit tensors is even, and their names end in [`INT4_SUFFIX`].
pub(crate) fn mixed_header(tensors: impl IntoIterator<Item = (String, DType, Vec<usize>)>) -> Vec<u8> {
    const ALIGNMENT: usize = 64;
    const LENGTH: usize = LENGTH_BYTES as usize;
    let name_of = |dtype| DTYPES.iter().find(|(_, known)| *known == dtype).map(|(name, _)| *name);
    let mut entries = Map::new();
    entries.insert("__metadata__".to_owned(), json!({ "format": "pt" }));
    let mut begin = 0;
    for (name, dtype, mut shape) in tensors {
        let end = begin + dtype.bytes_of_shape(&shape).unwrap_or(0) as u64;
        let stored = if dtype == DType::I4 { DType::U8 } else { dtype };
        if let (DType::I4, Some(last)) = (dtype, shape.last_mut()) {
            *last /= 2;
        }
        entries.insert(name, json!({ "dtype": name_of(stored), "shape": shape, "data_offsets": [begin, end] }));
        begin = end;
    }
    let mut json = Value::Object(entries).to_string().into_bytes();
    json.resize((LENGTH + json.len()).next_multiple_of(ALIGNMENT) - LENGTH, b' ');
    let mut header = (json.len() as u64).to_le_bytes().to_vec();
    header.append(&mut json);
    header
}

/// The index of a checkpoint of several files: which tensor is in which, and the bytes of all tensors.
pub(crate) fn index_json<'a>(tensors: impl Iterator<Item = (&'a str, &'a str)>, total_size: u64) -> Value {
    let weight_map: Map<String, Value> = tensors.map(|(name, file)| (name.to_owned(), json!(file))).collect();
    json!({ "metadata": { "total_size": total_size }, "weight_map": weight_map })
}

/// A JSON object by tensor name. A name that appears twice is an error: which one counts would depend on the parser.
pub(super) struct Entries<V>(pub(super) BTreeMap<String, V>);

impl<'de, V: Deserialize<'de>> Deserialize<'de> for Entries<V> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct ByName<V>(PhantomData<V>);
        impl<'de, V: Deserialize<'de>> Visitor<'de> for ByName<V> {
            type Value = Entries<V>;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("an object by tensor name")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut entries = BTreeMap::new();
                while let Some(name) = map.next_key::<String>()? {
                    if name == "__metadata__" {
                        map.next_value::<BTreeMap<String, String>>()?;
                        continue;
                    }
                    let value = map.next_value()?;
                    if entries.contains_key(&name) {
                        return Err(A::Error::custom(format!("tensor {name} appears twice")));
                    }
                    entries.insert(name, value);
                }
                Ok(Entries(entries))
            }
        }
        deserializer.deserialize_map(ByName(PhantomData))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;

    fn parse(header: &str, data_len: u64) -> Result<BTreeMap<String, WeightRef>, HeaderError> {
        parse_header(header.as_bytes(), data_len, 0)
    }

    #[test]
    fn offsets_are_from_the_start_of_the_file() {
        let header = r#"{"__metadata__":{"format":"pt"},"b":{"dtype":"BF16","shape":[3],"data_offsets":[8,14]},"a":{"dtype":"F32","shape":[1,2],"data_offsets":[0,8]}}"#;
        let entries = parse(header, 14).unwrap();
        let data_start = 8 + header.len() as u64;
        let expected = WeightRef { file: 0, offset: data_start + 8, len: 6, shape: vec![3], dtype: DType::Bf16 };
        assert_eq!(entries["b"], expected);
        assert_eq!(entries["a"].offset, data_start);
    }

    #[test]
    fn an_empty_tensor_and_a_scalar_are_tensors() {
        let header = r#"{"e":{"dtype":"F32","shape":[0,7],"data_offsets":[0,0]},"s":{"dtype":"F32","shape":[],"data_offsets":[0,4]}}"#;
        let entries = parse(header, 4).unwrap();
        assert_eq!((entries["e"].len, entries["s"].len), (0, 4));
    }

    #[test]
    fn plain_file_names_only() {
        for good in ["model-00001-of-00002.safetensors", "..x", "a b"] {
            assert!(is_plain_file_name(good), "{good}");
        }
        for bad in ["", ".", "..", "../x", "/x", "a/b", "a/", "./a", "a\\b", "C:x", "a\0"] {
            assert!(!is_plain_file_name(bad), "{bad}");
        }
    }

    const SEED: &str = r#"{"w":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]},"v":{"dtype":"F16","shape":[4],"data_offsets":[24,32]}}"#;

    proptest! {
        #[test]
        fn any_bytes_are_parsed_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..200), data_len: u64) {
            let _ = parse_header(&bytes, data_len, 0);
        }

        #[test]
        fn whatever_is_accepted_covers_the_data_exactly(
            edits in proptest::collection::vec((0..SEED.len(), prop_oneof![any::<u8>(), b'0'..=b'9']), 0..4),
            data_len in 0_u64..64,
        ) {
            let mut bytes = SEED.as_bytes().to_vec();
            for (at, byte) in edits {
                bytes[at] = byte;
            }
            if let Ok(entries) = parse_header(&bytes, data_len, 0) {
                prop_assert_eq!(entries.values().map(|w| w.len).sum::<u64>(), data_len);
                for weight in entries.values() {
                    prop_assert!(weight.offset + weight.len <= 8 + bytes.len() as u64 + data_len);
                    prop_assert_eq!(weight.len, weight.shape.iter().product::<usize>() as u64 * weight.dtype.size() as u64);
                }
            }
        }
    }
}
