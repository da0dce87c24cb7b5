//! The config.json of Llama and its relatives.

use super::super::error::CheckpointError;
use super::super::fields::Fields;
use super::super::rope;
use super::{DECODERS, MAX_HEAD_DIM, MAX_HEADS, MAX_LAYERS, MAX_POSITIONS, MAX_VOCAB, MAX_WIDTH};
use super::{check_common, eos_json, eos_token_ids, epsilon, token_id};
use accordion_graphs::architecture::Llama;
use serde_json::{Value, json};

/// What Mistral's first release used and its configs leave out.
const MISTRAL_WINDOW: usize = 4096;

pub(crate) fn read(fields: Fields<'_>) -> Result<Llama, CheckpointError> {
    let family = match fields.required("model_type", Fields::text)? {
        "llama" => Family::Llama,
        "mistral" => Family::Mistral,
        "qwen2" => Family::Qwen2,
        other => return Err(fields.unsupported("model_type", other, DECODERS)),
    };
    check_common(fields, "silu")?;
    let whole = |fraction: f64| (fraction - 1.0).abs() <= f64::EPSILON;
    rope::rotated_fraction(fields, &["partial_rotary_factor"], "equal to 1", whole)?;

    let count = |name, most| fields.required(name, |f, n| f.count(n, most));
    let hidden_size = count("hidden_size", MAX_WIDTH)?;
    let num_heads = count("num_attention_heads", MAX_HEADS)?;
    let num_kv_heads = fields.count("num_key_value_heads", MAX_HEADS)?.unwrap_or(num_heads);
    if !num_heads.is_multiple_of(num_kv_heads) {
        return Err(fields.wrong("num_key_value_heads", format!("a divisor of `num_attention_heads`, {num_heads}")));
    }
    let vocab_size = count("vocab_size", MAX_VOCAB)?;
    let max_positions = count("max_position_embeddings", MAX_POSITIONS)?;
    let attention_bias = family == Family::Llama && fields.flag("attention_bias")?.unwrap_or(false);
    Ok(Llama {
        num_layers: count("num_hidden_layers", MAX_LAYERS)?,
        hidden_size,
        intermediate_size: count("intermediate_size", MAX_WIDTH)?,
        num_heads,
        num_kv_heads,
        head_dim: head_dim(fields, hidden_size, num_heads)?,
        vocab_size,
        max_positions,
        rms_norm_eps: epsilon(fields, "rms_norm_eps")?,
        rope: rope::read(fields, &["rope_theta"], max_positions)?,
        tie_word_embeddings: fields.flag("tie_word_embeddings")?.unwrap_or(false),
        qkv_bias: family == Family::Qwen2 || attention_bias,
        o_bias: attention_bias,
        mlp_bias: family == Family::Llama && fields.flag("mlp_bias")?.unwrap_or(false),
        sliding_window: sliding_window(fields, family)?,
        eos_token_ids: eos_token_ids(fields, vocab_size)?.unwrap_or_default(),
        bos_token_id: token_id(fields, "bos_token_id", vocab_size)?,
    })
}

#[derive(Clone, Copy, PartialEq)]
enum Family {
    Llama,
    Mistral,
    Qwen2,
}

fn head_dim(fields: Fields<'_>, hidden_size: usize, num_heads: usize) -> Result<usize, CheckpointError> {
    if let Some(given) = fields.count("head_dim", MAX_HEAD_DIM)? {
        return if given.is_multiple_of(2) {
            Ok(given)
        } else {
            Err(fields.wrong("head_dim", "an even number: rotary positions turn pairs"))
        };
    }
    let derived = hidden_size / num_heads;
    if !hidden_size.is_multiple_of(num_heads) || !derived.is_multiple_of(2) || !(1..=MAX_HEAD_DIM).contains(&derived) {
        let expected = format!("{num_heads} heads of an even width of at most {MAX_HEAD_DIM} (`head_dim` is absent)");
        return Err(fields.wrong("hidden_size", expected));
    }
    Ok(derived)
}

fn sliding_window(fields: Fields<'_>, family: Family) -> Result<Option<usize>, CheckpointError> {
    let window = fields.count("sliding_window", MAX_POSITIONS)?;
    Ok(match family {
        Family::Mistral if fields.names().any(|name| name == "sliding_window") => window,
        Family::Mistral => Some(MISTRAL_WINDOW),
        Family::Qwen2 if fields.flag("use_sliding_window")?.unwrap_or(false) => {
            Some(window.ok_or_else(|| fields.missing("sliding_window"))?)
        }
        Family::Llama | Family::Qwen2 => None,
    })
}

/// The config.json of `model`. Where [`from_config_json`](super::from_config_json) can produce `model`, it reads this back to an equal value.
pub fn config_json(model: &Llama) -> Value {
    let qwen2 = model.qkv_bias && !model.o_bias;
    let (model_type, class) = match (qwen2, model.sliding_window) {
        (true, _) => ("qwen2", "Qwen2ForCausalLM"),
        (false, Some(_)) => ("mistral", "MistralForCausalLM"),
        (false, None) => ("llama", "LlamaForCausalLM"),
    };
    let mut config = json!({
        "architectures": [class],
        "model_type": model_type,
        "torch_dtype": "float32",
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.intermediate_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_kv_heads,
        "head_dim": model.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": model.max_positions,
        "rms_norm_eps": model.rms_norm_eps,
        "rope_theta": model.rope.theta,
        "rope_scaling": rope::scaling_json(&model.rope.scaling),
        "tie_word_embeddings": model.tie_word_embeddings,
        "bos_token_id": model.bos_token_id,
        "eos_token_id": eos_json(&model.eos_token_ids),
        "sliding_window": model.sliding_window,
    });
    if qwen2 {
        config["use_sliding_window"] = json!(model.sliding_window.is_some());
    } else {
        config["attention_bias"] = json!(model.o_bias);
        config["mlp_bias"] = json!(model.mlp_bias);
    }
    config
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::float_cmp)]
    use super::*;
    use accordion_graphs::architecture::RopeScaling;
    use std::path::Path;

    fn base() -> Value {
        json!({
            "model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
            "num_attention_heads": 4, "vocab_size": 100, "rms_norm_eps": 1e-5, "max_position_embeddings": 512,
        })
    }

    /// The base with some fields replaced; `null` removes.
    fn with(changes: &Value) -> Value {
        let mut config = base();
        for (name, value) in changes.as_object().unwrap() {
            match value {
                Value::Null => drop(config.as_object_mut().unwrap().remove(name)),
                value => config[name] = value.clone(),
            }
        }
        config
    }

    fn read(changes: &Value) -> Result<Llama, String> {
        read_config(&with(changes))
    }

    fn read_config(config: &Value) -> Result<Llama, String> {
        let fields = Fields::of(config, "", Path::new("m/config.json")).unwrap();
        super::read(fields).map_err(|e| e.to_string())
    }

    #[test]
    fn absent_fields_take_the_family_defaults() {
        let model = read(&json!({})).unwrap();
        assert_eq!((model.head_dim, model.num_kv_heads), (16, 4));
        assert_eq!((model.rope.theta, model.rope.scaling), (10_000.0, RopeScaling::None));
        assert!(!model.tie_word_embeddings && !model.qkv_bias && !model.o_bias && !model.mlp_bias);
        assert_eq!((model.sliding_window, model.bos_token_id, model.eos_token_ids), (None, None, vec![]));
    }

    #[test]
    fn families_differ_in_biases_and_windows() {
        let qwen2 = read(&json!({"model_type": "qwen2", "sliding_window": 32})).unwrap();
        assert_eq!((qwen2.qkv_bias, qwen2.o_bias, qwen2.sliding_window), (true, false, None));
        let qwen2 = json!({"model_type": "qwen2", "sliding_window": 32, "use_sliding_window": true});
        assert_eq!(read(&qwen2).unwrap().sliding_window, Some(32));
        assert_eq!(read(&json!({"model_type": "mistral"})).unwrap().sliding_window, Some(4096));
        let biased = read(&json!({"attention_bias": true, "mlp_bias": true})).unwrap();
        assert!(biased.qkv_bias && biased.o_bias && biased.mlp_bias);
        let mut released = with(&json!({"model_type": "mistral"}));
        released["sliding_window"] = Value::Null;
        assert_eq!(read_config(&released).unwrap().sliding_window, None);
    }

    #[test]
    fn both_spellings_of_the_rotary_scaling_agree() {
        let yarn = |mut fields: Value, kind: &str| {
            fields["factor"] = json!(4.0);
            fields[kind] = json!("yarn");
            fields
        };
        let attention_factor = 0.1 * 4.0_f64.ln() + 1.0;
        let expected = RopeScaling::Yarn {
            factor: 4.0,
            original_max_positions: 512,
            beta_fast: 32.0,
            beta_slow: 1.0,
            attention_factor,
        };
        let old = json!({"rope_theta": 5e5, "rope_scaling": yarn(json!({}), "type")});
        let new = json!({"rope_parameters": yarn(json!({"rope_theta": 5e5}), "rope_type")});
        for config in [old, new] {
            let rope = read(&config).unwrap().rope;
            assert_eq!((rope.theta, &rope.scaling), (5e5, &expected));
        }
        let both = json!({"rope_scaling": yarn(json!({}), "type"), "rope_parameters": {"rope_type": "default"}});
        assert!(read(&both).unwrap_err().contains("the same as `rope_parameters`"));
    }

    #[test]
    fn yarn_magnitudes() {
        let factor = |extra: Value| {
            let mut scaling = json!({"rope_type": "yarn", "factor": 40.0});
            scaling.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
            match read(&json!({"rope_scaling": scaling})).unwrap().rope.scaling {
                RopeScaling::Yarn { attention_factor, .. } => attention_factor,
                other => panic!("{other:?}"),
            }
        };
        assert_eq!(factor(json!({"attention_factor": 0.5, "mscale": 2.0})), 0.5);
        assert_eq!(factor(json!({"mscale": 1.0, "mscale_all_dim": 1.0})), 1.0);
        let ratio = (0.1 * 0.707 * 40.0_f64.ln() + 1.0) / (0.1 * 40.0_f64.ln() + 1.0);
        assert!((factor(json!({"mscale": 0.707, "mscale_all_dim": 1.0})) - ratio).abs() < 1e-12);
    }

    #[test]
    fn what_is_written_reads_back() {
        let llama3 = json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 128});
        for changes in [
            json!({}),
            json!({"rope_scaling": llama3, "eos_token_id": [3, 4], "bos_token_id": 1, "tie_word_embeddings": true}),
            json!({"rope_scaling": {"type": "dynamic", "factor": 2.0}, "num_key_value_heads": 2, "eos_token_id": 2}),
            json!({"rope_scaling": {"type": "linear", "factor": 2.5}, "attention_bias": true, "mlp_bias": true}),
            json!({"rope_scaling": {"type": "yarn", "factor": 2.5}, "head_dim": 48}),
            json!({"model_type": "qwen2", "sliding_window": 64, "use_sliding_window": true}),
            json!({"model_type": "qwen2"}),
            json!({"model_type": "mistral"}),
        ] {
            let model = read(&changes).unwrap();
            assert_eq!(read_config(&config_json(&model)).unwrap(), model);
        }
    }

    #[test]
    fn refusals_name_the_field() {
        let huge = 1_u64 << 60;
        for (changes, message) in [
            (json!({"model_type": null}), "`model_type` is missing in m/config.json"),
            (
                json!({"model_type": "gemma"}),
                "model_type 'gemma' in m/config.json is not supported (supported: llama, mistral, qwen2, gpt_neox; mamba",
            ),
            (json!({"hidden_act": "gelu"}), "hidden_act 'gelu' in m/config.json is not supported (supported: silu)"),
            (json!({"quantization_config": {"quant_method": "awq"}}), "quantization_config of method 'awq'"),
            (
                json!({"partial_rotary_factor": 0.5}),
                "`partial_rotary_factor` in m/config.json is 0.5, expected a finite number equal to 1",
            ),
            (json!({"num_hidden_layers": null}), "`num_hidden_layers` is missing in m/config.json"),
            (
                json!({"num_hidden_layers": huge}),
                "`num_hidden_layers` in m/config.json is 1152921504606846976, expected a whole number from 1 to 1024",
            ),
            (json!({"num_hidden_layers": 0}), "`num_hidden_layers` in m/config.json is 0,"),
            (json!({"hidden_size": -64}), "`hidden_size` in m/config.json is -64,"),
            (json!({"hidden_size": 64.5}), "`hidden_size` in m/config.json is 64.5,"),
            (json!({"hidden_size": "64"}), "`hidden_size` in m/config.json is \"64\","),
            (json!({"hidden_size": 66}), "`hidden_size` in m/config.json is 66, expected 4 heads of an even width"),
            (json!({"hidden_size": 12}), "`hidden_size` in m/config.json is 12,"),
            (json!({"head_dim": 15}), "`head_dim` in m/config.json is 15, expected an even number"),
            (
                json!({"num_key_value_heads": 3}),
                "`num_key_value_heads` in m/config.json is 3, expected a divisor of `num_attention_heads`, 4",
            ),
            (json!({"vocab_size": huge}), "`vocab_size` in m/config.json"),
            (json!({"rms_norm_eps": null}), "`rms_norm_eps` is missing"),
            (
                json!({"rms_norm_eps": -1e-5}),
                "`rms_norm_eps` in m/config.json is -0.00001, expected a finite number above 0",
            ),
            (json!({"rms_norm_eps": 0}), "`rms_norm_eps` in m/config.json is 0,"),
            (json!({"rope_theta": 0.0}), "`rope_theta` in m/config.json is 0.0, expected a finite number above 0"),
            (json!({"rope_theta": "Infinity"}), "`rope_theta` in m/config.json"),
            (json!({"rope_scaling": []}), "`rope_scaling` in m/config.json is [], expected an object"),
            (
                json!({"rope_scaling": {"type": "foo"}}),
                "rope_scaling type 'foo' in m/config.json is not supported (supported: linear, dynamic, yarn, llama3)",
            ),
            (json!({"rope_parameters": {"factor": 2}}), "`rope_parameters.type` is missing"),
            (json!({"rope_scaling": {"type": "linear"}}), "`rope_scaling.factor` is missing"),
            (
                json!({"rope_scaling": {"type": "linear", "factor": 0.5}}),
                "`rope_scaling.factor` in m/config.json is 0.5, expected a finite number of at least 1",
            ),
            (
                json!({"rope_scaling": {"type": "linear", "factor": 2, "x": 1}}),
                "rope_scaling of type linear: field 'x'",
            ),
            (json!({"rope_scaling": {"type": "yarn", "factor": 2, "truncate": false}}), "`rope_scaling.truncate`"),
            (json!({"rope_scaling": {"type": "yarn", "factor": 2, "beta_fast": 1}}), "`rope_scaling.beta_fast`"),
            (
                json!({"rope_scaling": {"type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 1, "original_max_position_embeddings": 8}}),
                "`rope_scaling.high_freq_factor`",
            ),
            (
                json!({"rope_scaling": {"type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4}}),
                "`rope_scaling.original_max_position_embeddings` is missing",
            ),
            (json!({"eos_token_id": 100}), "`eos_token_id` in m/config.json is 100, expected a token id below 100"),
            (json!({"eos_token_id": [1, -1]}), "`eos_token_id` in m/config.json is [1,-1]"),
            (json!({"bos_token_id": -1}), "`bos_token_id` in m/config.json is -1"),
            (
                json!({"tie_word_embeddings": "yes"}),
                "`tie_word_embeddings` in m/config.json is \"yes\", expected true or false",
            ),
            (json!({"model_type": "qwen2", "use_sliding_window": true}), "`sliding_window` is missing"),
        ] {
            let found = read(&changes).expect_err(&changes.to_string());
            assert!(found.contains(message), "{changes}: {found}");
        }
    }
}
