//! The fused operators as custom operators of ONNX Runtime's CUDA provider: our kernels, on the stream that it computes on.

use crate::cuda::{
    Address, Buffer, CublasLt, CudaError, Device, Element, Kernels, StridedCompress, StridedRows, TopKPrune,
};
use accordion_plugins::Operators;
use accordion_plugins::operator::{error, expect_shape, input, integer, length, optional_output, output};
use ort::memory::MemoryType::CPUInput;
use ort::operator::{
    BoxedKernel, ComputeContext, KernelContext, Operator, OperatorDomain, OperatorInput, OperatorOutput,
};
use ort::value::TensorElementType::{self, Bfloat16, Float16, Float32, Int64};
use ort::value::{Value, ValueType};
use ort::{AsPointer as _, Error, sys};
use std::ptr::{NonNull, null_mut};
use std::sync::{Arc, Mutex, PoisonError};

/// Every operator for every element type, to compute on `device`.
pub(super) fn domain(device: &Device, kernels: Arc<Kernels>) -> Result<OperatorDomain, CudaOperatorsError> {
    let shared = Arc::new(Shared {
        device: device.clone(),
        kernels,
        cublaslt: CublasLt::open(device)?,
        workspace: Mutex::new(Workspace { buffer: device.zeros(0)?, bytes: 0 }),
    });
    let mut operators = Operators::new(accordion_plugins::DOMAIN)?;
    for element in Element::ALL {
        operators = operators.add(Prune { element, shared: Arc::clone(&shared) })?;
        for mean in [false, true] {
            operators = operators.add(Compress { element, mean, shared: Arc::clone(&shared) })?;
        }
    }
    Ok(operators.into_domain())
}

/// Why there are no such operators.
#[derive(Debug, thiserror::Error)]
pub(super) enum CudaOperatorsError {
    #[error(transparent)]
    Cuda(#[from] CudaError),
    #[error(transparent)]
    Runtime(#[from] Error),
}

/// What all of them use.
struct Shared {
    device: Device,
    kernels: Arc<Kernels>,
    cublaslt: CublasLt,
    /// As much as the most demanding call so far needed. One serves all, for calls follow each other on the stream.
    workspace: Mutex<Workspace>,
}

struct Workspace {
    buffer: Buffer,
    bytes: usize,
}

impl Shared {
    /// Refuses to compute on another stream than what surrounds the node.
    fn check_stream(&self, context: &ComputeContext) -> ort::Result<()> {
        let stream = context.stream()?.map_or(null_mut(), NonNull::as_ptr);
        if stream.addr() == self.device.stream_pointer().addr() {
            return Ok(());
        }
        Err(error("the node computes on another stream than the session was given"))
    }
}

fn element_type(element: Element) -> TensorElementType {
    match element {
        Element::F32 => Float32,
        Element::F16 => Float16,
        Element::Bf16 => Bfloat16,
    }
}

/// `ai.accordion::TopKPrune` of its `contract.md`, with queries, keys, cache and hidden states of one element type.
struct Prune {
    element: Element,
    shared: Arc<Shared>,
}

impl Operator for Prune {
    type Kernel<'attr> = BoxedKernel<'attr>;

    fn name(&self) -> &'static str {
        "TopKPrune"
    }

    fn execution_provider_type(&self) -> Option<&str> {
        Some(super::ort_cuda::PROVIDER)
    }

    fn inputs(&self) -> impl IntoIterator<Item = OperatorInput> {
        let element = element_type(self.element);
        let on_device = [element, element, Float32, Int64, element, element].map(OperatorInput::required);
        // Lengths of outputs, and what is checked against them.
        let on_host = [Int64; 3].map(|element| OperatorInput::required(element).memory_type(CPUInput));
        on_device.into_iter().chain(on_host)
    }

    fn outputs(&self) -> impl IntoIterator<Item = OperatorOutput> {
        let element = element_type(self.element);
        let always = [Int64, element, Int64, element, Float32].map(OperatorOutput::required);
        always.into_iter().chain([OperatorOutput::optional(Float32)])
    }

    fn create_kernel<'attr>(&self, context: &KernelContext<'attr>) -> ort::Result<Self::Kernel<'attr>> {
        let scale = context.get::<f32>("scale");
        let (element, shared) = (self.element, Arc::clone(&self.shared));
        Ok(Box::new(move |context: &ComputeContext| prune(context, element, scale, &shared)))
    }
}

fn prune(context: &ComputeContext, element: Element, scale: Option<f32>, shared: &Shared) -> ort::Result<()> {
    shared.check_stream(context)?;
    let names = ["query_last", "key", "bias", "position_ids", "hidden", "kv"];
    let mut values = Vec::with_capacity(names.len());
    for (index, name) in names.into_iter().enumerate() {
        values.push(input(context, index, name)?);
    }
    let ([batch, heads, head_dim], query_last) = tensor(&values[0], "query_last")?;
    let (key_shape, key) = tensor::<4>(&values[1], "key")?;
    let ([bias_length], bias) = tensor(&values[2], "bias")?;
    let (position_shape, position_ids) = tensor::<2>(&values[3], "position_ids")?;
    let (hidden_shape, hidden) = tensor::<3>(&values[4], "hidden")?;
    let (kv_shape, kv) = tensor::<6>(&values[5], "kv")?;
    let [_, kv_heads, tokens, _] = key_shape;
    let [.., hidden_size] = hidden_shape;
    let layers = kv_shape[1];
    expect_shape("key", &key_shape, &[batch, kv_heads, tokens, head_dim])?;
    expect_shape("position_ids", &position_shape, &[batch, tokens])?;
    expect_shape("hidden", &hidden_shape, &[batch, tokens, hidden_size])?;
    expect_shape("kv", &kv_shape, &[batch, layers, 2, kv_heads, tokens, head_dim])?;
    let keep = length(&input(context, 6, "keep")?, "keep")?;
    let prefix = length(&input(context, 7, "prefix_length")?, "prefix_length")?;
    let suffix = length(&input(context, 8, "suffix_length")?, "suffix_length")?;
    // Before any output is allocated: its size is this number.
    if keep > tokens {
        return Err(error(format!("keep is {keep}, but there are {tokens} tokens")));
    }
    let mut call = TopKPrune {
        query_last,
        key,
        bias,
        position_ids,
        hidden,
        kv,
        batch: count(batch)?,
        heads: count(heads)?,
        kv_heads: count(kv_heads)?,
        head_dim: count(head_dim)?,
        length: count(tokens)?,
        hidden_size: count(hidden_size)?,
        layers: count(layers)?,
        keep: count(keep)?,
        prefix_length: count(prefix)?,
        suffix_length: count(suffix)?,
        bias_length: count(bias_length)?,
        scale: scale.unwrap_or_else(|| 1.0 / (head_dim as f32).sqrt()),
        element,
        hidden_element: element,
        ..TopKPrune::default()
    };
    call.keep_idx = allocated(context, 0, "keep_idx", [batch, keep])?;
    call.kept_hidden = allocated(context, 1, "kept_hidden", [batch, keep, hidden_size])?;
    call.kept_position_ids = allocated(context, 2, "kept_position_ids", [batch, keep])?;
    call.kept_kv = allocated(context, 3, "kept_kv", [batch, layers, 2, kv_heads, keep, head_dim])?;
    call.scores = allocated(context, 4, "scores", [batch, tokens])?;
    if let Some(metric) = optional_output(context, 5, [batch, heads, tokens])? {
        call.metric = address(&metric)?;
    }
    // SAFETY: the tensors have these shapes, and the runtime keeps them until what is on its stream is done.
    unsafe { shared.kernels.topk_prune(&call) }.map_err(error)
}

/// `ai.accordion::StridedCompress`, or with a mean `StridedCompressMean`, of one element type.
struct Compress {
    element: Element,
    mean: bool,
    shared: Arc<Shared>,
}

impl Operator for Compress {
    type Kernel<'attr> = BoxedKernel<'attr>;

    fn name(&self) -> &'static str {
        if self.mean { "StridedCompressMean" } else { "StridedCompress" }
    }

    fn execution_provider_type(&self) -> Option<&str> {
        Some(super::ort_cuda::PROVIDER)
    }

    fn inputs(&self) -> impl IntoIterator<Item = OperatorInput> {
        let inputs = if self.mean { 3 } else { 2 };
        vec![element_type(self.element); inputs].into_iter().map(OperatorInput::required)
    }

    fn outputs(&self) -> impl IntoIterator<Item = OperatorOutput> {
        [OperatorOutput::required(element_type(self.element))]
    }

    fn create_kernel<'attr>(&self, context: &KernelContext<'attr>) -> ort::Result<Self::Kernel<'attr>> {
        let rows = StridedRows {
            ratio: count(integer(context, "ratio")?)?,
            offset: count(integer(context, "offset")?)?,
            element: self.element,
            ..StridedRows::default()
        };
        let (mean, shared) = (self.mean, Arc::clone(&self.shared));
        Ok(Box::new(move |context: &ComputeContext| compress(context, rows, mean, &shared)))
    }
}

fn compress(context: &ComputeContext, mut rows: StridedRows, mean: bool, shared: &Shared) -> ort::Result<()> {
    shared.check_stream(context)?;
    let x = input(context, 0, "x")?;
    let (shape, x) = tensor::<3>(&x, "x")?;
    let [segments, window, width] = shape;
    rows = StridedRows { x, segments: count(segments)?, window: count(window)?, width: count(width)?, ..rows };
    if mean {
        let x2 = input(context, 1, "x2")?;
        let (other, x2) = tensor::<3>(&x2, "x2")?;
        expect_shape("x2", &other, &shape)?;
        rows.x2 = x2;
    }
    let weight = input(context, 1 + usize::from(mean), "weight")?;
    let ([out_width, in_width], weight) = tensor(&weight, "weight")?;
    expect_shape("weight", &[out_width, in_width], &[out_width, width])?;
    let kept = usize::try_from(rows.kept().map_err(error)?).map_err(error)?;
    rows.y = allocated(context, 0, "y", [kept, out_width])?;

    let workspace_bytes = CublasLt::workspace_bytes(&rows).map_err(error)?;
    let mut workspace = shared.workspace.lock().unwrap_or_else(PoisonError::into_inner);
    if workspace.bytes < workspace_bytes {
        // What is freed is freed behind the work on the stream that uses it.
        *workspace = Workspace { buffer: shared.device.zeros(workspace_bytes).map_err(error)?, bytes: workspace_bytes };
    }
    let call = StridedCompress {
        rows,
        weight,
        out_width: count(out_width)?,
        workspace: workspace.buffer.address(),
        workspace_bytes,
    };
    // SAFETY: the tensors have these shapes, and the runtime keeps them until what is on its stream is done, as the order on
    // the stream does for the workspace.
    unsafe { shared.cublaslt.compress(&shared.kernels, &call) }.map_err(error)
}

/// The shape and address of a tensor of rank `N`.
fn tensor<const N: usize>(value: &Value, name: &str) -> ort::Result<([usize; N], Address)> {
    let ValueType::Tensor { shape, .. } = value.dtype() else { return Err(error(format!("{name} is no tensor"))) };
    let dims: Vec<usize> = shape.iter().map(|&dim| dim.max(0) as usize).collect();
    let dims = <[usize; N]>::try_from(dims)
        .map_err(|dims| error(format!("{name} has shape {dims:?}, expected {N} dimensions")))?;
    Ok((dims, address(value)?))
}

/// Where the elements of a tensor lie.
fn address(value: &Value) -> ort::Result<Address> {
    let (tensor, mut data): (*const sys::OrtValue, _) = (value.ptr(), null_mut());
    // SAFETY: the value is a tensor; the call only reads where its memory is. The status is freed here.
    unsafe { Error::result_from_status((ort::api().GetTensorMutableData)(tensor.cast_mut(), &raw mut data)) }?;
    Ok(data.addr() as Address)
}

/// Where output `index` lies, allocated with this shape.
fn allocated<const N: usize>(
    context: &ComputeContext,
    index: usize,
    name: &str,
    shape: [usize; N],
) -> ort::Result<Address> {
    let value = output(context, index, name, shape)?;
    address(&value)
}

fn count(length: usize) -> ort::Result<i64> {
    i64::try_from(length).map_err(error)
}
