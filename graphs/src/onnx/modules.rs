//! What a graph consists of, module by module: small enough to be kept beside it, so that nobody has to parse it.

use super::DOMAIN;
use super::scope::NodeData;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};

/// The nodes of one kind of place in a model, those of all layers together.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ModuleNodes {
    /// Path of the module, numbers replaced by `*`: `model.layers.*.self_attn`; empty for the graph itself.
    pub module: String,
    /// Modules that this stands for.
    pub places: usize,
    /// Nodes of all of them by operator; operators that are not ONNX's own stand behind their domain.
    pub operators: BTreeMap<String, usize>,
}

impl ModuleNodes {
    /// Nodes of all places.
    pub fn nodes(&self) -> usize {
        self.operators.values().fold(0, |sum, &count| sum.saturating_add(count))
    }
}

/// The module that a node of `operator` belongs to: `model.layers.3.mlp` of `model.layers.3.mlp.Add/node`.
pub fn module_path<'n>(node: &'n str, operator: &str) -> &'n str {
    let path = node.split('/').next().unwrap_or(node);
    path.strip_suffix(operator).map_or(path, |module| module.trim_end_matches('.'))
}

/// `module` with its numbers replaced by `*`, the same for all layers.
pub fn module_pattern(module: &str) -> String {
    let star = |word| if str::parse::<u32>(word).is_ok() { "*" } else { word };
    module.split('.').map(star).collect::<Vec<_>>().join(".")
}

/// The name under which an operator is counted.
pub(super) fn qualified(domain: &str, operator: &str) -> String {
    if domain.is_empty() { operator.to_owned() } else { format!("{domain}.{operator}") }
}

/// Modules in the order of their first nodes.
pub(super) fn modules(nodes: &[NodeData]) -> Vec<ModuleNodes> {
    let mut found: Vec<(ModuleNodes, BTreeSet<&str>)> = Vec::new();
    let mut places: BTreeMap<String, usize> = BTreeMap::new();
    for node in nodes {
        let path = module_path(&node.name, &node.op);
        let module = module_pattern(path);
        let place = *places.entry(module).or_insert_with_key(|module| {
            let (module, operators) = (module.clone(), BTreeMap::new());
            found.push((ModuleNodes { module, places: 0, operators }, BTreeSet::new()));
            found.len() - 1
        });
        let (entry, paths) = &mut found[place];
        paths.insert(path);
        entry.places = paths.len();
        *entry.operators.entry(qualified(node.domain, &node.op)).or_default() += 1;
    }
    found.into_iter().map(|(entry, _)| entry).collect()
}

/// The name under which a function of this crate is counted where it is called.
pub(super) fn function_name(name: &str) -> String {
    qualified(DOMAIN, name)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(name: &str, domain: &'static str, op: &str) -> NodeData {
        let (name, op) = (name.to_owned(), op.to_owned());
        NodeData { name, domain, op, inputs: Vec::new(), outputs: Vec::new(), attributes: Vec::new() }
    }

    #[test]
    fn layers_are_counted_together() {
        let found = modules(&[
            node("Gather/node", "", "Gather"),
            node("model.layers.0.mlp.Add/node", "", "Add"),
            node("model.layers.0.mlp.Add/node_2", "", "Add"),
            node("model.layers.0.mlp.RmsNorm/node", DOMAIN, "RmsNorm"),
            node("model.layers.11.mlp.Add/node", "", "Add"),
            node("lm_head.MatMul/node", "", "MatMul"),
        ]);
        let found: Vec<_> = found.iter().map(|m| (m.module.as_str(), m.places, m.nodes())).collect();
        assert_eq!(found, [("", 1, 1), ("model.layers.*.mlp", 2, 4), ("lm_head", 1, 1)]);
    }

    #[test]
    fn a_module_that_is_called_like_an_operator_keeps_its_name() {
        assert_eq!(module_path("model.Add.Add/node_3", "Add"), "model.Add");
        assert_eq!(module_path("model.layers.3.fused", "Add"), "model.layers.3.fused");
        assert_eq!(module_pattern("node.h1.i0.layers.12.q"), "node.h1.i0.layers.*.q");
    }

    #[test]
    fn absurd_counts_do_not_overflow() {
        let operators = BTreeMap::from([("Add".to_owned(), usize::MAX), ("Mul".to_owned(), 2)]);
        assert_eq!(ModuleNodes { module: String::new(), places: 1, operators }.nodes(), usize::MAX);
    }
}
