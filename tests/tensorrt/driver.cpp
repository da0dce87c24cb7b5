// A CUDA driver without a device: memory is the CPU's, and what is put on a stream is done when the stream is waited for, not
// before, so that memory that is gone too early shows. Only what engines need is here; kernels are not.

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <functional>
#include <map>
#include <mutex>
#include <vector>

namespace {

constexpr int INVALID_VALUE = 1, OUT_OF_MEMORY = 2, NOT_SUPPORTED = 801;

std::recursive_mutex mutex;
std::vector<std::function<void()>> pending;
// Of every buffer, its length.
std::map<uint64_t, size_t> live;
void *current = nullptr;
int context;

// The device's own clock, in nanoseconds: only work that says what it takes moves it.
uint64_t now = 0;
// Most bytes that were taken at a time since the last stream was made: what has been freed is kept for the next buffers.
size_t reserved = 0;

size_t in_use() {
  size_t bytes = 0;
  for (const auto &buffer : live) bytes += buffer.second;
  return bytes;
}

// Bytes copied to the device, from it, and on it.
uint64_t copied[3];

template <class Call>
int locked(const Call &call) {
  const std::lock_guard<std::recursive_mutex> lock(mutex);
  return call();
}

[[noreturn]] void fail(const char *message) {
  fprintf(stderr, "driver: %s\n", message);
  abort();
}

bool owns(uint64_t address, size_t bytes) {
  auto buffer = live.upper_bound(address);
  if (buffer == live.begin()) return false;
  --buffer;
  return address + bytes <= buffer->first + buffer->second;
}

int take(uint64_t *address, size_t bytes) {
  if (bytes == 0) return INVALID_VALUE;
  void *memory = aligned_alloc(256, (bytes + 255) / 256 * 256);
  if (!memory) return OUT_OF_MEMORY;
  memset(memory, 0xa5, bytes);
  *address = uint64_t(memory);
  live[*address] = bytes;
  if (in_use() > reserved) reserved = in_use();
  return 0;
}

void release(uint64_t address) {
  const auto buffer = live.find(address);
  if (buffer == live.end()) fail("what is freed was not taken");
  memset(reinterpret_cast<void *>(address), 0x5a, buffer->second);
  live.erase(buffer);
  free(reinterpret_cast<void *>(address));
}

int copy(int kind, void *to, const void *from, size_t bytes) {
  pending.push_back([=] {
    if (kind != 1 && !owns(uint64_t(to), bytes)) fail("a copy goes where nothing was taken");
    if (kind != 0 && !owns(uint64_t(from), bytes)) fail("a copy comes from where nothing was taken");
    memcpy(to, from, bytes);
    copied[kind] += bytes;
  });
  return 0;
}

void finish() {
  // What is done may put more behind it.
  while (!pending.empty()) {
    const auto work = std::move(pending);
    pending.clear();
    for (const auto &item : work) item();
  }
}

void *pointer(uint64_t address) { return reinterpret_cast<void *>(address); }

}  // namespace

extern "C" {

// For the library that runs engines.
void emulated_driver_defer(const std::function<void()> *work) {
  locked([&] { return pending.push_back(*work), 0; });
}

int emulated_driver_owns(uint64_t address, size_t bytes) {
  return locked([&] { return int(owns(address, bytes)); });
}

// Takes the device so long.
void emulated_driver_spend(uint64_t nanoseconds) {
  locked([=] { return now += nanoseconds, 0; });
}

int emulated_driver_pending() {
  return locked([] { return int(pending.size()); });
}

// For tests.
void emulated_driver_copied(uint64_t *bytes) {
  locked([&] { return memcpy(bytes, copied, sizeof(copied)), 0; });
}

uint64_t emulated_driver_live() {
  return uint64_t(locked([] { return int(live.size()); }));
}

int cuInit(unsigned) { return 0; }
int cuDriverGetVersion(int *version) { return *version = 13000, 0; }
int cuDeviceGetCount(int *count) { return *count = 1, 0; }
int cuDeviceGet(int *device, int ordinal) { return *device = 0, ordinal == 0 ? 0 : INVALID_VALUE; }
int cuDeviceGetName(char *name, int length, int) { return snprintf(name, size_t(length), "Emulator, no GPU"), 0; }
// 115: memory that is taken and freed in the order of a stream.
int cuDeviceGetAttribute(int *value, int attribute, int) { return *value = attribute == 115, 0; }
int cuDeviceTotalMem_v2(size_t *bytes, int) { return *bytes = size_t(1) << 30, 0; }
int cuMemGetInfo_v2(size_t *free, size_t *total) {
  return locked([=] { return *total = size_t(1) << 30, *free = *total - reserved, 0; });
}
int cuDeviceGetDefaultMemPool(void **pool, int) { return *pool = &context, 0; }
int cuMemPoolSetAttribute(void *pool, int attribute, void *) { return pool == &context && attribute == 4 ? 0 : INVALID_VALUE; }

int cuDevicePrimaryCtxRetain(void **retained, int) { return *retained = &context, 0; }
int cuDevicePrimaryCtxRelease_v2(int) { return 0; }
int cuCtxGetCurrent(void **got) { return *got = current, 0; }
int cuCtxSetCurrent(void *set) { return current = set, 0; }

int cuMemAlloc_v2(uint64_t *address, size_t bytes) {
  return locked([=] { return take(address, bytes); });
}
int cuMemAllocAsync(uint64_t *address, size_t bytes, void *) { return cuMemAlloc_v2(address, bytes); }
int cuMemFree_v2(uint64_t address) {
  return locked([=] { return finish(), release(address), 0; });
}
int cuMemFreeAsync(uint64_t address, void *) {
  return locked([=] { return pending.push_back([=] { release(address); }), 0; });
}
int cuMemsetD8Async(uint64_t address, unsigned char value, size_t bytes, void *) {
  return locked([=] { return pending.push_back([=] { memset(pointer(address), value, bytes); }), 0; });
}
int cuMemcpyHtoDAsync_v2(uint64_t to, const void *from, size_t bytes, void *) {
  return locked([=] { return copy(0, pointer(to), from, bytes); });
}
int cuMemcpyDtoHAsync_v2(void *to, uint64_t from, size_t bytes, void *) {
  return locked([=] { return copy(1, to, pointer(from), bytes); });
}
int cuMemcpyDtoDAsync_v2(uint64_t to, uint64_t from, size_t bytes, void *) {
  return locked([=] { return copy(2, pointer(to), pointer(from), bytes); });
}

int cuStreamCreate(void **stream, unsigned) {
  return locked([=] { return *stream = new int(0), reserved = in_use(), 0; });
}
int cuStreamDestroy_v2(void *stream) {
  return locked([=] { return finish(), delete static_cast<int *>(stream), 0; });
}
int cuStreamSynchronize(void *) {
  return locked([] { return finish(), 0; });
}

struct Event {
  bool recorded = false, reached = false;
  uint64_t time = 0;
};

int cuEventCreate(void **event, unsigned) { return *event = new Event, 0; }
int cuEventRecord(void *event, void *) {
  return locked([=] {
    auto *recorded = static_cast<Event *>(event);
    recorded->recorded = true;
    recorded->reached = false;
    pending.push_back([=] { recorded->reached = true, recorded->time = now; });
    return 0;
  });
}
int cuEventSynchronize(void *event) {
  return locked([=] { return finish(), static_cast<Event *>(event)->recorded ? 0 : INVALID_VALUE; });
}
int cuEventElapsedTime_v2(float *milliseconds, void *from, void *to) {
  const auto *begin = static_cast<Event *>(from), *end = static_cast<Event *>(to);
  if (!begin->reached || !end->reached) return INVALID_VALUE;
  return *milliseconds = float(double(end->time - begin->time) / 1e6), 0;
}
int cuEventDestroy_v2(void *event) {
  return locked([=] { return pending.push_back([=] { delete static_cast<Event *>(event); }), 0; });
}

// Never called for engines, and looked for.
#define NOT_HERE(name) \
  int name() { return NOT_SUPPORTED; }
NOT_HERE(cuGraphDestroy)
NOT_HERE(cuGraphExecDestroy)
NOT_HERE(cuGraphInstantiateWithFlags)
NOT_HERE(cuGraphLaunch)
NOT_HERE(cuLaunchKernel)
NOT_HERE(cuModuleGetFunction)
NOT_HERE(cuModuleLoadData)
NOT_HERE(cuModuleUnload)
NOT_HERE(cuStreamBeginCapture_v2)
NOT_HERE(cuStreamEndCapture)

int cuGetErrorName(int status, const char **name) { return *name = status ? "CUDA_ERROR" : "CUDA_SUCCESS", 0; }
int cuGetErrorString(int, const char **text) { return *text = "the emulated driver refuses", 0; }

}  // extern "C"
