// Runs kernels on the CPU, so that the very sources that a GPU gets can be tested where there is none.
//
// The threads of a block are fibers. Barriers, votes and shuffles are where they take turns; between them they run in an order
// that is shuffled every time, so that a barrier that is missing shows. As on a GPU, a vector must lie at a multiple of its size.
// Stricter than a GPU, a barrier that some threads of the block never reach, or a vote or shuffle that not all lanes of the warp
// take part in, ends the process.
#ifndef ACCORDION_EMULATOR_H
#define ACCORDION_EMULATOR_H

#include <setjmp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <mutex>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
// Blocks run one after the other.
#define __shared__ static

struct dim3 {
  uint32_t x, y, z;
  explicit dim3(uint32_t x, uint32_t y = 1, uint32_t z = 1) : x(x), y(y), z(z) {}
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

inline dim3 threadIdx(0), blockIdx(0), blockDim(1), gridDim(1);

namespace emulator {

constexpr uint32_t MOST_THREADS = 1024, WARP = 32;
constexpr size_t STACK_BYTES = 64 << 10;

[[noreturn]] inline void fail(const char *message) {
  fprintf(stderr, "emulator: block (%u, %u), thread %u: %s\n", blockIdx.x, blockIdx.y, threadIdx.x, message);
  abort();
}

inline void checked(const void *at, size_t size) {
  if (uintptr_t(at) % size != 0) fail("a vector does not lie at a multiple of its size");
}

enum class State { READY, AT_BARRIER, AT_EXCHANGE, DONE };

struct Fiber {
  jmp_buf at;
  bool started;
  State state;
  uint32_t exchanges;
};

inline Fiber fibers[MOST_THREADS];
inline jmp_buf scheduler;
inline void (*body)(const void *);
inline const void *body_data;
// What the lanes of each warp exchange. Two, because a lane may bring the next value before another has read the last.
inline uint64_t exchanged[2][MOST_THREADS];

inline void yield(State state) {
  Fiber &fiber = fibers[threadIdx.x];
  fiber.state = state;
  if (_setjmp(fiber.at) == 0) _longjmp(scheduler, 1);
}

// A fiber runs block after block.
inline void fiber_main() {
  for (;;) {
    body(body_data);
    yield(State::DONE);
  }
}

inline char *stacks() {
  static char *memory = [] {
    const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    void *mapped = mmap(nullptr, MOST_THREADS * STACK_BYTES, PROT_READ | PROT_WRITE, flags, -1, 0);
    if (mapped == MAP_FAILED) fail("no memory for stacks");
    return static_cast<char *>(mapped);
  }();
  return memory;
}

inline void resume(uint32_t thread) {
  Fiber &fiber = fibers[thread];
  threadIdx.x = thread;
  fiber.state = State::READY;
  if (_setjmp(scheduler) != 0) return;
  if (fiber.started) _longjmp(fiber.at, 1);
  fiber.started = true;
  static ucontext_t context, unused;
  getcontext(&context);
  context.uc_stack.ss_sp = stacks() + thread * STACK_BYTES;
  context.uc_stack.ss_size = STACK_BYTES;
  context.uc_link = nullptr;
  makecontext(&context, fiber_main, 0);
  swapcontext(&unused, &context);
}

inline uint32_t random_below(uint32_t limit) {
  static uint64_t state = 1;
  state = state * 6364136223846793005u + 1442695040888963407u;
  return uint32_t(state >> 33) % limit;
}

// Whether the threads from `first` on all wait for each other.
inline bool all_wait(uint32_t first, uint32_t count, State state) {
  for (uint32_t i = first; i < first + count; i++)
    if (fibers[i].state != state) return false;
  return true;
}

inline void run_block(uint32_t threads) {
  static uint32_t order[MOST_THREADS];
  for (uint32_t i = 0; i < threads; i++) {
    order[i] = i;
    fibers[i].state = State::READY;
  }
  for (;;) {
    // Warps in random order, and in each warp lanes in random order until all of them wait for something else.
    for (uint32_t i = threads / WARP - 1; i > 0; i--) {
      const uint32_t j = random_below(i + 1), at = order[i];
      order[i] = order[j];
      order[j] = at;
    }
    for (uint32_t w = 0; w < threads / WARP; w++) {
      const uint32_t first = order[w] * WARP;
      if (!all_wait(first, WARP, State::READY)) fail("the threads of a block take different ways around a barrier");
      do {
        const uint32_t rotation = random_below(WARP), mirror = random_below(2) * (WARP - 1);
        for (uint32_t lane = 0; lane < WARP; lane++) resume(first + ((lane + rotation) % WARP ^ mirror));
      } while (all_wait(first, WARP, State::AT_EXCHANGE));
    }
    if (all_wait(0, threads, State::DONE)) return;
    if (!all_wait(0, threads, State::AT_BARRIER)) fail("the threads of a block take different ways around a barrier");
    for (uint32_t i = 0; i < threads; i++) fibers[i].state = State::READY;
  }
}

inline std::mutex running;

// Runs a kernel, block by block. One at a time.
template <class Body>
void run(dim3 grid, uint32_t threads, const Body &kernel) {
  const std::lock_guard<std::mutex> lock(running);
  if (threads % WARP != 0 || threads > MOST_THREADS) fail("a block has whole warps and at most 1024 threads");
  body = [](const void *data) { (*static_cast<const Body *>(data))(); };
  body_data = &kernel;
  gridDim = grid;
  blockDim = dim3(threads);
  for (blockIdx.y = 0; blockIdx.y < grid.y; blockIdx.y++)
    for (blockIdx.x = 0; blockIdx.x < grid.x; blockIdx.x++) run_block(threads);
}

// Brings a value and waits for those of the warp's other lanes.
inline const uint64_t *exchange(uint64_t value) {
  const uint32_t thread = threadIdx.x, turn = fibers[thread].exchanges++ % 2;
  exchanged[turn][thread] = value;
  yield(State::AT_EXCHANGE);
  return exchanged[turn] + thread / WARP * WARP;
}

template <class T>
uint64_t pack(T value) {
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof(T));
  return bits;
}

template <class T>
T unpack(uint64_t bits) {
  T value;
  memcpy(&value, &bits, sizeof(T));
  return value;
}

// Rounds to the nearest, ties to even, like the instructions for it.
inline uint16_t float_to_bfloat(float value) {
  const uint32_t bits = unpack<uint32_t>(pack(value));
  if (value != value) return 0x7fff;
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline float half_to_float(uint16_t bits) {
  const float sign = bits >> 15 ? -1.0f : 1.0f;
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  if (exponent == 31) return fraction ? unpack<float>(0x7fc00000u) : sign * __builtin_inff();
  if (exponent == 0) return sign * __builtin_ldexpf(float(fraction), -24);
  return sign * __builtin_ldexpf(float(1024 + fraction), exponent - 25);
}

inline uint16_t float_to_half(float value) {
  if (value != value) return 0x7fff;
  const uint16_t sign = __builtin_signbit(value) ? 0x8000 : 0;
  const float size = __builtin_fabsf(value);
  if (size >= 65520.0f) return sign | 0x7c00;
  // One unit of the last place of a half of this size; below 2^-14 they are all alike.
  int exponent;
  __builtin_frexpf(size, &exponent);
  const int unit = (exponent > -13 ? exponent : -13) - 11;
  const uint32_t units = uint32_t(__builtin_rintf(__builtin_ldexpf(size, -unit)));
  return units < 1024 ? sign | uint16_t(units) : sign | uint16_t(uint32_t(unit + 24) * 1024 + units);
}

}  // namespace emulator

inline void __syncthreads() { emulator::yield(emulator::State::AT_BARRIER); }

inline uint32_t __ballot_sync(uint32_t, bool vote) {
  const uint64_t *votes = emulator::exchange(vote);
  uint32_t ballot = 0;
  for (uint32_t lane = 0; lane < emulator::WARP; lane++) ballot |= uint32_t(votes[lane]) << lane;
  return ballot;
}

template <class T>
T __shfl_xor_sync(uint32_t, T value, uint32_t mask) {
  return emulator::unpack<T>(emulator::exchange(emulator::pack(value))[(threadIdx.x ^ mask) % emulator::WARP]);
}

template <class T>
T __shfl_up_sync(uint32_t, T value, uint32_t distance) {
  const uint32_t lane = threadIdx.x % emulator::WARP;
  const uint64_t *values = emulator::exchange(emulator::pack(value));
  return emulator::unpack<T>(values[lane >= distance ? lane - distance : lane]);
}

inline uint32_t atomicAdd(uint32_t *to, uint32_t value) {
  const uint32_t old = *to;
  *to += value;
  return old;
}

inline int __popc(uint32_t bits) { return __builtin_popcount(bits); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __uint_as_float(uint32_t bits) { return emulator::unpack<float>(bits); }
inline uint32_t __float_as_uint(float value) { return emulator::unpack<uint32_t>(emulator::pack(value)); }

#endif
