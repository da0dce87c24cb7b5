//! Faults, and where they are put: into a tensor of the weights, into what config.json says, or into single nodes of the
//! graphs on their way into the runtime, as a faulty kernel would be.

use accordion::checkpoint::{Checkpoint, config_json};
use accordion::runtime::ort_cpu::OrtCpu;
use accordion::runtime::{Engine, EngineError, Loader};
use accordion_graphs::architecture::Llama;
use onnx_protobuf::attribute_proto::AttributeType;
use onnx_protobuf::{AttributeProto, GraphProto, Message, ModelProto, NodeProto, TensorProto};
use protobuf::CodedInputStream;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::RngCore;
use std::path::Path;

/// One fault.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Fault {
    /// A tensor of the engine's weights is off.
    Weight(String),
    /// A tensor of both sides' weights is no number in places.
    NotANumber(String),
    /// A projection, `q` or `k`, of the attention at a path is rotated in pairs of neighbours instead of halves.
    RotaryHalves(String, char),
    /// A projection of the attention at a path is rotated as if every token came one later.
    Position(String, char),
    /// The attention at a path is scaled otherwise.
    Scale(String),
    /// The norm at a path has another epsilon.
    Epsilon(String),
    /// All norms of the graph have another epsilon.
    EveryEpsilon,
    /// All rotations of the graph have another base.
    Theta,
    /// Every sum in the residual stream is longer by so little that it is within its bounds.
    Drift,
}

const NORMS: [&str; 2] = ["input_layernorm", "post_attention_layernorm"];
const TENSORS: [&str; 9] = [
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
    NORMS[0],
    NORMS[1],
];

impl Fault {
    /// The `kind`-th kind of fault in a random place of a model of `layers` layers.
    pub(crate) fn random(kind: usize, layers: usize, random: &mut ChaCha8Rng) -> Self {
        let mut pick = |n: usize| random.next_u32() as usize % n;
        let layer = pick(layers);
        let attention = format!("model.layers.{layer}.self_attn");
        match kind % 5 {
            0 => Self::Weight(format!("model.layers.{layer}.{}.weight", TENSORS[pick(TENSORS.len())])),
            1 => Self::RotaryHalves(attention, ['q', 'k'][pick(2)]),
            2 => Self::Position(attention, ['q', 'k'][pick(2)]),
            3 => Self::Scale(attention),
            _ => Self::Epsilon(format!("model.layers.{layer}.{}", NORMS[pick(2)])),
        }
    }

    /// The module it sits in.
    pub(crate) fn module(&self) -> String {
        match self {
            Self::Weight(name) | Self::NotANumber(name) => name.strip_suffix(".weight").unwrap().to_owned(),
            Self::RotaryHalves(module, _) | Self::Position(module, _) | Self::Scale(module) | Self::Epsilon(module) => {
                module.clone()
            }
            Self::EveryEpsilon => format!("model.layers.0.{}", NORMS[0]),
            Self::Theta => "rows.rotary".to_owned(),
            Self::Drift => unreachable!("it sits nowhere"),
        }
    }

    /// The first tap that it makes wrong in a plain decoder.
    pub(crate) fn tap(&self) -> String {
        let module = self.module();
        match module.strip_prefix("model.layers.").and_then(|rest| rest.split_once('.')) {
            Some((number, rest)) => format!("layers.{number}.{}", self.tap_in_layer(rest)),
            None if module == "model.embed_tokens" => "embed".to_owned(),
            None if *self == Self::Theta => "layers.0.attn.q".to_owned(),
            None => "logits".to_owned(),
        }
    }

    /// The first tap of its layer that it makes wrong, where it sits in `module` of a Llama's layer.
    pub(crate) fn tap_in_layer(&self, module: &str) -> &'static str {
        match (self, module) {
            (Self::Scale(_), "self_attn") => "attn.out",
            (Self::RotaryHalves(_, 'k') | Self::Position(_, 'k'), _) | (_, "self_attn.k_proj") => "attn.k",
            (_, "self_attn" | "self_attn.q_proj" | "input_layernorm") => "attn.q",
            (_, "self_attn.v_proj") => "attn.v",
            (_, "self_attn.o_proj") => "attn_residual",
            (_, "cross_attn.o_proj") => "cross_residual",
            (_, cross) if cross.starts_with("cross_attn") => "cross.out",
            _ => "mlp.out",
        }
    }

    /// Writes the checkpoint of `good` with the fault, if it is one of checkpoints, into the new folder `dir`.
    pub(crate) fn write_checkpoint(&self, good: &Checkpoint, arch: &Llama, dir: &Path) {
        std::fs::create_dir(dir).unwrap();
        let mut arch = arch.clone();
        match self {
            Self::EveryEpsilon => arch.rms_norm_eps = 1e-3,
            Self::Theta => arch.rope.theta = 20_000.0,
            _ => {}
        }
        std::fs::write(dir.join("config.json"), config_json(&arch).to_string()).unwrap();
        let file = &good.weights().files()[0];
        let mut bytes = std::fs::read(file).unwrap();
        if let Self::Weight(name) | Self::NotANumber(name) = self {
            let off_by = if matches!(self, Self::Weight(_)) { 0.02 } else { f32::NAN };
            let weight = good.weights().get(name).unwrap();
            let place = weight.offset as usize..(weight.offset + weight.len) as usize;
            // Every seventh element: rows and columns are hit whatever the shape.
            for element in bytes[place].as_chunks_mut::<4>().0.iter_mut().step_by(7) {
                *element = (f32::from_le_bytes(*element) + off_by).to_le_bytes();
            }
        }
        std::fs::write(dir.join("model.safetensors"), bytes).unwrap();
    }

    fn plant(&self, graph: &mut GraphProto, rotary: &Frequencies) {
        match self {
            Self::RotaryHalves(attention, part) => {
                if let Some(at) = rotation(graph, attention, *part) {
                    graph.node[at].attribute.push(AttributeProto {
                        name: "interleaved".to_owned(),
                        type_: AttributeType::INT.into(),
                        i: 1,
                        ..AttributeProto::default()
                    });
                }
            }
            Self::Position(attention, part) => {
                if let Some(at) = rotation(graph, attention, *part) {
                    rotate_one_later(graph, at, rotary);
                }
            }
            Self::Scale(attention) => {
                let prefix = format!("{attention}.");
                let attends = |n: &NodeProto| n.op_type == "Attention" || n.op_type.starts_with("GroupQueryAttention");
                if let Some(at) = graph.node.iter().position(|n| n.name.starts_with(&prefix) && attends(n)) {
                    let scaled = "planted.query".to_owned();
                    let query = std::mem::replace(&mut graph.node[at].input[0], scaled.clone());
                    graph.initializer.push(number("planted.scale", 1, 1.25_f32.to_le_bytes().to_vec()));
                    graph.node.insert(at, node("Mul", [&query, "planted.scale"], &scaled));
                }
            }
            Self::Epsilon(norm) => {
                let prefix = format!("{norm}.");
                for node in graph.node.iter_mut().filter(|n| n.name.starts_with(&prefix)) {
                    for attribute in node.attribute.iter_mut().filter(|a| a.name == "epsilon") {
                        attribute.f = 0.1;
                    }
                }
            }
            Self::Drift => {
                graph.initializer.push(number("planted.drift", 1, 1.00004_f32.to_le_bytes().to_vec()));
                graph.node = std::mem::take(&mut graph.node).into_iter().flat_map(longer).collect();
            }
            Self::Weight(_) | Self::NotANumber(_) | Self::EveryEpsilon | Self::Theta => {}
        }
    }
}

/// A sum in the residual stream, times what it drifts by; any other node as it is.
fn longer(mut sum: NodeProto) -> Vec<NodeProto> {
    let in_stream = sum.name.strip_prefix("model.layers.").and_then(|rest| rest.split_once('.'));
    if !in_stream.is_some_and(|(_, operator)| operator.starts_with("Add")) {
        return vec![sum];
    }
    let output = sum.output[0].clone();
    let exact = format!("planted.{output}");
    sum.output[0].clone_from(&exact);
    vec![sum, node("Mul", [&exact, "planted.drift"], &output)]
}

/// The first rotation of queries or keys in the attention at a path; the projection that it comes from says which it is.
fn rotation(graph: &GraphProto, attention: &str, part: char) -> Option<usize> {
    let prefix = format!("{attention}.");
    let projection = format!("{prefix}{part}_proj.");
    let made_by = |value: &str| graph.node.iter().find(|n| n.output.iter().any(|o| o == value));
    let comes_from = |node: &NodeProto| {
        // Reshapes, and a choice of rows, lie between a projection and its rotation.
        let mut value = node.input[0].clone();
        loop {
            match made_by(&value) {
                Some(before) if before.name.starts_with(&projection) => break true,
                Some(before) if before.op_type == "Reshape" || before.op_type == "Gather" => {
                    value = before.input[0].clone();
                }
                _ => break false,
            }
        }
    };
    let rotates = |n: &NodeProto| n.op_type == "RotaryEmbedding" && n.name.starts_with(&prefix);
    graph.node.iter().position(|n| rotates(n) && comes_from(n))
}

/// The angle by which every pair of dimensions turns from one position to the next.
#[derive(Debug, Clone)]
pub(crate) struct Frequencies(Vec<f32>);

impl Frequencies {
    pub(crate) fn new(theta: f64, head_dim: usize) -> Self {
        Self((0..head_dim / 2).map(|i| theta.powf(-2.0 * i as f64 / head_dim as f64) as f32).collect())
    }

    fn tensor(&self, name: &str, of: fn(f32) -> f32) -> TensorProto {
        let bytes = self.0.iter().flat_map(|&angle| of(angle).to_le_bytes()).collect();
        TensorProto { dims: vec![self.0.len() as i64], ..number(name, 1, bytes) }
    }
}

/// Gives the rotation `at` angles of its own, of positions that are larger by one: `cos(a + b)` and `sin(a + b)`.
fn rotate_one_later(graph: &mut GraphProto, at: usize, rotary: &Frequencies) {
    let [cos, sin] = [1, 2].map(|input| graph.node[at].input[input].clone());
    graph.initializer.push(rotary.tensor("planted.cos", f32::cos));
    graph.initializer.push(rotary.tensor("planted.sin", f32::sin));
    let nodes = [
        node("Mul", [&cos, "planted.cos"], "planted.cc"),
        node("Mul", [&sin, "planted.sin"], "planted.ss"),
        node("Sub", ["planted.cc", "planted.ss"], "planted.later.cos"),
        node("Mul", [&sin, "planted.cos"], "planted.sc"),
        node("Mul", [&cos, "planted.sin"], "planted.cs"),
        node("Add", ["planted.sc", "planted.cs"], "planted.later.sin"),
    ];
    "planted.later.cos".clone_into(&mut graph.node[at].input[1]);
    "planted.later.sin".clone_into(&mut graph.node[at].input[2]);
    graph.node.splice(at..at, nodes);
}

fn node(operator: &str, input: [&str; 2], output: &str) -> NodeProto {
    NodeProto {
        op_type: operator.to_owned(),
        name: format!("planted.{output}/node"),
        input: input.map(str::to_owned).to_vec(),
        output: vec![output.to_owned()],
        ..NodeProto::default()
    }
}

fn number(name: &str, data_type: i32, raw_data: Vec<u8>) -> TensorProto {
    TensorProto { name: name.to_owned(), data_type, raw_data, ..TensorProto::default() }
}

/// Where the outputs begin that were appended to a model: at its second graph, which this crate's parser would take for a
/// replacement of the first.
fn appended(bytes: &[u8]) -> usize {
    const GRAPH: u32 = 7;
    let mut input = CodedInputStream::from_bytes(bytes);
    let mut graphs = 0;
    loop {
        let at = input.pos() as usize;
        let Some(tag) = input.read_raw_tag_or_eof().unwrap() else { return bytes.len() };
        graphs += usize::from(tag >> 3 == GRAPH);
        if graphs == 2 {
            return at;
        }
        match tag & 7 {
            0 => drop(input.read_raw_varint64().unwrap()),
            2 => drop(input.read_bytes().unwrap()),
            wire => panic!("a model has no field of wire type {wire}"),
        }
    }
}

/// A runtime in which some nodes do not compute what they should.
pub(crate) struct FaultyRuntime {
    pub(crate) sound: OrtCpu,
    pub(crate) fault: Fault,
    pub(crate) rotary: Frequencies,
}

impl Loader for FaultyRuntime {
    fn load(&self, name: &str, bytes: &[u8], weights: &[String]) -> Result<Box<dyn Engine>, EngineError> {
        let (model, taps) = bytes.split_at(appended(bytes));
        let mut model = ModelProto::parse_from_bytes(model).unwrap();
        self.fault.plant(model.graph.mut_or_insert_default(), &self.rotary);
        self.sound.load(name, &[&model.write_to_bytes().unwrap(), taps].concat(), weights)
    }

    fn name(&self) -> &'static str {
        "faulty"
    }
}
