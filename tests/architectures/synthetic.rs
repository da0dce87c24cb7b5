//! Checkpoints of seeded random weights, as Hugging Face lays them out.

use accordion::checkpoint::{config_json, required_tensors};
use accordion_graphs::architecture::{Llama, Rope, RopeScaling};
use accordion_graphs::dtype::DType;
use half::{bf16, f16};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};
use safetensors::tensor::{Dtype, TensorView};
use std::collections::BTreeMap;
use std::path::Path;

/// A Llama of `num_layers` small layers with grouped heads.
pub(crate) fn small_llama(num_layers: usize) -> Llama {
    Llama {
        num_layers,
        hidden_size: 64,
        intermediate_size: 80,
        num_heads: 4,
        num_kv_heads: 2,
        head_dim: 16,
        vocab_size: 97,
        max_positions: 64,
        rms_norm_eps: 1e-5,
        rope: Rope { theta: 10_000.0, scaling: RopeScaling::None },
        tie_word_embeddings: false,
        qkv_bias: false,
        o_bias: false,
        mlp_bias: false,
        sliding_window: None,
        eos_token_ids: vec![],
        bos_token_id: None,
    }
}

/// How the weights are stored.
pub(crate) struct Storage {
    pub(crate) dtype: DType,
    pub(crate) shards: usize,
}

/// Name, shape and bytes of a tensor.
type Stored = (String, Vec<usize>, Vec<u8>);

/// Writes config.json and the weights of a model of architecture `arch` into the new folder `dir`.
pub(crate) fn write_checkpoint(dir: &Path, arch: &Llama, storage: &Storage, seed: u64) {
    std::fs::create_dir(dir).unwrap();
    std::fs::write(dir.join("config.json"), config_json(arch).to_string()).unwrap();
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let mut shards: Vec<Vec<Stored>> = (0..storage.shards).map(|_| Vec::new()).collect();
    for (i, (name, shape)) in required_tensors(arch).enumerate() {
        let count: usize = shape.iter().product();
        // Matrices keep the scale of what goes through them; gains are near one.
        let (center, spread) = match shape.as_slice() {
            [_, width] => (0.0, 1.7 / (*width as f32).sqrt()),
            _ if name.ends_with("norm.weight") => (1.0, 0.2),
            _ => (0.0, 0.3),
        };
        let values = (0..count).map(|_| center + spread * (random.next_u32() as f32 / u32::MAX as f32 * 2.0 - 1.0));
        let bytes = match storage.dtype {
            DType::F16 => values.flat_map(|v| f16::from_f32(v).to_le_bytes()).collect(),
            DType::Bf16 => values.flat_map(|v| bf16::from_f32(v).to_le_bytes()).collect(),
            _ => values.flat_map(f32::to_le_bytes).collect(),
        };
        shards[i % storage.shards].push((name, shape, bytes));
    }
    let dtype = match storage.dtype {
        DType::F16 => Dtype::F16,
        DType::Bf16 => Dtype::BF16,
        _ => Dtype::F32,
    };
    let mut weight_map = BTreeMap::new();
    let count = shards.len();
    for (i, shard) in shards.iter().enumerate() {
        let file = if count == 1 {
            "model.safetensors".to_owned()
        } else {
            format!("model-{:05}-of-{count:05}.safetensors", i + 1)
        };
        let views =
            shard.iter().map(|(name, shape, bytes)| (name, TensorView::new(dtype, shape.clone(), bytes).unwrap()));
        safetensors::serialize_to_file(views, None, &dir.join(&file)).unwrap();
        weight_map.extend(shard.iter().map(|(name, ..)| (name.clone(), file.clone())));
    }
    if count > 1 {
        let index = serde_json::json!({ "metadata": {}, "weight_map": weight_map });
        std::fs::write(dir.join("model.safetensors.index.json"), index.to_string()).unwrap();
    }
}
