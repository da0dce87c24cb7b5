//! `accordion inspect`.

mod bundle;
mod checkpoint;
mod compressor;
mod graph;
mod pieces;
mod plan;
mod quantization;
mod table;

use super::output::Output;
use super::text;
use super::{Outcome, models};
use accordion::bundle::{Bundle, MANIFEST_FILE};
use accordion::checkpoint::{Checkpoint, gguf_facts};
use accordion_graphs::architecture::Architecture;
use accordion_graphs::plan::PromptLengths;
use anyhow::ensure;
use clap::Args;
use serde::Serialize;
use std::path::PathBuf;

/// Say what a checkpoint, a bundle, a GGUF file or a calibration table holds
///
/// With --context, also what a prompt of these lengths costs and the tree, segments or chunks that a bundle's method makes
/// of it.
#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// Checkpoint or bundle folder, GGUF file, calibration table, or the name of a model that can be fetched
    path: PathBuf,
    /// Plan for a context of this many tokens
    #[arg(long, value_name = "N")]
    context: Option<usize>,
    /// Tokens before the context
    #[arg(long, value_name = "N", default_value_t = 0, requires = "context")]
    prefix: usize,
    /// Tokens after the context
    #[arg(long, value_name = "N", default_value_t = 1, requires = "context")]
    suffix: usize,
    /// Only this graph of a bundle, with its operators, functions and modules
    #[arg(long, value_name = "NAME", conflicts_with = "context")]
    graph: Option<String>,
}

/// The result: what was found at the path, and the plan that was asked for.
#[derive(Serialize)]
struct Inspection<T: Serialize> {
    schema: &'static str,
    path: PathBuf,
    #[serde(flatten)]
    found: T,
    #[serde(skip_serializing_if = "Option::is_none")]
    plan: Option<plan::Cost>,
}

/// What can be told about.
trait Described: Serialize {
    /// Lines for a reader.
    fn in_words(&self) -> String;
}

/// Runs the command.
pub(crate) fn run(arguments: &Arguments, output: &Output) -> anyhow::Result<Outcome> {
    let path = &arguments.path;
    let lengths =
        arguments.context.map(|context| PromptLengths { prefix: arguments.prefix, context, suffix: arguments.suffix });
    if path.join(MANIFEST_FILE).exists() {
        let bundle = Bundle::open(path)?;
        if let Some(name) = &arguments.graph {
            return print(path.clone(), graph::describe(&bundle, name)?, None, output);
        }
        let plan = lengths.map(|lengths| plan::of_bundle(&bundle, lengths)).transpose()?;
        return print(path.clone(), bundle::describe(&bundle)?, plan, output);
    }
    ensure!(arguments.graph.is_none(), "--graph is for bundles, and {} is none", path.display());
    if path.extension().is_some_and(|extension| extension == "safetensors") {
        ensure!(lengths.is_none(), "--context is for models, and {} is a table", path.display());
        return print(path.clone(), self::table::describe(path)?, None, output);
    }
    if path.is_file() {
        let facts = gguf_facts(path)?;
        let plan = lengths.map(|lengths| plan::plain(&facts.model.clone().into(), lengths)).transpose()?;
        return print(path.clone(), checkpoint::describe_gguf(facts), plan, output);
    }
    let folder = models::folder(path, output)?;
    let found = checkpoint::describe(&Checkpoint::open(&folder)?)?;
    let plan = lengths.map(|lengths| plan::plain(found.model(), lengths)).transpose()?;
    print(folder, found, plan, output)
}

fn print(path: PathBuf, found: impl Described, plan: Option<plan::Cost>, output: &Output) -> anyhow::Result<Outcome> {
    let inspection = Inspection { schema: "accordion.inspect/1", path, found, plan };
    output.result(&inspection, || {
        let plan = inspection.plan.as_ref().map(|plan| format!("\n{}", plan.in_words())).unwrap_or_default();
        format!("{}\n{}{plan}", inspection.path.display(), inspection.found.in_words())
    })?;
    Ok(Outcome::Done)
}

/// Names and values, one to a line.
fn facts(rows: &[(&str, String)]) -> String {
    let rows: Vec<[String; 2]> = rows.iter().map(|(name, value)| [format!("  {name}"), value.clone()]).collect();
    text::table(["", ""], &rows)
}

/// Lines about an architecture.
fn architecture(model: &Architecture) -> Vec<(&'static str, String)> {
    let tied = if model.tie_word_embeddings() { "tied to the output" } else { "with an output matrix of its own" };
    let [layers, hidden, inner] = [model.num_layers(), model.hidden_size(), model.intermediate_size()];
    let [heads, groups, width] = [model.num_heads(), model.num_kv_heads(), model.head_dim()];
    let rotated = if model.rotary_dims() == width {
        String::new()
    } else {
        format!(", the first {} of {width} dimensions", model.rotary_dims())
    };
    let rope = accordion::checkpoint::rope_text(model.rope());
    let mut rows = vec![
        ("layers", format!("{layers}, hidden {hidden}, MLP {inner}")),
        ("heads", format!("{heads} query, {groups} key/value, {width} wide")),
        ("vocabulary", format!("{}, {tied}", model.vocab_size())),
        ("positions", format!("{}, rotary {rope}{rotated}", model.max_positions())),
    ];
    rows.extend(model.sliding_window().map(|window| ("sliding window", format!("{window} tokens"))));
    match model {
        Architecture::Llama(model) => {
            let biases = [(model.qkv_bias, "q, k, v"), (model.o_bias, "o"), (model.mlp_bias, "MLP")];
            let biases: Vec<&str> = biases.into_iter().filter_map(|(has, name)| has.then_some(name)).collect();
            if !biases.is_empty() {
                rows.push(("biases", biases.join(", ")));
            }
        }
        Architecture::GptNeox(model) => {
            let halves = if model.parallel_residual { "side by side" } else { "one after the other" };
            rows.push(("attention and MLP", halves.to_owned()));
        }
        _ => {}
    }
    rows
}
