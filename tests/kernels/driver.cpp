// A CUDA driver without a device, for tests of everything around the kernels: memory is the CPU's, launches run in the emulator,
// and what was done is done when a call returns. Only what this project calls is here.
//
// ACCORDION_EMULATOR_FAULT=keep makes the selection wrong, for the test that such a thing is found.

#include <chrono>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#include "../../plugins/append_rows/kernel.cu"
#include "../../plugins/strided_compress/kernel.cu"
#include "../../plugins/topk_prune/kernel.cu"
#include "memcpy2d.h"

namespace {

constexpr int INVALID_VALUE = 1, OUT_OF_MEMORY = 2, NOT_FOUND = 500;

struct Event {
  std::chrono::steady_clock::time_point at;
};

struct Function {
  const char *name;
  size_t bytes;
  void (*run)(dim3 grid, uint32_t threads, const void *argument);
};

template <class Call, void (*kernel)(Call)>
Function function(const char *name) {
  return {name, sizeof(Call), [](dim3 grid, uint32_t threads, const void *argument) {
            const Call call = *static_cast<const Call *>(argument);
            emulator::run(grid, threads, [&] { kernel(call); });
          }};
}

void select_or_fail(dim3 grid, uint32_t threads, const void *argument) {
  const AccordionTopKPrune call = *static_cast<const AccordionTopKPrune *>(argument);
  emulator::run(grid, threads, [&] { accordion_topk_prune_select(call); });
  const char *fault = getenv("ACCORDION_EMULATOR_FAULT");
  if (fault && !strcmp(fault, "keep")) call.keep_idx[0]++;
}

#define FUNCTION(Call, name) function<Call, name>(#name)
const Function FUNCTIONS[] = {
    FUNCTION(AccordionTopKPrune, accordion_topk_prune_score_f32),
    FUNCTION(AccordionTopKPrune, accordion_topk_prune_score_f16),
    FUNCTION(AccordionTopKPrune, accordion_topk_prune_score_bf16),
    {"accordion_topk_prune_select", sizeof(AccordionTopKPrune), select_or_fail},
    FUNCTION(AccordionTopKPrune, accordion_topk_prune_gather),
    FUNCTION(AccordionStridedRows, accordion_strided_select),
    FUNCTION(AccordionStridedRows, accordion_strided_mean_f32),
    FUNCTION(AccordionStridedRows, accordion_strided_mean_f16),
    FUNCTION(AccordionStridedRows, accordion_strided_mean_bf16),
    FUNCTION(AccordionAppendRows, accordion_append_each),
};

typedef std::vector<std::function<void()>> Work;

// What is being recorded, or null.
Work *recorded = nullptr;
void *current = nullptr;
int context;

}  // namespace

extern "C" {

int cuInit(unsigned) { return 0; }

int cuDriverGetVersion(int *version) { return *version = 13000, 0; }

int cuDeviceGetCount(int *count) { return *count = 1, 0; }

int cuDeviceGet(int *device, int ordinal) { return *device = 0, ordinal == 0 ? 0 : INVALID_VALUE; }

int cuDeviceGetName(char *name, int length, int) { return snprintf(name, size_t(length), "Emulator, no GPU"), 0; }

int cuDeviceGetAttribute(int *value, int attribute, int) {
  switch (attribute) {
    case 13: *value = 1000000; break;     // clock, kHz
    case 16: *value = 1; break;           // multiprocessors
    case 36: *value = 1000000; break;     // memory clock, kHz
    case 37: *value = 64; break;          // bus width, bits
    case 38: *value = 1 << 20; break;     // L2
    case 75: *value = 9; break;           // compute capability
    case 76: *value = 0; break;
    default: *value = 0;
  }
  return 0;
}

int cuDeviceTotalMem_v2(size_t *bytes, int) { return *bytes = size_t(1) << 30, 0; }

// Little, so that times of large lengths are left out.
int cuMemGetInfo_v2(size_t *free, size_t *total) { return *free = *total = size_t(1) << 29, 0; }

int cuDevicePrimaryCtxRetain(void **retained, int) { return *retained = &context, 0; }

int cuDevicePrimaryCtxRelease_v2(int) { return 0; }

int cuCtxGetCurrent(void **got) { return *got = current, 0; }

int cuCtxSetCurrent(void *set) { return current = set, 0; }

int cuMemAlloc_v2(uint64_t *address, size_t bytes) {
  void *memory = aligned_alloc(256, (bytes + 255) / 256 * 256);
  // Not the zeros that fresh memory often has.
  if (memory) memset(memory, 0xa5, bytes);
  return *address = uint64_t(memory), memory && bytes ? 0 : OUT_OF_MEMORY;
}

int cuMemAllocAsync(uint64_t *address, size_t bytes, void *) { return cuMemAlloc_v2(address, bytes); }

int cuMemFree_v2(uint64_t address) { return free(reinterpret_cast<void *>(address)), 0; }

int cuMemFreeAsync(uint64_t address, void *) { return cuMemFree_v2(address); }

int cuMemsetD8Async(uint64_t address, unsigned char value, size_t bytes, void *) {
  return memset(reinterpret_cast<void *>(address), value, bytes), 0;
}

int cuMemcpyHtoDAsync_v2(uint64_t to, const void *from, size_t bytes, void *) {
  return memcpy(reinterpret_cast<void *>(to), from, bytes), 0;
}

int cuMemcpyDtoHAsync_v2(void *to, uint64_t from, size_t bytes, void *) {
  return memcpy(to, reinterpret_cast<const void *>(from), bytes), 0;
}

int cuMemcpyDtoDAsync_v2(uint64_t to, uint64_t from, size_t bytes, void *) {
  return memcpy(reinterpret_cast<void *>(to), reinterpret_cast<const void *>(from), bytes), 0;
}

int cuMemcpy2DAsync_v2(const Memcpy2D *copy, void *stream) { return copy->rows(cuMemcpyDtoDAsync_v2, stream); }
// Looked for, and never called.
int cuMemHostAlloc() { return INVALID_VALUE; }
int cuMemFreeHost() { return INVALID_VALUE; }

int cuStreamCreate(void **stream, unsigned) { return *stream = new int(0), 0; }

int cuStreamDestroy_v2(void *stream) { return delete static_cast<int *>(stream), 0; }

int cuStreamSynchronize(void *) { return 0; }

int cuEventCreate(Event **event, unsigned) { return *event = new Event, 0; }

int cuEventDestroy_v2(Event *event) { return delete event, 0; }

int cuEventRecord(Event *event, void *) { return event->at = std::chrono::steady_clock::now(), 0; }

int cuEventSynchronize(Event *) { return 0; }

int cuEventElapsedTime_v2(float *milliseconds, const Event *from, const Event *to) {
  return *milliseconds = std::chrono::duration<float, std::milli>(to->at - from->at).count(), 0;
}

// Takes what another library would put on the stream, if the stream is being recorded.
bool emulated_driver_record(const std::function<void()> *work) {
  if (recorded) recorded->push_back(*work);
  return recorded != nullptr;
}

// Code must be that of a device, as a real driver would find.
int cuModuleLoadData(void **module, const void *image) {
  return *module = new int(0), memcmp(image, "\x7f" "ELF", 4) == 0 ? 0 : INVALID_VALUE;
}

int cuModuleUnload(void *module) { return delete static_cast<int *>(module), 0; }

int cuModuleGetFunction(const Function **found, void *, const char *name) {
  for (const Function &function : FUNCTIONS)
    if (!strcmp(function.name, name)) return *found = &function, 0;
  return NOT_FOUND;
}

int cuLaunchKernel(const Function *function, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned threads_y,
                   unsigned threads_z, unsigned shared, void *, void **arguments, void **) {
  if (z != 1 || threads_y != 1 || threads_z != 1 || shared != 0) return INVALID_VALUE;
  const char *argument = static_cast<const char *>(arguments[0]);
  if (recorded) {
    const std::vector<char> copy(argument, argument + function->bytes);
    recorded->push_back([=] { function->run(dim3(x, y), threads, copy.data()); });
  } else {
    function->run(dim3(x, y), threads, argument);
  }
  return 0;
}

int cuStreamBeginCapture_v2(void *, int) { return recorded = new Work, 0; }

int cuStreamEndCapture(void *, Work **graph) {
  *graph = recorded;
  recorded = nullptr;
  return 0;
}

int cuGraphInstantiateWithFlags(Work **executable, const Work *graph, uint64_t) { return *executable = new Work(*graph), 0; }

int cuGraphLaunch(const Work *executable, void *) {
  for (const auto &work : *executable) work();
  return 0;
}

int cuGraphExecDestroy(Work *executable) { return delete executable, 0; }

int cuGraphDestroy(Work *graph) { return delete graph, 0; }

int cuGetErrorName(int status, const char **name) { return *name = status ? "CUDA_ERROR" : "CUDA_SUCCESS", 0; }

int cuGetErrorString(int, const char **text) { return *text = "the emulated driver refuses", 0; }

}  // extern "C"
