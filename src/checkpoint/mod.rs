//! Checkpoints: a Hugging Face folder (config.json, safetensors, tokenizer.json) as typed, checked facts.
//!
//! Nothing in such a folder is trusted: sizes are bounded before anything is allocated, arithmetic is checked, and
//! what is not understood is refused by name.

mod aliases;
mod chat;
pub(crate) mod clock;
mod config;
mod error;
mod fields;
mod files;
mod gguf;
mod identity;
mod import;
mod llama2c;
mod maps;
mod required;
mod rope;
mod safetensors;
mod tokenizer;
mod trained;
mod vocabulary;

pub(crate) use aliases::{ALIASES, add as add_aliases, to_json as aliases_json};
pub use chat::{ChatMessage, PromptAffixes};
pub(crate) use config::encoder_from_json;
pub use config::{architecture_json, config_json, encoder_json, from_config_json};
pub use error::{CheckpointError, GgufError, HeaderError};
pub use gguf::{GgufFacts, gguf_facts, import_gguf};
pub(crate) use identity::identity_of;
pub use identity::{model_identity, rope_text};
pub use llama2c::import_llama2c;
pub use maps::WeightMaps;
pub(crate) use required::check_parts;
pub(crate) use required::encoder_tensors;
pub use required::{NamedShape, check_tensors, decoder_tensors, rcc_tensors, required_tensors, sharedllm_tensors};
pub use rope::parse_rope_scaling;
pub use safetensors::read_index;
pub(crate) use safetensors::{
    INDEX, SINGLE, header as safetensors_header, index_json, mixed_header as safetensors_mixed_header,
};
pub use tokenizer::{TextStream, Tokenizer};
pub(crate) use trained::{Disagreement, disagreement, parse_last_p};
pub use trained::{RCC_FILE, rcc_json, sharedllm_json};

use crate::tensor::Tensor;
use accordion_graphs::architecture::{Architecture, Compressor, RopeScaling};
use accordion_graphs::plan::rcc::RccSettings;
use accordion_graphs::plan::sharedllm::SharedLlmSettings;
use accordion_graphs::weights::WeightIndex;
use fields::Fields;
use sha2::{Digest, Sha256};
use std::path::{Path, PathBuf};
use trained::{Trained, TrainedSettings};

/// The configuration's file name.
pub(crate) const CONFIG: &str = "config.json";
/// The file that overrides the end-of-text ids.
pub(crate) const GENERATION_CONFIG: &str = "generation_config.json";
/// Files that say how to use a model and its texts: whatever is made from a checkpoint takes along those that are there.
pub(crate) const SIDE_FILES: [&str; 6] = [
    CONFIG,
    GENERATION_CONFIG,
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
];
const MAX_CONFIG: u64 = 4 << 20;

/// An open checkpoint. Clones share its file mappings.
#[derive(Debug, Clone)]
pub struct Checkpoint {
    dir: PathBuf,
    architecture: Architecture,
    trained: Option<Trained>,
    /// Ids that every model of the checkpoint knows.
    vocab_size: usize,
    maps: WeightMaps,
    description: Sha256,
}

impl Checkpoint {
    /// Opens the checkpoint in the folder `dir`. Reads config.json, rcc.json if there is one, and the headers of the
    /// weight files; no weight.
    ///
    /// # Errors
    ///
    /// A file is missing or malformed, the architecture is not supported, or a tensor that it needs is missing or has
    /// another shape.
    pub fn open(dir: impl Into<PathBuf>) -> Result<Self, CheckpointError> {
        let dir = dir.into();
        let path = dir.join(CONFIG);
        let text = files::read_bounded(&path, MAX_CONFIG)?;
        let json = parse_json(&path, &text)?;
        let config = Fields::of(&json, "", &path)?;
        let mut architecture = config::architecture(config)?;
        if let Some(ids) = generation_eos(&dir, architecture.vocab_size())? {
            match &mut architecture {
                Architecture::Llama(model) => model.eos_token_ids = ids,
                Architecture::GptNeox(model) => model.eos_token_ids = ids,
                _ => {}
            }
        }
        let (weights, headers) = safetensors::index(&dir)?;
        check_tensors(decoder_tensors(&architecture), &weights, &dir, CONFIG)?;
        let mut description = Sha256::new().chain_update(Sha256::digest(&text)).chain_update(headers.finalize());
        let rcc_path = dir.join(RCC_FILE);
        let rcc = if files::exists(&rcc_path)? {
            let text = files::read_bounded(&rcc_path, MAX_CONFIG)?;
            description.update(Sha256::digest(&text));
            Some(parse_json(&rcc_path, &text)?)
        } else {
            None
        };
        let trained = trained::find(&dir, config, &architecture, rcc.as_ref(), &weights)?;
        let compressor_vocab = trained.as_ref().map_or(usize::MAX, |trained| match &trained.compressor {
            Compressor::Rcc(model) => model.encoder.vocab_size(),
            Compressor::SharedLlm(model) => model.lower.vocab_size,
            _ => usize::MAX,
        });
        let vocab_size = architecture.vocab_size().min(compressor_vocab);
        let maps = WeightMaps::open(weights)?;
        Ok(Self { dir, architecture, trained, vocab_size, maps, description })
    }

    /// The same checkpoint under another rotary scaling than config.json has.
    #[must_use]
    pub fn with_rope_scaling(mut self, scaling: RopeScaling) -> Self {
        match &mut self.architecture {
            Architecture::Llama(model) => model.rope.scaling = scaling,
            Architecture::GptNeox(model) => model.rope.scaling = scaling,
            _ => {}
        }
        self
    }

    /// The folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// What config.json says, word for word.
    ///
    /// # Errors
    ///
    /// The file cannot be read any more.
    pub(crate) fn config(&self) -> Result<serde_json::Value, CheckpointError> {
        files::read_json(&self.dir.join(CONFIG), MAX_CONFIG)
    }

    /// What config.json says of the decoder.
    pub fn architecture(&self) -> &Architecture {
        &self.architecture
    }

    /// What the checkpoint holds besides the decoder, if it was trained for a method.
    pub fn compressor(&self) -> Option<&Compressor> {
        self.trained.as_ref().map(|trained| &trained.compressor)
    }

    /// What RCC was trained with, if the checkpoint has its encoder: rcc.json over the released model's settings.
    pub fn rcc_settings(&self) -> Option<RccSettings> {
        match self.trained.as_ref()?.settings {
            TrainedSettings::Rcc(settings) => Some(settings),
            TrainedSettings::SharedLlm(_) => None,
        }
    }

    /// What config.json says of SharedLLM, if it does. It has no chunk length: 1024 is that of the language models.
    pub fn sharedllm_settings(&self) -> Option<SharedLlmSettings> {
        match self.trained.as_ref()?.settings {
            TrainedSettings::SharedLlm(settings) => Some(settings),
            TrainedSettings::Rcc(_) => None,
        }
    }

    /// Where every tensor lies.
    pub fn weights(&self) -> &WeightIndex {
        self.maps.index()
    }

    /// The mapped weight files.
    pub fn maps(&self) -> &WeightMaps {
        &self.maps
    }

    /// The tensor called `name`, without a copy where the file aligns it.
    ///
    /// # Errors
    ///
    /// There is no such tensor.
    pub fn tensor(&self, name: &str) -> Result<Tensor, CheckpointError> {
        self.maps.tensor(name)
    }

    /// The tokenizer of the folder.
    ///
    /// # Errors
    ///
    /// tokenizer.json is missing or malformed.
    pub fn tokenizer(&self) -> Result<Tokenizer, CheckpointError> {
        Tokenizer::open(&self.dir, self.vocab_size)
    }

    /// Names the model: SHA-256, in hexadecimal, over config.json, the headers of the weight files, rcc.json if there is
    /// one, and the first bytes of every tensor. The last keep a fine-tuned model apart from its base, whose config and headers are the same.
    /// It costs milliseconds, and is no proof that the rest of the weights is unchanged.
    pub fn fingerprint(&self) -> String {
        const SAMPLE: u64 = 64;
        let mut digest = self.description.clone();
        self.maps.sample(SAMPLE, |bytes| digest.update(bytes));
        digest.finalize().iter().fold(String::new(), |hex, byte| hex + &format!("{byte:02x}"))
    }
}

fn parse_json(path: &Path, text: &[u8]) -> Result<serde_json::Value, CheckpointError> {
    serde_json::from_slice(text).map_err(|source| CheckpointError::Json { path: path.to_owned(), source })
}

/// The end-of-text ids of `generation_config.json`, which take precedence over those of config.json, as they do for
/// Hugging Face's `generate`.
fn generation_eos(dir: &Path, vocab_size: usize) -> Result<Option<Vec<u32>>, CheckpointError> {
    let path = dir.join(GENERATION_CONFIG);
    if !files::exists(&path)? {
        return Ok(None);
    }
    let config = files::read_json(&path, MAX_CONFIG)?;
    config::eos_token_ids(Fields::of(&config, "", &path)?, vocab_size)
}
