//! The flags of `export` that say what numbers a bundle computes with.

use accordion::precision::Recipe;
use accordion_graphs::precision::Precision;
use clap::{Args, ValueEnum};

#[derive(Debug, Args)]
pub(super) struct PrecisionArguments {
    /// What numbers the graphs compute with
    #[arg(long, value_enum, default_value_t = PrecisionName::Fp32)]
    precision: PrecisionName,
    /// Weights that share a scale, where weights are in blocks [default: 32 of weight-int4, else 64]
    #[arg(long, value_name = "N")]
    block: Option<usize>,
    /// Matrices that stay as they are: those with this word in their names; may be given several times
    #[arg(long = "keep-float", value_name = "WORD")]
    keep: Vec<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum PrecisionName {
    /// Single precision throughout; the weights are the checkpoint's own files
    Fp32,
    /// 8-bit integers in linear layers, activations with a scale per row as they come
    Int8PerToken,
    /// 8-bit weights with a scale per block, computation in fp32
    WeightInt8,
    /// 4-bit weights with a scale per block, computation in fp32
    WeightInt4,
}

impl PrecisionArguments {
    pub(super) fn recipe(&self) -> Recipe {
        let precision = match self.precision {
            PrecisionName::Fp32 => Precision::Fp32,
            PrecisionName::Int8PerToken => Precision::Int8PerToken,
            PrecisionName::WeightInt8 => Precision::WeightInt8,
            PrecisionName::WeightInt4 => Precision::WeightInt4,
        };
        Recipe { precision, block: self.block, keep: self.keep.clone() }
    }
}
