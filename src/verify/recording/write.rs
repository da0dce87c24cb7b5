//! Writing a recording part by part: memory holds one part, the disk the rest.

use super::{Format, VerifyError, input_arrays, problem};
use crate::npz;
use crate::taps::TapSink;
use crate::tensor::Tensor;
use crate::verify::judge::Detail;
use crate::verify::parts::{Part, Parts, computed_order};
use accordion_graphs::dtype::DType;
use accordion_graphs::plan::PromptLengths;
use safetensors::tensor::Dtype;
use serde_json::{Map, Value, json};
use std::fs::File;
use std::io::{self, BufWriter, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use tempfile::NamedTempFile;

/// The header's length and the data begin at multiples of this.
const ALIGNMENT: usize = 64;

/// A side's sink that writes what it is given into a file. The file is there once all is written, and not before.
pub struct Recorder {
    path: PathBuf,
    detail: Detail,
    sample: String,
    part: Part,
    arrays: Arrays,
}

enum Arrays {
    Npz(Box<npz::Writer<NamedTempFile>>),
    /// The header stands before the data, and is known when all of them are: they wait in a file of their own.
    Safetensors {
        target: NamedTempFile,
        data: BufWriter<File>,
        header: Map<String, Value>,
        len: u64,
    },
}

impl Recorder {
    /// Starts the recording `path` of the taps that `detail` includes; the extension says how it is stored.
    ///
    /// # Errors
    ///
    /// It is called otherwise, or its folder cannot be written into.
    pub fn create(path: &Path, detail: Detail) -> Result<Self, VerifyError> {
        let failed = |source| VerifyError::Io { path: path.to_owned(), source };
        let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let format = Format::of(path)?;
        let mut builder = tempfile::Builder::new();
        builder.prefix(".accordion-");
        #[cfg(unix)]
        // As an ordinary new file, subject to the umask; temporary files are their owner's only.
        builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
        let target = builder.tempfile_in(folder).map_err(failed)?;
        let arrays = match format {
            Format::Npz => Arrays::Npz(Box::new(npz::Writer::new(target))),
            Format::Safetensors => Arrays::Safetensors {
                target,
                data: BufWriter::new(tempfile::tempfile_in(folder).map_err(failed)?),
                header: Map::from_iter([("__metadata__".to_owned(), json!({ "format": "pt" }))]),
                len: 0,
            },
        };
        let (path, sample) = (path.to_owned(), String::new());
        Ok(Self { path, detail, sample, part: Part::new(), arrays })
    }

    /// Begins a sample, whose names will begin with `sample`: what was asked.
    ///
    /// # Errors
    ///
    /// The disk is full or fails.
    pub fn begin(&mut self, sample: &str, lengths: PromptLengths, ids: &[u32]) -> Result<(), VerifyError> {
        sample.clone_into(&mut self.sample);
        for (name, array) in input_arrays(lengths, ids)? {
            self.write(name, &array)?;
        }
        Ok(())
    }

    /// Completes the file and gives it its name.
    ///
    /// # Errors
    ///
    /// The disk is full or fails. Nothing is left behind then.
    pub fn finish(self) -> Result<(), VerifyError> {
        let failed = |source| VerifyError::Io { path: self.path.clone(), source };
        let target = match self.arrays {
            Arrays::Npz(writer) => writer.finish().map_err(failed)?,
            Arrays::Safetensors { target, data, header, .. } => joined(target, data, header).map_err(failed)?,
        };
        target.persist(&self.path).map_err(|error| failed(error.error))?;
        Ok(())
    }

    fn write(&mut self, name: &str, value: &Tensor) -> Result<(), VerifyError> {
        let name = format!("{}{name}", self.sample);
        let written = match &mut self.arrays {
            Arrays::Npz(writer) if matches!(value.dtype(), DType::Bf16 | DType::F8E4m3) => {
                writer.write(&name, &Tensor::from_f32(value.shape(), value.to_f32())?)
            }
            Arrays::Npz(writer) => writer.write(&name, value),
            Arrays::Safetensors { data, header, len, .. } => {
                let end = *len + value.bytes().len() as u64;
                let dtype = stored_type(value.dtype());
                let entry = json!({ "dtype": dtype, "shape": value.shape(), "data_offsets": [*len, end] });
                if header.insert(name.clone(), entry).is_some() {
                    return Err(problem(&self.path, format!("{name} would be there twice")));
                }
                *len = end;
                data.write_all(value.bytes())
            }
        };
        written.map_err(|source| VerifyError::Io { path: self.path.clone(), source })
    }
}

/// Header and data in `target`.
fn joined(mut target: NamedTempFile, data: BufWriter<File>, header: Map<String, Value>) -> io::Result<NamedTempFile> {
    let mut data = data.into_inner()?;
    let mut json = Value::Object(header).to_string().into_bytes();
    json.resize((8 + json.len()).next_multiple_of(ALIGNMENT) - 8, b' ');
    target.write_all(&(json.len() as u64).to_le_bytes())?;
    target.write_all(&json)?;
    data.seek(SeekFrom::Start(0))?;
    io::copy(&mut data, target.as_file_mut())?;
    Ok(target)
}

/// The name of an element type in safetensors.
fn stored_type(dtype: DType) -> Dtype {
    match dtype {
        DType::F32 => Dtype::F32,
        DType::F16 => Dtype::F16,
        DType::Bf16 => Dtype::BF16,
        DType::I64 => Dtype::I64,
        DType::I32 => Dtype::I32,
        DType::Bool => Dtype::BOOL,
        // Two elements to a byte: what a file holds are the bytes.
        DType::U8 | DType::I4 => Dtype::U8,
        DType::I8 => Dtype::I8,
        DType::F8E4m3 => Dtype::F8_E4M3,
    }
}

impl TapSink for Recorder {
    fn wants(&self, name: &str) -> bool {
        self.detail.includes(name)
    }

    fn record(&mut self, name: &str, value: Tensor) {
        self.part.insert(name.to_owned(), value);
    }
}

impl Parts for Recorder {
    fn end_part(&mut self, _name: &str) -> Result<(), VerifyError> {
        let part = std::mem::take(&mut self.part);
        for name in computed_order(part.keys()) {
            self.write(name, &part[name])?;
        }
        Ok(())
    }
}
