//! Why a checkpoint cannot be used.

use crate::tensor::TensorError;
use accordion_graphs::dtype::DType;
use accordion_graphs::plan::PlanError;
use accordion_graphs::weights::AliasError;
use std::path::{Path, PathBuf};

/// Why a checkpoint cannot be opened, read or imported. Every message names the file and what in it is wrong.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CheckpointError {
    /// The operating system refused.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// The reason it gave.
        source: std::io::Error,
    },
    /// A file that is parsed as a whole is larger than any honest one.
    #[error("{} has {found} bytes; at most {limit} are read", path.display())]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// Its size.
        found: u64,
        /// The largest size accepted.
        limit: u64,
    },
    /// A file ends before what it announces.
    #[error("{} has {found} bytes; {what} needs {needed}: is the file truncated?", path.display())]
    TooShort {
        /// The file.
        path: PathBuf,
        /// What does not fit.
        what: &'static str,
        /// The size that would be enough.
        needed: u64,
        /// Its size.
        found: u64,
    },
    /// Not JSON, or not JSON of the expected shape.
    #[error("{}: {source}", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// What the parser found.
        source: serde_json::Error,
    },
    /// A field that must be there is not.
    #[error("`{field}` is missing in {}", path.display())]
    MissingField {
        /// The file.
        path: PathBuf,
        /// The field, dotted when nested.
        field: String,
    },
    /// A field has a value that cannot be meant.
    #[error("`{field}` in {} is {found}, expected {expected}", path.display())]
    Field {
        /// The file.
        path: PathBuf,
        /// The field, dotted when nested.
        field: String,
        /// The value.
        found: String,
        /// What would have been accepted.
        expected: String,
    },
    /// A value that may be right but that this program does not know.
    #[error("{what} '{found}' in {} is not supported (supported: {supported})", path.display())]
    Unsupported {
        /// The kind of thing, usually the field's name.
        what: String,
        /// The value.
        found: String,
        /// The file.
        path: PathBuf,
        /// What would have been understood.
        supported: String,
    },
    /// A safetensors file whose header cannot be trusted.
    #[error("{}: {problem}", path.display())]
    Header {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: HeaderError,
    },
    /// A shard named by the index that cannot be the one meant.
    #[error("{} puts tensor {tensor} into '{shard}': {problem}", path.display())]
    Shard {
        /// The index file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// The file name that the index gives.
        shard: String,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// A further name that a tensor cannot have.
    #[error("{} calls tensor {target} '{alias}': {problem}", path.display())]
    Alias {
        /// The file of aliases.
        path: PathBuf,
        /// The further name.
        alias: String,
        /// The tensor.
        target: String,
        /// What is wrong.
        problem: AliasError,
    },
    /// The folder holds no weights.
    #[error("{} has neither model.safetensors nor model.safetensors.index.json", path.display())]
    NoWeights {
        /// The folder.
        path: PathBuf,
    },
    /// A tensor that the architecture needs, or that somebody asked for, is not there.
    #[error("{} has no tensor {name}", path.display())]
    MissingTensor {
        /// The folder or file.
        path: PathBuf,
        /// The tensor.
        name: String,
    },
    /// A tensor's shape does not follow from the model's description.
    #[error("tensor {name} in {} has shape {found:?}, {description} asks for {expected:?}", path.display())]
    Shape {
        /// The file.
        path: PathBuf,
        /// The tensor.
        name: String,
        /// Its shape.
        found: Vec<usize>,
        /// The shape the architecture needs.
        expected: Vec<usize>,
        /// The file that describes the architecture.
        description: &'static str,
    },
    /// Settings that contradict each other or the model.
    #[error("{}: {problem}", path.display())]
    Settings {
        /// The file that has them.
        path: PathBuf,
        /// What is wrong with them.
        problem: PlanError,
    },
    /// A description of RCC's encoder beside weights without one.
    #[error("{} describes an encoder, but the checkpoint has no tensor {tensor}", path.display())]
    NoEncoder {
        /// The file.
        path: PathBuf,
        /// The tensor by which an encoder is known.
        tensor: String,
    },
    /// Tensors of two encoders, of which one must be the right one.
    #[error("{} has both {first} and {second}, expected the tensors of one encoder", path.display())]
    TwoEncoders {
        /// The folder.
        path: PathBuf,
        /// A tensor.
        first: String,
        /// A tensor.
        second: String,
    },
    /// A weight of another type than it must have.
    #[error("tensor {name} in {} is {found}, expected {expected}", path.display())]
    WeightType {
        /// The file.
        path: PathBuf,
        /// The tensor.
        name: String,
        /// Its element type.
        found: DType,
        /// What it may be.
        expected: String,
    },
    /// A weight index that does not fit the file it points into.
    #[error(
        "tensor {name} should lie in bytes {offset}..{} of {}, which has {available}", 
        offset.saturating_add(*len), path.display()
    )]
    OutsideFile {
        /// The file.
        path: PathBuf,
        /// The tensor.
        name: String,
        /// First byte.
        offset: u64,
        /// Number of bytes.
        len: u64,
        /// Size of the file.
        available: u64,
    },
    /// There is a model, and nothing that turns texts into its tokens.
    #[error("there is no {}, and texts need one; a checkpoint of random numbers has none", path.display())]
    NoTokenizer {
        /// tokenizer.json.
        path: PathBuf,
    },
    /// The tokenizer refused: its file, a text or an id.
    #[error("{}: {source}", path.display())]
    Tokenizer {
        /// tokenizer.json.
        path: PathBuf,
        /// The reason the tokenizers library gives.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The tokenizer knows more tokens than the model.
    #[error("{}: token '{token}' has id {id}, but the model knows only ids below {vocab_size}", path.display())]
    TokenId {
        /// tokenizer.json.
        path: PathBuf,
        /// The token.
        token: String,
        /// Its id.
        id: u32,
        /// Number of ids of the model.
        vocab_size: usize,
    },
    /// The chat template is not valid, or refuses the conversation.
    #[error("the chat template of {}: {detail}", path.display())]
    ChatTemplate {
        /// The file it comes from, or the folder when there is none.
        path: PathBuf,
        /// What is wrong.
        detail: String,
    },
    /// A GGUF file whose structure cannot be trusted.
    #[error("{}: {problem}", path.display())]
    Gguf {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: GgufError,
    },
    /// An import would overwrite something.
    #[error("{} exists already", path.display())]
    Exists {
        /// The folder that was to be made.
        path: PathBuf,
    },
    /// A tensor that cannot be viewed.
    #[error("tensor {name}: {source}")]
    Tensor {
        /// The tensor.
        name: String,
        /// What is wrong with it.
        source: TensorError,
    },
}

/// What is wrong with a safetensors header.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum HeaderError {
    /// Not even the length of the header is there.
    #[error("{found} bytes are too few for a safetensors file")]
    TooShort {
        /// Size of the file.
        found: u64,
    },
    /// The header would not fit into the file, or is larger than the format allows.
    #[error("the header claims {claimed} bytes, at most {available} are possible")]
    HeaderLength {
        /// The length the file claims.
        claimed: u64,
        /// The longest it may be.
        available: u64,
    },
    /// Not the JSON that a header is; includes duplicate names.
    #[error("the header is not valid: {0}")]
    Json(String),
    /// An element type outside the list of [`DType`].
    #[error("tensor {name} has type {found}; supported are F32, F16, BF16, I64, I32, BOOL and U8")]
    UnknownType {
        /// The tensor.
        name: String,
        /// The type as written.
        found: String,
    },
    /// The shape's product does not fit into 64 bits.
    #[error("tensor {name}: the number of bytes of shape {shape:?} overflows")]
    ShapeOverflow {
        /// The tensor.
        name: String,
        /// The shape as written.
        shape: Vec<u64>,
    },
    /// Shape and offsets disagree.
    #[error("tensor {name} of shape {shape:?} needs {expected} bytes, its offsets {begin}..{end} span another number")]
    WrongSize {
        /// The tensor.
        name: String,
        /// The shape as written.
        shape: Vec<u64>,
        /// Bytes that the shape needs.
        expected: u64,
        /// First offset.
        begin: u64,
        /// Last offset.
        end: u64,
    },
    /// The tensor begins before the previous one ends.
    #[error("tensor {name} begins at {begin}, inside the previous tensor, which ends at {previous_end}")]
    Overlap {
        /// The tensor.
        name: String,
        /// Where it begins.
        begin: u64,
        /// Where the previous one ends.
        previous_end: u64,
    },
    /// Bytes that no tensor claims.
    #[error("bytes {begin}..{end} of the data belong to no tensor")]
    Hole {
        /// First unclaimed byte.
        begin: u64,
        /// End of the unclaimed bytes.
        end: u64,
    },
    /// The tensor ends after the file does.
    #[error("tensor {name} ends at byte {end} of the data, which has {available}: is the file truncated?")]
    Truncated {
        /// The tensor.
        name: String,
        /// Where it ends.
        end: u64,
        /// Bytes there are.
        available: u64,
    },
}

/// What is wrong with a GGUF file.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum GgufError {
    /// The first four bytes are others.
    #[error("not a GGUF file")]
    NotGguf,
    /// A version that is not 2 or 3.
    #[error("GGUF version {0}; supported are 2 and 3")]
    Version(u32),
    /// The file ends inside something.
    #[error("the file ends inside {0}")]
    Truncated(String),
    /// A count that no honest file has.
    #[error("{found} {what}; at most {limit} are read")]
    TooMany {
        /// What is counted.
        what: &'static str,
        /// The count.
        found: u64,
        /// The largest count accepted.
        limit: u64,
    },
    /// A name that appears twice.
    #[error("{0} appears twice")]
    Twice(String),
    /// A string that is not UTF-8.
    #[error("{0} is not UTF-8")]
    NotUtf8(String),
    /// A number that stands for a type and is not known.
    #[error("{what} has type {found}, which is not supported")]
    UnknownType {
        /// The metadata field or tensor.
        what: String,
        /// The number.
        found: u32,
    },
    /// `general.alignment` is not a power of two of at most 65536.
    #[error("general.alignment is {0}, expected a power of two up to 65536")]
    Alignment(u64),
    /// A tensor whose shape is empty, overflows, or does not divide into blocks.
    #[error("tensor {name}: shape {shape:?} (innermost first) does not divide into blocks of {block}")]
    Shape {
        /// The tensor.
        name: String,
        /// Its dimensions as the file orders them.
        shape: Vec<u64>,
        /// Elements in one block.
        block: usize,
    },
    /// A tensor that does not lie inside the file at a multiple of the alignment.
    #[error("tensor {name}: {len} bytes at {offset} of the tensor data, which has {available} bytes")]
    Offset {
        /// The tensor.
        name: String,
        /// Where it begins.
        offset: u64,
        /// Its size.
        len: u64,
        /// Size of all tensor data.
        available: u64,
    },
    /// Two tensors share bytes.
    #[error("tensors {0} and {1} overlap")]
    Overlap(String, String),
}

/// Attaches the path to an I/O error.
pub(crate) fn io_error(path: &Path) -> impl FnOnce(std::io::Error) -> CheckpointError + '_ {
    move |source| CheckpointError::Io { path: path.to_owned(), source }
}
