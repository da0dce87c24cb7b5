//! What names a model where something was made for exactly that model.

use super::Checkpoint;
use accordion_calibration::significance::ModelIdentity;
use accordion_graphs::architecture::{Architecture, Rope, RopeScaling};

/// The model and the rotary embedding in effect, for tables that hold only for these.
pub fn model_identity(checkpoint: &Checkpoint) -> ModelIdentity {
    identity_of(checkpoint.fingerprint(), checkpoint.architecture())
}

/// The identity of a model whose fingerprint is known.
pub(crate) fn identity_of(fingerprint: String, architecture: &Architecture) -> ModelIdentity {
    let [rotated, head_dim] = [architecture.rotary_dims(), architecture.head_dim()];
    let partly = if rotated == head_dim { String::new() } else { format!(" rotated {rotated} of {head_dim}") };
    let rope = rope_text(architecture.rope()) + &partly;
    ModelIdentity { fingerprint, rope }
}

/// The one spelling of a rotary embedding: equal texts are equal embeddings. Numbers are the shortest that read back to
/// the same value.
pub fn rope_text(rope: &Rope) -> String {
    let scaling = match rope.scaling {
        RopeScaling::None => "unscaled".to_owned(),
        RopeScaling::Linear { factor } => format!("linear factor {factor}"),
        RopeScaling::Dynamic { factor, original_max_positions } => {
            format!("dynamic factor {factor} original {original_max_positions}")
        }
        RopeScaling::Yarn { factor, original_max_positions, beta_fast, beta_slow, attention_factor } => format!(
            "yarn factor {factor} original {original_max_positions} beta {beta_fast} {beta_slow} \
             attention {attention_factor}"
        ),
        RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_positions } => format!(
            "llama3 factor {factor} original {original_max_positions} bands {low_freq_factor} {high_freq_factor}"
        ),
    };
    format!("theta {} {scaling}", rope.theta)
}

#[cfg(test)]
mod tests {
    use super::*;
    use accordion_graphs::architecture::GptNeox;

    #[test]
    fn every_difference_shows() {
        let yarn = |factor, attention_factor| RopeScaling::Yarn {
            factor,
            original_max_positions: 4096,
            beta_fast: 32.0,
            beta_slow: 1.0,
            attention_factor,
        };
        let texts = [
            (1e4, RopeScaling::None),
            (1e5, RopeScaling::None),
            (1e4, RopeScaling::Linear { factor: 2.0 }),
            (1e4, RopeScaling::Dynamic { factor: 2.0, original_max_positions: 4096 }),
            (1e4, RopeScaling::Dynamic { factor: 2.0, original_max_positions: 2048 }),
            (1e4, yarn(2.0, 1.0)),
            (1e4, yarn(2.0, 1.0 + f64::EPSILON)),
            (1e4, yarn(4.0, 1.0)),
        ]
        .map(|(theta, scaling)| rope_text(&Rope { theta, scaling }));
        let distinct: std::collections::BTreeSet<_> = texts.iter().collect();
        assert_eq!(distinct.len(), texts.len(), "{texts:#?}");
        assert_eq!(texts[1], "theta 100000 unscaled");
    }

    #[test]
    fn the_rotated_part_of_a_head_shows() {
        let model = |rotary_dims| {
            Architecture::GptNeox(GptNeox {
                num_layers: 1,
                hidden_size: 32,
                intermediate_size: 8,
                num_heads: 2,
                vocab_size: 8,
                max_positions: 8,
                layer_norm_eps: 1e-5,
                rope: Rope { theta: 1e4, scaling: RopeScaling::None },
                rotary_dims,
                parallel_residual: true,
                tie_word_embeddings: false,
                attention_bias: true,
                eos_token_ids: Vec::new(),
                bos_token_id: None,
            })
        };
        let rope = |rotary_dims| identity_of(String::new(), &model(rotary_dims)).rope;
        assert_eq!(rope(4), "theta 10000 unscaled rotated 4 of 16");
        assert_eq!(rope(16), "theta 10000 unscaled");
    }
}
