//! `NumPy`'s file of several arrays (<https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html>): a ZIP archive,
//! one `.npy` for each.

use crate::tensor::{Tensor, TensorError};
use accordion_graphs::dtype::DType;
use half::f16;
use std::fs::File;
use std::io::{self, Read, Seek, Write};
use std::sync::Arc;
use zip::write::SimpleFileOptions;
use zip::{CompressionMethod, ZipArchive, ZipWriter};

/// Header and data of an `.npy` begin at multiples of this.
const ALIGNMENT: usize = 64;
const MAGIC: &[u8] = b"\x93NUMPY";
const VERSION: &[u8] = &[1, 0];
/// A header says a type and a shape; anything longer is none.
const MAX_HEADER: usize = 1 << 16;
const MAX_DIMS: usize = 32;

/// Writes arrays one after the other, without compression.
pub(crate) struct Writer<W: Write + Seek>(ZipWriter<W>);

impl<W: Write + Seek> Writer<W> {
    pub(crate) fn new(file: W) -> Self {
        Self(ZipWriter::new(file))
    }

    /// Appends `tensor`, whose name is no other one's.
    pub(crate) fn write(&mut self, name: &str, tensor: &Tensor) -> io::Result<()> {
        // Room for 64-bit lengths costs nothing and is asked for beforehand.
        let options = SimpleFileOptions::default().compression_method(CompressionMethod::Stored).large_file(true);
        self.0.start_file(format!("{name}.npy"), options)?;
        self.0.write_all(&header(tensor)?)?;
        self.0.write_all(tensor.bytes())
    }

    /// Completes the file and returns it.
    pub(crate) fn finish(self) -> io::Result<W> {
        let mut file = self.0.finish()?;
        file.flush()?;
        Ok(file)
    }
}

/// Writes `arrays` by name.
pub(crate) fn write<'a>(
    file: impl Write + Seek,
    arrays: impl IntoIterator<Item = (&'a str, &'a Tensor)>,
) -> io::Result<()> {
    let mut writer = Writer::new(file);
    arrays.into_iter().try_for_each(|(name, tensor)| writer.write(name, tensor))?;
    writer.finish().map(drop)
}

fn header(tensor: &Tensor) -> io::Result<Vec<u8>> {
    let descr = match tensor.dtype() {
        DType::F32 => "<f4",
        DType::F16 => "<f2",
        DType::I64 => "<i8",
        DType::I32 => "<i4",
        DType::Bool => "|b1",
        DType::U8 => "|u1",
        DType::I8 => "|i1",
        other @ (DType::Bf16 | DType::I4 | DType::F8E4m3) => {
            return Err(io::Error::other(format!("NumPy has no {other}")));
        }
    };
    // A tuple of one needs the comma behind it.
    let dims: Vec<String> = tensor.shape().iter().map(|n| format!("{n},")).collect();
    let mut text = format!("{{'descr': '{descr}', 'fortran_order': False, 'shape': ({}), }}", dims.join(" "));
    let unpadded = MAGIC.len() + VERSION.len() + 2 + text.len() + 1;
    text.extend(std::iter::repeat_n(' ', unpadded.next_multiple_of(ALIGNMENT) - unpadded));
    text.push('\n');
    let length = u16::try_from(text.len()).map_err(io::Error::other)?;
    Ok([MAGIC, VERSION, &length.to_le_bytes(), text.as_bytes()].concat())
}

/// Why an array cannot be read.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NpzError {
    /// The archive or an entry is damaged.
    #[error(transparent)]
    Zip(#[from] zip::result::ZipError),
    /// The data end early, or the disk fails.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// The header is not that of an array.
    #[error("the header is not that of an .npy file: {0}")]
    Header(&'static str),
    /// Elements that there is no type for here.
    #[error("its elements are '{0}', expected one of '<f2', '<f4', '<f8', '<i4', '<i8', '|b1', '|i1' and '|u1'")]
    Elements(String),
    /// Columns first.
    #[error("it is stored in Fortran order; save numpy.ascontiguousarray of it")]
    Fortran,
    /// The data are not as long as the shape says.
    #[error("it has {found} bytes of data, and its shape {shape:?} needs {expected}")]
    Length {
        /// Bytes there are.
        found: u64,
        /// Bytes it takes.
        expected: u64,
        /// The shape.
        shape: Vec<usize>,
    },
    /// The elements do not make a tensor.
    #[error(transparent)]
    Tensor(#[from] TensorError),
}

/// Names and shapes of arrays.
type Named = Vec<(String, Vec<usize>)>;

/// An archive that is read one array at a time.
pub(crate) struct Archive(ZipArchive<File>);

/// What an array's header says.
#[derive(Debug, PartialEq, Eq)]
struct Header {
    elements: String,
    shape: Vec<usize>,
    /// Bytes of the data.
    len: u64,
}

impl Archive {
    /// Opens `file`, and returns the names and shapes of its arrays in the order in which they lie there.
    pub(crate) fn open(file: File) -> Result<(Self, Named), (String, NpzError)> {
        let mut archive = ZipArchive::new(file).map_err(|e| (String::new(), e.into()))?;
        let mut arrays = Vec::new();
        for index in 0..archive.len() {
            let mut entry = archive.by_index(index).map_err(|e| (String::new(), e.into()))?;
            let Some(name) = entry.name().strip_suffix(".npy").map(str::to_owned) else { continue };
            let header = Header::read(&mut entry).map_err(|e| (name.clone(), e))?;
            arrays.push((name, header.shape));
        }
        Ok((Self(archive), arrays))
    }

    /// The array called `name`. Numbers of double precision are rounded to single precision.
    pub(crate) fn read(&mut self, name: &str) -> Result<Tensor, NpzError> {
        let mut entry = self.0.by_name(&format!("{name}.npy"))?;
        let header = Header::read(&mut entry)?;
        let mut bytes = Vec::new();
        // Memory grows with what is there, not with what the header claims.
        let found = entry.take(header.len.saturating_add(1)).read_to_end(&mut bytes)? as u64;
        if found != header.len {
            return Err(NpzError::Length { found, expected: header.len, shape: header.shape });
        }
        header.tensor(bytes)
    }
}

impl Header {
    fn read(source: &mut impl Read) -> Result<Self, NpzError> {
        let mut start = [0; 8];
        source.read_exact(&mut start)?;
        let [magic @ .., major, _] = start;
        if magic != MAGIC {
            return Err(NpzError::Header("it does not begin with \\x93NUMPY"));
        }
        let mut length = [0; 4];
        match major {
            1 => source.read_exact(&mut length[..2])?,
            2 | 3 => source.read_exact(&mut length)?,
            _ => return Err(NpzError::Header("its version is none of 1, 2 and 3")),
        }
        let length = u32::from_le_bytes(length) as usize;
        if length > MAX_HEADER {
            return Err(NpzError::Header("it is longer than 64 KiB"));
        }
        let mut text = vec![0; length];
        source.read_exact(&mut text)?;
        let text = String::from_utf8(text).map_err(|_| NpzError::Header("it is not text"))?;
        Self::parse(&text)
    }

    /// Parses the Python dictionary `{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3), }`.
    fn parse(text: &str) -> Result<Self, NpzError> {
        let value = |key: &str| {
            let (_, rest) =
                text.split_once(&format!("'{key}':")).or_else(|| text.split_once(&format!("\"{key}\":")))?;
            Some(rest.trim_start())
        };
        let descr = value("descr").and_then(|rest| rest.strip_prefix(['\'', '"'])?.split(['\'', '"']).next());
        let descr = descr.ok_or(NpzError::Header("it has no 'descr' of one type"))?;
        let columns_first = value("fortran_order").ok_or(NpzError::Header("it has no 'fortran_order'"))?;
        let dims = value("shape").and_then(|rest| rest.strip_prefix('(')?.split_once(')'));
        let (dims, _) = dims.ok_or(NpzError::Header("it has no 'shape'"))?;
        let dims = dims.split(',').map(str::trim).filter(|dim| !dim.is_empty());
        let shape: Result<Vec<usize>, _> = dims.map(str::parse).collect();
        let shape = shape.map_err(|_| NpzError::Header("its 'shape' is not a tuple of lengths"))?;
        if shape.len() > MAX_DIMS {
            return Err(NpzError::Header("its 'shape' has more than 32 dimensions"));
        }
        if columns_first.starts_with("True") && shape.iter().filter(|&&dim| dim != 1).count() > 1 {
            return Err(NpzError::Fortran);
        }
        let size = match descr {
            "<f8" | "<i8" => 8,
            "<f4" | "<i4" => 4,
            "<f2" => 2,
            "|b1" | "|u1" | "|i1" => 1,
            other => return Err(NpzError::Elements(other.to_owned())),
        };
        let len = shape.iter().try_fold(size, |n: u64, &dim| n.checked_mul(dim as u64));
        let len = len.ok_or(NpzError::Header("its 'shape' is larger than any memory"))?;
        Ok(Self { elements: descr.to_owned(), shape, len })
    }

    fn tensor(self, bytes: Vec<u8>) -> Result<Tensor, NpzError> {
        fn each<const N: usize, T>(bytes: &[u8], one: impl Fn([u8; N]) -> T) -> Vec<T> {
            bytes.as_chunks::<N>().0.iter().map(|&b| one(b)).collect()
        }
        let Self { elements, shape, .. } = self;
        Ok(match elements.as_str() {
            "<f8" => Tensor::from_f32(shape, each(&bytes, |b| f64::from_le_bytes(b) as f32))?,
            "<f4" => Tensor::from_f32(shape, each(&bytes, f32::from_le_bytes))?,
            "<f2" => Tensor::from_storage(DType::F16, shape, Arc::new(each(&bytes, f16::from_le_bytes)), 0)?,
            "<i8" => Tensor::from_i64(shape, each(&bytes, i64::from_le_bytes))?,
            "<i4" => Tensor::from_i32(shape, each(&bytes, i32::from_le_bytes))?,
            "|b1" => Tensor::from_storage(DType::Bool, shape, Arc::new(bytes), 0)?,
            "|i1" => Tensor::from_storage(DType::I8, shape, Arc::new(each(&bytes, i8::from_le_bytes)), 0)?,
            _ => Tensor::from_storage(DType::U8, shape, Arc::new(bytes), 0)?,
        })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use std::io::Cursor;

    #[test]
    fn an_array_is_header_and_elements() {
        let tensor = Tensor::from_i64([2, 1], vec![5, -1]).unwrap();
        let mut bytes = Cursor::new(Vec::new());
        write(&mut bytes, [("a.b", &tensor)]).unwrap();
        let mut archive = ZipArchive::new(bytes).unwrap();
        let mut npy = Vec::new();
        archive.by_name("a.b.npy").unwrap().read_to_end(&mut npy).unwrap();
        let (head, data) = npy.split_at(npy.len() - 16);
        assert_eq!(data, [5_i64.to_le_bytes(), (-1_i64).to_le_bytes()].concat());
        assert_eq!((head.len() % ALIGNMENT, head.last()), (0, Some(&b'\n')));
        assert_eq!(usize::from(head[8]) + 10, head.len());
        let text = std::str::from_utf8(&head[10..]).unwrap();
        assert_eq!(text.trim_end(), "{'descr': '<i8', 'fortran_order': False, 'shape': (2, 1,), }");
    }

    #[test]
    fn shapes_are_tuples_of_any_length() {
        for (shape, expected) in [(vec![], "()"), (vec![1], "(1,)"), (vec![0, 3], "(0, 3,)")] {
            let tensor = Tensor::from_f32(shape.clone(), vec![0.0; shape.iter().product()]).unwrap();
            let text = String::from_utf8_lossy(&header(&tensor).unwrap()).into_owned();
            assert!(text.contains(&format!("'shape': {expected}, ")), "{text}");
            assert_eq!(Header::read(&mut header(&tensor).unwrap().as_slice()).unwrap().shape, shape);
        }
    }

    #[test]
    fn what_is_written_is_read() {
        let halves = Tensor::from_storage(DType::F16, [2], Arc::new(vec![f16::ONE, f16::NEG_INFINITY]), 0).unwrap();
        let flags = Tensor::from_storage(DType::Bool, [3], Arc::new(vec![1_u8, 0, 1]), 0).unwrap();
        let tensors = [
            ("floats", Tensor::from_f32([1, 2], vec![1.5, f32::NAN]).unwrap()),
            ("ids", Tensor::from_i64([0], vec![]).unwrap()),
            ("one", Tensor::from_i32([], vec![-7]).unwrap()),
            ("halves", halves),
            ("flags", flags),
        ];
        let mut file = tempfile::tempfile().unwrap();
        write(&mut file, tensors.iter().map(|(name, tensor)| (*name, tensor))).unwrap();
        let (mut archive, arrays) = Archive::open(file).map_err(|(_, e)| e).unwrap();
        let expected: Vec<_> = tensors.iter().map(|(name, t)| ((*name).to_owned(), t.shape().to_vec())).collect();
        assert_eq!(arrays, expected);
        for (name, tensor) in &tensors {
            let found = archive.read(name).unwrap();
            assert_eq!((found.dtype(), found.shape(), found.bytes()), (tensor.dtype(), tensor.shape(), tensor.bytes()));
        }
    }

    #[test]
    fn headers_that_lie_are_refused() {
        let header = |descr: &str, order: &str, shape: &str| {
            Header::parse(&format!("{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}, }}"))
        };
        assert_eq!(header("'<f8'", "False", "(2, 3)").unwrap().len, 48);
        assert!(matches!(header("'>f4'", "False", "(2,)"), Err(NpzError::Elements(_))));
        assert!(matches!(header("'<f4'", "True", "(2, 3)"), Err(NpzError::Fortran)));
        assert_eq!(header("'<f4'", "True", "(1, 3)").unwrap().len, 12);
        for (descr, shape) in [
            ("[('a', '<f4')]", "(2,)"),
            ("'<f4'", "(-2,)"),
            ("'<f4'", "(2"),
            ("'<f4'", "(9223372036854775807, 9223372036854775807)"),
        ] {
            assert!(matches!(header(descr, "False", shape), Err(NpzError::Header(_))), "{descr} {shape}");
        }
        let mut file = [MAGIC, &[2, 0], &u32::MAX.to_le_bytes()].concat();
        assert!(matches!(Header::read(&mut file.as_slice()), Err(NpzError::Header(_))));
        file[0] = 0;
        assert!(matches!(Header::read(&mut file.as_slice()), Err(NpzError::Header(_))));
    }

    #[test]
    fn data_of_another_length_are_refused() {
        let mut writer = ZipWriter::new(tempfile::tempfile().unwrap());
        for (name, count) in [("short.npy", 1), ("long.npy", 4)] {
            writer.start_file(name, SimpleFileOptions::default()).unwrap();
            writer.write_all(&header(&Tensor::from_f32([2], vec![0.0; 2]).unwrap()).unwrap()).unwrap();
            writer.write_all(&vec![0; 4 * count]).unwrap();
        }
        let (mut archive, _) = Archive::open(writer.finish().unwrap()).map_err(|(_, e)| e).unwrap();
        for name in ["short", "long"] {
            assert!(matches!(archive.read(name), Err(NpzError::Length { expected: 8, .. })), "{name}");
        }
    }
}
