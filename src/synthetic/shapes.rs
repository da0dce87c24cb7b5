//! The shapes there are: Pythia, and RCC's pairs of an encoder and a Pythia decoder.

use super::RandomOptions;
use crate::checkpoint::{CONFIG, NamedShape, RCC_FILE, architecture_json, decoder_tensors, encoder_tensors, rcc_json};
use accordion_graphs::architecture::{Architecture, Encoder, GptNeox, Mamba, Rope, RopeScaling};
use accordion_graphs::plan::rcc::RccSettings;
use serde_json::{Value, json};

/// A model's shape.
#[derive(Debug, Clone, Copy)]
pub struct Shape {
    name: &'static str,
    decoder: PythiaSize,
    encoder: Option<EncoderSize>,
}

#[derive(Debug, Clone, Copy)]
struct PythiaSize {
    layers: usize,
    hidden: usize,
    heads: usize,
    vocab: usize,
}

#[derive(Debug, Clone, Copy)]
struct MambaSize {
    layers: usize,
    hidden: usize,
    vocab: usize,
}

#[derive(Debug, Clone, Copy)]
enum EncoderSize {
    /// One more model like the decoder.
    Twin,
    /// Twice as deep as the decoder.
    Mamba(MambaSize),
}

// From the configurations that EleutherAI and state-spaces publish.
const VOCAB: usize = 50_304;
const MAMBA_VOCAB: usize = 50_280;
const PYTHIA_70M: PythiaSize = PythiaSize { layers: 6, hidden: 512, heads: 8, vocab: VOCAB };
const PYTHIA_160M: PythiaSize = PythiaSize { layers: 12, hidden: 768, heads: 12, vocab: VOCAB };
const PYTHIA_410M: PythiaSize = PythiaSize { layers: 24, hidden: 1024, heads: 16, vocab: VOCAB };
const PYTHIA_1_4B: PythiaSize = PythiaSize { layers: 24, hidden: 2048, heads: 16, vocab: VOCAB };
const MAMBA_130M: MambaSize = MambaSize { layers: 24, hidden: 768, vocab: MAMBA_VOCAB };
const MAMBA_1_4B: MambaSize = MambaSize { layers: 48, hidden: 2048, vocab: MAMBA_VOCAB };

const ALL: [Shape; 9] = [
    Shape { name: "pythia-70m", decoder: PYTHIA_70M, encoder: None },
    Shape { name: "pythia-160m", decoder: PYTHIA_160M, encoder: None },
    Shape { name: "pythia-410m", decoder: PYTHIA_410M, encoder: None },
    Shape { name: "pythia-1.4b", decoder: PYTHIA_1_4B, encoder: None },
    Shape { name: "rcc-pythia-70m", decoder: PYTHIA_70M, encoder: Some(EncoderSize::Twin) },
    Shape { name: "rcc-pythia-160m", decoder: PYTHIA_160M, encoder: Some(EncoderSize::Twin) },
    Shape { name: "rcc-pythia-1.4b", decoder: PYTHIA_1_4B, encoder: Some(EncoderSize::Twin) },
    Shape { name: "rcc-mamba-130m", decoder: PYTHIA_160M, encoder: Some(EncoderSize::Mamba(MAMBA_130M)) },
    Shape { name: "rcc-mamba-1.4b", decoder: PYTHIA_1_4B, encoder: Some(EncoderSize::Mamba(MAMBA_1_4B)) },
];

/// Where RCC's code keeps the encoder and the maps.
const ENCODER_PATH: &str = "gpt_neox.rcc_encoder";
/// A second head inside the decoder that RCC's code stores and never uses.
const INNER_HEAD: &str = "gpt_neox.embed_out.weight";

impl Shape {
    /// The shapes there are.
    pub fn all() -> &'static [Shape] {
        &ALL
    }

    /// The shape of that name.
    pub fn named(name: &str) -> Option<&'static Shape> {
        ALL.iter().find(|shape| shape.name == name)
    }

    /// Its name.
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// Every tensor of the checkpoint.
    pub(super) fn tensors(&self) -> Vec<NamedShape> {
        let decoder = Architecture::GptNeox(self.decoder.architecture());
        let mut tensors = decoder_tensors(&decoder);
        let Some((encoder, _)) = self.encoder() else {
            return tensors;
        };
        let PythiaSize { layers, hidden, vocab, .. } = self.decoder;
        tensors.push((INNER_HEAD.to_owned(), vec![vocab, hidden]));
        let named = |(name, shape)| (format!("{ENCODER_PATH}.{name}"), shape);
        tensors.extend(encoder_tensors(&encoder).into_iter().map(named));
        let map = |name: &str| (format!("{ENCODER_PATH}2gpt_{name}.weight"), vec![hidden, encoder.hidden_size()]);
        tensors.extend((0..layers).map(|layer| map(&format!("A_matrix.{layer}"))));
        tensors.push(map("embed"));
        tensors
    }

    /// The JSON files that describe it.
    pub(super) fn descriptions(&self, RandomOptions { seed, dtype }: RandomOptions) -> Vec<(&'static str, Value)> {
        let mut config = architecture_json(&Architecture::GptNeox(self.decoder.architecture()));
        config["torch_dtype"] = json!(dtype.torch_name());
        // Nobody shall take it for the published model.
        config["_name_or_path"] = json!(format!("random:{} seed {seed}", self.name));
        let rcc = self.encoder().map(|(encoder, settings)| (RCC_FILE, rcc_json(&encoder, settings)));
        std::iter::once((CONFIG, config)).chain(rcc).collect()
    }

    fn encoder(&self) -> Option<(Encoder, RccSettings)> {
        let released = RccSettings { window: 2048, ratio: 32, pairs: false, first_state_is_embedding: false };
        Some(match self.encoder? {
            EncoderSize::Twin => (Encoder::Transformer(Architecture::GptNeox(self.decoder.architecture())), released),
            EncoderSize::Mamba(size) => (Encoder::Mamba(size.architecture()), RccSettings { pairs: true, ..released }),
        })
    }
}

impl PythiaSize {
    fn architecture(self) -> GptNeox {
        let Self { layers, hidden, heads, vocab } = self;
        GptNeox {
            num_layers: layers,
            hidden_size: hidden,
            intermediate_size: 4 * hidden,
            num_heads: heads,
            vocab_size: vocab,
            max_positions: 2048,
            layer_norm_eps: 1e-5,
            rope: Rope { theta: 10_000.0, scaling: RopeScaling::None },
            // A quarter of a head.
            rotary_dims: hidden / heads / 4,
            parallel_residual: true,
            tie_word_embeddings: false,
            attention_bias: true,
            eos_token_ids: vec![0],
            bos_token_id: Some(0),
        }
    }
}

impl MambaSize {
    fn architecture(self) -> Mamba {
        let Self { layers, hidden, vocab } = self;
        Mamba {
            num_layers: layers,
            hidden_size: hidden,
            intermediate_size: 2 * hidden,
            state_size: 16,
            conv_kernel: 4,
            time_step_rank: hidden.div_ceil(16),
            vocab_size: vocab,
            rms_norm_eps: 1e-5,
            use_bias: false,
            use_conv_bias: true,
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    /// A model of kilobytes with everything that the others have.
    pub(in super::super) const SMALL: Shape = Shape {
        name: "small",
        decoder: PythiaSize { layers: 2, hidden: 32, heads: 2, vocab: 300 },
        encoder: Some(EncoderSize::Mamba(MambaSize { layers: 4, hidden: 32, vocab: 290 })),
    };

    /// A model that fits on no disk.
    pub(in super::super) fn huge() -> Shape {
        Shape { name: "huge", decoder: PythiaSize { hidden: 1 << 20, heads: 1 << 10, ..PYTHIA_1_4B }, encoder: None }
    }

    /// Numbers of parameters that the models' cards and RCC's description give.
    #[test]
    fn the_shapes_have_the_published_sizes() {
        let parameters = |name: &str| -> usize {
            let tensors = Shape::named(name).unwrap().tensors();
            tensors.iter().map(|(_, shape)| shape.iter().product::<usize>()).sum()
        };
        for (name, expected) in [
            ("pythia-70m", 70_426_624),
            ("pythia-160m", 162_322_944),
            ("pythia-410m", 405_334_016),
            ("pythia-1.4b", 1_414_647_808),
        ] {
            assert_eq!(parameters(name), expected, "{name}");
        }
        assert_eq!(parameters("rcc-pythia-1.4b") / 100_000, 30_371);
        // Without the head, which is the embedding: 129 and 1372 million.
        let encoder = |name, pythia, layers: usize, hidden: usize, head: usize| {
            parameters(name) - parameters(pythia) - head - (layers + 1) * hidden * hidden - MAMBA_VOCAB * hidden
        };
        assert_eq!(encoder("rcc-mamba-130m", "pythia-160m", 12, 768, VOCAB * 768), 129_135_360);
        assert_eq!(encoder("rcc-mamba-1.4b", "pythia-1.4b", 24, 2048, VOCAB * 2048), 1_372_178_432);
    }

    #[test]
    fn names_are_unique() {
        for shape in Shape::all() {
            assert_eq!(Shape::all().iter().filter(|other| other.name == shape.name).count(), 1);
            let names: std::collections::BTreeSet<_> = shape.tensors().into_iter().map(|(name, _)| name).collect();
            assert_eq!(names.len(), shape.tensors().len(), "{}", shape.name);
        }
    }
}
