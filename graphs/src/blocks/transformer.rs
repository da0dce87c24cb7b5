//! A causal transformer of the checkpoint: where its tensors lie, and the parts of a layer that differ by family.

use super::Target;
use super::linear::linear;
use crate::architecture::{Architecture, GptNeox, Llama};
use crate::functions;
use crate::onnx::{Scope, Value};

/// A causal transformer of the checkpoint, for building graphs of it.
#[derive(Clone)]
pub struct Transformer<'a> {
    pub(super) arch: &'a Architecture,
    pub(super) target: Target,
    body: String,
    taps: String,
}

/// What attention leaves for the second half of a layer.
#[derive(Clone)]
pub struct Residual {
    /// The residual stream after attention, `[batch * sequence, D]`.
    pub stream: Value,
    /// What the MLP reads instead of the stream, where the two halves of a layer work side by side.
    parallel_input: Option<Value>,
}

impl Residual {
    /// The same rows picked from everything the second half reads.
    #[must_use]
    pub fn pick(&self, pick: impl Fn(&Value) -> Value) -> Self {
        Self { stream: pick(&self.stream), parallel_input: self.parallel_input.as_ref().map(pick) }
    }

    /// The same with another stream, which a further part of the layer left.
    pub(super) fn with_stream(&self, stream: Value) -> Self {
        Self { stream, ..self.clone() }
    }

    /// The MLP's input.
    fn mlp_input(&self) -> &Value {
        self.parallel_input.as_ref().unwrap_or(&self.stream)
    }
}

impl From<Value> for Residual {
    fn from(stream: Value) -> Self {
        Self { stream, parallel_input: None }
    }
}

impl<'a> Transformer<'a> {
    /// The checkpoint's decoder.
    pub fn decoder(arch: &'a Architecture, target: Target) -> Self {
        Self::at(arch, target, Self::body_of(arch), "")
    }

    /// A model whose embedding, layers and final norm lie at the path `body`. Its taps are called as the decoder's, behind
    /// `taps` if that is not empty.
    pub fn at(arch: &'a Architecture, target: Target, body: &str, taps: &str) -> Self {
        Self { arch, target, body: body.to_owned(), taps: taps.to_owned() }
    }

    /// The same model, with its taps behind `taps`.
    #[must_use]
    pub fn tapped_as(&self, taps: &str) -> Self {
        Self { taps: taps.to_owned(), ..self.clone() }
    }

    /// Path of the embedding, layers and final norm in a checkpoint of `arch` alone.
    pub fn body_of(arch: &Architecture) -> &'static str {
        match arch {
            Architecture::Llama(_) => "model",
            Architecture::GptNeox(_) => "gpt_neox",
        }
    }

    /// The architecture.
    pub fn architecture(&self) -> &'a Architecture {
        self.arch
    }

    fn scope(&self, g: &Scope) -> Scope {
        g.scope_tapped_as(&self.body, &self.taps)
    }

    /// The scope of layer `index`.
    pub fn layer(&self, g: &Scope, index: usize) -> Scope {
        self.scope(g).scope("layers").scope(index)
    }

    /// Token embeddings of `ids [batch, sequence]` as `[batch * sequence, D]`.
    pub fn embed(&self, g: &Scope, ids: &Value) -> Value {
        let weight = self.embedding(g);
        weight.gather(ids).flatten_rows()
    }

    fn embedding(&self, g: &Scope) -> Value {
        let name = match self.arch {
            Architecture::Llama(_) => "embed_tokens",
            Architecture::GptNeox(_) => "embed_in",
        };
        self.scope(g).scope(name).weight("weight", &[self.arch.vocab_size(), self.arch.hidden_size()])
    }

    /// The final norm of `x [rows, D]`.
    pub fn final_norm(&self, g: &Scope, x: &Value) -> Value {
        let name = match self.arch {
            Architecture::Llama(_) => "norm",
            Architecture::GptNeox(_) => "final_layer_norm",
        };
        self.norm(&self.scope(g), name, x)
    }

    /// Logits `[rows, V]` of `x [rows, D]`: final norm and output projection.
    pub fn head(&self, g: &Scope, x: &Value) -> Value {
        let normed = self.final_norm(g, x);
        self.scope(g).tap("final_norm", &normed);
        let head = g.scope(match self.arch {
            Architecture::Llama(_) => "lm_head",
            Architecture::GptNeox(_) => "embed_out",
        });
        let weight = if self.arch.tie_word_embeddings() {
            self.embedding(g)
        } else {
            head.weight("weight", &[self.arch.vocab_size(), self.arch.hidden_size()])
        };
        linear(&head, self.target, &normed, &weight, None)
    }

    /// The norm `name` of `scope` over `x [rows, D]`.
    pub(super) fn norm(&self, scope: &Scope, name: &str, x: &Value) -> Value {
        let norm = scope.scope(name);
        let x = x.within(&norm);
        match self.arch {
            Architecture::Llama(m) => x.rms_norm(&norm.weight("weight", &[m.hidden_size]), m.rms_norm_eps),
            Architecture::GptNeox(m) => {
                let [gain, bias] = ["weight", "bias"].map(|part| norm.weight(part, &[m.hidden_size]));
                x.layer_norm(&gain, &bias, m.layer_norm_eps)
            }
        }
    }

    /// The linear layer `name` of `scope` over `x [rows, from]`.
    pub(super) fn project(&self, scope: &Scope, name: &str, x: &Value, [from, to]: [usize; 2], bias: bool) -> Value {
        let g = scope.scope(name);
        let bias = bias.then(|| g.weight("bias", &[to]));
        linear(&g, self.target, x, &g.weight("weight", &[to, from]), bias.as_ref())
    }

    /// The scope of a layer's attention.
    pub(super) fn attention_scope(&self, layer: &Scope) -> Scope {
        layer.scope(match self.arch {
            Architecture::Llama(_) => "self_attn",
            Architecture::GptNeox(_) => "attention",
        })
    }

    /// What a layer's attention projects its input `x [rows, D]` from: its norm.
    pub(super) fn attention_input(&self, layer: &Scope, x: &Value) -> Value {
        self.norm(layer, "input_layernorm", x)
    }

    /// Queries `[rows, H * d]`, keys and values `[rows, G * d]` of normalised rows.
    pub(super) fn queries_keys_values(&self, layer: &Scope, normed: &Value) -> [Value; 3] {
        let attn = self.attention_scope(layer);
        match self.arch {
            Architecture::Llama(_) => {
                let query = self.queries(layer, normed);
                let [key, value] = self.keys_values(layer, normed);
                [query, key, value]
            }
            Architecture::GptNeox(m) => {
                let shape = [m.hidden_size, 3 * m.hidden_size];
                let fused = self.project(&attn, "query_key_value", normed, shape, m.attention_bias);
                split_by_head(&attn, m, &fused)
            }
        }
    }

    /// Only the queries of normalised rows.
    pub(super) fn queries(&self, layer: &Scope, normed: &Value) -> Value {
        match self.arch {
            Architecture::Llama(m) => {
                let shape = [m.hidden_size, m.num_heads * m.head_dim];
                self.project(&self.attention_scope(layer), "q_proj", normed, shape, m.qkv_bias)
            }
            Architecture::GptNeox(_) => {
                let [query, ..] = self.queries_keys_values(layer, normed);
                query
            }
        }
    }

    /// Only the keys and values of normalised rows.
    pub(super) fn keys_values(&self, layer: &Scope, normed: &Value) -> [Value; 2] {
        match self.arch {
            Architecture::Llama(m) => ["k_proj", "v_proj"].map(|name| {
                let shape = [m.hidden_size, m.num_kv_heads * m.head_dim];
                self.project(&self.attention_scope(layer), name, normed, shape, m.qkv_bias)
            }),
            Architecture::GptNeox(_) => {
                let [_, key, value] = self.queries_keys_values(layer, normed);
                [key, value]
            }
        }
    }

    /// The output projection of `mixed [rows, H * d]`.
    pub(super) fn attention_output(&self, layer: &Scope, mixed: &Value) -> Value {
        let attn = self.attention_scope(layer);
        match self.arch {
            Architecture::Llama(m) => {
                self.project(&attn, "o_proj", mixed, [m.num_heads * m.head_dim, m.hidden_size], m.o_bias)
            }
            Architecture::GptNeox(m) => {
                self.project(&attn, "dense", mixed, [m.hidden_size, m.hidden_size], m.attention_bias)
            }
        }
    }

    /// The residual of a layer with input `x` and attention output `projected`, both `[rows, D]`.
    pub(super) fn residual(&self, layer: &Scope, x: &Value, projected: &Value) -> Residual {
        let parallel = matches!(self.arch, Architecture::GptNeox(m) if m.parallel_residual);
        Residual { stream: x.within(layer) + projected, parallel_input: parallel.then(|| x.clone()) }
    }

    /// The second half of layer `layer`: what attention left, plus the MLP, `[rows, D]`.
    pub fn mlp_residual(&self, layer: &Scope, residual: &Residual) -> Value {
        let normed = self.norm(layer, "post_attention_layernorm", residual.mlp_input());
        let mlp = layer.scope("mlp");
        let out = match self.arch {
            Architecture::Llama(m) => self.gated_mlp(&mlp, m, &normed),
            Architecture::GptNeox(m) => {
                let [hidden, inner] = [m.hidden_size, m.intermediate_size];
                let inner_rows =
                    self.project(&mlp, "dense_h_to_4h", &normed, [hidden, inner], true).within(&mlp).gelu();
                self.project(&mlp, "dense_4h_to_h", &inner_rows, [inner, hidden], true)
            }
        };
        let result = residual.stream.within(layer) + &out;
        layer.tap("mlp.out", &out);
        layer.tap("out", &result);
        result
    }

    /// `down(silu(gate(x)) * up(x))`.
    fn gated_mlp(&self, mlp: &Scope, m: &Llama, x: &Value) -> Value {
        let [hidden, inner] = [m.hidden_size, m.intermediate_size];
        let gate = self.project(mlp, "gate_proj", x, [hidden, inner], m.mlp_bias).within(mlp);
        let up = self.project(mlp, "up_proj", x, [hidden, inner], m.mlp_bias);
        let activation = match self.target {
            Target::Portable => &gate * gate.sigmoid() * up,
            Target::OrtCpu => {
                let result = (gate.dtype(), gate.shape().to_vec());
                mlp.call(&functions::SWIGLU, &[&gate, &up], vec![], vec![result])[0].clone()
            }
        };
        self.project(mlp, "down_proj", &activation, [inner, hidden], m.mlp_bias)
    }
}

/// GPT-NeoX projects head by head, `[rows, H, (q, k, v), d]`, into one row.
fn split_by_head(attn: &Scope, m: &GptNeox, fused: &Value) -> [Value; 3] {
    let split = attn.scope("split");
    let (rows, d) = (fused.dim(0), m.head_dim());
    let by_head = fused.within(&split).reshape(&[rows.clone(), m.num_heads.into(), 3.into(), d.into()]);
    [0, 1, 2].map(|part| {
        let one = by_head.slice(2, &split.ints(&[part]), &split.ints(&[part + 1]), 1.into());
        one.reshape(&[rows.clone(), m.hidden_size.into()])
    })
}
