//! `NumPy`'s file of several arrays (<https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html>): a ZIP archive
//! without compression, one `.npy` for each.

use crate::tensor::Tensor;
use accordion_graphs::dtype::DType;
use std::io::{self, Seek, Write};
use zip::write::SimpleFileOptions;
use zip::{CompressionMethod, ZipWriter};

/// Header and data of an `.npy` begin at multiples of this.
const ALIGNMENT: usize = 64;
const MAGIC: &[u8] = b"\x93NUMPY\x01\x00";

/// Writes `arrays` by name.
pub(super) fn write<'a>(
    file: impl Write + Seek,
    arrays: impl IntoIterator<Item = (&'a str, &'a Tensor)>,
) -> io::Result<()> {
    let mut archive = ZipWriter::new(file);
    for (name, tensor) in arrays {
        // Room for 64-bit lengths costs nothing and is asked for beforehand.
        let options = SimpleFileOptions::default().compression_method(CompressionMethod::Stored).large_file(true);
        archive.start_file(format!("{name}.npy"), options)?;
        archive.write_all(&header(tensor)?)?;
        archive.write_all(tensor.bytes())?;
    }
    archive.finish()?.flush()
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
    let unpadded = MAGIC.len() + 2 + text.len() + 1;
    text.extend(std::iter::repeat_n(' ', unpadded.next_multiple_of(ALIGNMENT) - unpadded));
    text.push('\n');
    let length = u16::try_from(text.len()).map_err(io::Error::other)?;
    Ok([MAGIC, &length.to_le_bytes(), text.as_bytes()].concat())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use std::io::{Cursor, Read};

    #[test]
    fn an_array_is_header_and_elements() {
        let tensor = Tensor::from_i64([2, 1], vec![5, -1]).unwrap();
        let mut bytes = Cursor::new(Vec::new());
        write(&mut bytes, [("a.b", &tensor)]).unwrap();
        let mut archive = zip::ZipArchive::new(bytes).unwrap();
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
        }
    }
}
