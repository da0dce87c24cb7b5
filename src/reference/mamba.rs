//! Mamba (Gu and Dao 2023): blocks of a gated selective state space model.

use super::Result;
use super::array::Scope;
use super::quantize::Weight;
use super::weights::{Linear, Weights, embed, rms_norm, silu};
use accordion_graphs::architecture;
use ndarray::{Array1, Array2, Array3, Axis, s};

/// The model without its output projection, all weights in `f32`.
pub struct Mamba {
    architecture: architecture::Mamba,
    embeddings: Array2<f32>,
    blocks: Vec<Block>,
    norm_f: Array1<f32>,
}

struct Block {
    norm: Array1<f32>,
    in_proj: Linear,
    /// `[D, 1, kernel]`.
    conv1d: Array3<f32>,
    conv1d_bias: Option<Array1<f32>>,
    x_proj: Linear,
    dt_proj: Linear,
    /// `[D, N]`.
    a_log: Array2<f32>,
    d: Array1<f32>,
    out_proj: Linear,
}

impl Mamba {
    /// Loads the weights of `architecture` by their Hugging Face names from `source`, which may hold any float type,
    /// and of quantized matrices also says what rows are rounded to.
    ///
    /// # Errors
    ///
    /// A weight cannot be read or has another shape than the architecture gives it.
    pub fn load<W, E>(
        architecture: &architecture::Mamba,
        source: impl Fn(&str) -> std::result::Result<W, E>,
    ) -> Result<Self>
    where
        W: Into<Weight>,
        E: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        let a = architecture;
        let weights = Weights::new(source);
        let (hidden, inner, rank, state) = (a.hidden_size, a.intermediate_size, a.time_step_rank, a.state_size);
        let block = |index: usize| -> Result<Block> {
            let mixer = |name: &str| format!("backbone.layers.{index}.mixer.{name}");
            let parameters = state.saturating_mul(2).saturating_add(rank);
            Ok(Block {
                norm: weights.array(&format!("backbone.layers.{index}.norm.weight"), [hidden])?,
                in_proj: weights.linear(&mixer("in_proj"), inner.saturating_mul(2), hidden, a.use_bias)?,
                conv1d: weights.array(&mixer("conv1d.weight"), [inner, 1, a.conv_kernel])?,
                conv1d_bias: if a.use_conv_bias { Some(weights.array(&mixer("conv1d.bias"), [inner])?) } else { None },
                x_proj: weights.linear(&mixer("x_proj"), parameters, inner, false)?,
                dt_proj: weights.linear(&mixer("dt_proj"), inner, rank, true)?,
                a_log: weights.array(&mixer("A_log"), [inner, state])?,
                d: weights.array(&mixer("D"), [inner])?,
                out_proj: weights.linear(&mixer("out_proj"), hidden, inner, a.use_bias)?,
            })
        };
        Ok(Self {
            embeddings: weights.array("backbone.embeddings.weight", [a.vocab_size, hidden])?,
            blocks: (0..a.num_layers).map(block).collect::<Result<_>>()?,
            norm_f: weights.array("backbone.norm_f.weight", [hidden])?,
            architecture: a.clone(),
        })
    }

    /// Number of blocks.
    pub fn num_blocks(&self) -> usize {
        self.blocks.len()
    }

    /// The embeddings of `ids`, `[L, H]`.
    ///
    /// # Errors
    ///
    /// An id is outside the vocabulary.
    pub fn embed(&self, ids: &[u32]) -> Result<Array2<f32>> {
        embed(&self.embeddings, ids)
    }

    /// The final norm of rows that leave the last block, `[L, H]`.
    pub fn final_norm(&self, hidden: &Array2<f32>) -> Array2<f32> {
        self.rms_norm(hidden, &self.norm_f)
    }

    /// Block `index` over `x [L, H]`, from an empty state: `x + out((scan(u) + u D) silu(z))`.
    pub(super) fn block(&self, index: usize, x: &Array2<f32>, taps: &mut Scope<'_>) -> Result<Array2<f32>> {
        let inner = self.architecture.intermediate_size;
        let weights = &self.blocks[index];
        let both = weights.in_proj.apply(&self.rms_norm(x, &weights.norm));
        let u = weights.convolve(&both.slice(s![.., ..inner]).to_owned()).mapv_into(silu);
        taps.tap("conv", &u)?;
        let scanned = self.scan(weights, &u, taps)? + &u * &weights.d;
        taps.tap("scan", &scanned)?;
        let gate = both.slice(s![.., inner..]).mapv(silu);
        let out = x + &weights.out_proj.apply(&(scanned * gate));
        taps.tap("out", &out)?;
        Ok(out)
    }

    /// The state space model over `u [L, D]`, its step sizes and its input and output vectors taken from `u` itself.
    fn scan(&self, weights: &Block, u: &Array2<f32>, taps: &mut Scope<'_>) -> Result<Array2<f32>> {
        let (rank, states) = (self.architecture.time_step_rank, self.architecture.state_size);
        let parameters = weights.x_proj.apply(u);
        let dt = weights.dt_proj.apply(&parameters.slice(s![.., ..rank]).to_owned()).mapv_into(softplus);
        taps.tap("dt", &dt)?;
        let b = parameters.slice(s![.., rank..rank + states]);
        let c = parameters.slice(s![.., rank + states..]);
        let a = weights.a_log.mapv(|log| -log.exp());

        let mut state = Array2::<f32>::zeros(a.dim());
        let mut scanned = Array2::zeros(u.dim());
        for row in 0..u.nrows() {
            for channel in 0..u.ncols() {
                let (dt, u) = (dt[[row, channel]], u[[row, channel]]);
                let mut sum = 0.0;
                for n in 0..states {
                    let next = (dt * a[[channel, n]]).exp() * state[[channel, n]] + dt * b[[row, n]] * u;
                    state[[channel, n]] = next;
                    sum += next * c[[row, n]];
                }
                scanned[[row, channel]] = sum;
            }
        }
        Ok(scanned)
    }

    fn rms_norm(&self, x: &Array2<f32>, weight: &Array1<f32>) -> Array2<f32> {
        rms_norm(x, weight, self.architecture.rms_norm_eps as f32)
    }
}

impl Block {
    /// Every channel of `u [L, D]` convolved with its own kernel, whose last element meets the row itself and the others the
    /// rows before it; there is nothing before the first row.
    fn convolve(&self, u: &Array2<f32>) -> Array2<f32> {
        let kernel = self.conv1d.index_axis(Axis(1), 0);
        let last = kernel.ncols().saturating_sub(1);
        let convolved = Array2::from_shape_fn(u.dim(), |(row, channel)| {
            let back = 0..kernel.ncols().min(row + 1);
            back.map(|back| kernel[[channel, last - back]] * u[[row - back, channel]]).sum::<f32>()
        });
        match &self.conv1d_bias {
            Some(bias) => convolved + bias,
            None => convolved,
        }
    }
}

/// `ln(1 + exp(x))` without overflow.
fn softplus(x: f32) -> f32 {
    x.max(0.0) + (-x.abs()).exp().ln_1p()
}
