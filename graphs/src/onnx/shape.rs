//! Symbolic shapes.

use std::fmt;
use std::ops::{Add, Mul};
use std::rc::Rc;

/// One dimension: a number, or a name for a number known at run time.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Dim {
    /// Known when the graph is built.
    Known(usize),
    /// Known at run time; equal names are equal numbers.
    Symbol(Rc<str>),
}

impl From<usize> for Dim {
    fn from(n: usize) -> Self {
        Self::Known(n)
    }
}

impl From<&str> for Dim {
    fn from(name: &str) -> Self {
        Self::Symbol(name.into())
    }
}

impl fmt::Display for Dim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Known(n) => write!(f, "{n}"),
            Self::Symbol(name) => f.write_str(name),
        }
    }
}

impl Add for &Dim {
    type Output = Dim;

    fn add(self, other: &Dim) -> Dim {
        match (self, other) {
            (Dim::Known(a), Dim::Known(b)) => Dim::Known(a + b),
            (Dim::Known(0), d) | (d, Dim::Known(0)) => d.clone(),
            (a, b) => Dim::Symbol(format!("{a} + {b}").into()),
        }
    }
}

impl Mul for &Dim {
    type Output = Dim;

    fn mul(self, other: &Dim) -> Dim {
        product(&[self.clone(), other.clone()])
    }
}

/// The product of dimensions that are flattened into one.
pub(crate) fn product(dims: &[Dim]) -> Dim {
    let known: usize = dims.iter().filter_map(|d| if let Dim::Known(n) = d { Some(*n) } else { None }).product();
    let symbols: Vec<String> = dims
        .iter()
        .filter_map(|d| match d {
            Dim::Symbol(sum) if sum.contains(" + ") => Some(format!("({sum})")),
            Dim::Symbol(name) => Some(name.to_string()),
            Dim::Known(_) => None,
        })
        .collect();
    match (known, symbols.as_slice()) {
        (_, []) => Dim::Known(known),
        (1, _) => Dim::Symbol(symbols.join(" * ").into()),
        _ => Dim::Symbol(format!("{known} * {}", symbols.join(" * ")).into()),
    }
}

/// Numpy broadcasting of two shapes, or `None` where they do not fit.
pub(crate) fn broadcast(a: &[Dim], b: &[Dim]) -> Option<Vec<Dim>> {
    let rank = a.len().max(b.len());
    let at = |s: &[Dim], i: usize| if i + s.len() < rank { Dim::Known(1) } else { s[i + s.len() - rank].clone() };
    (0..rank)
        .map(|i| match (at(a, i), at(b, i)) {
            (x, y) if x == y => Some(x),
            (Dim::Known(1), d) | (d, Dim::Known(1)) => Some(d),
            _ => None,
        })
        .collect()
}

/// `[batch, sequence, 64]`, for messages.
pub(crate) fn display(shape: &[Dim]) -> String {
    let dims: Vec<String> = shape.iter().map(ToString::to_string).collect();
    format!("[{}]", dims.join(", "))
}
