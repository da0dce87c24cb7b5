//! Looks for NVIDIA's libraries before `cudarc` does, which ends the program where one is missing or lacks a function.

use crate::runtime::dylib::Dylib;
use std::ffi::CStr;
use std::path::Path;

/// Whether the library that `cudarc` would load as `name` is there, with these functions.
///
/// # Errors
///
/// What is missing, called `title`.
pub(crate) fn require(name: &str, title: &str, functions: &[&CStr]) -> Result<(), String> {
    let candidates = cudarc::get_lib_name_candidates(name);
    let library = candidates.iter().find_map(|name| Dylib::open(Path::new(name)).ok());
    let library = library.ok_or_else(|| format!("no {title} library (lib{name})"))?;
    let missing = functions.iter().find(|function| library.symbol(function).is_none());
    missing.map_or(Ok(()), |function| Err(format!("the {title} library has no {}", function.to_string_lossy())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libraries_and_functions_are_named() {
        // A library that every program here is linked to.
        assert_eq!(require("gcc_s", "unwinding", &[c"_Unwind_Resume"]), Ok(()));
        let expected = Err("the unwinding library has no unwind".to_owned());
        assert_eq!(require("gcc_s", "unwinding", &[c"_Unwind_Resume", c"unwind"]), expected);
        assert_eq!(require("nowhere", "other", &[]), Err("no other library (libnowhere)".to_owned()));
    }
}
