//! The file of a significance table.
//!
//! It is safetensors, with the tensors `bias` f32 `[layers, distances]`, `count` i64 `[distances]` (samples per distance)
//! and `deviation` f32 `[layers]`, and one metadata entry, [`METADATA_KEY`], whose text is a JSON object: `format`
//! ([`FORMAT`]) and the fields of [`Provenance`]. The same table gives the same bytes.

use super::{MAX_ENTRIES, Provenance, SignificanceTable};
use crate::file::{Kind, TableError, TableProblem, shaped_tensor, tensor, write_aside};
use safetensors::tensor::{Dtype, TensorView};
use std::path::Path;

/// Version of the file format.
pub const FORMAT: &str = "accordion.significance/1";

/// Key of the metadata entry.
pub const METADATA_KEY: &str = "accordion.significance";

const KIND: Kind = Kind {
    name: "significance table",
    format: FORMAT,
    key: METADATA_KEY,
    // Twice what the largest table takes.
    max_bytes: 2 * size_of::<f32>() as u64 * MAX_ENTRIES as u64,
};

impl SignificanceTable {
    /// Writes the table: aside, then renamed to `path`, so that no reader ever sees half of it.
    ///
    /// # Errors
    ///
    /// The folder cannot be written to. What was at `path` is then still there, and nothing else.
    pub fn save(&self, path: &Path) -> Result<(), TableError> {
        let write = || write_aside(path, &self.to_bytes()?);
        write().map_err(|problem| KIND.error(path, problem))
    }

    fn to_bytes(&self) -> Result<Vec<u8>, TableProblem> {
        let bias: Vec<u8> = self.bias.iter().flat_map(|x| x.to_le_bytes()).collect();
        let count: Vec<u8> = self.counts.iter().flat_map(|x| x.to_le_bytes()).collect();
        let deviation: Vec<u8> = self.deviation.iter().flat_map(|x| x.to_le_bytes()).collect();
        let (layers, distances) = (self.num_layers(), self.num_distances());
        let tensors = [
            ("bias", TensorView::new(Dtype::F32, vec![layers, distances], &bias)?),
            ("count", TensorView::new(Dtype::I64, vec![distances], &count)?),
            ("deviation", TensorView::new(Dtype::F32, vec![layers], &deviation)?),
        ];
        KIND.serialize(&self.provenance, tensors)
    }

    /// Reads a table and checks all of it.
    ///
    /// # Errors
    ///
    /// The file cannot be read or is not a valid table of this format.
    pub fn load(path: &Path) -> Result<Self, TableError> {
        let name = format!("{} {}", KIND.name, path.display());
        let read = || Self::from_bytes(name, &KIND.read(path)?);
        read().map_err(|problem| KIND.error(path, problem))
    }

    fn from_bytes(name: String, bytes: &[u8]) -> Result<Self, TableProblem> {
        let (provenance, file) = KIND.parse::<Provenance>(bytes)?;
        let (shape, bias) = tensor(&file, "bias", Dtype::F32, f32::from_le_bytes)?;
        let (layers, distances) = match shape[..] {
            [layers, distances]
                if layers.checked_mul(distances).is_some_and(|entries| (1..=MAX_ENTRIES).contains(&entries)) =>
            {
                (layers, distances)
            }
            _ => {
                let expected = format!("[layers, distances] with 1 to {MAX_ENTRIES} elements");
                return Err(TableProblem::Shape { tensor: "bias".to_owned(), found: shape, expected });
            }
        };
        let count = shaped_tensor(&file, "count", &[distances], Dtype::I64, i64::from_le_bytes)?;
        let deviation = shaped_tensor(&file, "deviation", &[layers], Dtype::F32, f32::from_le_bytes)?;

        let value = |tensor: &str, index, found, expected| TableProblem::Value {
            tensor: tensor.to_owned(),
            index,
            found,
            expected,
        };
        if let Some(i) = bias.iter().position(|x| !x.is_finite()) {
            return Err(value("bias", i, bias[i].into(), "a finite number"));
        }
        if let Some(i) = deviation.iter().position(|x| !x.is_finite() || *x < 0.0) {
            return Err(value("deviation", i, deviation[i].into(), "a finite number not below 0"));
        }
        let mut at_most = i64::MAX;
        for (index, &n) in count.iter().enumerate() {
            let at_least = i64::from(index == 0);
            if !(at_least..=at_most).contains(&n) {
                return Err(value("count", index, n as f64, "positive, then not increasing and not below 0"));
            }
            at_most = n;
        }
        let counts = count.into_iter().map(i64::unsigned_abs).collect();
        Ok(Self { name, counts, bias, deviation, provenance })
    }
}
