//! The numbers: a block of normal ones that tensors are cut from, and what norms and biases begin as.

use crate::checkpoint::NamedShape;
use accordion_graphs::dtype::DType;
use half::bf16;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};
use sha2::{Digest, Sha256};
use std::io::{self, Write};

/// Numbers in the block: four megabytes in fp32, which caches keep.
const BLOCK: usize = 1 << 20;
/// Standard deviation of what GPT-NeoX and Mamba are initialised with.
const DEVIATION: f64 = 0.02;
/// Mamba's step size at the beginning; its bias is what softplus turns into it.
const TIME_STEP: f64 = 0.01;

/// Element type of a random checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum NumberType {
    /// 32 bits.
    #[default]
    F32,
    /// The upper 16 bits of these, rounded.
    Bf16,
}

impl NumberType {
    /// The element type.
    pub fn dtype(self) -> DType {
        match self {
            Self::F32 => DType::F32,
            Self::Bf16 => DType::Bf16,
        }
    }

    /// Hugging Face's name for it.
    pub(crate) fn torch_name(self) -> &'static str {
        match self {
            Self::F32 => "float32",
            Self::Bf16 => "bfloat16",
        }
    }

    fn encode(self, values: impl Iterator<Item = f32>) -> Vec<u8> {
        match self {
            Self::F32 => values.flat_map(f32::to_le_bytes).collect(),
            Self::Bf16 => values.flat_map(|x| bf16::from_f32(x).to_le_bytes()).collect(),
        }
    }
}

/// What fills tensors.
pub(super) struct Noise {
    seed: u64,
    dtype: NumberType,
    /// The block, encoded.
    normal: Vec<u8>,
}

/// What a tensor begins as.
enum Beginning {
    Normal,
    Constant(f32),
    /// The logarithms of 1, 2, 3, ... in every row: Mamba's decay rates.
    Logarithms,
}

impl Noise {
    pub(super) fn new(seed: u64, dtype: NumberType) -> Self {
        let mut random = ChaCha8Rng::seed_from_u64(seed);
        Self { seed, dtype, normal: dtype.encode((0..BLOCK).map(|_| normal(&mut random))) }
    }

    /// Writes the numbers of a tensor.
    pub(super) fn fill(&self, target: &mut impl Write, (name, shape): &NamedShape) -> io::Result<()> {
        let count: usize = shape.iter().product();
        match beginning(name) {
            Beginning::Normal => self.fill_normal(target, name, count),
            Beginning::Constant(value) => target.write_all(&self.dtype.encode(std::iter::repeat_n(value, count))),
            Beginning::Logarithms => {
                let row = shape.last().copied().unwrap_or(1);
                let values = (0..count).map(|i| ((i % row + 1) as f64).ln() as f32);
                target.write_all(&self.dtype.encode(values))
            }
        }
    }

    /// Stretches of the block, of at least half its length each.
    fn fill_normal(&self, target: &mut impl Write, name: &str, count: usize) -> io::Result<()> {
        let own_seed = Sha256::new().chain_update(self.seed.to_le_bytes()).chain_update(name).finalize();
        let mut places = ChaCha8Rng::from_seed(own_seed.into());
        let size = self.dtype.dtype().size();
        let mut left = count;
        while left > 0 {
            let start = places.next_u32() as usize % (BLOCK / 2);
            let length = left.min(BLOCK - start);
            target.write_all(&self.normal[start * size..][..length * size])?;
            left -= length;
        }
        Ok(())
    }
}

fn beginning(name: &str) -> Beginning {
    let ends = |end: &str| name.ends_with(end);
    if ends("norm.weight") || ends(".norm_f.weight") || ends(".mixer.D") {
        Beginning::Constant(1.0)
    } else if ends(".mixer.A_log") {
        Beginning::Logarithms
    } else if ends(".dt_proj.bias") {
        Beginning::Constant(TIME_STEP.exp_m1().ln() as f32)
    } else if ends(".bias") {
        Beginning::Constant(0.0)
    } else {
        Beginning::Normal
    }
}

/// The sum of twelve uniform numbers: variance 1, close to normal, and without a function that rounds differently
/// elsewhere.
fn normal(random: &mut ChaCha8Rng) -> f32 {
    const STEPS: f64 = 65536.0;
    let sum: u64 = (0..3)
        .map(|_| {
            let bits = random.next_u64();
            (0..4).map(|i| (bits >> (16 * i)) & 0xffff).sum::<u64>()
        })
        .sum();
    // Each of the twelve stands for the middle of its step, so that the mean is 0.
    let deviations = (sum as f64 + 6.0) / STEPS - 6.0;
    (deviations * DEVIATION) as f32
}
