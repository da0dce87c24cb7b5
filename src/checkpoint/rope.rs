//! The rotary part of config.json, in both spellings: `rope_scaling` beside `rope_theta`, and `rope_parameters`.

use super::error::CheckpointError;
use super::fields::{Fields, shown};
use accordion_graphs::architecture::{Rope, RopeScaling};
use serde_json::{Map, Value, json};
use std::path::Path;

/// What Hugging Face's Llama, Mistral and Qwen2 use when the config says nothing.
const DEFAULT_THETA: f64 = 10_000.0;
const MAX_POSITIONS: usize = super::config::MAX_POSITIONS;

/// The rotary embedding of a model trained for `max_positions`. The base of the frequencies is the rotary object's, or
/// the config's under one of `theta_names`.
pub(crate) fn read(config: Fields<'_>, theta_names: &[&str], max_positions: usize) -> Result<Rope, CheckpointError> {
    let outside = agreed(config, theta_names, |name| config.positive(name))?.map_or(DEFAULT_THETA, |(_, theta)| theta);
    let Some((name, value)) = object(config)? else {
        return Ok(Rope { theta: outside, scaling: RopeScaling::None });
    };
    let scope = scope(config, name);
    let fields = Fields::of(value, &scope, config.path())?;
    let theta = fields.positive("rope_theta")?.unwrap_or(outside);
    Ok(Rope { theta, scaling: scaling(fields, name, max_positions)? })
}

/// The part of a head that is rotated, where the config tells it: in the rotary object or under one of `names`, which
/// have to agree. The number must be one that is `accept`ed; `expected` describes those.
pub(crate) fn rotated_fraction(
    config: Fields<'_>,
    names: &[&str],
    expected: &str,
    accept: impl Fn(f64) -> bool,
) -> Result<Option<f64>, CheckpointError> {
    const NAME: &str = "partial_rotary_factor";
    let number = |fields: &Fields<'_>, name: &str| fields.number(name, expected, &accept);
    let outside = agreed(config, names, |name| number(&config, name))?;
    let Some((object, value)) = object(config)? else {
        return Ok(outside.map(|(_, fraction)| fraction));
    };
    let scope = scope(config, object);
    let inside = number(&Fields::of(value, &scope, config.path())?, NAME)?;
    if let (Some(inside), Some((name, outside))) = (inside, outside)
        && inside.to_bits() != outside.to_bits()
    {
        return Err(config.wrong(name, format!("the same as `{scope}{NAME}`, {inside}")));
    }
    Ok(inside.or(outside.map(|(_, fraction)| fraction)))
}

/// The number that all of `names` that are there agree on, and the first of these.
fn agreed<'n>(
    config: Fields<'_>,
    names: &[&'n str],
    read: impl Fn(&str) -> Result<Option<f64>, CheckpointError>,
) -> Result<Option<(&'n str, f64)>, CheckpointError> {
    let mut known: Option<(&str, f64)> = None;
    for &name in names {
        match (read(name)?, known) {
            (Some(found), Some((first, number))) if found.to_bits() != number.to_bits() => {
                return Err(config.wrong(name, format!("the same as `{first}`, {number}")));
            }
            (Some(found), None) => known = Some((name, found)),
            _ => {}
        }
    }
    Ok(known)
}

/// The object that holds the scaling, and its name.
fn object(config: Fields<'_>) -> Result<Option<(&'static str, &Value)>, CheckpointError> {
    match (config.get("rope_scaling"), config.get("rope_parameters")) {
        (Some(old), Some(new)) if old != new => {
            Err(config.wrong("rope_scaling", format!("the same as `rope_parameters`, {}", shown(new))))
        }
        (_, Some(value)) => Ok(Some(("rope_parameters", value))),
        (Some(value), None) => Ok(Some(("rope_scaling", value))),
        (None, None) => Ok(None),
    }
}

fn scope(config: Fields<'_>, object: &str) -> String {
    format!("{}{object}.", config.scope())
}

fn scaling(fields: Fields<'_>, name: &str, max_positions: usize) -> Result<RopeScaling, CheckpointError> {
    let kind = match fields.text("rope_type")? {
        Some(kind) => kind,
        None => fields.required("type", Fields::text)?,
    };
    let only = |known: &[&str]| {
        let common = ["type", "rope_type", "rope_theta", "partial_rotary_factor"];
        match fields.names().find(|field| !known.contains(field) && !common.contains(field)) {
            None => Ok(()),
            Some(unknown) => Err(CheckpointError::Unsupported {
                what: format!("{name} of type {kind}: field"),
                found: unknown.to_owned(),
                path: fields.path().to_owned(),
                supported: if known.is_empty() { "none".to_owned() } else { known.join(", ") },
            }),
        }
    };
    let factor = || fields.required("factor", |f, n| f.number(n, "of at least 1", |x| x >= 1.0));
    let original = || fields.count("original_max_position_embeddings", MAX_POSITIONS);
    Ok(match kind {
        "default" => {
            only(&[])?;
            RopeScaling::None
        }
        "linear" => {
            only(&["factor"])?;
            RopeScaling::Linear { factor: factor()? }
        }
        "dynamic" => {
            only(&["factor", "original_max_position_embeddings"])?;
            RopeScaling::Dynamic { factor: factor()?, original_max_positions: original()?.unwrap_or(max_positions) }
        }
        "yarn" => {
            only(&[
                "factor",
                "original_max_position_embeddings",
                "attention_factor",
                "mscale",
                "mscale_all_dim",
                "beta_fast",
                "beta_slow",
                "truncate",
                "finetuned",
            ])?;
            yarn(fields, factor()?, original()?.unwrap_or(max_positions))?
        }
        "llama3" => {
            only(&["factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"])?;
            let low_freq_factor = fields.required("low_freq_factor", Fields::positive)?;
            let high_freq_factor = fields.required("high_freq_factor", Fields::positive)?;
            if high_freq_factor <= low_freq_factor {
                let expected = format!("above `low_freq_factor`, {low_freq_factor}");
                return Err(fields.wrong("high_freq_factor", expected));
            }
            RopeScaling::Llama3 {
                factor: factor()?,
                low_freq_factor,
                high_freq_factor,
                original_max_positions: original()?
                    .ok_or_else(|| fields.missing("original_max_position_embeddings"))?,
            }
        }
        unknown => {
            return Err(CheckpointError::Unsupported {
                what: format!("{name} type"),
                found: unknown.to_owned(),
                path: fields.path().to_owned(),
                supported: "linear, dynamic, yarn, llama3".to_owned(),
            });
        }
    })
}

/// Reads a scaling as a flag spells it: `none`, `linear=FACTOR`, `dynamic=FACTOR[:ORIGINAL]` or `yarn=FACTOR[:ORIGINAL]`,
/// where ORIGINAL is the trained length, `max_positions` if not given. The base of the frequencies stays the model's; the
/// `YaRN` patch of HOMER's authors computes with 10000 whatever the model has.
///
/// # Errors
///
/// It is not one of those, or a number is outside what the scaling is defined for.
pub fn parse_rope_scaling(text: &str, max_positions: usize) -> Result<RopeScaling, CheckpointError> {
    if text == "none" {
        return Ok(RopeScaling::None);
    }
    let number = |text: &str| serde_json::from_str::<Value>(text).unwrap_or_else(|_| json!(text));
    let (kind, numbers) = text.split_once('=').unwrap_or((text, ""));
    let (factor, original) = numbers.split_once(':').map_or((numbers, None), |(f, o)| (f, Some(o)));
    let mut spelled = Map::from_iter([("type".to_owned(), json!(kind))]);
    if !factor.is_empty() {
        spelled.insert("factor".to_owned(), number(factor));
    }
    if let Some(original) = original {
        spelled.insert("original_max_position_embeddings".to_owned(), number(original));
    }
    let flag = Path::new("--rope-scaling");
    scaling(Fields::of(&Value::Object(spelled), "", flag)?, "rope_scaling", max_positions)
}

fn yarn(fields: Fields<'_>, factor: f64, original_max_positions: usize) -> Result<RopeScaling, CheckpointError> {
    if fields.flag("truncate")? == Some(false) {
        return Err(fields.wrong("truncate", "true: the frequency bounds are rounded to whole dimensions"));
    }
    let beta_fast = fields.positive("beta_fast")?.unwrap_or(32.0);
    let beta_slow = fields.positive("beta_slow")?.unwrap_or(1.0);
    if beta_fast <= beta_slow {
        return Err(fields.wrong("beta_fast", format!("above `beta_slow`, {beta_slow}")));
    }
    // Section 3.4 of the paper (arXiv 2309.00071), and the ratio of two such scales that DeepSeek's configs ask for.
    let magnitude = |mscale: f64| 0.1 * mscale * factor.ln() + 1.0;
    let scales = (fields.positive("mscale")?, fields.positive("mscale_all_dim")?);
    let attention_factor = match (fields.positive("attention_factor")?, scales) {
        (Some(given), _) => given,
        (None, (Some(mscale), Some(all_dim))) => magnitude(mscale) / magnitude(all_dim),
        (None, _) => magnitude(1.0),
    };
    Ok(RopeScaling::Yarn { factor, original_max_positions, beta_fast, beta_slow, attention_factor })
}

/// `scaling` as the value of `rope_scaling`; `null` when there is none.
pub(crate) fn scaling_json(scaling: &RopeScaling) -> Value {
    match *scaling {
        RopeScaling::None => Value::Null,
        RopeScaling::Linear { factor } => json!({ "rope_type": "linear", "factor": factor }),
        RopeScaling::Dynamic { factor, original_max_positions } => json!({
            "rope_type": "dynamic",
            "factor": factor,
            "original_max_position_embeddings": original_max_positions,
        }),
        RopeScaling::Yarn { factor, original_max_positions, beta_fast, beta_slow, attention_factor } => json!({
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": original_max_positions,
            "beta_fast": beta_fast,
            "beta_slow": beta_slow,
            "attention_factor": attention_factor,
        }),
        RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_positions } => json!({
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": low_freq_factor,
            "high_freq_factor": high_freq_factor,
            "original_max_position_embeddings": original_max_positions,
        }),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::float_cmp)]
    use super::*;

    #[test]
    fn flags_spell_scalings() {
        let parse = |text| parse_rope_scaling(text, 8192).unwrap();
        assert_eq!(parse("none"), RopeScaling::None);
        assert_eq!(parse("linear=2"), RopeScaling::Linear { factor: 2.0 });
        assert_eq!(parse("dynamic=4"), RopeScaling::Dynamic { factor: 4.0, original_max_positions: 8192 });
        let RopeScaling::Yarn { factor, original_max_positions, attention_factor, .. } = parse("yarn=2:4096") else {
            unreachable!("{:?}", parse("yarn=2:4096"))
        };
        assert_eq!((factor, original_max_positions), (2.0, 4096));
        assert_eq!(attention_factor, 0.1 * 2.0_f64.ln() + 1.0);
    }

    #[test]
    fn what_is_no_scaling_is_refused_by_name() {
        for (text, word) in [
            ("foo=2", "'foo'"),
            ("yarn", "`factor` is missing in --rope-scaling"),
            ("yarn=0.5", "0.5"),
            ("yarn=two", "two"),
            ("yarn=2:-1", "-1"),
            ("linear=2:4096", "original_max_position_embeddings"),
            ("", "''"),
        ] {
            let message = parse_rope_scaling(text, 8192).unwrap_err().to_string();
            assert!(message.contains(word) && message.contains("--rope-scaling"), "{text}: {message}");
        }
    }
}
