//! Precision in the graph: what numbers a bundle computes with, and the passes that put them into a graph that was built in
//! fp32.

mod float16;
mod kv_cache;
mod quantize;

pub use crate::onnx::Arithmetic;
pub use float16::{Decision, Keep, float16};
pub use kv_cache::KvCache;
pub use quantize::quantize;

use crate::dtype::DType;
use serde::{Deserialize, Serialize};

/// What numbers a bundle computes with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Precision {
    /// Single precision throughout.
    #[default]
    Fp32,
    /// Half precision, with what would overflow or lose too much in fp32.
    Fp16,
    /// The upper half of fp32, with what would lose too much in fp32.
    Bf16,
    /// Linear layers over 8-bit integers: activations with one scale per tensor, known from calibration.
    Int8,
    /// Linear layers over 8-bit integers: activations with a scale per row, computed as they come.
    Int8PerToken,
    /// Weights as 8-bit integers with a scale per block, computation in fp32.
    WeightInt8,
    /// Weights as 4-bit integers with a scale per block, computation in fp32.
    WeightInt4,
    /// Linear layers over 8-bit floats with one scale per tensor, known from calibration.
    Fp8,
}

impl Precision {
    /// The word for it, in flags, bundles and reports.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Fp32 => "fp32",
            Self::Fp16 => "fp16",
            Self::Bf16 => "bf16",
            Self::Int8 => "int8",
            Self::Int8PerToken => "int8-per-token",
            Self::WeightInt8 => "weight-int8",
            Self::WeightInt4 => "weight-int4",
            Self::Fp8 => "fp8",
        }
    }

    /// Whether it needs to know the ranges of activations.
    pub const fn needs_ranges(self) -> bool {
        matches!(self, Self::Int8 | Self::Fp8)
    }
}

impl std::fmt::Display for Precision {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(self.name())
    }
}

/// How one matrix of a linear layer is stored and multiplied with. The parts of matrix `M` are tensors called `M.int8`,
/// `M.scale` and so on: see [`MatrixForm::parts`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "form")]
pub enum MatrixForm {
    /// 8-bit integers with a scale per row, times 8-bit activations with one scale.
    Int8 {
        /// Whether activations are multiplied by factors of their columns first, and the matrix was divided by them.
        smoothed: bool,
    },
    /// 8-bit integers with a scale per row, times 8-bit activations with a scale per row.
    Int8PerToken {
        /// As above.
        smoothed: bool,
    },
    /// Integers with a scale for every `block` entries of a row, times activations as they are.
    Block {
        /// 8 or 4.
        bits: u8,
        /// Entries that share a scale; divides the row.
        block: usize,
    },
    /// 8-bit floats with one scale, times 8-bit floats with one scale.
    Fp8,
}

/// A tensor that a quantized matrix consists of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum MatrixPart {
    /// The entries, `[out, in]`.
    Entries,
    /// What entries count in units of.
    Scale,
    /// What activations count in units of, without dimensions.
    InputScale,
    /// What activations are multiplied by first, and columns of the matrix were divided by, `[in]`.
    Smoothing,
}

impl MatrixForm {
    /// Element type of the entries.
    pub const fn entries(self) -> DType {
        match self {
            Self::Int8 { .. } | Self::Int8PerToken { .. } | Self::Block { bits: 8, .. } => DType::I8,
            Self::Block { .. } => DType::I4,
            Self::Fp8 => DType::F8E4m3,
        }
    }

    /// The tensors that a matrix `[out, in]` in this form consists of, with their types and shapes.
    pub fn parts(self, [out, inner]: [usize; 2]) -> Vec<(MatrixPart, DType, Vec<usize>)> {
        use MatrixPart::{Entries, InputScale, Scale, Smoothing};
        let entries = (Entries, self.entries(), vec![out, inner]);
        let per_row = (Scale, DType::F32, vec![out]);
        let smoothing = |smoothed: bool| smoothed.then(|| (Smoothing, DType::F32, vec![inner]));
        match self {
            Self::Int8 { smoothed } => {
                [entries, per_row, (InputScale, DType::F32, vec![])].into_iter().chain(smoothing(smoothed)).collect()
            }
            Self::Int8PerToken { smoothed } => [entries, per_row].into_iter().chain(smoothing(smoothed)).collect(),
            Self::Block { block, .. } => vec![entries, (Scale, DType::F32, vec![out, inner / block.max(1)])],
            Self::Fp8 => vec![entries, (Scale, DType::F32, vec![]), (InputScale, DType::F32, vec![])],
        }
    }

    /// The name of `part` of the matrix `matrix`.
    pub fn part_name(self, matrix: &str, part: MatrixPart) -> String {
        let suffix = match part {
            MatrixPart::Entries => match self.entries() {
                DType::I4 => "int4",
                DType::F8E4m3 => "fp8",
                _ => "int8",
            },
            MatrixPart::Scale => "scale",
            MatrixPart::InputScale => "input_scale",
            MatrixPart::Smoothing => "smoothing",
        };
        format!("{matrix}.{suffix}")
    }
}
