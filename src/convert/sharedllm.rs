//! A SharedLLM checkpoint out of a plain Llama, as the paper begins its training: the lower model is the bottom layers
//! of the same model.
//!
//! No weight is copied. The new folder holds hard links to the source's files, and `aliases.json` says which of their
//! tensors are the lower model's and the cross attention's:
//!
//! | new name | tensor |
//! |---|---|
//! | `encoder.embed_tokens`, `encoder.norm`, `encoder.layers.<i>.*` | `model.*` |
//! | `model.layers.<i>.cross_attn.q_proj` | `model.layers.<i>.self_attn.q_proj` |
//! | `model.layers.<i>.cross_attn.o_proj` | `model.layers.<i>.self_attn.o_proj`, or zeros |
//! | `model.layers.<i>.cross_attn.layernorm` | `model.layers.<i>.post_attention_layernorm` |

use super::{ConvertError, Converted};
use crate::checkpoint::{
    ALIASES, CONFIG, Checkpoint, CheckpointError, INDEX, SIDE_FILES, SINGLE, aliases_json, config_json, index_json,
    required_tensors, safetensors_header, sharedllm_json,
};
use crate::staging::{Kind, Placement, Staging};
use accordion_graphs::architecture::{Architecture, Compressor, Llama, RopeScaling, SharedLlmModel};
use accordion_graphs::plan::sharedllm::{Keep, Quirks, SharedLlmSettings};
use accordion_graphs::weights::{WeightIndex, WeightRef};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// Only what a conversion wrote is replaced: nobody else's folder has aliases.
const CONVERTED: Kind = Kind { noun: "converted checkpoint", marker: ALIASES, prefix: ".accordion-convert-" };
/// The file of the output projections that are zero.
const ZEROS: &str = "cross_attention.safetensors";
/// Name of the source's only file where it is one of two: `model.safetensors` would hide the index.
const BASE: &str = "model-base.safetensors";
const MAX_DEPTH: usize = 32;

/// How the output projections of the cross attention begin; the rest is copied in any case.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CrossAttention {
    /// As those of the self attention.
    Copy,
    /// As zeros: the context has no effect yet, and the model is exactly the source.
    Zero,
}

/// What the source does not say.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SharedLlmOptions {
    /// Bottom layers that attend to the context, and layers of the lower model \[M\].
    pub layers: usize,
    /// How the cross attention begins.
    pub cross_attention: CrossAttention,
    /// Tokens kept of a node \[p\].
    pub keep: Keep,
    /// Levels of the tree \[D\].
    pub tree_depth: usize,
    /// Whether the half that is more similar to the running text is split further.
    pub retrieval: bool,
    /// Replace a converted checkpoint that is already there.
    pub force: bool,
}

/// Writes the SharedLLM checkpoint that begins as `source` into the folder `out`.
///
/// # Errors
///
/// The source is no Llama, is SharedLLM already, has biases or fewer layers than asked for; a setting is out of range; or
/// something cannot be written. Nothing is left behind then.
pub fn to_sharedllm(source: &Checkpoint, out: &Path, options: &SharedLlmOptions) -> Result<Converted, ConvertError> {
    let plain = source.config().map_err(Box::new)?;
    let model = check(source, &plain, options)?;
    let mut staging = Staging::create(out, CONVERTED, options.force)?;

    let mut parts = Parts::of(source)?;
    if options.cross_attention == CrossAttention::Zero {
        let (tensor, weight) = parts.add_zeros(model, source)?;
        let header = safetensors_header(weight.dtype, [(tensor, weight.shape.clone())]);
        staging.write_and_zeros(ZEROS, &header, weight.len)?;
    }
    parts.name_files();
    for (from, file) in source.weights().files().iter().zip(&parts.files) {
        staging.place(from, file, Placement::Link)?;
    }
    let index = parts.index(model, options, &out.join(ALIASES))?;
    if let [_, _, ..] = index.files() {
        let tensors = index.stored().map(|(name, weight)| (name, parts.files[weight.file].as_str()));
        staging.write_json(INDEX, &index_json(tensors, index.byte_count()))?;
    }
    staging.write_json(ALIASES, &aliases_json(index.aliases()))?;
    staging.write_json(CONFIG, &config(plain, model, options))?;
    for file in SIDE_FILES.into_iter().filter(|file| *file != CONFIG) {
        let from = source.dir().join(file);
        if from.is_file() {
            staging.place(&from, file, Placement::Copy)?;
        }
    }
    let converted = Converted {
        bytes_written: staging.bytes_written(),
        aliases: index.aliases().len(),
        link_failure: staging.link_failure().map(str::to_owned),
    };
    staging.publish()?;
    Ok(converted)
}

/// The source's model, if it can be converted with these options.
fn check<'a>(source: &'a Checkpoint, config: &Value, options: &SharedLlmOptions) -> Result<&'a Llama, ConvertError> {
    let path = || source.dir().to_owned();
    let refuse = |found: &str| Err(ConvertError::Family { path: path(), found: found.to_owned() });
    match source.compressor() {
        None => {}
        Some(Compressor::SharedLlm(_)) => return refuse("sharedllm already"),
        Some(_) => return refuse("a checkpoint of another method"),
    }
    let family = config.get("model_type").and_then(Value::as_str).unwrap_or_default();
    let (Architecture::Llama(model), "llama") = (source.architecture(), family) else {
        return refuse(&format!("'{family}'"));
    };
    match model.rope.scaling {
        RopeScaling::None | RopeScaling::Linear { .. } | RopeScaling::Dynamic { .. } => {}
        _ => return refuse("one with another rotary scaling than linear or dynamic"),
    }
    let is_bias = |name: &String| Path::new(name).extension().is_some_and(|extension| extension == "bias");
    if let Some(tensor) = required_tensors(model).map(|(name, _)| name).find(is_bias) {
        return Err(ConvertError::Bias { path: path(), tensor });
    }
    if !(1..=model.num_layers).contains(&options.layers) {
        return Err(ConvertError::Layers { path: path(), found: options.layers, most: model.num_layers });
    }
    let setting = |flag, found, expected: &str| ConvertError::Setting { flag, found, expected: expected.to_owned() };
    match options.keep {
        Keep::Tokens(0) => return Err(setting("--keep", "0".to_owned(), "at least 1 token")),
        Keep::Fraction(part) if !(part > 0.0 && part <= 1.0) => {
            return Err(setting("--keep", part.to_string(), "a fraction above 0, at most 1"));
        }
        _ => {}
    }
    if !(1..=MAX_DEPTH).contains(&options.tree_depth) {
        return Err(setting("--tree-depth", options.tree_depth.to_string(), &format!("1 to {MAX_DEPTH}")));
    }
    Ok(model)
}

/// The tensors of the new checkpoint and the names of its files.
struct Parts {
    files: Vec<String>,
    tensors: BTreeMap<String, WeightRef>,
    aliases: BTreeMap<String, String>,
}

impl Parts {
    fn of(source: &Checkpoint) -> Result<Self, ConvertError> {
        let name = |path: &PathBuf| path.file_name().and_then(|name| name.to_str()).map(str::to_owned);
        let weights = source.weights();
        let files = weights.files().iter().map(|path| name(path).ok_or_else(|| path.clone())).collect::<Result<_, _>>();
        Ok(Self {
            files: files.map_err(|path| ConvertError::FileName { path })?,
            tensors: weights.stored().map(|(name, weight)| (name.to_owned(), weight.clone())).collect(),
            aliases: weights.aliases().clone(),
        })
    }

    /// Adds the output projection of the bottom layer's cross attention, in a file of its own; the other layers share it.
    fn add_zeros(&mut self, model: &Llama, source: &Checkpoint) -> Result<(String, WeightRef), ConvertError> {
        let like = self_attention(0, "o_proj");
        let Some(weight) = source.weights().get(&like) else {
            let path = source.dir().to_owned();
            return Err(Box::new(CheckpointError::MissingTensor { path, name: like }).into());
        };
        let shape = vec![model.hidden_size, model.num_heads * model.head_dim];
        let weight = WeightRef { file: self.files.len(), offset: 0, shape, ..weight.clone() };
        self.files.push(ZEROS.to_owned());
        let name = cross_attention(0, "o_proj");
        self.tensors.insert(name.clone(), weight.clone());
        Ok((name, weight))
    }

    /// A single file has the name that needs no index; one of several must not have it.
    fn name_files(&mut self) {
        if let [only] = self.files.as_mut_slice() {
            SINGLE.clone_into(only);
        }
        let several = self.files.len() > 1;
        for file in self.files.iter_mut().filter(|file| several && *file == SINGLE) {
            BASE.clone_into(file);
        }
    }

    /// All tensors under all of their names; `origin` is the file that will list the names.
    fn index(&self, model: &Llama, options: &SharedLlmOptions, origin: &Path) -> Result<WeightIndex, ConvertError> {
        let mut index = WeightIndex::new(self.files.iter().map(PathBuf::from).collect(), self.tensors.clone());
        let new = lower_model(model, options.layers).chain(cross_attentions(options));
        for (alias, target) in self.aliases.clone().into_iter().chain(new) {
            let target = self.aliases.get(&target).unwrap_or(&target).clone();
            index.alias(&alias, &target).map_err(|problem| {
                Box::new(CheckpointError::Alias { path: origin.to_owned(), alias, target, problem })
            })?;
        }
        Ok(index)
    }
}

/// The lower model's tensors as parts of `model`.
fn lower_model(model: &Llama, layers: usize) -> impl Iterator<Item = (String, String)> {
    let lower = Llama { num_layers: layers, tie_word_embeddings: true, ..model.clone() };
    let names: Vec<String> = required_tensors(&lower).map(|(name, _)| name).collect();
    names.into_iter().filter_map(|name| Some((format!("encoder.{}", name.strip_prefix("model.")?), name)))
}

/// The cross attention's tensors as parts of the self attention.
fn cross_attentions(options: &SharedLlmOptions) -> impl Iterator<Item = (String, String)> {
    let SharedLlmOptions { layers, cross_attention: init, .. } = *options;
    (0..layers).flat_map(move |i| {
        let output = match init {
            CrossAttention::Copy => Some(self_attention(i, "o_proj")),
            CrossAttention::Zero if i > 0 => Some(cross_attention(0, "o_proj")),
            CrossAttention::Zero => None,
        };
        let norm = format!("model.layers.{i}.post_attention_layernorm.weight");
        [("q_proj", Some(self_attention(i, "q_proj"))), ("o_proj", output), ("layernorm", Some(norm))]
            .into_iter()
            .filter_map(move |(name, target)| Some((cross_attention(i, name), target?)))
    })
}

fn self_attention(layer: usize, name: &str) -> String {
    format!("model.layers.{layer}.self_attn.{name}.weight")
}

fn cross_attention(layer: usize, name: &str) -> String {
    format!("model.layers.{layer}.cross_attn.{name}.weight")
}

/// The source's configuration with the fields that the authors' code reads besides.
fn config(mut config: Value, model: &Llama, options: &SharedLlmOptions) -> Value {
    let lower = Llama { num_layers: options.layers, ..model.clone() };
    let shared = SharedLlmModel { lower, injected_layers: options.layers };
    // The chunk length has no place in the file.
    let SharedLlmOptions { keep, tree_depth, retrieval, .. } = *options;
    let settings = SharedLlmSettings { chunk_len: 0, tree_depth, keep, retrieval, quirks: Quirks::default() };
    let plain = config_json(model);
    if let (Value::Object(config), Value::Object(fields)) = (&mut config, sharedllm_json(model, &shared, &settings)) {
        config.extend(fields.into_iter().filter(|(name, _)| plain.get(name).is_none()));
    }
    config["architectures"] = json!(["SharedLLMForCausalLM"]);
    config["add_noise"] = json!(false);
    config["is_decoder"] = json!(true);
    config["_flash_attn_2_enabled"] = json!(true);
    config
}
