//! The config.json of GPT-NeoX and Pythia.

use super::super::error::CheckpointError;
use super::super::fields::Fields;
use super::super::rope;
use super::{MAX_HEAD_DIM, MAX_HEADS, MAX_LAYERS, MAX_POSITIONS, MAX_VOCAB, MAX_WIDTH};
use super::{check_common, eos_json, eos_token_ids, epsilon, token_id};
use accordion_graphs::architecture::GptNeox;
use serde_json::{Value, json};

/// Names of the frequencies' base and of the rotated fraction of a head; transformers writes both pairs.
const THETA: [&str; 2] = ["rotary_emb_base", "rope_theta"];
const FRACTION: [&str; 2] = ["rotary_pct", "partial_rotary_factor"];
/// What Hugging Face's class rotates when the config says nothing.
const DEFAULT_FRACTION: f64 = 0.25;

pub(super) fn read(fields: Fields<'_>) -> Result<GptNeox, CheckpointError> {
    check_common(fields, "gelu")?;
    let count = |name, most| fields.required(name, |f, n| f.count(n, most));
    let hidden_size = count("hidden_size", MAX_WIDTH)?;
    let num_heads = count("num_attention_heads", MAX_HEADS)?;
    let head_dim = hidden_size / num_heads;
    if !hidden_size.is_multiple_of(num_heads) || head_dim > MAX_HEAD_DIM {
        return Err(fields.wrong("hidden_size", format!("{num_heads} heads of a width of at most {MAX_HEAD_DIM}")));
    }
    let even = |fraction| rotated(head_dim, fraction).is_some();
    let expected = format!("above 0, at most 1, that rotates an even number of the {head_dim} dimensions of a head");
    let fraction = rope::rotated_fraction(fields, &FRACTION, &expected, even)?.unwrap_or(DEFAULT_FRACTION);
    let rotary_dims = rotated(head_dim, fraction).ok_or_else(|| fields.wrong(FRACTION[0], expected))?;
    let vocab_size = count("vocab_size", MAX_VOCAB)?;
    let max_positions = count("max_position_embeddings", MAX_POSITIONS)?;
    Ok(GptNeox {
        num_layers: count("num_hidden_layers", MAX_LAYERS)?,
        hidden_size,
        intermediate_size: count("intermediate_size", MAX_WIDTH)?,
        num_heads,
        vocab_size,
        max_positions,
        layer_norm_eps: epsilon(fields, "layer_norm_eps")?,
        rope: rope::read(fields, &THETA, max_positions)?,
        rotary_dims,
        parallel_residual: fields.flag("use_parallel_residual")?.unwrap_or(true),
        tie_word_embeddings: fields.flag("tie_word_embeddings")?.unwrap_or(false),
        attention_bias: fields.flag("attention_bias")?.unwrap_or(true),
        eos_token_ids: eos_token_ids(fields, vocab_size)?.unwrap_or_default(),
        bos_token_id: token_id(fields, "bos_token_id", vocab_size)?,
    })
}

/// Dimensions of a head that `fraction` rotates, rounded down as Hugging Face does; `None` if they are not pairs.
fn rotated(head_dim: usize, fraction: f64) -> Option<usize> {
    let dims = (head_dim as f64 * fraction) as usize;
    (fraction > 0.0 && fraction <= 1.0 && dims > 0 && dims.is_multiple_of(2)).then_some(dims)
}

/// A fraction that rotates exactly `dims` dimensions.
fn fraction(dims: usize, head_dim: usize) -> f64 {
    let fraction = dims as f64 / head_dim.max(1) as f64;
    // The product may round to just below the whole number, which would lose a dimension.
    if (head_dim as f64 * fraction) as usize == dims { fraction } else { fraction.next_up() }
}

pub(super) fn config_json(model: &GptNeox) -> Value {
    let fraction = fraction(model.rotary_dims, model.head_dim());
    json!({
        "architectures": ["GPTNeoXForCausalLM"],
        "model_type": "gpt_neox",
        "torch_dtype": "float32",
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.intermediate_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "hidden_act": "gelu",
        "max_position_embeddings": model.max_positions,
        "layer_norm_eps": model.layer_norm_eps,
        "rotary_pct": fraction,
        "rotary_emb_base": model.rope.theta,
        "rope_scaling": rope::scaling_json(&model.rope.scaling),
        "use_parallel_residual": model.parallel_residual,
        "attention_bias": model.attention_bias,
        "tie_word_embeddings": model.tie_word_embeddings,
        "bos_token_id": model.bos_token_id,
        "eos_token_id": eos_json(&model.eos_token_ids),
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::float_cmp)]
    use super::super::{architecture_json, from_config_json};
    use super::*;
    use accordion_graphs::architecture::{Architecture, RopeScaling};
    use std::path::Path;

    fn base() -> Value {
        json!({
            "model_type": "gpt_neox", "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2,
            "num_attention_heads": 4, "vocab_size": 100, "layer_norm_eps": 1e-5, "max_position_embeddings": 512,
        })
    }

    fn read(changes: &Value) -> Result<GptNeox, String> {
        let mut config = base();
        config.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
        match from_config_json(&config, Path::new("m/config.json")).map_err(|e| e.to_string())? {
            Architecture::GptNeox(model) => Ok(model),
            other => Err(format!("{other:?}")),
        }
    }

    #[test]
    fn absent_fields_take_the_family_defaults() {
        let model = read(&json!({})).unwrap();
        assert_eq!((model.rotary_dims, model.rope.theta), (4, 10_000.0));
        assert!(model.parallel_residual && model.attention_bias && !model.tie_word_embeddings);
        assert_eq!((model.bos_token_id, model.eos_token_ids), (None, vec![]));
    }

    #[test]
    fn every_spelling_of_the_rotary_embedding_agrees() {
        let linear = json!({"rope_type": "linear", "factor": 2.0, "rope_theta": 5e4, "partial_rotary_factor": 0.5});
        let expected = read(&json!({
            "rotary_pct": 0.5, "rotary_emb_base": 5e4, "rope_scaling": {"type": "linear", "factor": 2.0},
        }));
        let expected = expected.unwrap();
        assert_eq!((expected.rotary_dims, expected.rope.theta), (8, 5e4));
        assert_eq!(expected.rope.scaling, RopeScaling::Linear { factor: 2.0 });
        for spelling in [
            json!({"rope_parameters": linear}),
            json!({"rope_parameters": linear, "rotary_pct": 0.5, "partial_rotary_factor": 0.5}),
            json!({"rotary_emb_base": 50_000, "rope_theta": 5e4, "partial_rotary_factor": 0.5,
                "rope_scaling": {"type": "linear", "factor": 2}}),
        ] {
            assert_eq!(read(&spelling).unwrap(), expected, "{spelling}");
        }
    }

    #[test]
    fn what_is_written_reads_back() {
        for changes in [
            json!({}),
            json!({"rotary_pct": 1.0, "use_parallel_residual": false, "eos_token_id": 0, "bos_token_id": 0}),
            json!({"attention_bias": false, "tie_word_embeddings": true, "eos_token_id": [0, 2]}),
            json!({"rope_scaling": {"type": "dynamic", "factor": 2.0}, "rotary_emb_base": 7e3}),
            // 46 / 98 * 98 rounds to below 46.
            json!({"hidden_size": 98 * 4, "rotary_pct": 0.47}),
        ] {
            let model = Architecture::GptNeox(read(&changes).unwrap());
            assert_eq!(from_config_json(&architecture_json(&model), Path::new("")).unwrap(), model, "{changes}");
        }
        for head_dim in 1..=512 {
            for dims in (2..=head_dim).step_by(2) {
                assert_eq!(rotated(head_dim, fraction(dims, head_dim)), Some(dims), "{dims} of {head_dim}");
            }
        }
    }

    #[test]
    fn refusals_name_the_field() {
        for (changes, message) in [
            (
                json!({"hidden_act": "gelu_new"}),
                "hidden_act 'gelu_new' in m/config.json is not supported (supported: gelu)",
            ),
            (json!({"hidden_size": 66}), "`hidden_size` in m/config.json is 66, expected 4 heads"),
            (json!({"rotary_pct": 0.2}), "`rotary_pct` in m/config.json is 0.2,"),
            (json!({"rotary_pct": 0}), "`rotary_pct` in m/config.json is 0,"),
            (json!({"rotary_pct": 1.5}), "`rotary_pct` in m/config.json is 1.5,"),
            (json!({"hidden_size": 4}), "`rotary_pct` in m/config.json is absent, expected"),
            (json!({"rotary_pct": 0.5, "partial_rotary_factor": 0.25}), "the same as `rotary_pct`, 0.5"),
            (
                json!({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.3}, "hidden_size": 40}),
                "`rope_parameters.partial_rotary_factor` in m/config.json is 0.3,",
            ),
            (
                json!({"rotary_pct": 0.5, "rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.25}}),
                "`rotary_pct` in m/config.json is 0.5, expected the same as `rope_parameters.partial_rotary_factor`",
            ),
            (
                json!({"rotary_emb_base": 1e4, "rope_theta": 2e4}),
                "`rope_theta` in m/config.json is 20000.0, expected the same as `rotary_emb_base`, 10000",
            ),
            (json!({"rotary_emb_base": -1}), "`rotary_emb_base` in m/config.json is -1"),
            (json!({"layer_norm_eps": null}), "`layer_norm_eps` is missing"),
            (json!({"use_parallel_residual": 1}), "`use_parallel_residual` in m/config.json is 1"),
            (json!({"num_hidden_layers": 1_u64 << 60}), "`num_hidden_layers` in m/config.json"),
            (json!({"eos_token_id": 100}), "`eos_token_id` in m/config.json is 100"),
        ] {
            let found = read(&changes).unwrap_err();
            assert!(found.contains(message), "{changes}: {found}");
        }
    }
}
