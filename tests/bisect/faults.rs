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
    /// A projection, `q` or `k`, of a layer is rotated in pairs of neighbours instead of halves.
    RotaryHalves(usize, char),
    /// A projection of a layer is rotated as if every token came one later.
    Position(usize, char),
    /// Attention of a layer is scaled otherwise.
    Scale(usize),
    /// A norm of a layer has another epsilon.
    Epsilon(usize, &'static str),
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
        match kind % 5 {
            0 => Self::Weight(format!("model.layers.{layer}.{}.weight", TENSORS[pick(TENSORS.len())])),
            1 => Self::RotaryHalves(layer, ['q', 'k'][pick(2)]),
            2 => Self::Position(layer, ['q', 'k'][pick(2)]),
            3 => Self::Scale(layer),
            _ => Self::Epsilon(layer, NORMS[pick(2)]),
        }
    }

    /// The first tap that it makes wrong, and the module it sits in.
    pub(crate) fn place(&self) -> (String, String) {
        let in_layer = |module: &str| match module {
            "self_attn.q_proj" | "input_layernorm" => "attn.q",
            "self_attn.k_proj" => "attn.k",
            "self_attn.v_proj" => "attn.v",
            "self_attn.o_proj" => "attn_residual",
            _ => "mlp.out",
        };
        let layer = |layer: &usize, module: &str, tap: &str| {
            (format!("layers.{layer}.{tap}"), format!("model.layers.{layer}.{module}"))
        };
        match self {
            Self::Weight(name) | Self::NotANumber(name) => {
                let module = name.strip_suffix(".weight").unwrap();
                match module.strip_prefix("model.layers.").and_then(|rest| rest.split_once('.')) {
                    Some((number, rest)) => (format!("layers.{number}.{}", in_layer(rest)), module.to_owned()),
                    None if module == "model.embed_tokens" => ("embed".to_owned(), module.to_owned()),
                    None => ("logits".to_owned(), module.to_owned()),
                }
            }
            Self::RotaryHalves(l, part) | Self::Position(l, part) => layer(l, "self_attn", &format!("attn.{part}")),
            Self::Scale(l) => layer(l, "self_attn", "attn.out"),
            Self::Epsilon(l, norm) => layer(l, norm, in_layer(norm)),
            Self::EveryEpsilon => layer(&0, NORMS[0], "attn.q"),
            Self::Theta => ("layers.0.attn.q".to_owned(), "rows.rotary".to_owned()),
            Self::Drift => unreachable!("it sits nowhere"),
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

    fn plant(&self, graph: &mut GraphProto) {
        match self {
            Self::RotaryHalves(layer, part) => {
                if let Some(at) = rotation(graph, *layer, *part) {
                    graph.node[at].attribute.push(AttributeProto {
                        name: "interleaved".to_owned(),
                        type_: AttributeType::INT.into(),
                        i: 1,
                        ..AttributeProto::default()
                    });
                }
            }
            Self::Position(layer, part) => {
                if let Some(at) = rotation(graph, *layer, *part) {
                    rotate_one_later(graph, at);
                }
            }
            Self::Scale(layer) => {
                let prefix = format!("model.layers.{layer}.self_attn.");
                let attends = |n: &NodeProto| n.op_type == "Attention" || n.op_type == "GroupQueryAttention";
                if let Some(at) = graph.node.iter().position(|n| n.name.starts_with(&prefix) && attends(n)) {
                    let scaled = "planted.query".to_owned();
                    let query = std::mem::replace(&mut graph.node[at].input[0], scaled.clone());
                    graph.initializer.push(number("planted.scale", 1, 1.25_f32.to_le_bytes().to_vec()));
                    graph.node.insert(at, node("Mul", [&query, "planted.scale"], &scaled));
                }
            }
            Self::Epsilon(layer, norm) => {
                let prefix = format!("model.layers.{layer}.{norm}.");
                for node in graph.node.iter_mut().filter(|n| n.name.starts_with(&prefix)) {
                    for attribute in node.attribute.iter_mut().filter(|a| a.name == "epsilon") {
                        attribute.f = 1e-2;
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

/// The rotation of a layer's queries or keys, which is the first or the second of the two that its attention has; a part
/// of a graph may have one of them only, and its weights say which.
fn rotation(graph: &GraphProto, layer: usize, part: char) -> Option<usize> {
    let prefix = format!("model.layers.{layer}.self_attn.");
    let projection = format!("{prefix}{part}_proj.");
    let made_by = |value: &str| graph.node.iter().find(|n| n.output.iter().any(|o| o == value));
    let comes_from = |node: &NodeProto| {
        // Reshapes lie between a projection and its rotation.
        let mut value = node.input[0].clone();
        loop {
            match made_by(&value) {
                Some(before) if before.name.starts_with(&projection) => break true,
                Some(before) if before.op_type == "Reshape" => value = before.input[0].clone(),
                _ => break false,
            }
        }
    };
    let rotates = |n: &NodeProto| n.op_type == "RotaryEmbedding" && n.name.starts_with(&prefix);
    graph.node.iter().position(|n| rotates(n) && comes_from(n))
}

/// Gives the rotation `at` angles of its own, of positions that are larger by one.
fn rotate_one_later(graph: &mut GraphProto, at: usize) {
    let mut angles: Vec<NodeProto> =
        graph.node.iter().filter(|n| n.name.starts_with("rows.rotary.")).cloned().collect();
    let made: Vec<String> = angles.iter().flat_map(|n| n.output.clone()).collect();
    let renamed = |name: &String| if made.contains(name) { format!("planted.{name}") } else { name.clone() };
    for node in &mut angles {
        node.name.insert_str(0, "planted.");
        node.input = node.input.iter().map(renamed).collect();
        node.output = node.output.iter().map(renamed).collect();
    }
    let cast = angles.iter_mut().find(|n| n.op_type == "Cast").unwrap();
    let positions = std::mem::replace(&mut cast.input[0], "planted.positions".to_owned());
    graph.initializer.push(number("planted.one", 7, 1_i64.to_le_bytes().to_vec()));
    let later = node("Add", [&positions, "planted.one"], "planted.positions");
    for input in &mut graph.node[at].input[1..3] {
        *input = renamed(input);
    }
    graph.node.splice(at..at, std::iter::once(later).chain(angles));
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
}

impl Loader for FaultyRuntime {
    fn load(&self, name: &str, bytes: &[u8], weights: &[String]) -> Result<Box<dyn Engine>, EngineError> {
        let (model, taps) = bytes.split_at(appended(bytes));
        let mut model = ModelProto::parse_from_bytes(model).unwrap();
        self.fault.plant(model.graph.mut_or_insert_default());
        self.sound.load(name, &[&model.write_to_bytes().unwrap(), taps].concat(), weights)
    }

    fn name(&self) -> &'static str {
        "faulty"
    }
}
