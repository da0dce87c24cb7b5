//! What one graph of a bundle consists of, as its export recorded it.

use super::Described;
use super::bundle::Graph;
use crate::cli::text::{grouped, table};
use accordion::bundle::Bundle;
use accordion_graphs::onnx::{GraphSignature, ModuleNodes};
use anyhow::bail;
use serde::Serialize;
use std::collections::BTreeMap;

/// Facts about one graph.
#[derive(Serialize)]
pub(super) struct Description<'b> {
    kind: &'static str,
    #[serde(flatten)]
    graph: Graph<'b>,
    /// Nodes by operator.
    operators: BTreeMap<&'b str, usize>,
    /// Functions of the model: nodes in the body of each.
    functions: &'b BTreeMap<String, usize>,
    /// In the order of the graph; empty where the bundle does not say.
    modules: &'b [ModuleNodes],
}

/// Describes the graph `name`; its file is checked on the way.
pub(super) fn describe<'b>(bundle: &'b Bundle, name: &str) -> anyhow::Result<Description<'b>> {
    let graphs = &bundle.manifest().graphs;
    let Some((name, entry)) = graphs.get_key_value(name) else {
        let known: Vec<&str> = graphs.keys().map(String::as_str).collect();
        bail!("--graph is {name}, expected one of {}", known.join(", "));
    };
    let GraphSignature { modules, functions, .. } = &entry.signature;
    let mut operators: BTreeMap<&str, usize> = BTreeMap::new();
    for (operator, count) in modules.iter().flat_map(|module| &module.operators) {
        let sum = operators.entry(operator).or_default();
        *sum = sum.saturating_add(*count);
    }
    Ok(Description { kind: "graph", graph: Graph::of(bundle, name, entry)?, operators, functions, modules })
}

impl Described for Description<'_> {
    fn in_words(&self) -> String {
        let text = format!("{} in {}: {}", self.graph.name, self.graph.file(), self.graph.in_words());
        if self.modules.is_empty() {
            return text + "\nThe bundle does not say what the nodes are; exported again, it will.\n";
        }
        let operators = table(["operator", ">nodes", ""], &self.operators());
        let modules = table(["module", ">nodes", ">places", "operators of one place"], &self.modules());
        format!("{text}\n{operators}\n{modules}")
    }
}

impl Description<'_> {
    /// Operators, the most frequent first.
    fn operators(&self) -> Vec<[String; 3]> {
        let mut listed: Vec<(&&str, &usize)> = self.operators.iter().collect();
        listed.sort_by_key(|(name, count)| (std::cmp::Reverse(**count), **name));
        let row = |(name, count): (&&str, &usize)| {
            let body = self.functions.get(*name).map(|nodes| match nodes {
                1 => "a function of 1 node".to_owned(),
                nodes => format!("a function of {nodes} nodes"),
            });
            [(*name).to_owned(), grouped(*count as u64), body.unwrap_or_default()]
        };
        listed.into_iter().map(row).collect()
    }

    fn modules(&self) -> Vec<[String; 4]> {
        let row = |module: &ModuleNodes| {
            let ModuleNodes { module: path, places, operators } = module;
            let path = if path.is_empty() { "(the graph)" } else { path };
            [path.to_owned(), grouped(module.nodes() as u64), format!("x {places}"), one_place(operators, *places)]
        };
        self.modules.iter().map(row).collect()
    }
}

/// Operators of one place, where all are alike; else of all places together.
fn one_place(operators: &BTreeMap<String, usize>, places: usize) -> String {
    let places = places.max(1);
    let alike = operators.values().all(|count| count.is_multiple_of(places));
    let short = |name: &str| name.rsplit('.').next().unwrap_or(name).to_owned();
    let listed: Vec<String> = operators
        .iter()
        .map(|(name, &count)| match if alike { count / places } else { count } {
            1 => short(name),
            count => format!("{count} {}", short(name)),
        })
        .collect();
    listed.join(", ") + if alike { "" } else { " (in all places)" }
}

#[cfg(test)]
mod tests {
    use super::one_place;
    use std::collections::BTreeMap;

    #[test]
    fn places_that_differ_are_not_averaged() {
        let counts = |add, mul| BTreeMap::from([("Add".to_owned(), add), ("ai.accordion.Mul".to_owned(), mul)]);
        assert_eq!(one_place(&counts(60, 30), 30), "2 Add, Mul");
        assert_eq!(one_place(&counts(60, 29), 30), "60 Add, 29 Mul (in all places)");
        assert_eq!(one_place(&counts(1, 1), 0), "Add, Mul");
    }
}
