// A CUDA driver without a device: memory is the CPU's, and what is put on a stream is done when the stream is waited for, not
// before, so that memory that is gone too early shows. What is put there while it is recorded is done, with what the memory holds then,
// whenever the record is launched. Only what engines need is here; of the kernels, the one that appends rows, run by the emulator.

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <functional>
#include <map>
#include <mutex>
#include <vector>

#include "../../plugins/append_rows/kernel.cu"

namespace {

constexpr int INVALID_VALUE = 1, OUT_OF_MEMORY = 2, NOT_FOUND = 500, CAPTURE_UNSUPPORTED = 900, CAPTURE_INVALIDATED = 901;

// A buffer of the device: its length, and the how-manieth that was ever taken, from 1 on.
struct Taken {
  size_t bytes;
  uint64_t serial;
};

typedef std::vector<std::function<void()>> Work;

std::recursive_mutex mutex;
Work pending;
// What is being recorded, or null, and whether that has become impossible.
Work *recorded = nullptr;
bool invalid = false;
std::map<uint64_t, Taken> live;
// Page-locked memory of the host.
std::map<uint64_t, size_t> locked_pages;
void *current = nullptr;
int context;

// The device's own clock, in nanoseconds: only work that says what it takes moves it.
uint64_t now = 0;
// Most bytes that were taken at a time since the last stream was made: what has been freed is kept for the next buffers.
size_t reserved = 0;

size_t in_use() {
  size_t bytes = 0;
  for (const auto &buffer : live) bytes += buffer.second.bytes;
  return bytes;
}

// What was done. As `Counts` in double.rs.
struct {
  // Bytes copied to the device, from it, and on it.
  uint64_t copied[3];
  // Buffers taken, of the device and of page-locked memory.
  uint64_t taken;
  // Calls of another library, and launches of kernels and graphs, that were put on the stream while nothing was recorded.
  uint64_t calls, kernels, graphs;
  // Graphs that were recorded.
  uint64_t records;
} counts;
// Whether calls of another library cannot be recorded.
bool unrecordable = false;

template <class Call>
int locked(const Call &call) {
  const std::lock_guard<std::recursive_mutex> lock(mutex);
  return call();
}

[[noreturn]] void fail(const char *message) {
  fprintf(stderr, "driver: %s\n", message);
  abort();
}

// The number of the buffer in which these bytes lie; 0 if there is none.
uint64_t owner(uint64_t address, size_t bytes) {
  auto buffer = live.upper_bound(address);
  if (buffer == live.begin()) return 0;
  --buffer;
  return address + bytes <= buffer->first + buffer->second.bytes ? buffer->second.serial : 0;
}

bool is_locked(uint64_t address, size_t bytes) {
  auto pages = locked_pages.upper_bound(address);
  if (pages == locked_pages.begin()) return false;
  --pages;
  return address + bytes <= pages->first + pages->second;
}

void put(std::function<void()> work) { (recorded ? *recorded : pending).push_back(std::move(work)); }

int take(uint64_t *address, size_t bytes) {
  if (bytes == 0) return INVALID_VALUE;
  if (recorded) fail("memory is taken while work is recorded");
  void *memory = aligned_alloc(256, (bytes + 255) / 256 * 256);
  if (!memory) return OUT_OF_MEMORY;
  memset(memory, 0xa5, bytes);
  *address = uint64_t(memory);
  live[*address] = {bytes, ++counts.taken};
  if (in_use() > reserved) reserved = in_use();
  return 0;
}

void release(uint64_t address) {
  const auto buffer = live.find(address);
  if (buffer == live.end()) fail("what is freed was not taken");
  memset(reinterpret_cast<void *>(address), 0x5a, buffer->second.bytes);
  live.erase(buffer);
  free(reinterpret_cast<void *>(address));
}

// Copies `count` rows, which lie so far apart.
int copy(int kind, void *to, size_t to_stride, const void *from, size_t from_stride, size_t count, size_t bytes) {
  if (count == 0 || bytes == 0 || (count > 1 && (to_stride < bytes || from_stride < bytes))) return INVALID_VALUE;
  const size_t to_bytes = (count - 1) * to_stride + bytes, from_bytes = (count - 1) * from_stride + bytes;
  const auto locked_pages_are_used = [=] {
    return kind == 2 || (kind == 0 ? is_locked(uint64_t(from), from_bytes) : is_locked(uint64_t(to), to_bytes));
  };
  const bool locked_pages_were_used = locked_pages_are_used();
  // A record would read or write it whenever it is launched.
  if (recorded && !locked_pages_were_used) fail("a recorded copy uses pageable memory");
  const auto check = [=] {
    if (kind != 1 && !owner(uint64_t(to), to_bytes)) fail("a copy goes where nothing was taken");
    if (kind != 0 && !owner(uint64_t(from), from_bytes)) fail("a copy comes from where nothing was taken");
    if (locked_pages_were_used && !locked_pages_are_used()) fail("page-locked memory is gone");
  };
  put([=] {
    check();
    for (size_t i = 0; i < count; i++)
      memcpy(static_cast<char *>(to) + i * to_stride, static_cast<const char *>(from) + i * from_stride, bytes);
    counts.copied[kind] += count * bytes;
  });
  return 0;
}

int copy(int kind, void *to, const void *from, size_t bytes) { return copy(kind, to, bytes, from, bytes, 1, bytes); }

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

// For the library that runs engines: false if it cannot be recorded.
bool emulated_driver_defer(const std::function<void()> *work) {
  const std::lock_guard<std::recursive_mutex> lock(mutex);
  if (recorded && unrecordable) return invalid = true, false;
  counts.calls += recorded == nullptr;
  put(*work);
  return true;
}

bool emulated_driver_records() {
  const std::lock_guard<std::recursive_mutex> lock(mutex);
  return recorded != nullptr;
}

// The number of the buffer in which these bytes lie.
uint64_t emulated_driver_owner(uint64_t address, size_t bytes) {
  const std::lock_guard<std::recursive_mutex> lock(mutex);
  return owner(address, bytes);
}

// Takes the device so long.
void emulated_driver_spend(uint64_t nanoseconds) {
  locked([=] { return now += nanoseconds, 0; });
}

int emulated_driver_pending() {
  return locked([] { return int(pending.size()); });
}

// For tests.
void emulated_driver_counts(void *copy) {
  locked([&] { return memcpy(copy, &counts, sizeof(counts)), 0; });
}

uint64_t emulated_driver_live() {
  return uint64_t(locked([] { return int(live.size() + locked_pages.size()); }));
}

void emulated_driver_set_unrecordable(bool set) {
  locked([=] { return unrecordable = set, 0; });
}

int cuInit(unsigned) { return 0; }
int cuDriverGetVersion(int *version) { return *version = 13000, 0; }
int cuDeviceGetCount(int *count) { return *count = 1, 0; }
int cuDeviceGet(int *device, int ordinal) { return *device = 0, ordinal == 0 ? 0 : INVALID_VALUE; }
int cuDeviceGetName(char *name, int length, int) { return snprintf(name, size_t(length), "Emulator, no GPU"), 0; }
// 115: memory that is taken and freed in the order of a stream.
int cuDeviceGetAttribute(int *value, int attribute, int) {
  // 75: the first number of its compute capability.
  return *value = attribute == 75 ? 9 : attribute == 115, 0;
}
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
  return locked([=] {
    if (recorded) fail("memory is freed while work is recorded");
    return put([=] { release(address); }), 0;
  });
}
int cuMemHostAlloc(void **address, size_t bytes, unsigned) {
  return locked([=] {
    if (recorded) fail("memory is taken while work is recorded");
    *address = malloc(bytes);
    if (!*address || bytes == 0) return OUT_OF_MEMORY;
    memset(*address, 0xa5, bytes);
    locked_pages[uint64_t(*address)] = bytes;
    return counts.taken++, 0;
  });
}
int cuMemFreeHost(void *address) {
  return locked([=] {
    if (locked_pages.erase(uint64_t(address)) != 1) fail("page-locked memory is freed that was not taken");
    return free(address), 0;
  });
}
int cuMemsetD8Async(uint64_t address, unsigned char value, size_t bytes, void *) {
  return locked([=] { return put([=] { memset(pointer(address), value, bytes); }), 0; });
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

// As in cuda.h.
struct Copy2D {
  size_t from_x, from_y;
  unsigned from_type;
  const void *from_host;
  uint64_t from_device;
  void *from_array;
  size_t from_pitch, to_x, to_y;
  unsigned to_type;
  void *to_host;
  uint64_t to_device;
  void *to_array;
  size_t to_pitch, width, height;
};

int cuMemcpy2DAsync_v2(const Copy2D *c, void *) {
  const unsigned HOST = 1, DEVICE = 2;
  const bool from_host = c->from_type == HOST, to_host = c->to_type == HOST;
  if ((!from_host && c->from_type != DEVICE) || (!to_host && c->to_type != DEVICE) || (from_host && to_host)) return INVALID_VALUE;
  if (c->from_x || c->from_y || c->to_x || c->to_y || c->from_pitch < c->width || c->to_pitch < c->width) return INVALID_VALUE;
  const void *from = from_host ? c->from_host : pointer(c->from_device);
  void *to = to_host ? c->to_host : pointer(c->to_device);
  const int kind = from_host ? 0 : to_host ? 1 : 2;
  return locked([=] { return copy(kind, to, c->to_pitch, from, c->from_pitch, c->height, c->width); });
}

int cuStreamCreate(void **stream, unsigned) {
  return locked([=] { return *stream = new int(0), reserved = in_use(), 0; });
}
int cuStreamDestroy_v2(void *stream) {
  return locked([=] { return finish(), delete static_cast<int *>(stream), 0; });
}
int cuStreamSynchronize(void *) {
  return locked([] {
    if (recorded) return invalid = true, CAPTURE_UNSUPPORTED;
    return finish(), 0;
  });
}

int cuStreamBeginCapture_v2(void *, int) {
  return locked([] { return recorded ? INVALID_VALUE : (invalid = false, recorded = new Work, 0); });
}
int cuStreamEndCapture(void *, Work **graph) {
  return locked([=] {
    if (!recorded) return INVALID_VALUE;
    if (invalid) delete recorded;
    *graph = invalid ? nullptr : recorded;
    recorded = nullptr;
    return invalid ? CAPTURE_INVALIDATED : 0;
  });
}
int cuGraphInstantiateWithFlags(Work **executable, const Work *graph, uint64_t) {
  return locked([=] { return counts.records++, *executable = new Work(*graph), 0; });
}
int cuGraphLaunch(const Work *executable, void *) {
  return locked([=] {
    counts.graphs++;
    for (const auto &work : *executable) put(work);
    return 0;
  });
}
int cuGraphExecDestroy(Work *executable) {
  return locked([=] {
    if (!pending.empty()) fail("a graph is destroyed while work is under way");
    return delete executable, 0;
  });
}
int cuGraphDestroy(Work *graph) { return delete graph, 0; }

// Code must be that of a device, as a real driver would find.
int cuModuleLoadData(void **module, const void *image) {
  return *module = new int(0), memcmp(image, "\x7f" "ELF", 4) == 0 ? 0 : INVALID_VALUE;
}
int cuModuleUnload(void *module) { return delete static_cast<int *>(module), 0; }
int cuModuleGetFunction(const void **found, void *, const char *name) {
  *found = name;
  return strcmp(name, "accordion_append_each") == 0 ? 0 : NOT_FOUND;
}
int cuLaunchKernel(const void *, unsigned x, unsigned y, unsigned, unsigned threads, unsigned, unsigned, unsigned, void *,
                   void **arguments, void **) {
  const AccordionAppendRows call = *static_cast<const AccordionAppendRows *>(arguments[0]);
  return locked([=] {
    counts.kernels += recorded == nullptr;
    put([=] {
      const size_t row = size_t(call.rows * call.width * accordion::element_bytes(call.type));
      if (!owner(uint64_t(call.length_at), 8) || !owner(uint64_t(call.pairs), size_t(call.caches) * sizeof(*call.pairs)))
        fail("a kernel reads where nothing was taken");
      for (int64_t i = 0; i < call.caches; i++)
        if (!owner(uint64_t(call.pairs[i].row), row) || !owner(uint64_t(call.pairs[i].cache), row * size_t(call.capacity)))
          fail("rows are appended from or to where nothing was taken");
      emulator::run(dim3(x, y), threads, [&] { accordion_append_each(call); });
    });
    return 0;
  });
}

struct Event {
  bool recorded = false, reached = false;
  uint64_t time = 0;
};

int cuEventCreate(void **event, unsigned) { return *event = new Event, 0; }
int cuEventRecord(void *event, void *) {
  return locked([=] {
    if (recorded) fail("a moment is recorded as a part of a graph");
    auto *moment = static_cast<Event *>(event);
    moment->recorded = true;
    moment->reached = false;
    return put([=] { moment->reached = true, moment->time = now; }), 0;
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
  return locked([=] {
    auto *moment = static_cast<Event *>(event);
    if (moment->recorded && !moment->reached) return pending.push_back([=] { delete moment; }), 0;
    return delete moment, 0;
  });
}

int cuGetErrorName(int status, const char **name) { return *name = status ? "CUDA_ERROR" : "CUDA_SUCCESS", 0; }
int cuGetErrorString(int, const char **text) { return *text = "the emulated driver refuses", 0; }

}  // extern "C"
