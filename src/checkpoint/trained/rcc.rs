//! RCC's encoder and maps: their names in the checkpoint, and what `rcc.json` says of them.
//!
//! The released checkpoints keep neither the encoder's configuration nor the settings. Here they may stand in a file
//! `rcc.json` beside config.json, all fields of which are optional:
//!
//! ```json
//! {
//!   "schema": "accordion.rcc/1",
//!   "window": 2048, "ratio": 32, "pairs": false, "first_state_is_embedding": false,
//!   "encoder": { "model_type": "mamba", "hidden_size": 2048, "...": "as in the encoder's own config.json" }
//! }
//! ```
//!
//! Without `encoder`, it is one more model like the decoder.

use super::super::config;
use super::super::error::CheckpointError;
use super::super::fields::Fields;
use super::super::required::encoder_body;
use accordion_graphs::architecture::{Architecture, Encoder, RccModel};
use accordion_graphs::plan::rcc::RccSettings;
use accordion_graphs::weights::WeightIndex;
use serde_json::{Value, json};
use std::path::Path;

/// Name of the file that describes the encoder.
pub const RCC_FILE: &str = "rcc.json";

const SCHEMA: &str = "accordion.rcc/1";
const FIELDS: [&str; 6] = ["schema", "window", "ratio", "pairs", "first_state_is_embedding", "encoder"];
/// Far above any window that was trained.
const MAX_WINDOW: usize = 1 << 20;
/// What the released model was trained with.
const RELEASED: RccSettings = RccSettings { window: 2048, ratio: 32, pairs: false, first_state_is_embedding: false };

/// What the encoder is called: in the authors' code, where it is a Mamba, and in their code for Qwen2.
const NAMES: [&str; 3] = ["rcc_encoder", "mamba", "rcc_decoder"];
/// What follows the encoder's name in the names of the maps.
const EMBED_MAP: &str = "2gpt_embed";
const LAYER_MAPS: &str = "2gpt_A_matrix";
/// Paths of the embeddings of the encoders there are, inside the encoder.
const EMBEDDINGS: [&str; 3] = ["gpt_neox.embed_in", "model.embed_tokens", "backbone.embeddings"];

/// The content of the rcc.json of a checkpoint with `encoder`, trained with `settings`.
pub fn rcc_json(encoder: &Encoder, settings: RccSettings) -> Value {
    json!({
        "schema": SCHEMA,
        "window": settings.window,
        "ratio": settings.ratio,
        "pairs": settings.pairs,
        "first_state_is_embedding": settings.first_state_is_embedding,
        "encoder": config::encoder_json(encoder),
    })
}

/// The encoder and maps that are among `weights`, with the settings of the file `rcc`.
pub(super) fn read(
    dir: &Path,
    config: Fields<'_>,
    decoder: &Architecture,
    rcc: Option<Fields<'_>>,
    weights: &WeightIndex,
) -> Result<Option<(RccModel, RccSettings)>, CheckpointError> {
    let body = match decoder {
        Architecture::GptNeox(_) => "gpt_neox",
        _ => "model",
    };
    let settings = rcc.map_or(Ok(RELEASED), settings)?;
    let Some((embed_map, name)) = embed_map(dir, body, weights)? else {
        return match rcc {
            None => Ok(None),
            // Going on without would silently leave the encoder unused.
            Some(fields) => Err(CheckpointError::NoEncoder {
                path: fields.path().to_owned(),
                tensor: format!("{body}.{}{EMBED_MAP}.weight", NAMES[0]),
            }),
        };
    };
    let described = match rcc.and_then(|fields| Some((fields, fields.get("encoder")?))) {
        Some((fields, value)) => Fields::of(value, "encoder.", fields.path())?,
        None => config,
    };
    let model = RccModel {
        encoder: config::encoder(described)?,
        encoder_path: encoder_path(body, name, weights),
        layer_maps: format!("{body}.{name}{LAYER_MAPS}"),
        embed_map,
    };
    check_against_tensors(&model, decoder, settings, described, weights)?;
    let path = rcc.map_or(config.path(), |fields| fields.path());
    settings
        .check_encoder(&model.encoder, decoder.num_layers())
        .map_err(|problem| CheckpointError::Settings { path: path.to_owned(), problem })?;
    Ok(Some((model, settings)))
}

/// The settings in the rcc.json `fields`.
fn settings(fields: Fields<'_>) -> Result<RccSettings, CheckpointError> {
    if let Some(unknown) = fields.names().find(|name| !FIELDS.contains(name)) {
        return Err(fields.unsupported("field", unknown, &FIELDS.join(", ")));
    }
    if let Some(other) = fields.text("schema")?.filter(|&schema| schema != SCHEMA) {
        return Err(fields.unsupported("schema", other, SCHEMA));
    }
    let settings = RccSettings {
        window: fields.count("window", MAX_WINDOW)?.unwrap_or(RELEASED.window),
        ratio: fields.count("ratio", MAX_WINDOW)?.unwrap_or(RELEASED.ratio),
        pairs: fields.flag("pairs")?.unwrap_or(RELEASED.pairs),
        first_state_is_embedding: fields.flag("first_state_is_embedding")?.unwrap_or(RELEASED.first_state_is_embedding),
    };
    settings.check().map_err(|problem| CheckpointError::Settings { path: fields.path().to_owned(), problem })?;
    Ok(settings)
}

/// Path of the embedding's map, and the name of the encoder in it.
fn embed_map(dir: &Path, body: &str, weights: &WeightIndex) -> Result<Option<(String, &'static str)>, CheckpointError> {
    let tensor = |path: &str| format!("{path}.weight");
    let mut found = NAMES
        .map(|name| (format!("{body}.{name}{EMBED_MAP}"), name))
        .into_iter()
        .filter(|(path, _)| weights.get(&tensor(path)).is_some());
    match (found.next(), found.next()) {
        (Some((first, _)), Some((second, _))) => {
            Err(CheckpointError::TwoEncoders { path: dir.to_owned(), first: tensor(&first), second: tensor(&second) })
        }
        (only, _) => Ok(only),
    }
}

/// Path of the encoder: under the maps' name for it, or under another of its names.
fn encoder_path(body: &str, maps_name: &str, weights: &WeightIndex) -> String {
    let has_tensors = |name: &&str| {
        EMBEDDINGS.iter().any(|embedding| weights.get(&format!("{body}.{name}.{embedding}.weight")).is_some())
    };
    let name = std::iter::once(maps_name).chain(NAMES).find(has_tensors).unwrap_or(maps_name);
    format!("{body}.{name}")
}

/// Refuses an encoder that is not the one whose tensors are there. `described` are the fields it was read from.
fn check_against_tensors(
    model: &RccModel,
    decoder: &Architecture,
    settings: RccSettings,
    described: Fields<'_>,
    weights: &WeightIndex,
) -> Result<(), CheckpointError> {
    let hint = match described.scope() {
        "" => format!("; `encoder` in {RCC_FILE} describes an encoder that is not like the decoder"),
        _ => String::new(),
    };
    let wrong = |field: &str, expected: String| Err(described.wrong(field, expected + &hint));
    let path = &model.encoder_path;
    let there = EMBEDDINGS.iter().find_map(|embedding| {
        let name = format!("{path}.{embedding}.weight");
        weights.get(&name).map(|weight| (name, weight))
    });
    // What is missing is named by the check of all tensors.
    let Some((embedding, weight)) = there else { return Ok(()) };
    let body = encoder_body(model);
    if !embedding.starts_with(&body) {
        return wrong("model_type", format!("that of a model with a tensor {embedding}"));
    }
    let sizes = [("vocab_size", model.encoder.vocab_size()), ("hidden_size", model.encoder.hidden_size())];
    for ((field, size), &found) in sizes.into_iter().zip(&weight.shape) {
        if size != found {
            return wrong(field, format!("{found}: tensor {embedding} has shape {:?}", weight.shape));
        }
    }
    let layers = format!("{body}.layers.");
    let number = |name: &str| name.strip_prefix(&layers)?.split('.').next()?.parse::<usize>().ok();
    let last = weights.iter().filter_map(|(name, _)| Some((number(name)?, name))).max();
    let Some((last, tensor)) = last else { return Ok(()) };
    let found = last.saturating_add(1);
    // A checkpoint may leave out the blocks that reach no token, but no others.
    let (live, _) = settings.encoder_states(&model.encoder, settings.live_states(decoder.num_layers()));
    if found != model.encoder.num_layers() && found != live {
        return wrong("num_hidden_layers", format!("{found}: tensor {tensor} belongs to the last layer"));
    }
    Ok(())
}
