//! SharedLLM's fields in config.json.

use super::super::config::{self, MAX_LAYERS, config_json};
use super::super::error::CheckpointError;
use super::super::fields::Fields;
use accordion_graphs::architecture::{Architecture, Llama, RopeScaling, SharedLlmModel};
use accordion_graphs::plan::sharedllm::{Keep, Quirks, SharedLlmSettings};
use accordion_graphs::weights::WeightIndex;
use serde_json::{Value, json};

/// The field whose presence makes a checkpoint one of SharedLLM.
const INJECTED: &str = "num_cross_attn_layers";
/// What the released code uses when the config says nothing.
const DEFAULT_DEPTH: usize = 3;
const DEFAULT_KEEP: Keep = Keep::Tokens(64);
/// The chunks of the language models; configs do not have it.
const DEFAULT_CHUNK: usize = 1024;
/// A chunk halved this often is longer than any text.
const MAX_DEPTH: usize = 32;
const MAX_KEPT: usize = 1 << 20;

/// The content of the config.json of a checkpoint of `upper` and `model`. The chunk length and which computation is meant
/// have no place in it.
pub fn sharedllm_json(upper: &Llama, model: &SharedLlmModel, settings: &SharedLlmSettings) -> Value {
    let keep = match settings.keep {
        Keep::All => "-1".to_owned(),
        Keep::Tokens(count) => count.to_string(),
        // With a decimal point or an exponent, always.
        Keep::Fraction(fraction) => format!("{fraction:?}"),
    };
    let mut config = config_json(upper);
    config[INJECTED] = json!(-(model.injected_layers as i64));
    config["do_cross_attention"] = json!(true);
    config["num_cross_attn_hidden_states"] = json!(1);
    config["encoder_is_model"] = json!(false);
    config["encoder_config"] = config_json(&model.lower);
    config["encoder_hidden_size"] = json!(model.lower.hidden_size);
    config["segment_tree_depth"] = json!(settings.tree_depth);
    config["do_retrieval"] = json!(settings.retrieval);
    config["last_p"] = json!(keep);
    config
}

/// The lower model and the settings, if `config` has them.
pub(super) fn read(
    config: Fields<'_>,
    upper: &Architecture,
) -> Result<Option<(SharedLlmModel, SharedLlmSettings)>, CheckpointError> {
    if config.get(INJECTED).is_none() {
        return Ok(None);
    }
    let (Architecture::Llama(upper), Some("llama")) = (upper, config.text("model_type")?) else {
        return Err(config.wrong("model_type", format!("\"llama\", since there is `{INJECTED}`")));
    };
    check_scaling(config, upper)?;
    let model = SharedLlmModel { injected_layers: injected_layers(config)?, lower: lower(config)? };
    if let Some(Disagreement { field, found, expected }) = disagreement(upper, &model) {
        let (path, field, found) = (config.path().to_owned(), field.to_owned(), found.to_string());
        return Err(CheckpointError::Field { path, field, found, expected });
    }
    for (name, right) in [("do_cross_attention", true), ("encoder_is_model", false)] {
        if config.flag(name)?.is_some_and(|value| value != right) {
            return Err(config.wrong(name, right.to_string()));
        }
    }
    if config.count("num_cross_attn_hidden_states", MAX_LAYERS)?.is_some_and(|states| states != 1) {
        return Err(config.wrong("num_cross_attn_hidden_states", "1"));
    }
    if config.get("encoder_hidden_size").is_some_and(|size| *size != model.lower.hidden_size) {
        let expected = format!("`encoder_config.hidden_size`, {}", model.lower.hidden_size);
        return Err(config.wrong("encoder_hidden_size", expected));
    }
    let settings = SharedLlmSettings {
        chunk_len: DEFAULT_CHUNK,
        tree_depth: config.count("segment_tree_depth", MAX_DEPTH)?.unwrap_or(DEFAULT_DEPTH),
        keep: keep(config)?,
        retrieval: config.flag("do_retrieval")?.unwrap_or(true),
        quirks: Quirks::Faithful,
    };
    Ok(Some((model, settings)))
}

/// The bottom layers that are injected into: their number, negated.
fn injected_layers(config: Fields<'_>) -> Result<usize, CheckpointError> {
    let number = config.get(INJECTED).and_then(Value::as_i64);
    let layers = number.and_then(i64::checked_neg).and_then(|layers| usize::try_from(layers).ok());
    layers.filter(|layers| (1..=MAX_LAYERS).contains(layers)).ok_or_else(|| {
        let why = "a positive number puts cross attention into the top layers while the released code offers keys and \
                   values to the bottom ones";
        config.wrong(INJECTED, format!("-M for the bottom M layers, M from 1 to {MAX_LAYERS}: {why}"))
    })
}

fn lower(config: Fields<'_>) -> Result<Llama, CheckpointError> {
    const NAME: &str = "encoder_config";
    let mut value = config.get(NAME).cloned().ok_or_else(|| config.missing(NAME))?;
    if let Some(object) = value.as_object_mut().filter(|object| object.get("model_type").is_none_or(Value::is_null)) {
        // It is a Llama's configuration, whether it says so or not.
        object.insert("model_type".to_owned(), json!("llama"));
    }
    let scope = format!("{NAME}.");
    let fields = Fields::of(&value, &scope, config.path())?;
    if fields.text("model_type")? != Some("llama") {
        return Err(fields.wrong("model_type", "\"llama\""));
    }
    let lower = config::llama(fields)?;
    check_scaling(fields, &lower)?;
    Ok(lower)
}

/// The released code knows two scalings.
fn check_scaling(fields: Fields<'_>, model: &Llama) -> Result<(), CheckpointError> {
    let found = match model.rope.scaling {
        RopeScaling::None | RopeScaling::Linear { .. } | RopeScaling::Dynamic { .. } => return Ok(()),
        RopeScaling::Yarn { .. } => "yarn",
        RopeScaling::Llama3 { .. } => "llama3",
    };
    Err(fields.unsupported("rope_scaling type", found, "linear, dynamic"))
}

/// A number of the lower model that does not fit the upper one.
pub(crate) struct Disagreement {
    /// Its name in config.json.
    pub(crate) field: &'static str,
    pub(crate) found: i64,
    pub(crate) expected: String,
}

/// What keeps `model` from being injected into `upper`: its keys and values go into the upper attention unchanged, its
/// hidden states are compared with the upper ones, and it needs a layer for every injected one.
pub(crate) fn disagreement(upper: &Llama, model: &SharedLlmModel) -> Option<Disagreement> {
    let (lower, layers) = (&model.lower, model.injected_layers);
    let widths = [
        ("encoder_config.hidden_size", lower.hidden_size, upper.hidden_size),
        ("encoder_config.num_attention_heads", lower.num_heads, upper.num_heads),
        ("encoder_config.num_key_value_heads", lower.num_kv_heads, upper.num_kv_heads),
        ("encoder_config.head_dim", lower.head_dim, upper.head_dim),
    ];
    let of = |field, found: usize, expected| Some(Disagreement { field, found: found as i64, expected });
    if let Some((field, found, expected)) = widths.into_iter().find(|(_, lower, upper)| lower != upper) {
        return of(field, found, format!("{expected}, as in the upper model"));
    }
    if layers == 0 || layers > upper.num_layers {
        let expected = format!("-1 to -{}, the upper model's layers", upper.num_layers);
        return Some(Disagreement { field: INJECTED, found: -(layers as i64), expected });
    }
    if lower.num_layers < layers {
        return of(
            "encoder_config.num_hidden_layers",
            lower.num_layers,
            format!("at least {layers}, as many as `{INJECTED}` injects"),
        );
    }
    None
}

/// Refuses biases in cross attention, which no released configuration has: they would be ignored.
pub(super) fn check_unbiased(
    config: Fields<'_>,
    model: &SharedLlmModel,
    weights: &WeightIndex,
) -> Result<(), CheckpointError> {
    let biases = (0..model.injected_layers)
        .flat_map(|layer| ["q_proj", "o_proj"].map(|name| format!("model.layers.{layer}.cross_attn.{name}.bias")));
    match biases.into_iter().find(|name| weights.get(name).is_some()) {
        None => Ok(()),
        Some(bias) => Err(config.unsupported("tensor", &bias, "cross attention without biases")),
    }
}

/// `last_p`: a number, or the text of a Python expression that is one, or a pair of them of which the first counts; the
/// text may be quoted once more.
fn keep(config: Fields<'_>) -> Result<Keep, CheckpointError> {
    const NAME: &str = "last_p";
    let keep = match config.get(NAME) {
        None => Some(DEFAULT_KEEP),
        Some(Value::Number(number)) => keep_of(&number.to_string()),
        Some(Value::String(text)) => parse_last_p(text),
        Some(_) => None,
    };
    keep.ok_or_else(|| {
        let expected = format!("tokens to keep of a node: up to {MAX_KEPT}, a fraction up to 1.0, or -1 for all");
        config.wrong(NAME, expected)
    })
}

/// What the authors' code takes the text of `last_p` for, if it is one.
pub(crate) fn parse_last_p(text: &str) -> Option<Keep> {
    keep_of(first_element(unquoted(text)))
}

/// `text` without the quotes that Python would take off by evaluating it.
fn unquoted(text: &str) -> &str {
    let text = text.trim();
    let inside = |quote| text.strip_prefix(quote)?.strip_suffix(quote);
    inside('"').or_else(|| inside('\'')).map_or(text, str::trim)
}

/// The first number of a tuple, with or without its parentheses; anything else as it is.
fn first_element(text: &str) -> &str {
    let inside = text.strip_prefix('(').and_then(|rest| rest.strip_suffix(')')).unwrap_or(text);
    inside.split(',').next().unwrap_or(inside).trim()
}

fn keep_of(number: &str) -> Option<Keep> {
    if let Ok(count) = number.parse::<i64>() {
        return match usize::try_from(count) {
            Err(_) | Ok(0) => Some(Keep::All),
            Ok(count) => (count <= MAX_KEPT).then_some(Keep::Tokens(count)),
        };
    }
    let fraction = number.parse::<f64>().ok().filter(|fraction| fraction.is_finite() && *fraction <= 1.0)?;
    Some(if fraction > 0.0 { Keep::Fraction(fraction) } else { Keep::All })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use std::path::Path;

    /// The configuration of the authors' smallest test, with some fields replaced.
    fn with(changes: &Value) -> Value {
        let llama = json!({
            "model_type": "llama", "vocab_size": 128, "hidden_size": 64, "intermediate_size": 128,
            "num_hidden_layers": 5, "num_attention_heads": 4, "num_key_value_heads": 2,
            "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "rope_theta": 1e4,
        });
        let mut config = llama.clone();
        config["encoder_config"] = llama;
        config[INJECTED] = json!(-2);
        for (name, value) in changes.as_object().unwrap() {
            match name.strip_prefix("encoder_config.") {
                Some(inner) => config["encoder_config"][inner] = value.clone(),
                None => config[name] = value.clone(),
            }
        }
        config
    }

    fn read_config(config: &Value) -> Result<(Llama, SharedLlmModel, SharedLlmSettings), String> {
        let fields = Fields::of(config, "", Path::new("config.json")).unwrap();
        let upper = config::architecture(fields).map_err(|e| e.to_string())?;
        let (model, settings) = read(fields, &upper).map_err(|e| e.to_string())?.ok_or("no SharedLLM")?;
        match upper {
            Architecture::Llama(upper) => Ok((upper, model, settings)),
            other => Err(format!("{other:?}")),
        }
    }

    fn keep_of(last_p: &Value) -> Result<Keep, String> {
        read_config(&with(&json!({ "last_p": last_p }))).map(|(_, _, settings)| settings.keep)
    }

    #[test]
    fn absent_fields_take_the_defaults_of_the_released_code() {
        let (_, model, settings) = read_config(&with(&json!({}))).unwrap();
        assert_eq!((model.injected_layers, model.lower.num_layers), (2, 5));
        let expected = SharedLlmSettings {
            chunk_len: 1024,
            tree_depth: 3,
            keep: Keep::Tokens(64),
            retrieval: true,
            quirks: Quirks::Faithful,
        };
        assert_eq!(settings, expected);
        let plain = with(&json!({ "num_cross_attn_layers": null }));
        assert_eq!(read_config(&plain).unwrap_err(), "no SharedLLM");
        let nameless = with(&json!({ "encoder_config.model_type": null }));
        assert_eq!(read_config(&nameless).unwrap().1, model);
    }

    #[test]
    fn every_spelling_of_the_kept_tokens() {
        for (text, keep) in [
            (json!("64"), Keep::Tokens(64)),
            (json!("32,32"), Keep::Tokens(32)),
            (json!("\"4,4\""), Keep::Tokens(4)),
            (json!("'(8, 4)'"), Keep::Tokens(8)),
            (json!(" (32, 32) "), Keep::Tokens(32)),
            (json!("5,"), Keep::Tokens(5)),
            (json!("0.25"), Keep::Fraction(0.25)),
            (json!("(0.5, 2)"), Keep::Fraction(0.5)),
            (json!("-1"), Keep::All),
            (json!("0"), Keep::All),
            (json!("-0.5"), Keep::All),
            (json!(16), Keep::Tokens(16)),
            (json!(-1), Keep::All),
            (json!(0.125), Keep::Fraction(0.125)),
        ] {
            assert_eq!(keep_of(&text), Ok(keep), "{text}");
        }
        for wrong in [
            json!(""),
            json!("all"),
            json!("()"),
            json!("1.5"),
            json!("nan"),
            json!("inf"),
            json!("__import__('os')"),
            json!("9999999999999999999999"),
            json!(1_u64 << 40),
            json!([32, 32]),
            json!(true),
        ] {
            let message = keep_of(&wrong).unwrap_err();
            assert!(message.starts_with("`last_p` in config.json is"), "{wrong}: {message}");
        }
    }

    #[test]
    fn what_is_written_reads_back() {
        for changes in [
            json!({}),
            json!({"last_p": "0.25", "segment_tree_depth": 2, "do_retrieval": false, "encoder_config.num_hidden_layers": 2}),
            json!({"last_p": "-1", "rope_scaling": {"type": "linear", "factor": 2}, "attention_bias": true}),
            json!({"last_p": "7", "encoder_config.rope_scaling": {"type": "dynamic", "factor": 4}}),
        ] {
            let (upper, model, settings) = read_config(&with(&changes)).unwrap();
            let written = sharedllm_json(&upper, &model, &settings);
            assert_eq!(read_config(&written).unwrap(), (upper, model, settings), "{changes}");
        }
    }

    #[test]
    fn refusals_name_the_field() {
        let yarn = json!({"type": "yarn", "factor": 2});
        for (changes, message) in [
            (json!({INJECTED: 2}), "`num_cross_attn_layers` in config.json is 2, expected -M for the bottom M layers"),
            (json!({INJECTED: 2}), "a positive number puts cross attention into the top layers"),
            (json!({INJECTED: 0}), "`num_cross_attn_layers` in config.json is 0"),
            (json!({INJECTED: i64::MIN}), "`num_cross_attn_layers` in config.json is -9223372036854775808"),
            (json!({INJECTED: "-2"}), "`num_cross_attn_layers` in config.json is \"-2\""),
            (json!({INJECTED: -6}), "`num_cross_attn_layers` in config.json is -6, expected -1 to -5"),
            (json!({"encoder_config": null}), "`encoder_config` is missing in config.json"),
            (json!({"encoder_config": []}), "`encoder_config` in config.json is [], expected an object"),
            (
                json!({"encoder_config.num_hidden_layers": 1}),
                "`encoder_config.num_hidden_layers` in config.json is 1, expected at least 2",
            ),
            (
                json!({"encoder_config.hidden_size": 128}),
                "`encoder_config.hidden_size` in config.json is 128, expected 64",
            ),
            (
                json!({"encoder_config.num_attention_heads": 2}),
                "`encoder_config.num_attention_heads` in config.json is 2",
            ),
            (
                json!({"encoder_config.num_key_value_heads": 4}),
                "`encoder_config.num_key_value_heads` in config.json is 4",
            ),
            (json!({"encoder_config.head_dim": 32}), "`encoder_config.head_dim` in config.json is 32"),
            (json!({"encoder_config.model_type": "qwen2"}), "`encoder_config.model_type` in config.json is \"qwen2\""),
            (
                json!({"encoder_config.rope_scaling": {"type": "linear", "factor": 0}}),
                "`encoder_config.rope_scaling.factor` in config.json is 0",
            ),
            (json!({"encoder_config.rope_scaling": yarn}), "encoder_config.rope_scaling type 'yarn' in config.json"),
            (
                json!({"rope_scaling": yarn}),
                "rope_scaling type 'yarn' in config.json is not supported (supported: linear",
            ),
            (json!({"model_type": "qwen2"}), "`model_type` in config.json is \"qwen2\", expected \"llama\""),
            (json!({"do_cross_attention": false}), "`do_cross_attention` in config.json is false, expected true"),
            (json!({"encoder_is_model": true}), "`encoder_is_model` in config.json is true, expected false"),
            (json!({"num_cross_attn_hidden_states": 2}), "`num_cross_attn_hidden_states` in config.json is 2"),
            (json!({"encoder_hidden_size": 32}), "`encoder_hidden_size` in config.json is 32"),
            (json!({"segment_tree_depth": 0}), "`segment_tree_depth` in config.json is 0"),
            (json!({"do_retrieval": 1}), "`do_retrieval` in config.json is 1"),
        ] {
            let found = read_config(&with(&changes)).unwrap_err();
            assert!(found.contains(message), "{changes}: {found}");
        }
    }
}
