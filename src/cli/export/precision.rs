//! The flags of `export` that say what numbers a bundle computes with.

use accordion::precision::Recipe;
use accordion_calibration::ranges::Calibrator;
use accordion_graphs::precision::{KvCache, Precision};
use clap::{Args, ValueEnum};
use std::path::PathBuf;

#[derive(Debug, Args)]
pub(super) struct PrecisionArguments {
    /// What numbers the graphs compute with
    #[arg(long, value_enum, default_value_t = PrecisionName::Fp32)]
    precision: PrecisionName,
    /// Weights that share a scale, where weights are in blocks [default: 32 of weight-int4, else 64]
    #[arg(long, value_name = "N")]
    block: Option<usize>,
    /// Ranges of activations, from `accordion calibrate ranges`: what int8 and fp8 need, and int8-per-token and
    /// fp16 are better with
    #[arg(long, value_name = "FILE")]
    ranges: Option<PathBuf>,
    /// How clipping values are taken from the ranges: minmax, average, percentile=P, entropy or mse
    #[arg(long, value_name = "NAME", default_value_t = Calibrator::MinMax)]
    calibrator: Calibrator,
    /// Quantize activations as they are, without factors that even out their channels
    #[arg(long)]
    no_smoothing: bool,
    /// Largest squared error of a linear layer that is quantized, relative to its output: layers beyond it stay as they are
    ///
    /// Measured on the sample of activations in the ranges, with only that layer quantized [default: no limit]
    #[arg(long, value_name = "X", requires = "ranges")]
    max_error: Option<f64>,
    /// Compute in fp32 and round to fp16 or bf16 wherever the graphs would be in it, for a runtime that has no such numbers
    #[arg(long)]
    emulate: bool,
    /// Matrices that stay as they are: those with this word in their names; may be given several times
    #[arg(long, value_name = "WORD")]
    keep_float: Vec<String>,
    /// What numbers keys and values are kept in behind a context, while tokens are decoded
    #[arg(long, value_enum, default_value_t = KvCacheName::Fp32)]
    kv_cache: KvCacheName,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum KvCacheName {
    /// Single precision
    Fp32,
    /// 8-bit integers with a scale per head and channel: a quarter of the memory
    Int8,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum PrecisionName {
    /// Single precision throughout; the weights are the checkpoint's own files
    Fp32,
    /// Half precision, with what would overflow or lose too much in fp32; for target ort-cpu, the weights alone
    Fp16,
    /// Brain floats, likewise
    Bf16,
    /// 8-bit integers in linear layers, activations with one scale per tensor
    Int8,
    /// 8-bit integers in linear layers, activations with a scale per row as they come
    Int8PerToken,
    /// 8-bit weights with a scale per block, computation in fp32
    WeightInt8,
    /// 4-bit weights with a scale per block, computation in fp32
    WeightInt4,
    /// 8-bit floats (E4M3) in linear layers, with one scale per tensor
    Fp8,
}

impl PrecisionArguments {
    pub(super) fn recipe(&self) -> Recipe {
        let precision = match self.precision {
            PrecisionName::Fp32 => Precision::Fp32,
            PrecisionName::Fp16 => Precision::Fp16,
            PrecisionName::Bf16 => Precision::Bf16,
            PrecisionName::Int8 => Precision::Int8,
            PrecisionName::Fp8 => Precision::Fp8,
            PrecisionName::Int8PerToken => Precision::Int8PerToken,
            PrecisionName::WeightInt8 => Precision::WeightInt8,
            PrecisionName::WeightInt4 => Precision::WeightInt4,
        };
        Recipe {
            precision,
            block: self.block,
            keep: self.keep_float.clone(),
            ranges: self.ranges.clone(),
            calibrator: self.calibrator,
            smooth: !self.no_smoothing,
            max_error: self.max_error,
            emulated: self.emulate,
            kv_cache: match self.kv_cache {
                KvCacheName::Fp32 => KvCache::Fp32,
                KvCacheName::Int8 => KvCache::Int8,
            },
        }
    }
}
