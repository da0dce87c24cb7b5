//! `accordion selftest`, where there is no GPU.

use crate::program::{Run, accordion, command};
use accordion::environment::driver_library;

#[test]
fn help_says_what_it_needs() {
    let help = accordion(["selftest", "gpu", "--help"]).output();
    for part in ["--device", "--kernels", "--no-times", "cuBLASLt", "--methods", "--shape", "--budget", "CUDA provider"]
    {
        assert!(help.contains(part), "{part}: {help}");
    }
}

#[test]
fn without_a_driver_it_says_what_is_missing() {
    // A machine that has one has other reasons to refuse, or none.
    if driver_library().is_ok() {
        return;
    }
    for more in [&[][..], &["--kernels", "/nowhere"], &["--json", "--no-times", "--device", "7"]] {
        let error = Run::of(command().args(["selftest", "gpu", "--quiet"]).args(more)).error();
        assert!(error.contains("no NVIDIA driver library (libcuda)"), "{error}");
        assert!(error.contains("release 580 or later"), "{error}");
    }
}
