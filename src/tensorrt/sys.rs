//! The interface of `plugins/tensorrt/shim.h`, name for name.

use std::ffi::{c_char, c_void};

#[repr(C)]
pub(super) struct TensorRt {
    _opaque: [u8; 0],
}

#[repr(C)]
pub(super) struct Range {
    pub(super) name: *const c_char,
    pub(super) count: i32,
    pub(super) min: *const i64,
    pub(super) opt: *const i64,
    pub(super) max: *const i64,
}

#[repr(C)]
pub(super) struct Profile {
    pub(super) shapes: *const Range,
    pub(super) num_shapes: usize,
    pub(super) values: *const Range,
    pub(super) num_values: usize,
}

#[repr(C)]
pub(super) struct Request {
    pub(super) model: *const c_void,
    pub(super) model_bytes: usize,
    pub(super) model_path: *const c_char,
    pub(super) profiles: *const Profile,
    pub(super) num_profiles: usize,
    pub(super) timing_cache: *const c_void,
    pub(super) timing_cache_bytes: usize,
    pub(super) workspace_bytes: usize,
    pub(super) allow_tf32: i32,
}

#[repr(C)]
pub(super) struct Observer {
    pub(super) user: *mut c_void,
    pub(super) log: Option<unsafe extern "C" fn(*mut c_void, i32, *const c_char)>,
    pub(super) progress: Option<unsafe extern "C" fn(*mut c_void, *const c_char, i32, i32) -> i32>,
}

#[repr(C)]
pub(super) struct Bytes {
    pub(super) data: *mut c_void,
    pub(super) size: usize,
}

pub(super) type Open =
    unsafe extern "C" fn(*const c_char, *const c_char, *mut *mut TensorRt, *mut c_char, usize) -> i32;
pub(super) type Versions = unsafe extern "C" fn(*const TensorRt, *mut i32, *mut i32);
pub(super) type LoadPlugins = unsafe extern "C" fn(*mut TensorRt, *const c_char, *mut c_char, usize) -> i32;
pub(super) type Build =
    unsafe extern "C" fn(*mut TensorRt, *const Request, Observer, *mut Bytes, *mut Bytes, *mut c_char, usize) -> i32;
pub(super) type Free = unsafe extern "C" fn(Bytes);
pub(super) type Close = unsafe extern "C" fn(*mut TensorRt);

/// Most dimensions of an input or output.
pub(super) const MAX_RANK: usize = 8;

#[repr(C)]
pub(super) struct Engine {
    _opaque: [u8; 0],
}

#[repr(C)]
pub(super) struct Context {
    _opaque: [u8; 0],
}

#[repr(C)]
pub(super) struct Tensor {
    pub(super) name: *const c_char,
    pub(super) is_input: i32,
    pub(super) on_host: i32,
    pub(super) type_: i32,
    pub(super) is_linear: i32,
    pub(super) rank: i32,
    pub(super) shape: [i64; MAX_RANK],
}

pub(super) type EngineOpen = unsafe extern "C" fn(
    *mut TensorRt,
    *const c_void,
    usize,
    Observer,
    *mut *mut Engine,
    *mut i32,
    *mut i32,
    *mut c_char,
    usize,
) -> i32;
pub(super) type EngineTensor = unsafe extern "C" fn(*mut Engine, i32, *mut Tensor, *mut c_char, usize) -> i32;
pub(super) type EngineClose = unsafe extern "C" fn(*mut Engine);
pub(super) type ContextOpen =
    unsafe extern "C" fn(*mut Engine, i32, *mut c_void, *mut *mut Context, *mut i64, *mut c_char, usize) -> i32;
pub(super) type SetMemory = unsafe extern "C" fn(*mut Context, *mut c_void, i64);
pub(super) type SetShape =
    unsafe extern "C" fn(*mut Context, *const c_char, *const i64, i32, *mut c_char, usize) -> i32;
pub(super) type SetAddress = unsafe extern "C" fn(*mut Context, *const c_char, *mut c_void, *mut c_char, usize) -> i32;
pub(super) type InferShapes = unsafe extern "C" fn(*mut Context, *mut c_char, usize) -> i32;
pub(super) type Shape =
    unsafe extern "C" fn(*mut Context, *const c_char, *mut i64, *mut i32, *mut c_char, usize) -> i32;
pub(super) type Enqueue = unsafe extern "C" fn(*mut Context, *mut c_void, *mut c_char, usize) -> i32;
pub(super) type MeasureLayers = unsafe extern "C" fn(*mut Context);
pub(super) type LayerTimes =
    unsafe extern "C" fn(*mut Context, *mut c_void, unsafe extern "C" fn(*mut c_void, *const c_char, f32));
pub(super) type EngineLayers = unsafe extern "C" fn(*mut Engine, *mut Bytes, *mut c_char, usize) -> i32;
pub(super) type ContextClose = unsafe extern "C" fn(*mut Context);
