//! The file of a context state: a compressed context that any later process can ask questions about.
//!
//! It is safetensors, with the tensors `cache.<layer>.key` and `.value` f32 `[1, G, rows, d]`, `position_ids` i64 `[rows]`,
//! `prefix_ids` and `suffix_ids` i64 (the tokens around the context; the last rows are the suffix's), `logits` f32 `[V]`
//! where a suffix was read, and where something is injected `injected.<layer>.key`, `.value` and `.single_key` f32
//! `[1, G, slots, d]`. A state may be stored in 8 bits: keys and values are then i8, each with `<name>.scale` f32
//! `[1, G, 1, d]` that its entries count in. One metadata entry, [`METADATA_KEY`], is a JSON object: `schema` ([`SCHEMA`]), `last_position` and
//! the fields of [`Origin`]. The same state gives the same bytes.
//!
//! A file is mapped, not read: as long as the state is in use it must not be truncated.

use super::compress::Compression;
use super::state_precision::StatePrecision;
use super::{ContextState, Injected, InjectedLayer, Scales};
use crate::bundle::{Bundle, Method};
use crate::checkpoint::{CheckpointError, WeightMaps, read_index};
use crate::tensor::{Tensor, TensorError};
use accordion_calibration::significance::ModelIdentity;
use accordion_graphs::dtype::DType;
use accordion_graphs::plan::PromptLengths;
use accordion_graphs::plan::homer::HomerSettings;
use accordion_graphs::plan::rcc::RccSettings;
use accordion_graphs::plan::sharedllm::SharedLlmSettings;
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeSet, HashMap};
use std::fmt::Display;
use std::path::{Path, PathBuf};

/// Version of the file format.
pub const SCHEMA: &str = "accordion.state/1";

/// Key of the metadata entry. There is only this one because safetensors writes several in no particular order.
pub const METADATA_KEY: &str = "accordion.state";

/// No model has as many positions.
const MAX_POSITION: i64 = 1 << 40;

/// A context state with what it was made from.
#[derive(Debug, Clone)]
pub struct SavedState {
    /// The state. Its last rows are the suffix's.
    pub state: ContextState,
    /// The tokens before the context.
    pub prefix_ids: Vec<u32>,
    /// The tokens behind the context; none where only the context was read.
    pub suffix_ids: Vec<u32>,
    /// What made it.
    pub origin: Origin,
}

/// Where a state comes from.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Origin {
    /// Name and version of the program that made it.
    pub producer: String,
    /// The model and the rotary embedding in effect.
    pub model: ModelIdentity,
    /// What was done to the context.
    pub method: StateMethod,
    /// What numbers the graphs compute with.
    pub precision: String,
    /// What numbers keys and values are stored in.
    #[serde(default)]
    pub stored_as: StatePrecision,
    /// SHA-256 of the context's text, hexadecimal.
    pub context_sha256: String,
    /// Tokens of the prompt's parts.
    pub lengths: PromptLengths,
}

/// A method, with the settings that decide what it makes of a context.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "name", rename_all = "snake_case")]
pub enum StateMethod {
    /// Nothing: the whole context through the model.
    Plain,
    /// Hierarchical context merging.
    Homer(HomerSettings),
    /// Recurrent context compression.
    Rcc(RccSettings),
    /// Context tree and self-injection.
    #[serde(rename = "sharedllm")]
    SharedLlm(SharedLlmSettings),
}

#[derive(Serialize, Deserialize)]
struct Header {
    schema: String,
    last_position: i64,
    #[serde(flatten)]
    origin: Origin,
}

#[derive(Deserialize)]
struct Schema {
    schema: String,
}

/// Why a state could not be written or taken from a file.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StateError {
    /// The system refused.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// Not a well-formed safetensors file.
    #[error(transparent)]
    File(#[from] Box<CheckpointError>),
    /// Not a context state, or a damaged one.
    #[error("{}: {problem}", path.display())]
    Invalid {
        /// The file.
        path: PathBuf,
        /// What was found and what was expected.
        problem: String,
    },
    /// Made for another bundle.
    #[error(
        "{}: {what} of the state is {found}, that of the bundle is {expected}; compress the context again with \
         `accordion compress`",
        path.display()
    )]
    Mismatch {
        /// The file.
        path: PathBuf,
        /// What differs.
        what: &'static str,
        /// What the state was made with.
        found: String,
        /// What the bundle has.
        expected: String,
    },
}

impl StateMethod {
    /// The word for the method.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Plain => "plain",
            Self::Homer(_) => "homer",
            Self::Rcc(_) => "rcc",
            Self::SharedLlm(_) => "sharedllm",
        }
    }

    /// Method and settings in words.
    fn in_words(&self) -> String {
        serde_json::to_string(self).unwrap_or_else(|_| self.name().to_owned())
    }
}

impl From<&Method> for StateMethod {
    fn from(method: &Method) -> Self {
        match method {
            Method::Plain => Self::Plain,
            Method::Homer { settings, .. } => Self::Homer(*settings),
            Method::Rcc { settings } => Self::Rcc(*settings),
            Method::SharedLlm { settings } => Self::SharedLlm(*settings),
        }
    }
}

impl From<&Compression> for StateMethod {
    fn from(compression: &Compression) -> Self {
        match compression {
            Compression::Plain { .. } => Self::Plain,
            Compression::Homer(homer) => Self::Homer(homer.settings),
            Compression::Rcc(rcc) => Self::Rcc(rcc.settings),
            Compression::SharedLlm(shared) => Self::SharedLlm(shared.settings),
        }
    }
}

impl Origin {
    /// The origin of a state that `method` makes with the graphs of `bundle` from the context `text`.
    pub fn new(bundle: &Bundle, method: StateMethod, text: &str, lengths: PromptLengths) -> Self {
        use sha2::{Digest, Sha256};
        let manifest = bundle.manifest();
        Self {
            producer: format!("accordion {}", env!("CARGO_PKG_VERSION")),
            model: manifest.identity(),
            method,
            precision: manifest.precision.to_string(),
            stored_as: StatePrecision::Fp32,
            context_sha256: format!("{:x}", Sha256::digest(text)),
            lengths,
        }
    }

    /// Whether the decoder of `bundle` continues from such a state as the decoder did that it was made with.
    fn check(&self, path: &Path, bundle: &Bundle) -> Result<(), StateError> {
        let manifest = bundle.manifest();
        let (model, exported) = (manifest.identity(), StateMethod::from(&manifest.method));
        // Every decoder but sharedllm's reads a context plainly.
        let plainly = self.method == StateMethod::Plain && !matches!(exported, StateMethod::SharedLlm(_));
        let method = if plainly { StateMethod::Plain } else { exported };
        let pairs = [
            ("the model", self.model.fingerprint.clone(), model.fingerprint),
            ("the rotary embedding", self.model.rope.clone(), model.rope),
            ("the precision", self.precision.clone(), manifest.precision.to_string()),
            ("the method", self.method.in_words(), method.in_words()),
        ];
        match pairs.into_iter().find(|(_, found, expected)| found != expected) {
            None => Ok(()),
            Some((what, found, expected)) => Err(StateError::Mismatch { path: path.to_owned(), what, found, expected }),
        }
    }
}

impl ContextState {
    /// A state from a file, checked to be one that the decoder of `bundle` can continue from, in the numbers that it keeps.
    ///
    /// # Errors
    ///
    /// The file is not a context state, is damaged, or was made with another model, method, settings or precision.
    pub fn load(path: &Path, bundle: &Bundle) -> Result<SavedState, StateError> {
        let index = read_index(&[path.to_owned()]).map_err(Box::new)?;
        let maps = WeightMaps::open(index).map_err(Box::new)?;
        let header = read_header(path, &maps)?;
        header.origin.check(path, bundle)?;
        let stored_as = header.origin.stored_as;
        Reader { path, bundle, maps, stored_as, taken: BTreeSet::new() }.state(header)
    }
}

impl SavedState {
    /// Writes the state: aside, then renamed to `path`, so that no reader ever sees half of it.
    ///
    /// # Errors
    ///
    /// The folder cannot be written to. What was at `path` is then still there, and nothing else.
    pub fn save(&self, path: &Path) -> Result<(), StateError> {
        let io = |source| StateError::Io { path: path.to_owned(), source };
        let invalid = |problem: &dyn Display| invalid(path, problem);
        let header =
            Header { schema: SCHEMA.to_owned(), last_position: self.state.last_position, origin: self.origin.clone() };
        let metadata = serde_json::to_string(&header).map_err(|e| invalid(&e))?;
        let tensors = self.tensors().map_err(|e| invalid(&e))?;
        let views: Vec<(&str, TensorView<'_>)> = tensors
            .iter()
            .map(|(name, tensor)| {
                let dtype = match tensor.dtype() {
                    DType::I64 => Dtype::I64,
                    DType::I8 => Dtype::I8,
                    _ => Dtype::F32,
                };
                Ok((name.as_str(), TensorView::new(dtype, tensor.shape().to_vec(), tensor.bytes())?))
            })
            .collect::<Result<_, safetensors::SafeTensorError>>()
            .map_err(|e| invalid(&e))?;

        let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let mut builder = tempfile::Builder::new();
        #[cfg(unix)]
        {
            // As an ordinary new file, subject to the umask; the default of temporary files is owner only.
            use std::os::unix::fs::PermissionsExt;
            builder.permissions(std::fs::Permissions::from_mode(0o666));
        }
        let file = builder.tempfile_in(folder).map_err(io)?;
        let metadata = HashMap::from([(METADATA_KEY.to_owned(), metadata)]);
        safetensors::serialize_to_file(views, Some(metadata), file.path()).map_err(|problem| match problem {
            safetensors::SafeTensorError::IoError(source) => io(source),
            other => invalid(&other),
        })?;
        file.as_file().sync_all().map_err(io)?;
        file.persist(path).map_err(|error| io(error.error))?;
        Ok(())
    }

    /// The tensors as they go into the file.
    fn tensors(&self) -> Result<Vec<(String, Tensor)>, TensorError> {
        let ids = |ids: &[u32]| Tensor::from_i64([ids.len()], ids.iter().copied().map(i64::from).collect());
        let state = self.state.in_numbers(self.origin.stored_as.into())?;
        let mut tensors = vec![
            ("position_ids".to_owned(), Tensor::from_i64([state.len()], state.position_ids.clone())?),
            ("prefix_ids".to_owned(), ids(&self.prefix_ids)?),
            ("suffix_ids".to_owned(), ids(&self.suffix_ids)?),
        ];
        if !state.logits.is_empty() {
            tensors.push(("logits".to_owned(), Tensor::from_f32([state.logits.len()], state.logits.clone())?));
        }
        put_cache(&mut tensors, &state.cache, state.injected.as_ref(), "");
        if let Some(Scales { cache, injected }) = &state.scales {
            put_cache(&mut tensors, cache, injected.as_ref(), SCALE);
        }
        Ok(tensors)
    }
}

/// What the name of a tensor ends in that says what the entries of another count in.
const SCALE: &str = ".scale";

/// Adds keys and values under their names, which end in `suffix`.
fn put_cache(tensors: &mut Vec<(String, Tensor)>, cache: &[[Tensor; 2]], injected: Option<&Injected>, suffix: &str) {
    for (layer, [key, value]) in cache.iter().enumerate() {
        tensors.push((format!("cache.{layer}.key{suffix}"), key.clone()));
        tensors.push((format!("cache.{layer}.value{suffix}"), value.clone()));
    }
    for (l, layer) in injected.into_iter().flat_map(|injected| &injected.layers).enumerate() {
        tensors.push((format!("injected.{l}.key{suffix}"), layer.key.clone()));
        tensors.push((format!("injected.{l}.value{suffix}"), layer.value.clone()));
        tensors.extend(layer.single_key.iter().map(|key| (format!("injected.{l}.single_key{suffix}"), key.clone())));
    }
}

fn invalid(path: &Path, problem: &dyn Display) -> StateError {
    StateError::Invalid { path: path.to_owned(), problem: problem.to_string() }
}

fn read_header(path: &Path, maps: &WeightMaps) -> Result<Header, StateError> {
    let invalid = |problem: &dyn Display| invalid(path, problem);
    let file = maps.file(0).ok_or_else(|| invalid(&"there is no such file"))?;
    let (_, metadata) = SafeTensors::read_metadata(file.bytes()).map_err(|e| invalid(&e))?;
    let entry = metadata.metadata().as_ref().and_then(|map| map.get(METADATA_KEY));
    let entry = entry.ok_or_else(|| {
        invalid(&format!("the metadata entry {METADATA_KEY:?} is missing: this is not a context state"))
    })?;
    let malformed = |e: serde_json::Error| invalid(&format!("metadata entry {METADATA_KEY:?}: {e}"));
    // The version first: other versions may have other fields.
    let Schema { schema } = serde_json::from_str(entry).map_err(malformed)?;
    if schema != SCHEMA {
        return Err(invalid(&format!("schema is '{schema}', expected '{SCHEMA}'")));
    }
    serde_json::from_str(entry).map_err(malformed)
}

/// Takes a state out of a file, tensor by tensor.
struct Reader<'a> {
    path: &'a Path,
    bundle: &'a Bundle,
    maps: WeightMaps,
    stored_as: StatePrecision,
    /// Names of the tensors taken so far: no other may be in the file.
    taken: BTreeSet<String>,
}

impl Reader<'_> {
    fn state(mut self, Header { last_position, origin, .. }: Header) -> Result<SavedState, StateError> {
        let arch = self.bundle.architecture();
        let position_ids = self.integers("position_ids")?;
        let [prefix_ids, suffix_ids] = [self.ids("prefix_ids")?, self.ids("suffix_ids")?];
        let rows = position_ids.len();
        if rows == 0 {
            return Err(self.invalid("the state has no rows"));
        }
        let parts =
            [("prefix", prefix_ids.len(), origin.lengths.prefix), ("suffix", suffix_ids.len(), origin.lengths.suffix)];
        if let Some((part, found, expected)) = parts.into_iter().find(|(_, found, expected)| found != expected) {
            return Err(self.invalid(format!("{found} ids of the {part}, expected {expected}")));
        }
        self.check_positions(&position_ids, last_position, suffix_ids.len())?;
        let heads = [1, arch.num_kv_heads(), rows, arch.head_dim()];
        let layers: Vec<[String; 2]> =
            (0..arch.num_layers()).map(|l| ["key", "value"].map(|part| format!("cache.{l}.{part}"))).collect();
        let cache = self.both(&layers, |reader, name| reader.heads(name, &heads))?;
        let stored_int8 = self.stored_as == StatePrecision::Int8;
        let cache_scales =
            if stored_int8 { Some(self.both(&layers, |reader, name| reader.scale(name, &heads))?) } else { None };
        let logits = match self.maps.index().get("logits") {
            None => Vec::new(),
            Some(_) => self.floats("logits", &[arch.vocab_size()])?.to_f32(),
        };
        if logits.is_empty() != suffix_ids.is_empty() {
            return Err(self.invalid("a suffix and logits are there together or not at all"));
        }
        let (injected, injected_scales) = self.injected()?;
        let scales = cache_scales.map(|cache| Scales { cache, injected: injected_scales });
        if let Some((name, _)) = self.maps.index().iter().find(|(name, _)| !self.taken.contains(*name)) {
            return Err(self.invalid(format!("tensor {name} does not belong to a state of this model")));
        }
        let state = ContextState { cache, position_ids, last_position, logits, injected, scales };
        let state = state.into_numbers(self.bundle.manifest().kv_cache).map_err(|e| self.invalid(e))?;
        Ok(SavedState { state, prefix_ids, suffix_ids, origin })
    }

    /// The suffix is at the end, without gaps; nothing is behind it.
    fn check_positions(&self, position_ids: &[i64], last: i64, suffix_len: usize) -> Result<(), StateError> {
        let suffix = position_ids.len().checked_sub(suffix_len).map(|kept| &position_ids[kept..]);
        let in_order = suffix.is_some_and(|rows| rows.iter().rev().zip(0..).all(|(&found, back)| found == last - back));
        let in_range = (0..MAX_POSITION).contains(&last) && position_ids.iter().all(|p| (0..=last).contains(p));
        if in_order && in_range {
            return Ok(());
        }
        Err(self.invalid(format!(
            "position_ids are not those of {} rows that end with a suffix of {suffix_len} at position {last}",
            position_ids.len()
        )))
    }

    /// One tensor for either name of every layer.
    fn both(
        &mut self,
        layers: &[[String; 2]],
        mut read: impl FnMut(&mut Self, &str) -> Result<Tensor, StateError>,
    ) -> Result<Vec<[Tensor; 2]>, StateError> {
        layers.iter().map(|[key, value]| Ok([read(self, key)?, read(self, value)?])).collect()
    }

    /// What is injected, and what it counts in where it is of 8-bit integers.
    fn injected(&mut self) -> Result<(Option<Injected>, Option<Injected>), StateError> {
        let arch = self.bundle.architecture();
        let (mut layers, mut scales) = (Vec::new(), Vec::new());
        for l in 0..arch.num_layers() {
            let [key, value, single_key] = ["key", "value", "single_key"].map(|part| format!("injected.{l}.{part}"));
            let slots = match self.maps.index().get(&key).map(|weight| weight.shape.as_slice()) {
                None => break,
                Some(&[_, _, slots, _]) => slots,
                Some(other) => return Err(self.invalid(format!("tensor {key} has shape {other:?}, expected 4 axes"))),
            };
            let heads = [1, arch.num_kv_heads(), slots, arch.head_dim()];
            let single_key = self.maps.index().get(&single_key).map(|_| single_key);
            let stored_int8 = self.stored_as == StatePrecision::Int8;
            let mut layer = |read: fn(&mut Self, &str, &[usize; 4]) -> Result<Tensor, StateError>| {
                Ok::<_, StateError>(InjectedLayer {
                    key: read(self, &key, &heads)?,
                    value: read(self, &value, &heads)?,
                    single_key: single_key.as_ref().map(|name| read(self, name, &heads)).transpose()?,
                })
            };
            layers.push(layer(Self::heads)?);
            if stored_int8 {
                scales.push(layer(Self::scale)?);
            }
        }
        let some = |layers: Vec<InjectedLayer>| (!layers.is_empty()).then_some(Injected { layers });
        Ok((some(layers), some(scales)))
    }

    /// Keys or values of `shape`, `[1, G, rows, d]`, in the numbers that they are stored in.
    fn heads(&mut self, name: &str, shape: &[usize; 4]) -> Result<Tensor, StateError> {
        match self.stored_as {
            StatePrecision::Fp32 => self.floats(name, shape),
            StatePrecision::Int8 => self.shaped(name, DType::I8, shape),
        }
    }

    /// What the entries of the tensor `name`, which is of `shape`, count in.
    fn scale(&mut self, name: &str, &[batch, groups, _, width]: &[usize; 4]) -> Result<Tensor, StateError> {
        let name = format!("{name}{SCALE}");
        let scale = self.floats(&name, &[batch, groups, 1, width])?;
        if scale.to_f32().iter().any(|scale| !scale.is_finite() || *scale <= 0.0) {
            return Err(self.invalid(format!("tensor {name} has a scale that is not finite or not above 0")));
        }
        Ok(scale)
    }

    fn floats(&mut self, name: &str, shape: &[usize]) -> Result<Tensor, StateError> {
        self.shaped(name, DType::F32, shape)
    }

    fn shaped(&mut self, name: &str, dtype: DType, shape: &[usize]) -> Result<Tensor, StateError> {
        let tensor = self.tensor(name, dtype)?;
        if tensor.shape() == shape {
            return Ok(tensor);
        }
        Err(self.invalid(format!("tensor {name} has shape {:?}, expected {shape:?}", tensor.shape())))
    }

    fn integers(&mut self, name: &str) -> Result<Vec<i64>, StateError> {
        let tensor = self.tensor(name, DType::I64)?;
        match (tensor.shape(), tensor.as_i64()) {
            ([_], Ok(values)) => Ok(values.to_vec()),
            (shape, _) => Err(self.invalid(format!("tensor {name} has shape {shape:?}, expected one axis"))),
        }
    }

    fn ids(&mut self, name: &str) -> Result<Vec<u32>, StateError> {
        let vocab_size = self.bundle.architecture().vocab_size();
        let id = |&id: &i64| u32::try_from(id).ok().filter(|&id| (id as usize) < vocab_size);
        let values = self.integers(name)?;
        values.iter().map(id).collect::<Option<_>>().ok_or_else(|| {
            self.invalid(format!("tensor {name} has an id outside the model's vocabulary of {vocab_size}"))
        })
    }

    fn tensor(&mut self, name: &str, expected: DType) -> Result<Tensor, StateError> {
        if self.maps.index().get(name).is_none() {
            return Err(self.invalid(format!("tensor {name} is missing")));
        }
        let tensor = self.maps.tensor(name).map_err(Box::new)?;
        self.taken.insert(name.to_owned());
        if tensor.dtype() == expected {
            return Ok(tensor);
        }
        Err(self.invalid(format!("tensor {name} is {}, expected {expected}", tensor.dtype())))
    }

    fn invalid(&self, problem: impl Display) -> StateError {
        invalid(self.path, &problem)
    }
}
