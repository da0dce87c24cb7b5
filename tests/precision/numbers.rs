//! The numbers of quantized matrices and of their activations beside the checkpoint and the range table that they come from:
//! every entry is the nearest number of steps. And faults in what a bundle stores that this has to find.

use super::QUANTIZED;
use super::subject::{Subject, one_of_each};
use accordion::bundle::Bundle;
use accordion::precision::Recipe;
use accordion_calibration::ranges::RangeTable;
use accordion_graphs::blocks::Target;
use accordion_graphs::precision::{MatrixForm, MatrixPart};

/// A matrix as a bundle stores it.
#[derive(Clone)]
struct Stored {
    form: MatrixForm,
    /// Of the checkpoint.
    numbers: Vec<f32>,
    entries: Vec<f32>,
    /// Of equally long pieces of the entries, one after the other.
    scale: Vec<f32>,
    columns: usize,
    /// The largest magnitude that activations are rounded to, and the largest that the table has seen.
    reach: Option<[f32; 2]>,
}

impl Stored {
    fn of(bundle: &Bundle, subject: &Subject, table: Option<&RangeTable>, name: &str, form: MatrixForm) -> Self {
        let part = |part| bundle.weights().tensor(&form.part_name(name, part)).unwrap().to_f32();
        let original = subject.checkpoint().tensor(name).unwrap();
        let columns = original.shape()[1];
        let levels = if form == MatrixForm::Fp8 { 448.0 } else { 127.0 };
        let seen = |table: &RangeTable| table.expect_site(name, columns).unwrap().absmax();
        let reach = matches!(form, MatrixForm::Int8 { .. } | MatrixForm::Fp8)
            .then(|| [part(MatrixPart::InputScale)[0] * levels, seen(table.unwrap())]);
        let (entries, scale) = (part(MatrixPart::Entries), part(MatrixPart::Scale));
        Self { form, numbers: original.to_f32(), entries, scale, columns, reach }
    }

    /// How far a number may be from the entry that stands for it, in steps; nothing beyond the last entry on its side.
    fn allowed(&self, entry: f32) -> f32 {
        // Single precision may divide to either side of the middle between two entries.
        1.0001
            * match self.form {
                MatrixForm::Block { bits: 4, .. } if [-8.0, 7.0].contains(&entry) => f32::INFINITY,
                // Four bits of mantissa, of which the first is not stored.
                MatrixForm::Fp8 => (entry.abs() / 16.0).max(2_f32.powi(-10)),
                _ => 0.5,
            }
    }

    fn is_right(&self) -> bool {
        let piece = self.entries.len() / self.scale.len();
        let mut pieces = self.entries.chunks(piece).zip(self.numbers.chunks(piece)).zip(&self.scale);
        let near = pieces.all(|((entries, numbers), scale)| {
            let mut pairs = entries.iter().zip(numbers);
            pairs.all(|(&entry, number)| (number / scale - entry).abs() <= self.allowed(entry))
        });
        near && self.reach.is_none_or(|[found, expected]| (found / expected - 1.0).abs() < 1e-5)
    }
}

/// `numbers`, in rows of `columns`, column by column.
fn transposed(numbers: &[f32], columns: usize) -> Vec<f32> {
    let rows = numbers.len() / columns;
    (0..numbers.len()).map(|i| numbers[i % rows * columns + i / rows]).collect()
}

/// Changes what a matrix is stored as; not at all where the matrix cannot have the fault.
type Fault = fn(&mut Stored);

const FAULTS: [(&str, Fault); 4] = [
    ("all scales are off by 2 %", |stored| stored.scale.iter_mut().for_each(|scale| *scale *= 1.02)),
    ("a zero point is missing", |stored| stored.entries.iter_mut().for_each(|entry| *entry += 1.0)),
    ("the channel axis is transposed", |stored| stored.entries = transposed(&stored.entries, stored.columns)),
    ("the scale of activations is off by 2 %", |stored| {
        if let Some([found, _]) = &mut stored.reach {
            *found *= 1.02;
        }
    }),
];

#[test]
fn stored_numbers_are_the_nearest_and_faults_in_them_show() {
    for subject in one_of_each() {
        for precision in QUANTIZED {
            // Smoothed activations have another range, and smoothed matrices other numbers.
            let recipe = Recipe { smooth: false, ..subject.recipe(precision) };
            let table = recipe.ranges.as_ref().map(|path| RangeTable::load(path).unwrap());
            let bundle = subject.exported(recipe, Target::Portable);
            for (name, &form) in &bundle.manifest().quantization.as_ref().unwrap().matrices {
                let row = format!("{} {precision}: {name}", subject.name);
                let stored = Stored::of(&bundle, &subject, table.as_ref(), name, form);
                assert!(stored.is_right(), "{row}");
                for (fault, plant) in FAULTS {
                    let mut faulty = stored.clone();
                    plant(&mut faulty);
                    let has = faulty.entries != stored.entries
                        || faulty.scale != stored.scale
                        || faulty.reach != stored.reach;
                    assert!(!has || !faulty.is_right(), "{row}: {fault}, and nobody sees it");
                }
            }
        }
    }
}
