//! The tensor that travels between checkpoints, engines, the reference and the comparison: row-major, cheap to clone, on
//! the host or wherever an engine left it until the host reads it.

mod parts;

pub use parts::Runs;

use accordion_graphs::dtype::DType;
use accordion_graphs::fp8;
use half::{bf16, f16};
use std::any::Any;
use std::fmt;
use std::ops::Range;
use std::sync::Arc;

/// Memory that a [`Tensor`] may point into: a vector, a file mapping, a value a runtime owns, a buffer on a device.
pub trait Storage: Any + Send + Sync {
    /// All bytes of the storage, aligned for the element type of the tensors that point into it. Those of a device are
    /// copied here first; where [`Self::fetch`] would fail, every bit is set, which as a floating-point number is NaN.
    fn bytes(&self) -> &[u8];

    /// How many bytes there are.
    fn byte_len(&self) -> usize {
        self.bytes().len()
    }

    /// Whether a tensor may begin at the byte `offset` if its first element must lie at a multiple of `alignment`.
    fn allows(&self, offset: usize, alignment: usize) -> bool {
        (self.bytes().as_ptr().addr() + offset).is_multiple_of(alignment)
    }

    /// Makes sure that the bytes are on the host.
    ///
    /// # Errors
    ///
    /// What the device says.
    fn fetch(&self) -> Result<(), String> {
        Ok(())
    }

    /// New memory of `byte_len` bytes where this one lies, which `pieces` of this and of others fill; nothing if this is the
    /// host's, or one of the others lies elsewhere.
    ///
    /// # Errors
    ///
    /// What the device says.
    fn gathered(&self, _byte_len: usize, _pieces: &[(&dyn Storage, Runs)]) -> MaybeStorage {
        Ok(None)
    }
}

/// What [`Storage::gathered`] returns.
pub type MaybeStorage = Result<Option<Arc<dyn Storage>>, String>;

macro_rules! vector_storage {
    ($($element:ty),*) => {$(
        impl Storage for Vec<$element> {
            fn bytes(&self) -> &[u8] {
                // SAFETY: plain numbers have no padding and every byte of them is initialised; the length is the
                // vector's own.
                unsafe { std::slice::from_raw_parts(self.as_ptr().cast(), std::mem::size_of_val(self.as_slice())) }
            }
        }
    )*};
}
vector_storage!(u8, i8, f32, f16, bf16, i64, i32, u64);

/// Bytes of the host that are aligned for every element type.
pub(crate) struct HostBytes(Vec<u64>);

impl HostBytes {
    /// `byte_len` bytes, and as many more as make whole words.
    pub(crate) fn filled(byte_len: usize, byte: u8) -> Self {
        Self(vec![u64::from_ne_bytes([byte; 8]); byte_len.div_ceil(8)])
    }

    pub(crate) fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: integers have no padding, and every bit pattern is one; the length is the vector's own.
        unsafe { std::slice::from_raw_parts_mut(self.0.as_mut_ptr().cast(), size_of_val(self.0.as_slice())) }
    }
}

impl Storage for HostBytes {
    fn bytes(&self) -> &[u8] {
        self.0.bytes()
    }
}

/// A dense row-major tensor. Clones share the memory.
#[derive(Clone)]
pub struct Tensor {
    dtype: DType,
    shape: Vec<usize>,
    storage: Arc<dyn Storage>,
    offset: usize,
}

/// Why a [`Tensor`] could not be made or read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TensorError {
    /// The storage is too short for the shape, or the byte count of the shape overflows.
    #[error("a {dtype} tensor of shape {shape:?} does not fit into {available} bytes")]
    TooShort {
        /// Element type.
        dtype: DType,
        /// Requested shape.
        shape: Vec<usize>,
        /// Bytes there are from the offset on.
        available: usize,
    },
    /// The first element is not aligned.
    #[error("a {dtype} tensor cannot start at this address: it is not a multiple of {} bytes", dtype.size())]
    Misaligned {
        /// Element type.
        dtype: DType,
    },
    /// It lies on a device and cannot be copied to the host.
    #[error("a tensor cannot be copied from the device: {0}")]
    Device(String),
    /// They cannot be joined: there are none, they differ in type or in another dimension, or elements share a byte.
    #[error("tensors cannot be joined along axis {axis}: {}", parts.join(", "))]
    Unlike {
        /// The dimension.
        axis: usize,
        /// Their types and shapes.
        parts: Vec<String>,
    },
    /// It has no such entries, or elements of others share their bytes.
    #[error("a tensor of shape {shape:?} has no entries {range:?} along axis {axis} that can be taken")]
    Outside {
        /// The dimension.
        axis: usize,
        /// The entries asked for.
        range: Range<usize>,
        /// Its shape.
        shape: Vec<usize>,
    },
    /// Read as another type than it has.
    #[error("the tensor is {found}, expected {expected}")]
    WrongType {
        /// Its type.
        found: DType,
        /// The type it was read as.
        expected: DType,
    },
}

macro_rules! typed_view {
    ($view:ident, $from:ident, $element:ty, $dtype:ident) => {
        #[doc = concat!("The elements of a `", stringify!($element), "` tensor.\n\n# Errors\n\nThe tensor has another type.")]
        pub fn $view(&self) -> Result<&[$element], TensorError> {
            if self.dtype != DType::$dtype {
                return Err(TensorError::WrongType { found: self.dtype, expected: DType::$dtype });
            }
            self.storage.fetch().map_err(TensorError::Device)?;
            let bytes = self.bytes();
            // SAFETY: `from_storage` checked the alignment of the first element and that all of them lie inside the
            // storage, which `self` keeps alive; every bit pattern is a valid number.
            Ok(unsafe { std::slice::from_raw_parts(bytes.as_ptr().cast(), bytes.len() / size_of::<$element>()) })
        }

        #[doc = concat!("A tensor over a vector of `", stringify!($element), "`.\n\n# Errors\n\nThe vector is shorter than the shape.")]
        pub fn $from(shape: impl Into<Vec<usize>>, data: Vec<$element>) -> Result<Self, TensorError> {
            Self::from_storage(DType::$dtype, shape, Arc::new(data), 0)
        }
    };
}

impl Tensor {
    /// A tensor over `storage`, starting `offset` bytes into it.
    ///
    /// # Errors
    ///
    /// The shape does not fit, or the first element is not aligned.
    pub fn from_storage(
        dtype: DType,
        shape: impl Into<Vec<usize>>,
        storage: Arc<dyn Storage>,
        offset: usize,
    ) -> Result<Self, TensorError> {
        let shape = shape.into();
        let available = storage.byte_len().saturating_sub(offset);
        let fits = dtype.bytes_of_shape(&shape).is_some_and(|needed| needed <= available);
        if !fits {
            return Err(TensorError::TooShort { dtype, shape, available });
        }
        if !storage.allows(offset, dtype.size()) {
            return Err(TensorError::Misaligned { dtype });
        }
        Ok(Self { dtype, shape, storage, offset })
    }

    typed_view!(as_f32, from_f32, f32, F32);
    typed_view!(as_i64, from_i64, i64, I64);
    typed_view!(as_i32, from_i32, i32, I32);
    typed_view!(as_i8, from_i8, i8, I8);

    /// Element type.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Dimensions, outermost first.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// Whether there is no element.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The raw little-endian bytes; those of a device are copied to the host, once.
    pub fn bytes(&self) -> &[u8] {
        &self.storage.bytes()[self.offset..self.offset + self.byte_len()]
    }

    /// How many bytes the elements take.
    pub fn byte_len(&self) -> usize {
        self.dtype.bytes_of_shape(&self.shape).unwrap_or(0)
    }

    /// The same tensor, whose bytes the host can read from now on.
    ///
    /// # Errors
    ///
    /// They cannot be copied from the device.
    pub fn on_host(self) -> Result<Self, TensorError> {
        self.storage.fetch().map_err(TensorError::Device)?;
        Ok(self)
    }

    /// The memory and the byte at which the tensor begins, if the memory is of the kind `S`: how an engine recognises what
    /// it has made itself.
    pub fn stored_in<S: Storage>(&self) -> Option<(&S, usize)> {
        let storage: &dyn Any = self.storage.as_ref();
        storage.downcast_ref().map(|storage| (storage, self.offset))
    }

    /// Rows `range` of the first dimension, sharing the memory. A row must begin at a byte of its own.
    ///
    /// # Panics
    ///
    /// The tensor is a scalar or the range does not lie inside the first dimension.
    #[must_use]
    pub fn rows(&self, range: Range<usize>) -> Self {
        assert!(
            range.start <= range.end && range.end <= self.shape[0],
            "rows {range:?} of a tensor of shape {:?}",
            self.shape
        );
        let row_bytes = self.byte_len().checked_div(self.shape[0]).unwrap_or(0);
        let mut shape = self.shape.clone();
        shape[0] = range.len();
        Self {
            dtype: self.dtype,
            shape,
            storage: Arc::clone(&self.storage),
            offset: self.offset + range.start * row_bytes,
        }
    }

    /// The same elements under another shape.
    ///
    /// # Errors
    ///
    /// The shape asks for more elements than there are.
    pub fn reshaped(&self, shape: impl Into<Vec<usize>>) -> Result<Self, TensorError> {
        let shape = shape.into();
        match self.dtype.bytes_of_shape(&shape) {
            Some(n) if n == self.byte_len() => Ok(Self { shape, ..self.clone() }),
            _ => Err(TensorError::TooShort { dtype: self.dtype, shape, available: self.byte_len() }),
        }
    }

    /// Every element as `f32`, whatever the type (booleans as 0 and 1).
    pub fn to_f32(&self) -> Vec<f32> {
        fn each<const N: usize>(bytes: &[u8], convert: impl Fn([u8; N]) -> f32) -> Vec<f32> {
            bytes.as_chunks::<N>().0.iter().map(|&b| convert(b)).collect()
        }
        let bytes = self.bytes();
        match self.dtype {
            DType::F32 => each(bytes, f32::from_le_bytes),
            DType::F16 => each(bytes, |b| f16::from_le_bytes(b).to_f32()),
            DType::Bf16 => each(bytes, |b| bf16::from_le_bytes(b).to_f32()),
            DType::I64 => each(bytes, |b| i64::from_le_bytes(b) as f32),
            DType::I32 => each(bytes, |b| i32::from_le_bytes(b) as f32),
            DType::Bool | DType::U8 => each(bytes, |[b]| f32::from(b)),
            DType::I8 => each(bytes, |b| f32::from(i8::from_le_bytes(b))),
            DType::I4 => {
                // Shifted up and down again, so that the sign is the upper bit's.
                let pairs = bytes.iter().flat_map(|&b| [((b << 4) as i8) >> 4, (b as i8) >> 4]);
                pairs.take(self.len()).map(f32::from).collect()
            }
            DType::F8E4m3 => each(bytes, |[b]| fp8::to_f32(b)),
        }
    }
}

impl fmt::Debug for Tensor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {:?}", self.dtype, self.shape)
    }
}
