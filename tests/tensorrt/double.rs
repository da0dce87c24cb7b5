//! An emulated driver and a double of the shim: engines of any bundle, which compute on the CPU what ONNX Runtime does.

use super::host_steps::{Manner, Stepping};
use accordion::bundle::Bundle;
use accordion::cuda::{Device, Origin};
use accordion::pipeline::Engines;
use accordion::runtime::locate::{LoadOptions, LoadedRuntime, load};
use accordion::runtime::ort_cpu::{OrtCpu, OrtOptions};
use accordion::runtime::{Engine, Loader};
use accordion::tensor::Tensor;
use accordion::tensorrt::engines::{Engines as EnginesFolder, EnginesWriter, Record};
use accordion::tensorrt::ranges::{Workload, profiles};
use accordion::tensorrt::shim::Shim;
use accordion::tensorrt::toolkit::Toolkit;
use accordion::tensorrt::{BuiltProfile, ExecutionOptions, Flavour, TensorRt, TensorRtError};
use accordion_graphs::dtype::DType;
use accordion_graphs::onnx::{ValueInfo, tap_outputs};
use std::collections::{BTreeMap, HashMap};
use std::ffi::{CStr, CString, OsStr, c_char, c_void};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

/// The version that the double says it is.
pub(crate) const VERSION: &str = "11.4.0";
/// Inputs that the double reads on the host.
const ON_HOST: [&str; 7] =
    ["keep", "prefix_length", "suffix_length", "num_logits_to_keep", "first_chunk", "num_chunks", "query_index"];

/// Compiles a library of this folder: aside and renamed, because another process may use it.
fn compile(name: &str, source: &str, more: &[&OsStr]) -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("tensorrt-{}", source.replace('/', "-")));
    std::fs::create_dir_all(&folder).unwrap();
    let library = tempfile::NamedTempFile::new_in(&folder).unwrap().into_temp_path();
    let compiler = std::env::var_os("CXX").unwrap_or_else(|| "c++".into());
    let output = Command::new(&compiler)
        .args(["-std=c++17", "-O1", "-fPIC", "-shared", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-I"])
        .arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("plugins/cuda"))
        .arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/tensorrt").join(source))
        .arg(format!("-Wl,-Bsymbolic,-soname,{name}"))
        .args(more)
        .arg("-o")
        .arg::<&Path>(&library)
        .arg("-ldl")
        .output()
        .unwrap_or_else(|error| panic!("{}: {error}", compiler.display()));
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let path = folder.join(name);
    library.persist(&path).unwrap();
    path
}

pub(crate) fn driver() -> &'static Path {
    static DRIVER: OnceLock<PathBuf> = OnceLock::new();
    DRIVER.get_or_init(|| compile("libcuda.so", "driver.cpp", &[]))
}

pub(crate) fn shim() -> &'static Path {
    static SHIM: OnceLock<PathBuf> = OnceLock::new();
    SHIM.get_or_init(|| compile("libaccordion_shim.so", "double.cpp", &[]))
}

/// NVIDIA's library as far as the shim calls it, and the shim, both compiled with NVIDIA's headers.
pub(crate) fn nvidia(headers: &Path) -> &'static [PathBuf; 2] {
    static LIBRARIES: OnceLock<[PathBuf; 2]> = OnceLock::new();
    LIBRARIES.get_or_init(|| {
        let unused = tempfile::tempdir().unwrap();
        let classes = std::fs::read_to_string(headers.join("NvInferImpl.h")).unwrap();
        let unused_h = ["Runtime", "CudaEngine", "ExecutionContext", "EngineInspector"]
            .map(|class| unused_functions(&classes, class));
        std::fs::write(unused.path().join("unused.h"), unused_h.concat()).unwrap();
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("plugins/tensorrt");
        let includes: [&OsStr; 7] = [
            "-isystem".as_ref(),
            headers.as_ref(),
            "-I".as_ref(),
            root.as_ref(),
            "-I".as_ref(),
            unused.path().as_ref(),
            "-Wno-deprecated-declarations".as_ref(),
        ];
        let library = compile("libnvinfer.so.11", "nvinfer.cpp", &includes);
        [library, compile("libaccordion_shim.so", "../../plugins/tensorrt/shim.cpp", &includes)]
    })
}

/// A class whose functions are all those that `V<class>` in NVIDIA's header wants, and end the process.
fn unused_functions(header: &str, class: &str) -> String {
    let (_, body) = header.split_once(&format!("class V{class} : public VRoot")).unwrap();
    let (body, _) = body.split_once("\n};").unwrap();
    let code: String = body.lines().map(|line| line.split("//").next().unwrap_or_default().to_owned() + " ").collect();
    let functions = code.split(';').filter_map(|declaration| declaration.trim_end().strip_suffix("= 0"));
    let functions = functions.filter_map(|declaration| Some(declaration.split_once("virtual")?.1.to_owned()));
    let stubs: Vec<String> = functions.map(|function| format!("{function} override {{ unexpected(); }}\n")).collect();
    let stubs = stubs.concat();
    format!(
        "namespace nvinfer1 {{ struct Unused{class} : apiv::V{class} {{\n{stubs}}}; }}\nusing nvinfer1::Unused{class};\n"
    )
}

/// A function of a library that stays open, and whose symbols others find.
fn function<F: Copy>(library: &Path, name: &CStr) -> F {
    let path = CString::new(library.to_str().unwrap()).unwrap();
    // SAFETY: libraries of these tests, which are never closed.
    let symbol = unsafe {
        let handle = libc::dlopen(path.as_ptr(), libc::RTLD_NOW | libc::RTLD_GLOBAL);
        assert!(!handle.is_null());
        libc::dlsym(handle, name.as_ptr())
    };
    assert!(!symbol.is_null(), "{name:?}");
    assert_eq!(size_of::<F>(), size_of::<*mut c_void>());
    // SAFETY: the type is the declaration's.
    unsafe { std::mem::transmute_copy(&symbol) }
}

/// The emulated device and the double, for one test at a time: what they count is everybody's.
pub(crate) struct Machine {
    _turn: MutexGuard<'static, ()>,
    device: Device,
    counts: unsafe extern "C" fn(*mut Counts),
    live: unsafe extern "C" fn() -> u64,
    pending: unsafe extern "C" fn() -> i32,
    set_unrecordable: unsafe extern "C" fn(bool),
    kernels: tempfile::TempDir,
}

/// Tells a library with the double in it whom to ask.
fn register(library: &Path) {
    let register: unsafe extern "C" fn(*const Callbacks) = function(library, c"accordion_double_register");
    // SAFETY: the functions are copied.
    unsafe { register(&raw const CALLBACKS) };
}

/// What was done, as `driver.cpp` counts it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[repr(C)]
pub(crate) struct Counts {
    /// Bytes copied.
    pub(crate) to_device: u64,
    pub(crate) to_host: u64,
    pub(crate) on_device: u64,
    /// Buffers taken.
    pub(crate) taken: u64,
    /// What was put on the stream by itself: calls of engines, kernels, graphs.
    pub(crate) calls: u64,
    pub(crate) kernels: u64,
    pub(crate) graphs: u64,
    /// Graphs that were recorded.
    pub(crate) records: u64,
}

impl std::ops::Sub for Counts {
    type Output = Self;

    fn sub(self, before: Self) -> Self {
        Self {
            to_device: self.to_device - before.to_device,
            to_host: self.to_host - before.to_host,
            on_device: self.on_device - before.on_device,
            taken: self.taken - before.taken,
            calls: self.calls - before.calls,
            kernels: self.kernels - before.kernels,
            graphs: self.graphs - before.graphs,
            records: self.records - before.records,
        }
    }
}

impl Machine {
    pub(crate) fn open() -> Self {
        static TURN: Mutex<()> = Mutex::new(());
        let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        let counts = function(driver(), c"emulated_driver_counts");
        let live = function(driver(), c"emulated_driver_live");
        let set_unrecordable = function(driver(), c"emulated_driver_set_unrecordable");
        register(shim());
        let pending = function(driver(), c"emulated_driver_pending");
        let kernels = tempfile::tempdir().unwrap();
        // As far as the driver looks.
        std::fs::write(kernels.path().join("append_rows.sm_90.cubin"), b"\x7fELF").unwrap();
        let machine =
            Self { _turn: turn, device: Device::open(0).unwrap(), counts, live, pending, set_unrecordable, kernels };
        machine.refuse_to_record(false);
        machine
    }

    pub(crate) fn counts(&self) -> Counts {
        let mut counts = Counts::default();
        // SAFETY: the driver's structure.
        unsafe { (self.counts)(&raw mut counts) };
        counts
    }

    /// Whether calls of engines cannot be recorded from now on.
    pub(crate) fn refuse_to_record(&self, refuse: bool) {
        // SAFETY: it only remembers.
        unsafe { (self.set_unrecordable)(refuse) };
    }

    /// Engines are loaded so: with the kernel that their steps need.
    pub(crate) fn options(&self) -> ExecutionOptions {
        let kernels = Some(Origin::Folder(self.kernels.path().to_owned()));
        ExecutionOptions { kernels, ..ExecutionOptions::default() }
    }

    /// Buffers that have not been freed.
    pub(crate) fn live(&self) -> u64 {
        self.device.wait().unwrap();
        // SAFETY: it only counts.
        unsafe { (self.live)() }
    }

    /// Bytes of device memory that are free.
    pub(crate) fn free_bytes(&self) -> u64 {
        self.device.free_bytes().unwrap()
    }

    /// What is on the stream and not done.
    pub(crate) fn pending(&self) -> i32 {
        // SAFETY: it only counts.
        unsafe { (self.pending)() }
    }

    /// What loads the engines of `bundle`.
    pub(crate) fn loader<'b>(
        &self,
        bundle: &'b Bundle,
        options: &ExecutionOptions,
    ) -> Result<TensorRt<'b>, TensorRtError> {
        self.loader_of(bundle, [Path::new("/nowhere"), shim()], options)
    }

    /// What loads them through the shim `shim` over NVIDIA's `library`.
    fn loader_of<'b>(
        &self,
        bundle: &'b Bundle,
        [library, shim]: [&Path; 2],
        options: &ExecutionOptions,
    ) -> Result<TensorRt<'b>, TensorRtError> {
        let [library, parser, headers] = [(); 3].map(|()| library.to_owned());
        let shim = Shim::open_compiled(&Toolkit { flavour: Flavour::TensorRt, library, parser, headers }, shim)?;
        TensorRt::new(bundle, shim, self.device.clone(), options)
    }

    /// What loads the engines of `bundle` through the shim itself, compiled with the headers of this version.
    pub(crate) fn loader_of_nvidia<'b>(&self, bundle: &'b Bundle, headers: &Path) -> TensorRt<'b> {
        let [library, shim] = nvidia(headers);
        register(library);
        self.loader_of(bundle, [library, shim], &self.options()).unwrap()
    }

    /// Engines of `bundle` through the shim itself, compiled with the headers of this version.
    pub(crate) fn engines_of_nvidia<'b>(&self, bundle: &'b Bundle, headers: &Path) -> Engines<'b> {
        Engines::new(bundle, Box::new(self.loader_of_nvidia(bundle, headers)))
    }

    /// Engines of `bundle`, of which the one that decodes token by token keeps the rows so far.
    pub(crate) fn engines<'b>(&self, bundle: &'b Bundle) -> Engines<'b> {
        Engines::new(bundle, Box::new(self.loader(bundle, &self.options()).unwrap()))
    }

    /// Engines of `bundle` whose caches grow.
    pub(crate) fn growing<'b>(&self, bundle: &'b Bundle) -> Engines<'b> {
        Engines::new(bundle, Box::new(self.loader(bundle, &ExecutionOptions::default()).unwrap()))
    }
}

/// ONNX Runtime with nothing of ours: what the double computes with, and what it is held to.
pub(crate) fn portable(bundle: &Bundle) -> OrtCpu {
    OrtCpu::new(runtime(), bundle.weights().clone(), &OrtOptions { fused_operators: false }).unwrap()
}

/// The same graphs as engines with steps run, with the caches on the host.
pub(crate) fn stepping(bundle: &Bundle) -> Engines<'_> {
    let (loader, log) = (portable(bundle), Arc::default());
    Engines::new(bundle, Box::new(Stepping { loader, manner: Manner::Keeps, log }))
}

fn runtime() -> &'static LoadedRuntime {
    load(LoadOptions::fetching(&mut |_| {})).unwrap()
}

/// What engines are built for.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Build {
    pub(crate) workload: Workload,
    /// Whether taps are outputs.
    pub(crate) taps: bool,
    /// Whether any length goes.
    pub(crate) any_length: bool,
}

/// Writes the engines of `bundle` as `accordion build` does; a plan is where the bundle is, the graph, and whether taps are outputs.
pub(crate) fn build(bundle: &Bundle, build: Build) -> PathBuf {
    let Build { workload, taps, any_length } = build;
    let goal = EnginesFolder::dir(bundle, Flavour::TensorRt, VERSION);
    let mut record = Record::new(Flavour::TensorRt, VERSION.to_owned(), Vec::new(), workload, false);
    record.taps = taps;
    let mut writer = EnginesWriter::create(goal.clone(), record, true).unwrap();
    for (name, entry) in &bundle.manifest().graphs {
        let plan = format!("{}\n{name}\n{taps}", bundle.dir().canonicalize().unwrap().display());
        std::fs::write(writer.path(name), plan).unwrap();
        let built = profiles(bundle.manifest(), name, &workload).unwrap().into_iter().map(|profile| {
            let mut inputs = profile.inputs(name, &entry.signature).unwrap();
            let extents = inputs.iter_mut().flat_map(|input| input.shape.iter_mut().chain(&mut input.value));
            for extent in extents.filter(|_| any_length) {
                (extent.min, extent.max) = (0, usize::MAX);
            }
            BuiltProfile { name: profile.name.to_owned(), inputs }
        });
        writer.add(name, entry.sha256.clone(), built.collect()).unwrap();
    }
    writer.publish().unwrap();
    goal
}

/// The structures of `double.cpp`.
#[repr(C)]
struct DoubleTensor {
    name: *const c_char,
    is_input: i32,
    on_host: i32,
    dtype: i32,
    rank: i32,
    shape: [i64; 8],
    data: *mut c_void,
}

#[repr(C)]
struct Callbacks {
    open: unsafe extern "C" fn(*const c_void, usize, *mut u64, *mut DoubleTensor, i32, *mut i32, *mut i32) -> i32,
    run: unsafe extern "C" fn(u64, *mut DoubleTensor, i32) -> i32,
    close: unsafe extern "C" fn(u64),
    layers: unsafe extern "C" fn(u64, *mut c_void, OnLayer),
}

type OnLayer = unsafe extern "C" fn(*mut c_void, *const c_char, *const c_char, f32);

static CALLBACKS: Callbacks = Callbacks { open, run, close, layers };

/// A layer of the double's engines.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Layer {
    pub(crate) name: &'static str,
    /// What the parser of NVIDIA leaves in it; nothing in one that is only named.
    pub(crate) metadata: &'static str,
    /// What a run of it takes the device.
    pub(crate) milliseconds: f32,
}

/// The layers of the engine of graph `name`: some fused across modules, some within a function, one of nobody's.
pub(crate) fn layers_of(name: &str) -> Vec<Layer> {
    let layer = |name, metadata, milliseconds| Layer { name, metadata, milliseconds };
    let mut layers = vec![
        layer(
            "__mye1",
            r"[ONNX Layer: model.layers.0.mlp.up_proj.Gemm/node]\u001f[ONNX Layer: model.layers.0.mlp.Mul/node]",
            4.0,
        ),
        layer(
            "__mye2",
            r"[ONNX Layer: model.layers.1.mlp.up_proj.Gemm/node]\u001e[ONNX Layer: model.layers.1.mlp.Mul/node]",
            2.0,
        ),
        layer("model.layers.0.self_attn.q_proj.Gemm/node", "", 1.0),
        layer("Reformatting CopyNode for Input Tensor 0", "", 0.5),
    ];
    if name.starts_with("leaf") {
        layers.push(layer("__mye3", "[ONNX Layer: Add/node | prune.TopKPrune/node (TopKPrune)]", 0.25));
    }
    layers
}

/// Milliseconds that a run of graph `name` takes the device.
pub(crate) fn device_ms(name: &str) -> f64 {
    layers_of(name).iter().map(|layer| f64::from(layer.milliseconds)).sum()
}

/// A graph behind a plan.
struct Model {
    name: String,
    engine: Box<dyn Engine>,
    inputs: Vec<ValueInfo>,
    outputs: Vec<ValueInfo>,
    names: Vec<CString>,
}

static MODELS: Mutex<Option<HashMap<u64, Model>>> = Mutex::new(None);

/// The numbers of `nvinfer1::DataType`.
const TYPES: [(DType, i32); 4] = [(DType::F32, 0), (DType::Bool, 4), (DType::I32, 3), (DType::I64, 8)];

fn number(dtype: DType) -> i32 {
    TYPES.iter().find(|(known, _)| *known == dtype).unwrap().1
}

impl Model {
    fn of_plan(plan: &str) -> (Self, usize) {
        let mut lines = plan.lines();
        let [dir, name, taps] = [(); 3].map(|()| lines.next().unwrap());
        let bundle = Bundle::open(dir).unwrap();
        let signature = bundle.signature(name).unwrap();
        let mut outputs = signature.outputs.clone();
        let mut bytes = bundle.graph(name).unwrap();
        if taps == "true" {
            let known =
                |value: &ValueInfo| signature.inputs.iter().chain(&signature.outputs).any(|v| v.name == value.name);
            let values: BTreeMap<&str, &ValueInfo> = signature.taps.values().map(|v| (v.name.as_str(), v)).collect();
            let further: Vec<&ValueInfo> = values.into_values().filter(|value| !known(value)).collect();
            bytes.extend(tap_outputs(&further.iter().map(|value| value.name.as_str()).collect::<Vec<_>>()));
            outputs.extend(further.into_iter().cloned());
        }
        let engine = portable(&bundle).load(name, &bytes, &signature.weights).unwrap();
        let inputs = signature.inputs.clone();
        let names = inputs.iter().chain(&outputs).map(|value| CString::new(value.name.as_str()).unwrap()).collect();
        let recorded = EnginesFolder::open(EnginesFolder::dir(&bundle, Flavour::TensorRt, VERSION)).unwrap();
        (Self { name: name.to_owned(), engine, inputs, outputs, names }, recorded.record().engines[name].profiles.len())
    }

    fn run(&mut self, tensors: &mut [DoubleTensor]) {
        let (given, asked) = tensors.split_at_mut(self.inputs.len());
        let inputs: Vec<Tensor> = self.inputs.iter().zip(given).map(|(info, tensor)| tensor.to_tensor(info)).collect();
        let inputs: Vec<(&str, &Tensor)> = self.inputs.iter().map(|info| info.name.as_str()).zip(&inputs).collect();
        let outputs: Vec<&str> = self.outputs.iter().map(|info| info.name.as_str()).collect();
        let results = self.engine.run(&inputs, &mut [], &outputs).unwrap();
        for (result, tensor) in results.iter().zip(asked) {
            let shape: Vec<i64> = result.shape().iter().map(|&n| n as i64).collect();
            let known = &tensor.shape[..tensor.rank as usize];
            assert!(tensor.data.is_null() || known == shape, "{known:?} was said, {shape:?} has come");
            tensor.rank = shape.len() as i32;
            tensor.shape[..shape.len()].copy_from_slice(&shape);
            if !tensor.data.is_null() {
                // SAFETY: the caller has made room for a tensor of this shape.
                unsafe {
                    tensor.data.cast::<u8>().copy_from_nonoverlapping(result.bytes().as_ptr(), result.byte_len());
                };
            }
        }
    }
}

impl DoubleTensor {
    /// The tensor, or zeros where only its shape is known.
    fn to_tensor(&self, info: &ValueInfo) -> Tensor {
        let shape: Vec<usize> = self.shape[..self.rank as usize].iter().map(|&n| n as usize).collect();
        let bytes = info.dtype.bytes_of_shape(&shape).unwrap();
        let mut aligned = vec![0_i64; bytes.div_ceil(8)];
        if !self.data.is_null() {
            // SAFETY: as many bytes as the shape says are there, and room for them.
            unsafe { aligned.as_mut_ptr().cast::<u8>().copy_from_nonoverlapping(self.data.cast(), bytes) };
        }
        Tensor::from_storage(info.dtype, shape, std::sync::Arc::new(aligned), 0).unwrap()
    }
}

unsafe extern "C" fn open(
    plan: *const c_void,
    bytes: usize,
    handle: *mut u64,
    tensors: *mut DoubleTensor,
    capacity: i32,
    count: *mut i32,
    profiles: *mut i32,
) -> i32 {
    // SAFETY: the double hands on what it was given.
    let plan = unsafe { std::slice::from_raw_parts(plan.cast::<u8>(), bytes) };
    let Some(plan) = std::str::from_utf8(plan).ok().filter(|plan| plan.contains('\n')) else { return 1 };
    let (model, num_profiles) = Model::of_plan(plan);
    assert!(model.names.len() <= capacity as usize);
    let mut models = MODELS.lock().unwrap_or_else(PoisonError::into_inner);
    let models = models.get_or_insert_default();
    let key = models.keys().max().map_or(1, |last| last + 1);
    for (i, (info, name)) in model.inputs.iter().chain(&model.outputs).zip(&model.names).enumerate() {
        let is_input = i < model.inputs.len();
        let mut shape = [-1; 8];
        for (extent, dimension) in shape.iter_mut().zip(&info.shape) {
            *extent = dimension.parse().unwrap_or(-1);
        }
        let tensor = DoubleTensor {
            name: name.as_ptr(),
            is_input: is_input.into(),
            on_host: (is_input && ON_HOST.contains(&info.name.as_str())).into(),
            dtype: number(info.dtype),
            rank: info.shape.len() as i32,
            shape,
            data: std::ptr::null_mut(),
        };
        // SAFETY: fewer than the capacity.
        unsafe { tensors.add(i).write(tensor) };
    }
    // SAFETY: places of results.
    unsafe {
        *handle = key;
        *count = model.names.len() as i32;
        *profiles = num_profiles as i32;
    }
    models.insert(key, model);
    0
}

unsafe extern "C" fn run(handle: u64, tensors: *mut DoubleTensor, count: i32) -> i32 {
    let mut models = MODELS.lock().unwrap_or_else(PoisonError::into_inner);
    let model = models.as_mut().unwrap().get_mut(&handle).unwrap();
    // SAFETY: the double says so many are there.
    model.run(unsafe { std::slice::from_raw_parts_mut(tensors, count as usize) });
    0
}

unsafe extern "C" fn layers(handle: u64, user: *mut c_void, on_layer: OnLayer) {
    let models = MODELS.lock().unwrap_or_else(PoisonError::into_inner);
    for layer in layers_of(&models.as_ref().unwrap()[&handle].name) {
        let [name, metadata] = [layer.name, layer.metadata].map(|text| CString::new(text).unwrap());
        // SAFETY: the strings live over the call.
        unsafe { on_layer(user, name.as_ptr(), metadata.as_ptr(), layer.milliseconds) };
    }
}

unsafe extern "C" fn close(handle: u64) {
    MODELS.lock().unwrap_or_else(PoisonError::into_inner).as_mut().unwrap().remove(&handle);
}
