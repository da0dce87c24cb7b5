//! Which execution provider of ONNX Runtime runs which node, and whether that was meant.
//!
//! ONNX Runtime gives a node that its provider has no kernel for to the CPU, without a word, and every tensor around it then
//! travels back and forth. Its own option against that, `session.disable_cpu_ep_fallback`, is of no use for graphs with dynamic
//! lengths: it also refuses the arithmetic on lengths that ONNX Runtime itself prefers to have on the CPU, where the kernels
//! that take lengths want them. So the nodes are looked at once the session is made.

use ort::session::Session;
use ort::{AsPointer, Error, sys};
use std::collections::BTreeMap;
use std::ffi::{CStr, c_char};
use std::fmt;
use std::ptr::{null, null_mut};
use std::slice;

/// The option that makes a session remember who runs what.
pub(super) const RECORD_PLACEMENT: &str = "session.record_ep_graph_assignment_info";

/// Operators that only arrange or count, as in arithmetic on lengths. Those that compute on activations are not among them.
const ARITHMETIC_ON_LENGTHS: [&str; 31] = [
    "Add",
    "And",
    "Cast",
    "Concat",
    "Constant",
    "ConstantOfShape",
    "Div",
    "Equal",
    "Expand",
    "Flatten",
    "Gather",
    "Greater",
    "GreaterOrEqual",
    "Identity",
    "Less",
    "LessOrEqual",
    "Max",
    "Min",
    "Mod",
    "Mul",
    "Not",
    "Or",
    "Range",
    "Reshape",
    "Shape",
    "Size",
    "Slice",
    "Squeeze",
    "Sub",
    "Unsqueeze",
    "Where",
];

/// The nodes that a provider runs.
#[derive(Debug)]
pub(super) struct Share {
    pub(super) provider: String,
    /// Operator and name of each.
    pub(super) nodes: Vec<[String; 2]>,
}

/// Who runs the nodes of `session`, which was made with [`RECORD_PLACEMENT`].
pub(super) fn shares(session: &Session) -> Result<Vec<Share>, Error> {
    let api = ort::api();
    let (mut parts, mut count) = (null(), 0);
    // SAFETY: the session is alive and both places are valid. What is returned belongs to the session.
    let parts = unsafe {
        Error::result_from_status((api.Session_GetEpGraphAssignmentInfo)(
            session.ptr(),
            &raw mut parts,
            &raw mut count,
        ))?;
        list(parts, count)
    };
    let mut shares: Vec<Share> = Vec::new();
    for &part in parts {
        let (mut nodes, mut count) = (null(), 0);
        // SAFETY: as above.
        let (provider, nodes) = unsafe {
            Error::result_from_status((api.EpAssignedSubgraph_GetNodes)(part, &raw mut nodes, &raw mut count))?;
            (text(|out| (api.EpAssignedSubgraph_GetEpName)(part, out))?, list(nodes, count))
        };
        let mut described = Vec::with_capacity(nodes.len());
        for &node in nodes {
            // SAFETY: as above.
            let description = unsafe {
                [
                    text(|out| (api.EpAssignedNode_GetOperatorType)(node, out))?,
                    text(|out| (api.EpAssignedNode_GetName)(node, out))?,
                ]
            };
            described.push(description);
        }
        match shares.iter_mut().find(|share| share.provider == provider) {
            Some(share) => share.nodes.append(&mut described),
            None => shares.push(Share { provider, nodes: described }),
        }
    }
    Ok(shares)
}

/// # Safety
///
/// There are `count` pointers at `first`, which live as long as the result is used.
unsafe fn list<'a, T>(first: *const *const T, count: usize) -> &'a [*const T] {
    // SAFETY: the caller's promise.
    if first.is_null() { &[] } else { unsafe { slice::from_raw_parts(first, count) } }
}

/// # Safety
///
/// The call writes a C string's address.
unsafe fn text(call: impl FnOnce(*mut *const c_char) -> sys::OrtStatusPtr) -> Result<String, Error> {
    let mut text: *const c_char = null_mut();
    let status = call(&raw mut text);
    // SAFETY: the status is freed here; the string lives as long as the session.
    unsafe {
        Error::result_from_status(status)?;
        let text = if text.is_null() { c"" } else { CStr::from_ptr(text) };
        Ok(text.to_string_lossy().into_owned())
    }
}

/// Nodes that were meant for another provider, and compute.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Astray {
    wanted: String,
    /// How many there are of each operator, and the name of the first.
    operators: BTreeMap<String, (usize, String)>,
}

/// The nodes that compute and that `wanted` does not run, if there are any.
pub(super) fn astray(shares: &[Share], wanted: &str) -> Option<Astray> {
    let mut operators = BTreeMap::new();
    for [operator, name] in shares.iter().filter(|share| share.provider != wanted).flat_map(|share| &share.nodes) {
        if !ARITHMETIC_ON_LENGTHS.contains(&operator.as_str()) {
            operators.entry(operator.clone()).or_insert_with(|| (0, name.clone())).0 += 1;
        }
    }
    (!operators.is_empty()).then(|| Astray { wanted: wanted.to_owned(), operators })
}

impl fmt::Display for Astray {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let each = self.operators.iter().map(|(operator, (count, first))| format!("{count} {operator} ('{first}')"));
        let each: Vec<String> = each.collect();
        write!(f, "{} has no kernel for {}: they would run on the CPU", self.wanted, each.join(", "))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn share(provider: &str, nodes: &[[&str; 2]]) -> Share {
        Share { provider: provider.to_owned(), nodes: nodes.iter().map(|node| node.map(str::to_owned)).collect() }
    }

    #[test]
    fn arithmetic_on_lengths_may_be_elsewhere_and_nothing_else() {
        let gpu = share("GPU", &[["MatMul", "a"], ["Attention", "b"]]);
        assert_eq!(astray(&[gpu, share("CPU", &[["Shape", "c"], ["Concat", "d"]])], "GPU"), None);
        let cpu = share("CPU", &[["Shape", "c"], ["MatMul", "e"], ["TopK", "f"], ["MatMul", "g"]]);
        let found = astray(&[cpu], "GPU").unwrap().to_string();
        assert_eq!(found, "GPU has no kernel for 2 MatMul ('e'), 1 TopK ('f'): they would run on the CPU");
    }

    #[test]
    fn the_operators_are_in_order() {
        assert!(ARITHMETIC_ON_LENGTHS.is_sorted());
    }
}
