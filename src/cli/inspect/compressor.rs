//! What a trained method adds to a model.

use crate::cli::text::grouped;
use accordion_graphs::architecture::{Architecture, Compressor, Encoder, RccModel, SharedLlmModel};

/// Lines about `compressor`, whose results `model` reads.
pub(super) fn rows(compressor: &Compressor, model: &Architecture) -> Vec<(&'static str, String)> {
    match compressor {
        Compressor::Rcc(RccModel { encoder, encoder_path, .. }) => {
            let family = match encoder {
                Encoder::Transformer(encoder) => family(encoder),
                Encoder::Mamba(_) => "Mamba",
                _ => "of another kind",
            };
            let [layers, hidden, vocabulary] = [encoder.num_layers(), encoder.hidden_size(), encoder.vocab_size()];
            let vocabulary = grouped(vocabulary as u64);
            vec![
                (
                    "encoder",
                    format!("{family}, {layers} layers, hidden {hidden}, vocabulary {vocabulary}, {encoder_path}"),
                ),
                (
                    "maps",
                    format!(
                        "{}, to the embedding and behind {} layers, {} x {hidden}",
                        model.num_layers() + 1,
                        model.num_layers(),
                        model.hidden_size()
                    ),
                ),
            ]
        }
        Compressor::SharedLlm(SharedLlmModel { lower, injected_layers }) => {
            let unused = match lower.num_layers.saturating_sub(*injected_layers) {
                0 => String::new(),
                rest => format!(" and {rest} that are not used"),
            };
            vec![
                (
                    "lower model",
                    format!(
                        "{injected_layers} layers{unused}, hidden {}, MLP {}",
                        lower.hidden_size, lower.intermediate_size
                    ),
                ),
                ("attended to", format!("by the bottom {injected_layers} of {} layers", model.num_layers())),
            ]
        }
        _ => Vec::new(),
    }
}

fn family(model: &Architecture) -> &'static str {
    match model {
        Architecture::Llama(_) => "Llama",
        Architecture::GptNeox(_) => "GPT-NeoX",
        _ => "transformer",
    }
}
