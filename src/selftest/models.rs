//! Bundles of every method over random weights, made where they are measured: sizes are those of real models, and nothing is
//! fetched.
//!
//! All layers of a model have the numbers of one. On the device each layer's weights are tensors of their own, as those of a real
//! model would be; on the disk they take the room of one layer.

use crate::bundle::{Bundle, BundleError, ExportOptions, MethodSettings, WeightStorage, export, tree_heights};
use crate::checkpoint::{Checkpoint, CheckpointError};
use crate::convert::{ConvertError, CrossAttention, SharedLlmOptions, to_sharedllm};
use crate::precision::Recipe;
use crate::staging::StagingError;
use crate::synthetic::{NumberType, RandomOptions, Shape, write_repeating};
use accordion_graphs::blocks::Target;
use accordion_graphs::plan::PlanError;
use accordion_graphs::plan::homer::HomerSettings;
use accordion_graphs::plan::sharedllm::Keep;
use accordion_graphs::precision::Precision;
use std::path::{Path, PathBuf};

/// How large the models are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scale {
    /// Llama-2-7B, and RCC's pair of Pythia-1.4b.
    Large,
    /// SmolLM2-135M, and RCC's pair of Pythia-70m.
    Small,
    /// Models of kilobytes, for trying a machine.
    Tiny,
}

/// The models of a scale, and the contexts they are measured at.
#[derive(Debug, Clone, Copy)]
pub struct Sizes {
    /// The model of plain, HOMER and SharedLLM.
    pub llama: &'static str,
    /// RCC's.
    pub rcc: &'static str,
    /// HOMER's M, also the length of its cache, and W.
    pub homer: [usize; 2],
    /// Tokens of the context that all methods are compared at.
    pub context: usize,
    /// Tokens of RCC's longest.
    pub longest: usize,
}

impl Scale {
    /// Its sizes.
    pub fn sizes(self) -> Sizes {
        match self {
            Self::Large => Sizes {
                llama: "llama-2-7b",
                rcc: "rcc-pythia-1.4b",
                homer: [4096, 12],
                context: 32_768,
                longest: 1 << 20,
            },
            Self::Small => Sizes {
                llama: "llama-smollm2-135m",
                rcc: "rcc-pythia-70m",
                homer: [2048, 12],
                context: 32_768,
                longest: 1 << 18,
            },
            Self::Tiny => {
                Sizes { llama: "llama-tiny", rcc: "rcc-pythia-tiny", homer: [1024, 2], context: 4096, longest: 8192 }
            }
        }
    }
}

/// A bundle, and the methods that it is measured with.
#[derive(Debug)]
pub struct Subject {
    /// The model by name.
    pub model: &'static str,
    /// The bundle's method.
    pub method: &'static str,
    /// Its folder.
    pub bundle: PathBuf,
    /// Bytes that its weights take on a device.
    pub weight_bytes: u64,
    /// Bytes that plain keeps per token.
    pub kv_bytes_per_token: u64,
}

/// Why there is no bundle.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ModelsError {
    /// The weights cannot be written.
    #[error(transparent)]
    Weights(#[from] StagingError),
    /// What was written cannot be read.
    #[error(transparent)]
    Checkpoint(#[from] Box<CheckpointError>),
    /// The graphs cannot be exported.
    #[error(transparent)]
    Bundle(#[from] BundleError),
    /// The model cannot become one of SharedLLM.
    #[error(transparent)]
    Convert(#[from] ConvertError),
    /// There is no tree for the context.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// There is no shape of that name.
    #[error("there is no shape '{0}'")]
    Shape(&'static str),
}

/// Writes checkpoints and bundles into a folder.
#[derive(Debug)]
pub struct Maker<'a> {
    /// The folder, which exists.
    pub folder: &'a Path,
    /// The models.
    pub sizes: Sizes,
    /// What numbers graphs compute with.
    pub precision: Precision,
    /// The longest context.
    pub context: usize,
}

impl Maker<'_> {
    /// The bundle of `method`: homer, which has plain's decoder too, rcc or sharedllm.
    ///
    /// # Errors
    ///
    /// There is no room on the disk, or something cannot be written.
    pub fn subject(&self, method: &'static str) -> Result<Subject, ModelsError> {
        let model = if method == "rcc" { self.sizes.rcc } else { self.sizes.llama };
        let mut checkpoint = self.checkpoint(model)?;
        let settings = match method {
            "rcc" => MethodSettings::Rcc(checkpoint.rcc_settings().ok_or(ModelsError::Shape(model))?),
            "sharedllm" => {
                checkpoint = self.sharedllm(&checkpoint)?;
                MethodSettings::SharedLlm(checkpoint.sharedllm_settings().ok_or(ModelsError::Shape(model))?)
            }
            _ => self.homer(&checkpoint)?,
        };
        let out = self.folder.join(method);
        let options = ExportOptions {
            method: settings,
            target: Target::Portable,
            weights: WeightStorage::Link,
            recipe: Recipe::of(self.precision),
            force: false,
        };
        export(&checkpoint, &out, &options)?;
        let bundle = Bundle::open(&out)?;
        let bytes = |(_, weight): (&str, &accordion_graphs::weights::WeightRef)| weight.len;
        Ok(Subject {
            model,
            method,
            weight_bytes: bundle.weights().index().iter().map(bytes).sum(),
            kv_bytes_per_token: bundle.architecture().kv_bytes_per_token(),
            bundle: out,
        })
    }

    /// The model of random weights, written when the first bundle needs it.
    fn checkpoint(&self, model: &'static str) -> Result<Checkpoint, ModelsError> {
        let folder = self.folder.join(model);
        if !folder.is_dir() {
            let shape = Shape::named(model).ok_or(ModelsError::Shape(model))?;
            let dtype = if self.precision == Precision::Fp32 { NumberType::F32 } else { NumberType::Bf16 };
            write_repeating(shape, &folder, RandomOptions { dtype, ..RandomOptions::default() }, |_, _| {})?;
        }
        Ok(Checkpoint::open(folder).map_err(Box::new)?)
    }

    /// The same with a lower model, which is the lower half of the layers.
    fn sharedllm(&self, source: &Checkpoint) -> Result<Checkpoint, ModelsError> {
        let folder = self.folder.join("sharedllm-checkpoint");
        let options = SharedLlmOptions {
            layers: source.architecture().num_layers() / 2,
            cross_attention: CrossAttention::Copy,
            keep: Keep::Tokens(32),
            tree_depth: 3,
            retrieval: true,
            force: false,
        };
        to_sharedllm(source, &folder, &options)?;
        Ok(Checkpoint::open(folder).map_err(Box::new)?)
    }

    fn homer(&self, checkpoint: &Checkpoint) -> Result<MethodSettings, ModelsError> {
        let [length, layers_warmup] = self.sizes.homer;
        let settings =
            HomerSettings { max_chunk_len: length, max_initial_chunk_len: None, target_len: length, layers_warmup };
        let tree_heights = tree_heights(checkpoint.architecture().num_layers(), settings, self.context)?;
        Ok(MethodSettings::Homer { settings, tree_heights, significance: None })
    }
}
