//! A folder that shows a fault without this program: the nodes as a model, the tensors they need, their inputs and what
//! should come out.

use super::BisectError;
use super::culprit::{Culprit, Found, Origin};
use super::rebuild::Rebuilt;
use crate::checkpoint::{WeightMaps, read_index, safetensors_mixed_header};
use crate::npz;
use crate::staging::{Kind, Staging};
use crate::tensor::Tensor;
use serde_json::json;
use std::fmt::Write as _;
use std::path::Path;

const MARKER: &str = "reproducer.json";
const REPRODUCER: Kind = Kind { noun: "reproducer", marker: MARKER, prefix: ".accordion-reproducer-" };
const WEIGHTS: &str = "weights.safetensors";
const SCRIPT: &str = include_str!("reproduce.py");

/// Writes what was `found` in a graph of `rebuilt` into the folder `out`, which must not exist or, with `replace`, be a
/// reproducer.
///
/// # Errors
///
/// The folder cannot be written; then nothing is left of it.
pub fn write(rebuilt: &Rebuilt<'_>, found: &Found, out: &Path, replace: bool) -> Result<(), BisectError> {
    let mut staging = Staging::create(out, REPRODUCER, replace)?;
    let graph = rebuilt.graph(&found.culprit.graph)?;
    let bytes = weight_file(graph.bundle.weights(), &found.part.weights)?;
    staging.write(WEIGHTS, &bytes)?;
    let index = read_index(&[staging.path(WEIGHTS)]).map_err(Box::new)?;
    let model = graph.scope.cut(&found.part, &index)?.finish(&[WEIGHTS.to_owned()])?;
    staging.write("model.onnx", &model.bytes)?;
    let inputs = || found.inputs.iter().map(|(name, value)| (name.as_str(), value));
    staging.write_with("inputs.npz", |file| npz::write(file, inputs()))?;
    let output = (found.part.wanted.as_str(), &found.expected);
    staging.write_with("expected.npz", |file| npz::write(file, [output]))?;
    staging.write("reproduce.py", SCRIPT.as_bytes())?;
    staging.write("README.md", readme(found, &model.signature.weights).as_bytes())?;
    let description = json!({ "schema": "accordion.reproducer/1", "bounds": found.bounds, "culprit": found.culprit });
    staging.write_json(MARKER, &description)?;
    staging.publish()?;
    Ok(())
}

/// The tensors `names` as a safetensors file of their own.
fn weight_file(weights: &WeightMaps, names: &[String]) -> Result<Vec<u8>, BisectError> {
    let tensors: Vec<(&String, Tensor)> = names
        .iter()
        .map(|name| Ok((name, weights.tensor(name).map_err(Box::new)?)))
        .collect::<Result<_, BisectError>>()?;
    let described = |(name, tensor): &(&String, Tensor)| ((*name).clone(), tensor.dtype(), tensor.shape().to_vec());
    let mut bytes = safetensors_mixed_header(tensors.iter().map(described));
    for (_, tensor) in &tensors {
        bytes.extend_from_slice(tensor.bytes());
    }
    Ok(bytes)
}

fn readme(found: &Found, weights: &[String]) -> String {
    let mut text = format!("# A difference at `{}`\n\n```text\n{}```\n", found.culprit.tap, summary(&found.culprit));
    let folder = "\n`model.onnx` holds the nodes, `weights.safetensors` the tensors they read, `inputs.npz` what they are \
                  given, `expected.npz` what the reference makes of it; the names in the archives are those in the graph.\n";
    text.push_str(folder);
    if found.culprit.origin == Origin::Accumulated {
        text.push_str(
            "The difference is not made by few nodes: the model is everything from the graph's inputs up to the tap.\n",
        );
    }
    text.push_str(
        "\nIn stock onnxruntime, which exits with 1 if the difference is there (if it is not, the fault lies in the \
         runtime that ran the graph, not in the graph):\n\n    python reproduce.py\n\nIn any runtime that Polygraphy \
         knows:\n\n    polygraphy run model.onnx --onnxrt --data-loader-script reproduce.py\n\nTensors:",
    );
    let list: Vec<String> = weights.iter().map(|name| format!(" `{name}`")).collect();
    text.push_str(if list.is_empty() { " none" } else { "" });
    text.push_str(&list.join(","));
    text.push('\n');
    text
}

/// A culprit in a few lines for a terminal.
pub fn summary(culprit: &Culprit) -> String {
    let place = if culprit.place.is_empty() { String::new() } else { format!(", for {}", culprit.place) };
    let names = |names: &[String]| {
        let named: Vec<&str> = names.iter().map(|n| if n.is_empty() { "(the graph itself)" } else { n }).collect();
        named.join(", ")
    };
    let nodes: Vec<String> = culprit.suspects.iter().map(|n| format!("{} ({})", n.name, n.operator)).collect();
    let reads: Vec<String> = culprit
        .reads
        .iter()
        .map(|read| format!("{} {:?}", read.tap.as_deref().unwrap_or(&read.value), read.shape))
        .collect();
    let origin = match culprit.origin {
        Origin::Nodes => "these nodes are wrong on the reference's values",
        Origin::Accumulated => "accumulated: on the reference's values these nodes are right",
    };
    let mut text = String::new();
    for (label, value) in [
        ("graph", format!("{}{place}", culprit.graph)),
        ("first wrong", format!("{}: {}", culprit.tap, culprit.result.reason)),
        ("matrix", culprit.matrix.clone().unwrap_or_default()),
        ("module", names(&culprit.modules)),
        ("nodes", nodes.join(", ")),
        ("on inputs", reads.join(", ")),
        ("origin", origin.to_owned()),
        ("effort", format!("{} runs for {} taps and outputs", culprit.runs, culprit.points)),
    ]
    .into_iter()
    .filter(|(_, value)| !value.is_empty())
    {
        // Writing into memory cannot fail.
        let _ = writeln!(text, "{label:<12} {value}");
    }
    text
}
