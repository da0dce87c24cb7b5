//! What a checkpoint folder or a GGUF file holds.

use super::{Described, architecture, bundle, compressor, facts};
use crate::cli::text::{approximate, bytes, grouped};
use accordion::bundle::Method;
use accordion::checkpoint::{Checkpoint, GgufFacts};
use accordion_graphs::architecture::{Architecture, Compressor};
use serde::Serialize;
use std::collections::BTreeMap;

/// Facts about a model on disk.
#[derive(Serialize)]
pub(super) struct Description {
    kind: &'static str,
    architecture: Architecture,
    parameters: u64,
    kv_bytes_per_token: u64,
    /// Number of tensors by element type.
    dtypes: BTreeMap<String, usize>,
    #[serde(flatten, skip_serializing_if = "Option::is_none")]
    folder: Option<Folder>,
}

/// Facts that only a checkpoint folder has.
#[derive(Serialize)]
struct Folder {
    fingerprint: String,
    weight_bytes: u64,
    files: Vec<String>,
    /// Further names of tensors.
    aliases: usize,
    #[serde(flatten, skip_serializing_if = "Option::is_none")]
    trained: Option<Trained>,
    tokenizer: Option<Tokenizer>,
}

/// What a checkpoint that was trained for a method has besides its decoder.
#[derive(Serialize)]
struct Trained {
    method: Method,
    compressor: Compressor,
}

#[derive(Serialize)]
struct Tokenizer {
    vocab_size: usize,
    bos_token: Option<String>,
    eos_token: Option<String>,
    chat_template: bool,
}

/// Describes an open checkpoint.
pub(super) fn describe(checkpoint: &Checkpoint) -> anyhow::Result<Description> {
    let model = checkpoint.architecture();
    let weights = checkpoint.weights();
    let mut dtypes = BTreeMap::new();
    for (_, weight) in weights.stored() {
        *dtypes.entry(weight.dtype.to_string()).or_default() += 1;
    }
    let names = weights.files().iter().filter_map(|path| path.file_name());
    // A checkpoint without one can be exported, but not run.
    let tokenizer = checkpoint.dir().join("tokenizer.json").exists().then(|| checkpoint.tokenizer()).transpose()?;
    let folder = Folder {
        fingerprint: checkpoint.fingerprint(),
        weight_bytes: weights.byte_count(),
        aliases: weights.aliases().len(),
        trained: trained(checkpoint),
        files: names.map(|name| name.to_string_lossy().into_owned()).collect(),
        tokenizer: tokenizer.map(|tokenizer| Tokenizer {
            vocab_size: tokenizer.vocab_size(),
            bos_token: tokenizer.bos_token().map(str::to_owned),
            eos_token: tokenizer.eos_token().map(str::to_owned),
            chat_template: tokenizer.has_chat_template(),
        }),
    };
    Ok(Description::new("checkpoint", model.clone(), weights.parameter_count(), dtypes, Some(folder)))
}

fn trained(checkpoint: &Checkpoint) -> Option<Trained> {
    let rcc = checkpoint.rcc_settings().map(|settings| Method::Rcc { settings });
    let shared = checkpoint.sharedllm_settings().map(|settings| Method::SharedLlm { settings });
    Some(Trained { method: rcc.or(shared)?, compressor: checkpoint.compressor()?.clone() })
}

/// Describes a GGUF file.
pub(super) fn describe_gguf(facts: GgufFacts) -> Description {
    Description::new("gguf", facts.model.into(), facts.parameters, facts.encodings, None)
}

impl Description {
    fn new(
        kind: &'static str,
        architecture: Architecture,
        parameters: u64,
        dtypes: BTreeMap<String, usize>,
        folder: Option<Folder>,
    ) -> Self {
        let kv_bytes_per_token = architecture.kv_bytes_per_token();
        Self { kind, architecture, parameters, kv_bytes_per_token, dtypes, folder }
    }

    /// The model.
    pub(super) fn model(&self) -> &Architecture {
        &self.architecture
    }
}

impl Described for Description {
    fn in_words(&self) -> String {
        let mut rows = architecture(&self.architecture);
        if let Some(Trained { method, compressor }) = self.folder.as_ref().and_then(|folder| folder.trained.as_ref()) {
            rows.insert(0, ("trained for", bundle::method(method)));
            rows.extend(compressor::rows(compressor, &self.architecture));
        }
        rows.push(("parameters", format!("{} ({})", grouped(self.parameters), approximate(self.parameters))));
        let dtypes: Vec<String> = self.dtypes.iter().map(|(dtype, count)| format!("{dtype} ({count})")).collect();
        rows.push(("tensors", dtypes.join(", ")));
        rows.push(("cache", format!("{} per token as fp32", bytes(self.kv_bytes_per_token))));
        rows.push(("end ids", ids(&self.architecture)));
        let title = match &self.folder {
            None => "GGUF file: import it, or pass it as a CHECKPOINT",
            Some(folder) => {
                let files = match folder.files.as_slice() {
                    [only] => only.clone(),
                    several => format!("{} files", several.len()),
                };
                rows.push(("weights", format!("{} in {files}", bytes(folder.weight_bytes))));
                if folder.aliases > 0 {
                    rows.push((
                        "aliases",
                        format!("{} tensors are others of these under further names", folder.aliases),
                    ));
                }
                rows.push(("tokenizer", folder.tokenizer.as_ref().map_or("none".to_owned(), Tokenizer::in_words)));
                rows.push(("fingerprint", folder.fingerprint.clone()));
                "checkpoint"
            }
        };
        format!("{title}\n{}", facts(&rows))
    }
}

impl Tokenizer {
    fn in_words(&self) -> String {
        let Self { vocab_size, bos_token, eos_token, chat_template } = self;
        let name = |token: &Option<String>| token.clone().unwrap_or_else(|| "none".to_owned());
        let template = if *chat_template { "chat template" } else { "no chat template" };
        format!("{vocab_size} tokens, begin {}, end {}, {template}", name(bos_token), name(eos_token))
    }
}

fn ids(model: &Architecture) -> String {
    let ids: Vec<String> = model.eos_token_ids().iter().map(u32::to_string).collect();
    if ids.is_empty() { "none".to_owned() } else { ids.join(", ") }
}
