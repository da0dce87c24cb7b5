//! Cases of the kernel that appends a row to every cache: the definition, and what a host does.

use super::host::Host;
use crate::cuda::{AppendRows, AppendedRow, Element, Refusal};

/// A call to try.
#[derive(Debug, Clone, Copy)]
pub struct Case {
    /// Caches.
    pub caches: usize,
    /// Rows that each is appended: batch times key heads.
    pub rows: usize,
    /// Rows that there is room for behind each other.
    pub capacity: usize,
    /// Elements per row.
    pub width: usize,
    /// Element type.
    pub element: Element,
    /// Rows that are there; where there is no such row, nothing is appended.
    pub length: i64,
}

/// The bytes of the rows and of the caches.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tensors(Vec<[Vec<u8>; 2]>);

/// Bytes that differ from one another, and from one `seed` to the next.
fn noise(bytes: usize, seed: usize) -> Vec<u8> {
    (0..bytes).map(|i| ((i + 1) * (2 * seed + 1) * 151 / 8) as u8).collect()
}

impl Case {
    fn row_bytes(&self) -> usize {
        self.width * self.element.bytes()
    }

    /// What it reads and writes, before the call.
    pub fn tensors(&self) -> Tensors {
        let [new, all] = [1, self.capacity].map(|rows| self.rows * rows * self.row_bytes());
        Tensors((0..self.caches).map(|i| [noise(new, 2 * i), noise(all, 2 * i + 1)]).collect())
    }

    /// The same after it: the definition.
    pub fn expected(&self, tensors: &Tensors) -> Tensors {
        let mut after = tensors.clone();
        let Some(at) = usize::try_from(self.length).ok().filter(|&at| at < self.capacity) else { return after };
        let bytes = self.row_bytes();
        for [rows, cache] in &mut after.0 {
            for (row, sequence) in rows.chunks_exact(bytes).zip(cache.chunks_exact_mut(self.capacity * bytes)) {
                sequence[at * bytes..][..bytes].copy_from_slice(row);
            }
        }
        after
    }

    /// The same after a call of a host.
    ///
    /// # Errors
    ///
    /// The host refuses.
    pub fn on<H: Host>(&self, host: &H, tensors: &Tensors) -> Result<Tensors, H::Error>
    where
        H::Error: From<Refusal>,
    {
        let memory = tensors.0.iter().map(|[row, cache]| Ok([host.upload(row)?, host.upload(cache)?]));
        let memory = memory.collect::<Result<Vec<_>, H::Error>>()?;
        let pair = |[row, cache]: &[H::Memory; 2]| AppendedRow { row: H::address(row), cache: H::address(cache) };
        let pairs: Vec<u8> = memory.iter().flat_map(|memory| pair(memory).to_bytes()).collect();
        let (pairs, length) = (host.upload(&pairs)?, host.upload(&self.length.to_ne_bytes())?);
        let call = AppendRows {
            pairs: H::address(&pairs),
            length_at: H::address(&length),
            caches: self.caches as i64,
            rows: self.rows as i64,
            capacity: self.capacity as i64,
            width: self.width as i64,
            element: self.element,
        };
        // SAFETY: every tensor has the elements that the lengths say.
        unsafe { host.append_rows(&call) }?;
        let after = memory.iter().map(|[row, cache]| Ok([host.download(row)?, host.download(cache)?]));
        after.collect::<Result<_, H::Error>>().map(Tensors)
    }
}

impl Tensors {
    /// The first tensor in which two results differ, and where.
    pub fn difference(&self, expected: &Tensors) -> Option<String> {
        let all = self.0.iter().zip(&expected.0).enumerate();
        let mut differences = all.flat_map(|(i, (found, expected))| {
            let of = move |which: usize, name: &str| {
                let (found, expected) = (&found[which], &expected[which]);
                let at = found.iter().zip(expected).position(|(found, expected)| found != expected)?;
                Some(format!("byte {at} of {name} {i} is {}, expected {}", found[at], expected[at]))
            };
            [of(0, "row"), of(1, "cache")]
        });
        differences.find_map(|difference| difference)
    }
}

/// A case of small lengths.
pub(super) const SMALL: Case = Case { caches: 4, rows: 2, capacity: 5, width: 16, element: Element::F16, length: 3 };

/// What a GPU is tried with: a name and a case each.
pub(super) fn cases() -> Vec<(String, Case)> {
    let mut cases = Vec::new();
    for element in Element::ALL {
        let mut add = |name: &str, [caches, rows, capacity, width]: [usize; 4], length: i64| {
            cases
                .push((format!("{name}, {}", element.name()), Case { caches, rows, capacity, width, element, length }));
        };
        add("SmolLM2", [60, 3, 128, 64], 100);
        add("7B", [64, 32, 64, 128], 63);
        add("the first row", [4, 2, 8, 80], 0);
        add("odd widths", [3, 5, 7, 13], 4);
        add("no room", [4, 2, 8, 64], 8);
    }
    cases
}
