//! Resident memory is measured. In a file of its own, so that no other test allocates in the same process meanwhile.
#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used)]

use accordion::environment::{current_resident_bytes, peak_resident_bytes, reset_peak_resident};

#[test]
fn the_peak_sees_an_allocation_and_can_be_reset() {
    const BLOCK: u64 = 256 << 20;
    reset_peak_resident().unwrap();
    let before = peak_resident_bytes().unwrap();
    assert!(before < BLOCK, "{before}");

    let block = std::hint::black_box(vec![1_u8; BLOCK as usize]);
    assert!(current_resident_bytes().unwrap() >= BLOCK);
    drop(block);
    assert!(current_resident_bytes().unwrap() < BLOCK);
    let peak = peak_resident_bytes().unwrap();
    assert!((BLOCK..BLOCK + 2 * before).contains(&peak), "{before} then {peak}");

    reset_peak_resident().unwrap();
    assert!(peak_resident_bytes().unwrap() < BLOCK, "the peak was not reset");
}
