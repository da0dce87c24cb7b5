//! The config.json of Mamba, which only encodes.

use super::super::error::CheckpointError;
use super::super::fields::Fields;
use super::{MAX_LAYERS, MAX_VOCAB, MAX_WIDTH, check_common, epsilon};
use accordion_graphs::architecture::Mamba;
use serde_json::{Value, json};

const MAX_STATE: usize = 1 << 12;
const MAX_KERNEL: usize = 1 << 8;
/// What Hugging Face's class uses when the config says nothing.
const DEFAULT_EXPAND: usize = 2;
const DEFAULT_KERNEL: usize = 4;

pub(super) fn read(fields: Fields<'_>) -> Result<Mamba, CheckpointError> {
    check_common(fields, "silu")?;
    let count = |name, most| fields.required(name, |f, n| f.count(n, most));
    let hidden_size = count("hidden_size", MAX_WIDTH)?;
    Ok(Mamba {
        num_layers: count("num_hidden_layers", MAX_LAYERS)?,
        hidden_size,
        intermediate_size: intermediate_size(fields, hidden_size)?,
        state_size: count("state_size", MAX_STATE)?,
        conv_kernel: fields.count("conv_kernel", MAX_KERNEL)?.unwrap_or(DEFAULT_KERNEL),
        time_step_rank: time_step_rank(fields, hidden_size)?,
        vocab_size: count("vocab_size", MAX_VOCAB)?,
        rms_norm_eps: epsilon(fields, "layer_norm_epsilon")?,
        use_bias: fields.flag("use_bias")?.unwrap_or(false),
        use_conv_bias: fields.flag("use_conv_bias")?.unwrap_or(true),
    })
}

/// Given as such, as a multiple of the hidden size, or as both.
fn intermediate_size(fields: Fields<'_>, hidden_size: usize) -> Result<usize, CheckpointError> {
    let expand = fields.count("expand", MAX_WIDTH)?;
    let given = fields.count("intermediate_size", MAX_WIDTH)?;
    match (given, expand) {
        (Some(given), Some(expand)) if given != expand * hidden_size => {
            let expected = format!("{expand} x `hidden_size`, as `expand` says");
            Err(fields.wrong("intermediate_size", expected))
        }
        (Some(given), _) => Ok(given),
        (None, expand) => {
            let width = expand.unwrap_or(DEFAULT_EXPAND) * hidden_size;
            let expected = || format!("at most {MAX_WIDTH} / `hidden_size`, {hidden_size}");
            if width <= MAX_WIDTH { Ok(width) } else { Err(fields.wrong("expand", expected())) }
        }
    }
}

/// A number, or `"auto"`: a sixteenth of the hidden size.
fn time_step_rank(fields: Fields<'_>, hidden_size: usize) -> Result<usize, CheckpointError> {
    match fields.get("time_step_rank") {
        None => Ok(hidden_size.div_ceil(16)),
        Some(word) if word == "auto" => Ok(hidden_size.div_ceil(16)),
        Some(_) => fields.required("time_step_rank", |f, n| f.count(n, MAX_WIDTH)),
    }
}

pub(super) fn config_json(model: &Mamba) -> Value {
    json!({
        "architectures": ["MambaForCausalLM"],
        "model_type": "mamba",
        "torch_dtype": "float32",
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.intermediate_size,
        "state_size": model.state_size,
        "num_hidden_layers": model.num_layers,
        "conv_kernel": model.conv_kernel,
        "time_step_rank": model.time_step_rank,
        "layer_norm_epsilon": model.rms_norm_eps,
        "use_bias": model.use_bias,
        "use_conv_bias": model.use_conv_bias,
        "hidden_act": "silu",
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::super::{encoder, encoder_json, from_config_json};
    use super::*;
    use accordion_graphs::architecture::Encoder;
    use std::path::Path;

    fn with(changes: &Value) -> Value {
        let mut config = json!({
            "model_type": "mamba", "hidden_size": 40, "state_size": 8, "num_hidden_layers": 2, "vocab_size": 100,
            "layer_norm_epsilon": 1e-5,
        });
        config.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
        config
    }

    fn read(config: &Value) -> Result<Mamba, String> {
        let fields = Fields::of(config, "encoder.", Path::new("rcc.json")).unwrap();
        match encoder(fields).map_err(|e| e.to_string())? {
            Encoder::Mamba(model) => Ok(model),
            other => Err(format!("{other:?}")),
        }
    }

    #[test]
    fn absent_fields_take_the_family_defaults() {
        let model = read(&with(&json!({}))).unwrap();
        assert_eq!((model.intermediate_size, model.conv_kernel, model.time_step_rank), (80, 4, 3));
        assert!(!model.use_bias && model.use_conv_bias);
        assert_eq!(read(&with(&json!({"time_step_rank": "auto", "expand": 3}))).unwrap().intermediate_size, 120);
        assert_eq!(read(&with(&json!({"time_step_rank": 7}))).unwrap().time_step_rank, 7);
        assert_eq!(read(&with(&json!({"intermediate_size": 80, "expand": 2}))).unwrap(), model);
    }

    #[test]
    fn what_is_written_reads_back() {
        for changes in [
            json!({}),
            json!({"use_bias": true, "use_conv_bias": false, "conv_kernel": 2, "time_step_rank": 5}),
            json!({"intermediate_size": 50}),
        ] {
            let model = read(&with(&changes)).unwrap();
            assert_eq!(read(&encoder_json(&Encoder::Mamba(model.clone()))).unwrap(), model);
        }
    }

    #[test]
    fn refusals_name_the_field() {
        for (changes, message) in [
            (json!({"hidden_act": "gelu"}), "encoder.hidden_act 'gelu' in rcc.json"),
            (json!({"state_size": null}), "`encoder.state_size` is missing in rcc.json"),
            (json!({"state_size": 1_u64 << 40}), "`encoder.state_size` in rcc.json"),
            (json!({"time_step_rank": "some"}), "`encoder.time_step_rank` in rcc.json is \"some\""),
            (json!({"expand": 1 << 20}), "`encoder.expand` in rcc.json is 1048576, expected at most"),
            (json!({"intermediate_size": 81, "expand": 2}), "`encoder.intermediate_size` in rcc.json is 81"),
            (json!({"layer_norm_epsilon": 0}), "`encoder.layer_norm_epsilon` in rcc.json is 0"),
            (json!({"conv_kernel": 0}), "`encoder.conv_kernel` in rcc.json is 0"),
        ] {
            let found = read(&with(&changes)).unwrap_err();
            assert!(found.contains(message), "{changes}: {found}");
        }
        let alone = from_config_json(&with(&json!({})), Path::new("m/config.json")).unwrap_err().to_string();
        assert!(alone.contains("model_type 'mamba' in m/config.json is not supported"), "{alone}");
        assert!(alone.contains("mamba only as the encoder in rcc.json"), "{alone}");
    }
}
