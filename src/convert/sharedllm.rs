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

use super::assembly::{Assembly, NewFile};
use super::{ConvertError, Converted};
use crate::checkpoint::{CONFIG, Checkpoint, config_json, required_tensors, sharedllm_json};
use accordion_graphs::architecture::{Architecture, Llama, RopeScaling, SharedLlmModel};
use accordion_graphs::plan::sharedllm::{Keep, Quirks, SharedLlmSettings};
use serde_json::{Value, json};
use std::io::Seek;
use std::path::Path;

/// The file of the output projections that are zero.
const ZEROS: &str = "cross_attention.safetensors";
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
    // The output projection of the bottom layer's cross attention, which the other layers share.
    let output = (cross_attention(0, "o_proj"), vec![model.hidden_size, model.num_heads * model.head_dim]);
    let dtype = super::dtype_of(source, &self_attention(0, "o_proj"))?;
    let bytes = (output.1.iter().product::<usize>() * dtype.size()) as u64;
    let zeros = NewFile {
        name: ZEROS,
        dtype,
        tensors: vec![output],
        // Nothing is written, and where the file system knows holes, nothing takes room.
        fill: &|file| {
            let header = file.stream_position()?;
            file.set_len(header + bytes)
        },
    };
    let assembly = Assembly {
        source,
        aliases: lower_model(model, options.layers).chain(cross_attentions(options)).collect(),
        new: (options.cross_attention == CrossAttention::Zero).then_some(zeros),
        descriptions: vec![(CONFIG, config(plain, model, options))],
    };
    assembly.write(out, options.force)
}

/// The source's model, if it can be converted with these options.
fn check<'a>(source: &'a Checkpoint, config: &Value, options: &SharedLlmOptions) -> Result<&'a Llama, ConvertError> {
    let path = || source.dir().to_owned();
    let refuse =
        |found: String| Err(ConvertError::Family { path: path(), method: "sharedllm", made_of: "Llama", found });
    if let Some(compressor) = source.compressor() {
        return refuse(super::trained_for(compressor));
    }
    let (Architecture::Llama(model), "llama") = (source.architecture(), super::family(config)) else {
        return refuse(format!("'{}'", super::family(config)));
    };
    match model.rope.scaling {
        RopeScaling::None | RopeScaling::Linear { .. } | RopeScaling::Dynamic { .. } => {}
        _ => return refuse("one with another rotary scaling than linear or dynamic".to_owned()),
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
