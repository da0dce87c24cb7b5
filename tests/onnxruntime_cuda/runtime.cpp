// The CUDA runtime, cuBLAS and cuBLASLt without a device, as far as ONNX Runtime's CUDA provider uses them: memory is the CPU's,
// copies are copies, and kernels and products do nothing. The provider then loads graphs, places their nodes and moves tensors as
// it does on a GPU, and what it would have computed is zero.
//
// ACCORDION_EMULATOR_LOG names a file that gets one line for every copy to the host and every block of memory, with its bytes.

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace {

constexpr int OUT_OF_MEMORY = 2, DEVICE_TO_HOST = 2;

void log(const char *what, size_t bytes) {
  const char *path = getenv("ACCORDION_EMULATOR_LOG");
  FILE *file = path ? fopen(path, "a") : nullptr;
  if (!file) return;
  fprintf(file, "%s %zu\n", what, bytes);
  fclose(file);
}

int allocate(void **memory, size_t bytes) {
  const size_t rounded = (bytes + 255) / 256 * 256;
  *memory = aligned_alloc(256, rounded ? rounded : 256);
  if (!*memory) return OUT_OF_MEMORY;
  memset(*memory, 0, rounded);
  return 0;
}

int copy(void *to, const void *from, size_t bytes, int kind) {
  if (kind == DEVICE_TO_HOST) log("to the host", bytes);
  if (bytes) memmove(to, from, bytes);
  return 0;
}

int object(void **made) { return *made = malloc(64), 0; }

// The beginning of cudaDeviceProp, and room for the rest.
struct Properties {
  char name[256];
  char uuid[16], luid[8];
  unsigned luid_device_node_mask;
  size_t memory, shared_memory_per_block;
  int registers_per_block, warp_size;
  size_t pitch;
  int threads_per_block, threads[3], grid[3];
  size_t constant_memory;
  int major, minor;
  size_t texture_alignment, texture_pitch_alignment;
  int multiprocessors;
};

}  // namespace

extern "C" {

int cudaGetDeviceProperties(Properties *properties, int) {
  memset(properties, 0, sizeof *properties);
  strcpy(properties->name, "Emulator, no GPU");
  properties->memory = size_t(1) << 33;
  properties->shared_memory_per_block = 48 << 10;
  properties->registers_per_block = 65536;
  properties->warp_size = 32;
  properties->threads_per_block = 1024;
  for (int i = 0; i < 3; ++i) properties->threads[i] = 1024, properties->grid[i] = 65535;
  properties->grid[0] = 0x7fffffff;
  properties->major = 9;
  properties->multiprocessors = 132;
  return 0;
}

int cudaDeviceGetAttribute(int *value, int attribute, int) {
  switch (attribute) {
    case 1: *value = 1024; break;        // threads of a block
    case 8: *value = 48 << 10; break;    // shared memory of a block
    case 10: *value = 32; break;         // threads of a warp
    case 16: *value = 132; break;        // multiprocessors
    case 39: *value = 2048; break;       // threads of a multiprocessor
    case 75: *value = 9; break;          // compute capability
    case 81: *value = 228 << 10; break;  // shared memory of a multiprocessor
    case 97: *value = 227 << 10; break;  // shared memory that a block may ask for
    default: *value = 0;
  }
  return 0;
}

int cudaGetDevice(int *device) { return *device = 0, 0; }
int cudaGetDeviceCount(int *count) { return *count = 1, 0; }
int cudaDriverGetVersion(int *version) { return *version = 13000, 0; }
int cudaRuntimeGetVersion(int *version) { return *version = 13000, 0; }
int cudaMemGetInfo(size_t *free, size_t *total) { return *free = *total = size_t(1) << 33, 0; }

int cudaMalloc(void **memory, size_t bytes) { return log("memory", bytes), allocate(memory, bytes); }
int cudaMallocFromPoolAsync(void **memory, size_t bytes, void *, void *) { return allocate(memory, bytes); }
int cudaMallocHost(void **memory, size_t bytes) { return allocate(memory, bytes); }
int cudaHostAlloc(void **memory, size_t bytes, unsigned) { return allocate(memory, bytes); }
int cudaFree(void *memory) { return free(memory), 0; }
int cudaFreeAsync(void *memory, void *) { return free(memory), 0; }
int cudaFreeHost(void *memory) { return free(memory), 0; }

int cudaMemcpy(void *to, const void *from, size_t bytes, int kind) { return copy(to, from, bytes, kind); }
int cudaMemcpyAsync(void *to, const void *from, size_t bytes, int kind, void *) { return copy(to, from, bytes, kind); }
int cudaMemcpy2DAsync(char *to, size_t to_pitch, const char *from, size_t from_pitch, size_t width, size_t height, int kind,
                      void *) {
  for (size_t row = 0; row < height; ++row) copy(to + row * to_pitch, from + row * from_pitch, width, kind);
  return 0;
}
int cudaMemcpyFromSymbol(void *to, const void *, size_t bytes, size_t, int) { return memset(to, 0, bytes), 0; }
int cudaMemset(void *to, int value, size_t bytes) { return memset(to, value, bytes), 0; }
int cudaMemsetAsync(void *to, int value, size_t bytes, void *) { return memset(to, value, bytes), 0; }

int cudaPointerGetAttributes(int *attributes, const void *) {
  attributes[0] = 2;  // memory of a device
  return attributes[1] = 0, 0;
}

int cudaFuncGetAttributes(int *attributes, const void *) {
  memset(attributes, 0, 140);
  return attributes[6] = 1024, 0;  // threads of a block
}

int cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks, const void *, int, size_t, unsigned) {
  return *blocks = 1, 0;
}

int cudaStreamCreate(void **stream) { return object(stream); }
int cudaStreamCreateWithFlags(void **stream, unsigned) { return object(stream); }
int cudaStreamIsCapturing(void *, int *status) { return *status = 0, 0; }
int cudaEventCreate(void **event) { return object(event); }
int cudaEventCreateWithFlags(void **event, unsigned) { return object(event); }
int cudaEventElapsedTime(float *milliseconds, void *, void *) { return *milliseconds = 0, 0; }
int cudaMemPoolCreate(void **pool, const void *) { return object(pool); }
int cudaLibraryLoadData(void **library, const void *, void *, void *, unsigned, void *, void *, unsigned) {
  return object(library);
}
int cudaLibraryGetKernel(void **kernel, void *, const char *) { return object(kernel); }
int __cudaGetKernel(void **kernel, const void *) { return object(kernel); }
int cudaGetDriverEntryPointByVersion(const char *, void **function, unsigned, uint64_t, int *) {
  return *function = nullptr, 0;
}
const char *cudaGetErrorName(int) { return "cudaErrorEmulated"; }
const char *cudaGetErrorString(int) { return "the emulated CUDA runtime refuses"; }
void **__cudaRegisterFatBinary(void *) {
  static void *handle;
  return &handle;
}

int cublasCreate_v2(void **handle) { return object(handle); }
int cublasGetMathMode(void *, int *mode) { return *mode = 0, 0; }
const char *cublasGetStatusName(int) { return "CUBLAS_STATUS_EMULATED"; }
const char *cublasGetStatusString(int) { return "the emulated cuBLAS refuses"; }
int cublasLtCreate(void **handle) { return object(handle); }
int cublasLtMatmulDescCreate(void **desc, int, int) { return object(desc); }
int cublasLtMatmulPreferenceCreate(void **preference) { return object(preference); }
int cublasLtMatrixLayoutCreate(void **layout, int, uint64_t, uint64_t, int64_t) { return object(layout); }
int cublasLtMatrixTransformDescCreate(void **desc, int) { return object(desc); }
int cublasLtMatmulAlgoGetHeuristic(void *, void *, void *, void *, void *, void *, void *, int, void *found, int *count) {
  memset(found, 0, 96);
  return *count = 1, 0;
}

// What has nothing to do.
#define NOTHING(name) \
  int name() { return 0; }
NOTHING(__cudaLaunchKernel)
NOTHING(__cudaPopCallConfiguration)
NOTHING(__cudaPushCallConfiguration)
NOTHING(__cudaRegisterFatBinaryEnd)
NOTHING(__cudaRegisterFunction)
NOTHING(__cudaRegisterVar)
NOTHING(__cudaUnregisterFatBinary)
NOTHING(cuTensorMapEncodeTiled)
NOTHING(cublasDestroy_v2)
NOTHING(cublasDgeam)
NOTHING(cublasDgemmBatched)
NOTHING(cublasDgemmStridedBatched)
NOTHING(cublasDgemm_v2)
NOTHING(cublasDgetrfBatched)
NOTHING(cublasDgetriBatched)
NOTHING(cublasGemmBatchedEx)
NOTHING(cublasGemmEx)
NOTHING(cublasGemmStridedBatchedEx)
NOTHING(cublasLtDestroy)
NOTHING(cublasLtMatmul)
NOTHING(cublasLtMatmulAlgoConfigSetAttribute)
NOTHING(cublasLtMatmulAlgoInit)
NOTHING(cublasLtMatmulDescDestroy)
NOTHING(cublasLtMatmulDescSetAttribute)
NOTHING(cublasLtMatmulPreferenceDestroy)
NOTHING(cublasLtMatmulPreferenceSetAttribute)
NOTHING(cublasLtMatrixLayoutDestroy)
NOTHING(cublasLtMatrixLayoutSetAttribute)
NOTHING(cublasLtMatrixTransform)
NOTHING(cublasLtMatrixTransformDescDestroy)
NOTHING(cublasScopy_v2)
NOTHING(cublasSetMathMode)
NOTHING(cublasSetStream_v2)
NOTHING(cublasSgeam)
NOTHING(cublasSgemmBatched)
NOTHING(cublasSgemmStridedBatched)
NOTHING(cublasSgemm_v2)
NOTHING(cublasSgetrfBatched)
NOTHING(cublasSgetriBatched)
NOTHING(cublasSscal_v2)
NOTHING(cudaDeviceSynchronize)
NOTHING(cudaEventDestroy)
NOTHING(cudaEventRecord)
NOTHING(cudaEventRecordWithFlags)
NOTHING(cudaEventSynchronize)
NOTHING(cudaFuncSetAttribute)
NOTHING(cudaGetLastError)
NOTHING(cudaGraphDestroy)
NOTHING(cudaGraphExecDestroy)
NOTHING(cudaGraphInstantiate)
NOTHING(cudaGraphLaunch)
NOTHING(cudaKernelSetAttributeForDevice)
NOTHING(cudaLaunchCooperativeKernel)
NOTHING(cudaLaunchHostFunc)
NOTHING(cudaLaunchKernel)
NOTHING(cudaLaunchKernelExC)
NOTHING(cudaLibraryUnload)
NOTHING(cudaMemPoolDestroy)
NOTHING(cudaMemPoolGetAttribute)
NOTHING(cudaMemPoolSetAttribute)
NOTHING(cudaMemPoolTrimTo)
NOTHING(cudaPeekAtLastError)
NOTHING(cudaSetDevice)
NOTHING(cudaStreamBeginCapture)
NOTHING(cudaStreamDestroy)
NOTHING(cudaStreamEndCapture)
NOTHING(cudaStreamSynchronize)
NOTHING(cudaStreamWaitEvent)

}  // extern "C"
