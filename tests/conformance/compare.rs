//! What counts as equal, and how a comparison is told.

use accordion::tensor::Tensor;
use accordion::verify::golden::part;
use accordion_graphs::dtype::DType;
use std::fmt;

pub(crate) use accordion::verify::golden::Tensors;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verdict {
    Pass,
    /// Another set of tokens was kept, or another token generated, but only among candidates whose scores the precision
    /// of the golden cannot tell apart. What follows from that choice cannot be compared.
    Ambiguous,
    Fail,
}

/// A distance: absolute, plus a part of the largest finite magnitude in the tensor.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Bound {
    pub(crate) absolute: f32,
    pub(crate) relative: f32,
}

/// The project's bound for single precision.
pub(crate) const SINGLE: Bound = Bound { absolute: 1e-4, relative: 0.0 };

impl Bound {
    pub(crate) fn of(self, tensor: &[f32]) -> f32 {
        let magnitude = tensor.iter().filter(|v| v.is_finite()).fold(0.0_f32, |m, v| m.max(v.abs()));
        self.absolute + self.relative * magnitude
    }
}

/// The outcome of one case on one implementation.
pub(crate) struct Comparison {
    note: &'static str,
    compared: usize,
    in_part: usize,
    worst: f32,
    worst_tensor: String,
    skipped: usize,
    ambiguities: Vec<String>,
    failures: Vec<String>,
}

impl Comparison {
    /// A comparison without a finding; `note` is for the row.
    pub(crate) fn new(note: &'static str) -> Self {
        Self {
            note,
            compared: 0,
            in_part: 0,
            worst: 0.0,
            worst_tensor: "none".into(),
            skipped: 0,
            ambiguities: Vec::new(),
            failures: Vec::new(),
        }
    }

    /// Holds what was found of the golden tensor `name`, or of parts of it, against `expected`.
    pub(crate) fn compare(&mut self, name: &str, expected: &Tensor, found: &Tensors, bound: Bound) {
        self.compared += 1;
        let mut seen = 0;
        for (key, expected, found) in part::pairs(name, expected, found) {
            seen += 1;
            match difference(&expected, found, bound) {
                Ok(error) if error > self.worst => (self.worst, self.worst_tensor) = (error, key.to_owned()),
                Ok(_) => {}
                Err(difference) => self.failures.push(format!("{key}: {difference}")),
            }
        }
        self.in_part += usize::from(seen > 0 && !found.contains_key(name));
        if seen == 0 {
            self.failures.push(format!("{name}: was not computed"));
        }
    }

    /// Leaves a tensor out because it follows from an ambiguous choice.
    pub(crate) fn skip(&mut self) {
        self.skipped += 1;
    }

    /// Notes a choice that fell the other way among equals.
    pub(crate) fn ambiguous(&mut self, finding: String) {
        self.ambiguities.push(finding);
    }

    pub(crate) fn verdict(&self) -> Verdict {
        match (self.failures.is_empty(), self.ambiguities.is_empty()) {
            (false, _) => Verdict::Fail,
            (true, false) => Verdict::Ambiguous,
            (true, true) => Verdict::Pass,
        }
    }

    /// What is worth a line of its own below the row; the first few failures say it all.
    pub(crate) fn findings(&self) -> impl Iterator<Item = &String> {
        self.ambiguities.iter().chain(self.failures.iter().take(6))
    }
}

impl fmt::Display for Comparison {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:>4} tensors, worst error {:.1e} ({})", self.compared, self.worst, self.worst_tensor)?;
        if self.in_part > 0 {
            write!(f, ", {} of them in part", self.in_part)?;
        }
        if self.skipped > 0 {
            write!(f, ", {} not comparable", self.skipped)?;
        }
        f.write_str(self.note)?;
        match self.verdict() {
            Verdict::Pass => f.write_str(": PASS"),
            Verdict::Ambiguous => f.write_str(": AMBIGUOUS"),
            Verdict::Fail => write!(f, ": FAIL ({})", self.failures.len()),
        }
    }
}

/// The largest absolute error, if it is within bounds. Integers and flags have to be equal.
fn difference(expected: &Tensor, found: &Tensor, bound: Bound) -> Result<f32, String> {
    if expected.shape() != found.shape() {
        return Err(format!("shape {:?}, expected {:?}", found.shape(), expected.shape()));
    }
    if let Some(expected) = integers(expected) {
        let found = integers(found).ok_or_else(|| format!("{found:?}, expected integers"))?;
        return match found.iter().zip(&expected).position(|(f, e)| f != e) {
            None => Ok(0.0),
            Some(at) => Err(format!("{} at {at}, expected {}", found[at], expected[at])),
        };
    }
    let (expected, found) = (expected.to_f32(), found.to_f32());
    let bound = bound.of(&expected);
    let mut worst = (0.0, 0);
    for (at, (&e, &f)) in expected.iter().zip(&found).enumerate() {
        // Infinite scores of affix rows are equal, and have no difference.
        let error = if e.to_bits() == f.to_bits() { 0.0 } else { (e - f).abs() };
        if error > worst.0 || error.is_nan() {
            worst = (if error.is_nan() { f32::INFINITY } else { error }, at);
        }
    }
    let (error, at) = worst;
    if error <= bound {
        Ok(error)
    } else {
        Err(format!("{} at {at}, expected {}: off by {error:.2e}, allowed {bound:.2e}", found[at], expected[at]))
    }
}

pub(crate) fn integers(tensor: &Tensor) -> Option<Vec<i64>> {
    match tensor.dtype() {
        DType::I64 => tensor.as_i64().ok().map(<[i64]>::to_vec),
        DType::I32 => tensor.as_i32().ok().map(|values| values.iter().copied().map(i64::from).collect()),
        DType::Bool | DType::U8 => Some(tensor.bytes().iter().copied().map(i64::from).collect()),
        DType::F32 | DType::F16 | DType::Bf16 | DType::F8E4m3 | DType::I8 | DType::I4 => None,
    }
}
