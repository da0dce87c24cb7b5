//! The shapes there are: Llama, Pythia, and RCC's pairs of an encoder and a Pythia decoder.

use super::RandomOptions;
use crate::checkpoint::{CONFIG, NamedShape, RCC_FILE, architecture_json, decoder_tensors, encoder_tensors, rcc_json};
use accordion_graphs::architecture::{Architecture, Encoder, GptNeox, Llama, Mamba, Rope, RopeScaling};
use accordion_graphs::plan::rcc::RccSettings;
use serde_json::{Value, json};

/// A model's shape.
#[derive(Debug, Clone, Copy)]
pub struct Shape {
    name: &'static str,
    decoder: DecoderSize,
    encoder: Option<EncoderSize>,
}

#[derive(Debug, Clone, Copy)]
enum DecoderSize {
    Pythia(PythiaSize),
    Llama(LlamaSize),
}

#[derive(Debug, Clone, Copy)]
struct PythiaSize {
    layers: usize,
    hidden: usize,
    heads: usize,
    vocab: usize,
}

#[derive(Debug, Clone, Copy)]
struct LlamaSize {
    layers: usize,
    hidden: usize,
    intermediate: usize,
    heads: usize,
    kv_heads: usize,
    vocab: usize,
    max_positions: usize,
    theta: f64,
    tied: bool,
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

// From the configurations that EleutherAI, state-spaces, Hugging Face and Meta publish.
const VOCAB: usize = 50_304;
const MAMBA_VOCAB: usize = 50_280;
const PYTHIA_70M: DecoderSize = pythia(6, 512, 8, VOCAB);
const PYTHIA_160M: DecoderSize = pythia(12, 768, 12, VOCAB);
const PYTHIA_410M: DecoderSize = pythia(24, 1024, 16, VOCAB);
const PYTHIA_1_4B: DecoderSize = pythia(24, 2048, 16, VOCAB);
/// For trying a machine rather than measuring it.
const PYTHIA_TINY: DecoderSize = pythia(4, 64, 4, 320);
const LLAMA_TINY: DecoderSize = DecoderSize::Llama(LlamaSize {
    layers: 8,
    hidden: 64,
    intermediate: 128,
    heads: 4,
    kv_heads: 2,
    vocab: 320,
    max_positions: 2048,
    theta: 1e4,
    tied: true,
});
const SMOLLM2_135M: DecoderSize = DecoderSize::Llama(LlamaSize {
    layers: 30,
    hidden: 576,
    intermediate: 1536,
    heads: 9,
    kv_heads: 3,
    vocab: 49_152,
    max_positions: 8192,
    theta: 1e5,
    tied: true,
});
const LLAMA_2_7B: DecoderSize = DecoderSize::Llama(LlamaSize {
    layers: 32,
    hidden: 4096,
    intermediate: 11_008,
    heads: 32,
    kv_heads: 32,
    vocab: 32_000,
    max_positions: 4096,
    theta: 1e4,
    tied: false,
});
const MAMBA_130M: MambaSize = MambaSize { layers: 24, hidden: 768, vocab: MAMBA_VOCAB };
const MAMBA_1_4B: MambaSize = MambaSize { layers: 48, hidden: 2048, vocab: MAMBA_VOCAB };

const ALL: [Shape; 13] = [
    Shape { name: "llama-tiny", decoder: LLAMA_TINY, encoder: None },
    Shape { name: "llama-smollm2-135m", decoder: SMOLLM2_135M, encoder: None },
    Shape { name: "llama-2-7b", decoder: LLAMA_2_7B, encoder: None },
    Shape { name: "pythia-70m", decoder: PYTHIA_70M, encoder: None },
    Shape { name: "pythia-160m", decoder: PYTHIA_160M, encoder: None },
    Shape { name: "pythia-410m", decoder: PYTHIA_410M, encoder: None },
    Shape { name: "pythia-1.4b", decoder: PYTHIA_1_4B, encoder: None },
    Shape { name: "rcc-pythia-tiny", decoder: PYTHIA_TINY, encoder: Some(EncoderSize::Twin) },
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
        let decoder = self.decoder.architecture();
        let mut tensors = decoder_tensors(&decoder);
        let Some((encoder, _)) = self.encoder() else {
            return tensors;
        };
        let (layers, hidden, vocab) = (decoder.num_layers(), decoder.hidden_size(), decoder.vocab_size());
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
        let mut config = architecture_json(&self.decoder.architecture());
        config["torch_dtype"] = json!(dtype.torch_name());
        // Nobody shall take it for the published model.
        config["_name_or_path"] = json!(format!("random:{} seed {seed}", self.name));
        let rcc = self.encoder().map(|(encoder, settings)| (RCC_FILE, rcc_json(&encoder, settings)));
        std::iter::once((CONFIG, config)).chain(rcc).collect()
    }

    fn encoder(&self) -> Option<(Encoder, RccSettings)> {
        let released = RccSettings { window: 2048, ratio: 32, pairs: false, first_state_is_embedding: false };
        Some(match self.encoder? {
            EncoderSize::Twin => (Encoder::Transformer(self.decoder.architecture()), released),
            EncoderSize::Mamba(size) => (Encoder::Mamba(size.architecture()), RccSettings { pairs: true, ..released }),
        })
    }
}

const fn pythia(layers: usize, hidden: usize, heads: usize, vocab: usize) -> DecoderSize {
    DecoderSize::Pythia(PythiaSize { layers, hidden, heads, vocab })
}

impl DecoderSize {
    fn architecture(self) -> Architecture {
        match self {
            Self::Pythia(size) => Architecture::GptNeox(size.architecture()),
            Self::Llama(size) => Architecture::Llama(size.architecture()),
        }
    }
}

impl LlamaSize {
    fn architecture(self) -> Llama {
        Llama {
            num_layers: self.layers,
            hidden_size: self.hidden,
            intermediate_size: self.intermediate,
            num_heads: self.heads,
            num_kv_heads: self.kv_heads,
            head_dim: self.hidden / self.heads,
            vocab_size: self.vocab,
            max_positions: self.max_positions,
            rms_norm_eps: 1e-5,
            rope: Rope { theta: self.theta, scaling: RopeScaling::None },
            tie_word_embeddings: self.tied,
            qkv_bias: false,
            o_bias: false,
            mlp_bias: false,
            sliding_window: None,
            eos_token_ids: vec![2],
            bos_token_id: Some(1),
        }
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
        decoder: pythia(2, 32, 2, 300),
        encoder: Some(EncoderSize::Mamba(MambaSize { layers: 4, hidden: 32, vocab: 290 })),
    };

    /// A model that fits on no disk.
    pub(in super::super) fn huge() -> Shape {
        Shape { name: "huge", decoder: pythia(24, 1 << 20, 1 << 10, VOCAB), encoder: None }
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
            ("llama-2-7b", 6_738_415_616),
            ("llama-smollm2-135m", 134_515_008),
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
