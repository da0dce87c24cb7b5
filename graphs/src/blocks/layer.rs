//! Embedding, the gated MLP and the output head.

use super::Target;
use super::linear::linear;
use crate::architecture::Llama;
use crate::functions;
use crate::onnx::{Scope, Value};

/// Token embeddings of `ids [batch, sequence]` as `[batch * sequence, D]`.
pub fn embed(g: &Scope, arch: &Llama, ids: &Value) -> Value {
    let table = g.scope("model.embed_tokens");
    let weight = table.weight("weight", &[arch.vocab_size, arch.hidden_size]);
    weight.within(&table).gather(ids).flatten_rows()
}

/// `x + down(silu(gate(norm(x))) * up(norm(x)))` of layer `layer`, over `x [rows, D]`.
pub fn mlp_residual(layer: &Scope, arch: &Llama, target: Target, x: &Value) -> Value {
    let [hidden, inner] = [arch.hidden_size, arch.intermediate_size];
    let normed = x.within(&layer.scope("post_attention_layernorm"));
    let normed = normed.rms_norm(&layer.weight("post_attention_layernorm.weight", &[hidden]), arch.rms_norm_eps);
    let mlp = layer.scope("mlp");
    let project = |name: &str, x: &Value, from: usize, to: usize| {
        let g = mlp.scope(name);
        let bias = arch.mlp_bias.then(|| g.weight("bias", &[to]));
        linear(&g, target, x, &g.weight("weight", &[to, from]), bias.as_ref())
    };
    let gate = project("gate_proj", &normed, hidden, inner).within(&mlp);
    let up = project("up_proj", &normed, hidden, inner);
    let activation = match target {
        Target::Portable => &gate * gate.sigmoid() * up,
        Target::OrtCpu => {
            let result = (gate.dtype(), gate.shape().to_vec());
            mlp.call(&functions::SWIGLU, &[&gate, &up], vec![], vec![result])[0].clone()
        }
    };
    let out = project("down_proj", &activation, inner, hidden);
    let result = x.within(layer) + &out;
    layer.tap("mlp.out", &out);
    layer.tap("out", &result);
    result
}

/// Logits `[rows, V]` of `x [rows, D]`: final norm and output projection.
pub fn head(g: &Scope, arch: &Llama, target: Target, x: &Value) -> Value {
    let norm = g.scope("model.norm");
    let normed = x.within(&norm).rms_norm(&norm.weight("weight", &[arch.hidden_size]), arch.rms_norm_eps);
    let lm_head = g.scope("lm_head");
    let shape = [arch.vocab_size, arch.hidden_size];
    let weight = if arch.tie_word_embeddings {
        g.scope("model.embed_tokens").weight("weight", &shape)
    } else {
        lm_head.weight("weight", &shape)
    };
    linear(&lm_head, target, &normed, &weight, None)
}

/// `x [batch * L, D]` as `[batch, L, D]`, with the batch and length of `positions [batch, L]`.
pub fn unflatten(x: &Value, positions: &Value) -> Value {
    let g = x.scope();
    let width = x.dim(1);
    let shape = g.concat(&[&positions.within(g).shape_at_run_time(0, 2), &g.ints(&[-1])], 0);
    x.reshape_as(&shape, &[positions.dim(0), positions.dim(1), width])
}
