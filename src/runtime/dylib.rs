//! Asking a shared library for one symbol.

use std::ffi::{CStr, CString, c_void};
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;
use std::ptr::NonNull;

/// An open shared library; closed when dropped.
#[derive(Debug)]
pub(crate) struct Dylib(NonNull<c_void>);

impl Dylib {
    /// Opens a library by path, or by bare name through the system's search.
    ///
    /// # Errors
    ///
    /// The dynamic linker's own message.
    pub(crate) fn open(path: &Path) -> Result<Dylib, String> {
        let name = CString::new(path.as_os_str().as_bytes()).map_err(|e| e.to_string())?;
        // SAFETY: `name` is a C string that lives over the call. The library's initialisers run: opening is only done
        // for files that are about to be used as libraries anyway.
        let handle = unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
        NonNull::new(handle).map(Dylib).ok_or_else(last_error)
    }

    /// The address of a symbol, valid while the library is open.
    pub(crate) fn symbol(&self, name: &CStr) -> Option<NonNull<c_void>> {
        // SAFETY: the handle is open and `name` is a C string.
        NonNull::new(unsafe { libc::dlsym(self.0.as_ptr(), name.as_ptr()) })
    }
}

impl Drop for Dylib {
    fn drop(&mut self) {
        // SAFETY: the handle came from `dlopen` and is closed once.
        unsafe { libc::dlclose(self.0.as_ptr()) };
    }
}

fn last_error() -> String {
    // SAFETY: the message belongs to this thread and is copied before any other call of the linker's.
    let message = unsafe { libc::dlerror() };
    if message.is_null() {
        return "the dynamic linker gave no reason".to_owned();
    }
    // SAFETY: not null, so a C string, still the linker's latest.
    unsafe { CStr::from_ptr(message) }.to_string_lossy().into_owned()
}
