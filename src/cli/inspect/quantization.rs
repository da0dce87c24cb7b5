//! What of a bundle is in which numbers: how many matrices in every form, what they take, and what stays as it is and why.

use crate::cli::text::{bytes, grouped, table};
use accordion::bundle::Bundle;
use accordion::precision::{Basis, Quantization, RangesUsed};
use accordion_graphs::dtype::DType;
use accordion_graphs::precision::MatrixForm;
use serde::Serialize;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;

/// Reasons that are spelled out; the others are counted.
const REASONS: usize = 12;

/// What a bundle says of its precision.
#[derive(Serialize)]
pub(super) struct Forms<'b> {
    /// The forms of matrices, and the tensors that have none.
    numbers: Vec<Form>,
    /// What is not quantized or not rounded, and why.
    kept: &'b BTreeMap<String, String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    ranges: Option<&'b RangesUsed>,
    #[serde(skip_serializing_if = "Option::is_none")]
    rounding: Option<Rounded>,
}

#[derive(Serialize)]
struct Form {
    name: String,
    /// Matrices in it, or tensors.
    count: usize,
    /// What they take, scales and factors included.
    bytes: u64,
}

/// How graphs compute in 16 bits.
#[derive(Serialize)]
struct Rounded {
    format: DType,
    emulated: bool,
    decided_by: Basis,
}

impl<'b> Forms<'b> {
    pub(super) fn of(bundle: &Bundle, quantization: &'b Quantization) -> Self {
        let index = bundle.weights().index();
        let mut forms: BTreeMap<String, (usize, u64)> = BTreeMap::new();
        let mut parts: BTreeSet<String> = BTreeSet::new();
        for (matrix, &form) in &quantization.matrices {
            // The shapes decide nothing of the names.
            let names = form.parts([1, 1]).into_iter().map(|(part, ..)| form.part_name(matrix, part));
            let (count, size) = forms.entry(named(form)).or_default();
            *count += 1;
            for name in names {
                *size += index.get(&name).map_or(0, |weight| weight.len);
                parts.insert(name);
            }
        }
        let mut others: BTreeMap<String, (usize, u64)> = BTreeMap::new();
        for (_, weight) in index.stored().filter(|(name, _)| !parts.contains(*name)) {
            let (count, size) = others.entry(format!("tensors in {}", weight.dtype)).or_default();
            *count += 1;
            *size += weight.len;
        }
        let listed = |(name, (count, bytes))| Form { name, count, bytes };
        Self {
            numbers: forms.into_iter().chain(others).map(listed).collect(),
            kept: &quantization.kept,
            ranges: quantization.ranges.as_ref(),
            rounding: quantization.rounding.as_ref().map(|rounding| Rounded {
                format: rounding.format,
                emulated: rounding.emulated,
                decided_by: rounding.decided_by,
            }),
        }
    }

    pub(super) fn in_words(&self) -> String {
        let rows: Vec<[String; 3]> = self
            .numbers
            .iter()
            .map(|Form { name, count, bytes: size }| [format!("  {name}"), grouped(*count as u64), bytes(*size)])
            .collect();
        let mut text = table(["  numbers", ">matrices or tensors", ">bytes"], &rows);
        if let Some(Rounded { format, emulated, decided_by }) = &self.rounding {
            let how = if *emulated { format!("fp32 that is rounded to {format}") } else { format.to_string() };
            let by = match decided_by {
                Basis::Rules => "by rules",
                Basis::RulesAndRanges => "by rules and measured ranges",
            };
            // Writing into a string cannot fail.
            let _ = writeln!(text, "  graphs compute in {how}; what stays in fp32 is decided {by}");
        }
        if let Some(RangesUsed { sha256, calibrator, windows }) = self.ranges {
            let short = sha256.get(..12).unwrap_or(sha256);
            let _ = writeln!(text, "  ranges of {windows} windows, clipped by {calibrator}, table {short}");
        }
        text.push_str(&self.reasons());
        text
    }

    /// What is kept, by reason.
    fn reasons(&self) -> String {
        let mut reasons: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
        for (what, why) in self.kept {
            reasons.entry(why).or_default().push(what);
        }
        let mut listed: Vec<(&str, Vec<&str>)> = reasons.into_iter().collect();
        listed.sort_by_key(|(_, what)| std::cmp::Reverse(what.len()));
        let left = listed.split_off(listed.len().min(REASONS));
        let rows: Vec<[String; 3]> = listed
            .into_iter()
            .map(|(why, what)| {
                let example = what.first().copied().unwrap_or_default();
                let more = if what.len() > 1 { ", ..." } else { "" };
                [format!("  {}", grouped(what.len() as u64)), why.to_owned(), format!("{example}{more}")]
            })
            .collect();
        let mut text = if rows.is_empty() { String::new() } else { table(["  kept", "because", "which"], &rows) };
        if !left.is_empty() {
            let count: usize = left.iter().map(|(_, what)| what.len()).sum();
            let _ = writeln!(text, "  and {count} more for {} other reasons; --json lists all", left.len());
        }
        text
    }
}

fn named(form: MatrixForm) -> String {
    let smoothed = |smoothed| if smoothed { ", smoothed" } else { "" };
    match form {
        MatrixForm::Int8 { smoothed: by } => format!("8-bit rows, 8-bit activations of one scale{}", smoothed(by)),
        MatrixForm::Int8PerToken { smoothed: by } => {
            format!("8-bit rows, 8-bit activations of a scale per row{}", smoothed(by))
        }
        MatrixForm::Block { bits, block } => format!("{bits}-bit blocks of {block}, activations as they are"),
        MatrixForm::Fp8 => "8-bit floats, 8-bit float activations of one scale".to_owned(),
    }
}
