//! `AppendRows`: a row behind those of every cache, and nothing else written.

use crate::guarded::Guarded;
use crate::library::kernels;
use accordion::cuda::{AppendRows, AppendedRow, Element};
use proptest::prelude::*;

#[derive(Debug, Clone)]
struct Case {
    caches: usize,
    rows: usize,
    capacity: usize,
    width: usize,
    element: Element,
    length: i64,
}

/// Bytes that differ from one another, and from one `seed` to the next.
fn noise(bytes: usize, seed: usize) -> Vec<u8> {
    (0..bytes).map(|i| ((i + 1) * (2 * seed + 1) * 151 / 8) as u8).collect()
}

impl Case {
    fn expected(&self, row: &[u8], cache: &[u8]) -> Vec<u8> {
        let row_bytes = self.width * self.element.bytes();
        let mut cache = cache.to_vec();
        let Some(at) = usize::try_from(self.length).ok().filter(|&at| at < self.capacity) else { return cache };
        for r in 0..self.rows {
            let to = (r * self.capacity + at) * row_bytes;
            cache[to..to + row_bytes].copy_from_slice(&row[r * row_bytes..(r + 1) * row_bytes]);
        }
        cache
    }

    fn check(&self) {
        let row_bytes = self.width * self.element.bytes();
        let [new, all] = [self.rows * row_bytes, self.rows * self.capacity * row_bytes];
        let content: Vec<[Vec<u8>; 2]> = (0..self.caches).map(|i| [noise(new, 2 * i), noise(all, 2 * i + 1)]).collect();
        let memory: Vec<[Guarded; 2]> =
            content.iter().map(|pair| pair.each_ref().map(|bytes| Guarded::of(bytes))).collect();
        let pairs: Vec<u8> = memory
            .iter()
            .flat_map(|[row, cache]| AppendedRow { row: row.address(), cache: cache.address() }.to_bytes())
            .collect();
        let (pairs, length) = (Guarded::of(&pairs), Guarded::of(&self.length.to_ne_bytes()));
        let call = AppendRows {
            pairs: pairs.address(),
            length_at: length.address(),
            caches: self.caches as i64,
            rows: self.rows as i64,
            capacity: self.capacity as i64,
            width: self.width as i64,
            element: self.element,
        };
        assert_eq!(call.launch().unwrap().is_some(), self.caches * all > 0);
        // SAFETY: all of it is there.
        unsafe { kernels().append_rows(&call) }.unwrap();
        for (i, ([row, cache], [memory_row, memory_cache])) in content.iter().zip(&memory).enumerate() {
            assert!(memory_row.read() == *row, "{self:?}: row {i} was written");
            assert!(memory_cache.read() == self.expected(row, cache), "{self:?}: cache {i}");
        }
    }
}

fn any_case() -> impl Strategy<Value = Case> {
    let element = prop::sample::select(Element::ALL.as_slice());
    let width = prop_oneof![1_usize..20, prop::sample::select(vec![64_usize, 80, 128])];
    (0_usize..5, 0_usize..9, 0_usize..7, width, element, -2_i64..9).prop_map(
        |(caches, rows, capacity, width, element, length)| Case { caches, rows, capacity, width, element, length },
    )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    #[test]
    #[ignore = "needs a C++ compiler"]
    fn rows_are_appended_where_the_device_says(case in any_case()) {
        case.check();
    }
}

/// More than a block, and more than all blocks of a grid at once.
#[test]
#[ignore = "needs a C++ compiler"]
fn long_rows() {
    for (rows, width) in [(3, 5001), (64, 256), (1, 70_000), (20_000, 2)] {
        Case { caches: 2, rows, capacity: 3, width, element: Element::F16, length: 2 }.check();
    }
}

/// A length far outside leads nowhere.
#[test]
#[ignore = "needs a C++ compiler"]
fn lengths_outside_append_nothing() {
    for length in [i64::MIN, i64::MAX, -1, 4, 1 << 32] {
        Case { caches: 2, rows: 2, capacity: 4, width: 8, element: Element::F32, length }.check();
    }
}

/// The Rust side and the C side refuse the same calls.
#[test]
#[ignore = "needs a C++ compiler"]
fn what_is_refused() {
    let fine = AppendRows { caches: 0, rows: 2, capacity: 4, width: 8, ..AppendRows::default() };
    let refused: [&dyn Fn(&mut AppendRows); 7] = [
        &|c| c.caches = -1,
        &|c| c.rows = -1,
        &|c| c.rows = 1 << 31,
        &|c| c.capacity = -1,
        &|c| c.width = 1 << 40,
        &|c| (c.rows, c.capacity, c.width) = (1 << 30, 1 << 30, 4),
        &|c| c.caches = 1,
    ];
    assert_eq!(fine.launch(), Ok(None));
    // SAFETY: nothing is launched.
    unsafe { kernels().append_rows(&fine) }.unwrap();
    for (i, change) in refused.into_iter().enumerate() {
        let mut call = fine;
        change(&mut call);
        // SAFETY: nothing is launched.
        let there = unsafe { kernels().append_rows(&call) };
        assert!(call.launch().is_err() && there.is_err(), "{i}: {there:?}");
    }
}
