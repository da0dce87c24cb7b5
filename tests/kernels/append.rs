//! `AppendRows`: a row behind those of every cache, and nothing else written.

use crate::library::{Emulator, kernels};
use accordion::cuda::{AppendRows, Element};
use accordion::selftest::append::Case;
use proptest::prelude::*;

fn check(case: &Case) {
    let tensors = case.tensors();
    let found = case.on(&Emulator, &tensors).unwrap();
    assert_eq!(found.difference(&case.expected(&tensors)), None, "{case:?}");
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
        check(&case);
    }
}

/// More than a block, and more than all blocks of a grid at once.
#[test]
#[ignore = "needs a C++ compiler"]
fn long_rows() {
    for (rows, width) in [(3, 5001), (64, 256), (1, 70_000), (20_000, 2)] {
        check(&Case { caches: 2, rows, capacity: 3, width, element: Element::F16, length: 2 });
    }
}

/// A length far outside leads nowhere.
#[test]
#[ignore = "needs a C++ compiler"]
fn lengths_outside_append_nothing() {
    for length in [i64::MIN, i64::MAX, -1, 4, 1 << 32] {
        check(&Case { caches: 2, rows: 2, capacity: 4, width: 8, element: Element::F32, length });
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
