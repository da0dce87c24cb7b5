//! Cases of `StridedCompress`: inputs whose products are exact, the definition, and what a host does.

use super::host::Host;
use super::numbers::encode;
use crate::cuda::{CublasLt, Element, Refusal, StridedCompress, StridedRows};

/// A call to try.
#[derive(Debug, Clone, Copy)]
pub struct Case {
    /// Segments, S.
    pub segments: usize,
    /// Rows of a window that stay.
    pub groups: usize,
    /// Rows of which one stays.
    pub ratio: usize,
    /// Which one.
    pub offset: usize,
    /// Elements per row, He.
    pub width: usize,
    /// Elements per row of the result, H.
    pub out_width: usize,
    /// Element type.
    pub element: Element,
    /// Whether two inputs are averaged.
    pub mean: bool,
}

/// What a case reads.
#[derive(Debug, Clone)]
pub struct Tensors {
    x: Vec<f32>,
    x2: Vec<f32>,
    weight: Vec<f32>,
}

/// Bytes that a case writes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Compressed {
    /// The rows that stay, `[S W / ratio, He]`.
    pub rows: Vec<u8>,
    /// Their product, `[S W / ratio, H]`; `None` if there is nothing to multiply with.
    pub product: Option<Vec<u8>>,
}

/// Small integers, of which sums of a few thousand products are exact in `float32`.
fn numbers(count: usize, seed: usize) -> Vec<f32> {
    (0..count).map(|i| ((i * 7 + seed * 3 + i / 5) % 9) as f32 - 4.0).collect()
}

impl Case {
    /// The call; addresses are the caller's.
    pub fn rows(&self, [x, x2, y]: [u64; 3]) -> StridedRows {
        StridedRows {
            x,
            x2: if self.mean { x2 } else { 0 },
            y,
            segments: self.segments as i64,
            window: (self.groups * self.ratio) as i64,
            width: self.width as i64,
            ratio: self.ratio as i64,
            offset: self.offset as i64,
            element: self.element,
        }
    }

    /// Its inputs.
    pub fn tensors(&self) -> Tensors {
        let count = self.segments * self.groups * self.ratio * self.width;
        let weight = numbers(self.out_width * self.width, 3);
        Tensors { x: numbers(count, 1), x2: numbers(if self.mean { count } else { 0 }, 2), weight }
    }

    /// What a host makes of them.
    ///
    /// # Errors
    ///
    /// The host refuses.
    pub fn on<H: Host>(&self, host: &H, tensors: &Tensors) -> Result<Compressed, H::Error>
    where
        H::Error: From<Refusal>,
    {
        let kept = self.segments * self.groups;
        let x = host.upload(&encode(&tensors.x, self.element))?;
        let x2 = host.upload(&encode(&tensors.x2, self.element))?;
        let weight = host.upload(&encode(&tensors.weight, self.element))?;
        let rows = host.upload(&vec![0; kept * self.width * self.element.bytes()])?;
        let y = host.upload(&vec![0; kept * self.out_width * self.element.bytes()])?;
        let [x, x2] = [H::address(&x), H::address(&x2)];
        // SAFETY: every tensor has the elements that the lengths say, here and below.
        unsafe { host.strided_rows(&self.rows([x, x2, H::address(&rows)])) }?;
        let call = self.rows([x, x2, H::address(&y)]);
        let workspace_bytes = CublasLt::workspace_bytes(&call)?;
        let workspace = host.upload(&vec![0; workspace_bytes])?;
        let call = StridedCompress {
            rows: call,
            weight: H::address(&weight),
            out_width: self.out_width as i64,
            workspace: H::address(&workspace),
            workspace_bytes,
        };
        // SAFETY: as above.
        let multiplied = unsafe { host.strided_compress(&call) }?;
        let product = if multiplied { Some(host.download(&y)?) } else { None };
        Ok(Compressed { rows: host.download(&rows)?, product })
    }

    /// The definition.
    pub fn expected(&self, tensors: &Tensors) -> Compressed {
        let Tensors { x, x2, weight } = tensors;
        let starts = (0..self.segments * self.groups).map(|k| (k * self.ratio + self.offset) * self.width);
        let kept: Vec<f32> = starts
            .flat_map(|start| start..start + self.width)
            .map(|at| if self.mean { f32::midpoint(x[at], x2[at]) } else { x[at] })
            .collect();
        let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).fold(0.0, |sum, (a, b)| sum + a * b);
        let product: Vec<f32> = kept
            .chunks_exact(self.width)
            .flat_map(|row| weight.chunks_exact(self.width).map(move |column| dot(row, column)))
            .collect();
        Compressed { rows: encode(&kept, self.element), product: Some(encode(&product, self.element)) }
    }
}

impl Compressed {
    /// The first output in which two results differ, and where. What could not be multiplied is not compared.
    pub fn difference(&self, expected: &Compressed) -> Option<String> {
        let differ = |name: &str, found: &[u8], expected: &[u8]| {
            let at = found.iter().zip(expected).position(|(found, expected)| found != expected);
            let lengths = || (found.len() != expected.len()).then(|| format!("{name} has another number of elements"));
            at.map(|at| format!("byte {at} of {name} is {}, expected {}", found[at], expected[at])).or_else(lengths)
        };
        let products = self.product.as_ref().zip(expected.product.as_ref());
        differ("rows", &self.rows, &expected.rows)
            .or_else(|| products.and_then(|(found, expected)| differ("the product", found, expected)))
    }
}

/// A case of small lengths.
pub(super) const SMALL: Case =
    Case { segments: 2, groups: 3, ratio: 4, offset: 3, width: 16, out_width: 8, element: Element::F16, mean: true };

/// What a GPU is tried with: a name and a case each.
pub(super) fn cases() -> Vec<(String, Case)> {
    let mut cases = Vec::new();
    for element in Element::ALL {
        for mean in [false, true] {
            let mut add = |name: &str, [segments, groups, ratio, offset, width, out_width]: [usize; 6]| {
                let name = format!("{name}{}, {}", if mean { ", mean" } else { "" }, element.name());
                cases.push((name, Case { segments, groups, ratio, offset, width, out_width, element, mean }));
            };
            add("RCC, ratio 32", [2, 64, 32, 31, 256, 128]);
            add("one row of each window", [5, 1, 8, 0, 64, 32]);
            add("every row", [1, 100, 1, 0, 128, 64]);
            add("odd widths", [3, 7, 5, 2, 65, 33]);
        }
    }
    cases
}
