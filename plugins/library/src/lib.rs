//! The operators of `accordion-plugins` as a library that any host of ONNX Runtime can load, whatever language it is written
//! in: `SessionOptions.register_custom_ops_library(path)` in Python, `RegisterCustomOpsLibrary_V2` in C.
//!
//! The library calls the ONNX Runtime that loads it, and looks for no other one.

use std::ffi::{CStr, CString};
use std::panic::catch_unwind;
use std::ptr::null_mut;
use std::sync::{Mutex, PoisonError};

use ort::AsPointer;
use ort::operator::OperatorDomain;
use ort::sys::{ORT_API_VERSION, OrtApi, OrtApiBase, OrtErrorCode, OrtSessionOptions, OrtStatusPtr};

/// Adds the domain `ai.accordion` to `options`: what ONNX Runtime calls in a library of custom operators. Returns null, or a
/// status that says why not and that the caller releases.
///
/// # Safety
///
/// `options` are session options of the runtime that `base` belongs to, and `base` is valid for the rest of the process.
#[unsafe(no_mangle)]
pub unsafe extern "system" fn RegisterCustomOps(
    options: *mut OrtSessionOptions,
    base: *const OrtApiBase,
) -> OrtStatusPtr {
    // SAFETY: passed on from the caller.
    let register = || unsafe { register(options, base) };
    let message = match catch_unwind(register) {
        Ok(Ok(())) => return OrtStatusPtr(null_mut()),
        Ok(Err(message)) => message,
        Err(_) => "the library of ai.accordion panicked".to_owned(),
    };
    // SAFETY: passed on from the caller.
    unsafe { status(base, &message) }
}

/// # Safety
///
/// As [`RegisterCustomOps`].
unsafe fn register(options: *mut OrtSessionOptions, base: *const OrtApiBase) -> Result<(), String> {
    // SAFETY: valid by the caller's promise.
    let api = unsafe { api(base) }?;
    let mut domain = DOMAIN.lock().unwrap_or_else(PoisonError::into_inner);
    if domain.is_none() {
        // False where an earlier call got this far and the domain could not be made: the interface is set already.
        ort::set_api(api.clone());
    }
    if std::ptr::fn_addr_eq(ort::api().AddCustomOpDomain, api.AddCustomOpDomain) {
        let domain = match &*domain {
            Some(domain) => domain,
            None => domain.insert(Domain(accordion_plugins::domain().map_err(|error| error.to_string())?)),
        };
        // SAFETY: the options are the caller's, the domain is never dropped, and the status is freed here.
        let added =
            unsafe { ort::Error::result_from_status((api.AddCustomOpDomain)(options, domain.0.ptr().cast_mut())) };
        return added.map_err(|error| error.to_string());
    }
    Err("the operators of ai.accordion are already in use by another ONNX Runtime of this process".to_owned())
}

/// The interface that the operators are written for.
///
/// # Safety
///
/// As [`RegisterCustomOps`].
unsafe fn api(base: *const OrtApiBase) -> Result<&'static OrtApi, String> {
    // SAFETY: valid by the caller's promise.
    let base = unsafe { base.as_ref() }.ok_or("the host gave no OrtApiBase")?;
    // SAFETY: null where the runtime is older, otherwise valid for the rest of the process.
    let api = unsafe { (base.GetApi)(ORT_API_VERSION).as_ref() };
    api.ok_or_else(|| {
        // SAFETY: the runtime returns a string of its own that ends in zero.
        let version = unsafe { CStr::from_ptr((base.GetVersionString)()) }.to_string_lossy();
        format!("the operators of ai.accordion need ONNX Runtime 1.{ORT_API_VERSION} or newer, this is {version}")
    })
}

/// The operators, which sessions point to as long as they live: they are never dropped.
static DOMAIN: Mutex<Option<Domain>> = Mutex::new(None);

struct Domain(OperatorDomain);

// SAFETY: a domain is a list that is only read once it is complete, and its operators hold nothing that belongs to a thread.
unsafe impl Send for Domain {}

/// A failure that the host can read: the function that makes it is in every version of the interface.
///
/// # Safety
///
/// As [`RegisterCustomOps`].
unsafe fn status(base: *const OrtApiBase, message: &str) -> OrtStatusPtr {
    let message = CString::new(message.replace('\0', " ")).unwrap_or_default();
    // SAFETY: valid by the caller's promise; an interface of the first version is part of every later one.
    unsafe { base.as_ref().and_then(|base| (base.GetApi)(1).as_ref()) }
        // SAFETY: the message is copied.
        .map_or(OrtStatusPtr(null_mut()), |api| unsafe { (api.CreateStatus)(OrtErrorCode::ORT_FAIL, message.as_ptr()) })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use ort::sys::{OrtCustomOpDomain, stub};
    use std::ffi::c_char;
    use std::ptr::null;
    use std::sync::LazyLock;

    static HOST: LazyLock<OrtApi> = LazyLock::new(stub::api);
    /// Another runtime: its functions lie elsewhere.
    static OTHER: LazyLock<OrtApi> = LazyLock::new(|| OrtApi { AddCustomOpDomain: elsewhere, ..stub::api() });

    unsafe extern "system" fn elsewhere(_: *mut OrtSessionOptions, _: *mut OrtCustomOpDomain) -> OrtStatusPtr {
        OrtStatusPtr(null_mut())
    }

    unsafe extern "system" fn version() -> *const c_char {
        c"1.23.2".as_ptr()
    }

    unsafe extern "system" fn host(_: u32) -> *const OrtApi {
        &raw const *HOST
    }

    unsafe extern "system" fn other(_: u32) -> *const OrtApi {
        &raw const *OTHER
    }

    unsafe extern "system" fn old(version: u32) -> *const OrtApi {
        if version < ORT_API_VERSION { &raw const *HOST } else { null() }
    }

    fn refusal(get: unsafe extern "system" fn(u32) -> *const OrtApi) -> String {
        let base = OrtApiBase { GetApi: get, GetVersionString: version };
        // SAFETY: the runtimes here do not look at the options.
        let status = unsafe { RegisterCustomOps(null_mut(), &raw const base) };
        assert!(!status.0.is_null());
        // SAFETY: the stub made it, and it is not used again.
        unsafe { stub::Error::consume_sys(status.0) }.message().to_owned()
    }

    #[test]
    fn a_host_is_told_why_it_cannot_have_the_operators() {
        let too_old = "the operators of ai.accordion need ONNX Runtime 1.24 or newer, this is 1.23.2";
        assert_eq!(refusal(old), too_old);
        // This runtime can make no domain, and says so; the next attempt fails the same way.
        let incapable = refusal(host);
        assert!(incapable.contains("Unimplemented"), "{incapable}");
        assert_eq!(refusal(host), incapable);
        assert!(refusal(other).contains("already in use by another ONNX Runtime"));
    }
}
