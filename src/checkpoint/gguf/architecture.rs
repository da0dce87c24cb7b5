//! GGUF metadata to an architecture, by way of the config.json they stand for.

use super::Imported;
use super::reader::Gguf;
use crate::checkpoint::config;
use crate::checkpoint::error::CheckpointError;
use crate::checkpoint::fields::Fields;
use crate::checkpoint::import::RowOrder;
use serde_json::{Map, Value, json};

/// config.json field, and the metadata key after the architecture's name.
const REQUIRED: [(&str, &str); 6] = [
    ("hidden_size", "embedding_length"),
    ("intermediate_size", "feed_forward_length"),
    ("num_hidden_layers", "block_count"),
    ("num_attention_heads", "attention.head_count"),
    ("max_position_embeddings", "context_length"),
    ("rms_norm_eps", "attention.layer_norm_rms_epsilon"),
];
const OPTIONAL: [(&str, &str); 2] =
    [("num_key_value_heads", "attention.head_count_kv"), ("rope_theta", "rope.freq_base")];
/// Ids that end a generation: of the text, of a turn, of a message.
const END_IDS: [&str; 3] =
    ["tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id"];

/// The model that the metadata describe.
pub(super) fn read(gguf: &Gguf) -> Result<Imported, CheckpointError> {
    let fields = gguf.fields()?;
    let family = fields.required("general.architecture", Fields::text)?;
    // Only Llama's converter reorders the rotary rows.
    let row_order = match family {
        "llama" => RowOrder::Pairs,
        "qwen2" => RowOrder::Halves,
        other => {
            return Err(CheckpointError::Unsupported {
                what: "general.architecture".to_owned(),
                found: other.to_owned(),
                path: gguf.path().to_owned(),
                supported: "llama, qwen2".to_owned(),
            });
        }
    };
    let get = |key: &str| fields.get(&format!("{family}.{key}"));
    let mut config = Map::from_iter([("model_type".to_owned(), json!(family))]);
    for (field, key) in REQUIRED {
        let value = get(key).ok_or_else(|| fields.missing(&format!("{family}.{key}")))?;
        config.insert(field.to_owned(), value.clone());
    }
    let optional = OPTIONAL.iter().filter_map(|(field, key)| Some(((*field).to_owned(), get(key)?.clone())));
    config.extend(optional);
    if let Some(width) = head_dim(fields, family)? {
        config.insert("head_dim".to_owned(), width.clone());
    }
    if get("expert_count").is_some_and(|n| *n != json!(0)) {
        return Err(fields.wrong(&format!("{family}.expert_count"), "0: mixtures of experts are not supported"));
    }
    config.insert("rope_scaling".to_owned(), rope_scaling(fields, family)?);

    let tensors = gguf.tensors();
    let vocab_size = tensors.get("token_embd.weight").and_then(|tensor| tensor.shape.get(1));
    config.insert("vocab_size".to_owned(), json!(vocab_size));
    config.insert("tie_word_embeddings".to_owned(), json!(!tensors.contains_key("output.weight")));
    config.insert("attention_bias".to_owned(), json!(tensors.contains_key("blk.0.attn_q.bias")));
    config.insert("mlp_bias".to_owned(), json!(tensors.contains_key("blk.0.ffn_up.bias")));
    config.insert("bos_token_id".to_owned(), json!(fields.get("tokenizer.ggml.bos_token_id")));
    let mut ends: Vec<&Value> = END_IDS.iter().filter_map(|key| fields.get(key)).collect();
    ends.dedup();
    config.insert("eos_token_id".to_owned(), json!(ends));
    let model = config::llama(Fields::of(&Value::Object(config), "", gguf.path())?)?;
    Ok(Imported { model, row_order })
}

/// The width of a head, which may be given three times and must be one.
fn head_dim<'a>(fields: Fields<'a>, family: &str) -> Result<Option<&'a Value>, CheckpointError> {
    let keys = ["attention.key_length", "attention.value_length", "rope.dimension_count"];
    let mut width = None;
    for key in keys.map(|key| format!("{family}.{key}")) {
        match (fields.get(&key), width) {
            (Some(found), Some(known)) if found != known => {
                return Err(fields.wrong(&key, format!("{known}: heads of one width, rotated as a whole")));
            }
            (found, _) => width = width.or(found),
        }
    }
    Ok(width)
}

fn rope_scaling(fields: Fields<'_>, family: &str) -> Result<Value, CheckpointError> {
    let scope = format!("{family}.rope.scaling.");
    let known = ["type", "factor", "original_context_length", "finetuned"];
    let unknown = fields.names().find(|name| name.strip_prefix(&scope).is_some_and(|rest| !known.contains(&rest)));
    if let Some(unknown) = unknown {
        return Err(CheckpointError::Unsupported {
            what: "metadata field".to_owned(),
            found: unknown.to_owned(),
            path: fields.path().to_owned(),
            supported: known.map(|key| format!("{scope}{key}")).join(", "),
        });
    }
    let get = |key: &str| fields.get(&format!("{scope}{key}"));
    Ok(match fields.text(&format!("{scope}type"))? {
        None | Some("none") => Value::Null,
        Some("linear") => json!({ "rope_type": "linear", "factor": get("factor") }),
        Some(kind) => json!({
            "rope_type": kind,
            "factor": get("factor"),
            "original_max_position_embeddings": get("original_context_length"),
        }),
    })
}
