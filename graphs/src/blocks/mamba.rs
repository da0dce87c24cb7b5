//! A Mamba model of the checkpoint: blocks of a gated selective state space model.

use super::linear::linear;
use super::{Target, unflatten};
use crate::architecture;
use crate::functions;
use crate::onnx::{Scope, Value};

/// A Mamba model of the checkpoint, for building graphs of it.
#[derive(Clone)]
pub struct Mamba<'a> {
    arch: &'a architecture::Mamba,
    target: Target,
    path: String,
    taps: String,
}

impl<'a> Mamba<'a> {
    /// The model whose tensors lie at `path`, as in a checkpoint of its own (`backbone...` follows). Its taps are called
    /// `layers.<l>...` behind `taps`.
    pub fn at(arch: &'a architecture::Mamba, target: Target, path: &str, taps: &str) -> Self {
        Self { arch, target, path: path.to_owned(), taps: taps.to_owned() }
    }

    fn scope(&self, g: &Scope) -> Scope {
        g.scope_tapped_as(&format!("{}.backbone", self.path), &self.taps)
    }

    /// Token embeddings of `ids [segments, W]` as `[segments * W, H]`.
    pub fn embed(&self, g: &Scope, ids: &Value) -> Value {
        let shape = [self.arch.vocab_size, self.arch.hidden_size];
        self.scope(g).scope("embeddings").weight("weight", &shape).gather(ids).flatten_rows()
    }

    /// Block `index` over `x [segments * W, H]`; `ids [segments, W]` says which rows follow each other.
    pub fn block(&self, g: &Scope, index: usize, x: &Value, ids: &Value) -> Value {
        let arch = self.arch;
        let layer = self.scope(g).scope("layers").scope(index);
        let norm = layer.scope("norm");
        let normed = x.within(&norm).rms_norm(&norm.weight("weight", &[arch.hidden_size]), arch.rms_norm_eps);

        let mixer = layer.scope("mixer");
        let inner = arch.intermediate_size;
        let both = self.project(&mixer, "in_proj", &normed, [arch.hidden_size, 2 * inner], arch.use_bias);
        let [u, gate] = columns(&mixer, &both, [inner, inner]);
        let u = self.convolve(&mixer, &u, ids);
        layer.tap("conv", &u);
        let scanned = self.scan(&layer, &u, ids);
        layer.tap("scan", &scanned);
        let gated = self.gated(&mixer, &gate, &scanned);
        let out = self.project(&mixer, "out_proj", &gated, [inner, arch.hidden_size], arch.use_bias);
        let result = x.within(&layer) + out;
        layer.tap("out", &result);
        result
    }

    /// The linear layer `name` of `mixer` over `x [rows, from]`.
    fn project(&self, mixer: &Scope, name: &str, x: &Value, [from, to]: [usize; 2], bias: bool) -> Value {
        let g = mixer.scope(name);
        let bias = bias.then(|| g.weight("bias", &[to]));
        linear(&g, self.target, x, &g.weight("weight", &[to, from]), bias.as_ref())
    }

    /// `silu(conv(u))` along every segment, `[rows, D]`.
    fn convolve(&self, mixer: &Scope, u: &Value, ids: &Value) -> Value {
        let g = mixer.scope("conv1d");
        let inner = self.arch.intermediate_size;
        let weight = g.weight("weight", &[inner, 1, self.arch.conv_kernel]);
        let bias = self.arch.use_conv_bias.then(|| g.weight("bias", &[inner]));
        let by_channel = unflatten(&u.within(&g), ids).transpose(&[0, 2, 1]);
        let convolved = by_channel.causal_depthwise_conv(&weight, bias.as_ref()).transpose(&[0, 2, 1]).flatten_rows();
        &convolved * convolved.sigmoid()
    }

    /// The state space model over `u [rows, D]`, its input-dependent parameters included.
    fn scan(&self, layer: &Scope, u: &Value, ids: &Value) -> Value {
        let mixer = layer.scope("mixer");
        let (inner, state, rank) = (self.arch.intermediate_size, self.arch.state_size, self.arch.time_step_rank);
        let parameters = self.project(&mixer, "x_proj", u, [inner, rank + 2 * state], false);
        let [low_rank, b, c] = columns(&mixer, &parameters, [rank, state, state]);
        let dt = self.project(&mixer, "dt_proj", &low_rank, [rank, inner], true).within(&mixer).softplus();
        layer.tap("dt", &dt);
        let a = mixer.weight("A_log", &[inner, state]).exp().neg();
        let [u, dt, b, c] = [u, &dt, &b, &c].map(|v| unflatten(&v.within(&mixer), ids));
        let result = vec![(u.dtype(), u.shape().to_vec())];
        let inputs = [&u, &dt, &a, &b, &c, &mixer.weight("D", &[inner])];
        mixer.call(&functions::SELECTIVE_SCAN, &inputs, vec![], result).remove(0).flatten_rows()
    }

    /// `silu(gate) * x`.
    fn gated(&self, mixer: &Scope, gate: &Value, x: &Value) -> Value {
        match self.target {
            Target::Portable => gate * gate.sigmoid() * x,
            Target::OrtCpu => {
                let result = vec![(x.dtype(), x.shape().to_vec())];
                mixer.call(&functions::SWIGLU, &[gate, x], vec![], result).remove(0)
            }
        }
    }
}

/// `x [rows, sum of widths]` cut into columns.
fn columns<const N: usize>(mixer: &Scope, x: &Value, widths: [usize; N]) -> [Value; N] {
    let g = mixer.scope("columns");
    let mut start = 0;
    widths.map(|width| {
        let [from, to] = [start, start + width].map(|n| g.ints(&[n as i64]));
        start += width;
        x.within(&g).slice(1, &from, &to, width.into())
    })
}
