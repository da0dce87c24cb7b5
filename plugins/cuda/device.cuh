// What kernels are written in: CUDA by nvcc or NVRTC, without any header of the toolkit, or plain C++ with the emulator.
#ifndef ACCORDION_DEVICE_CUH
#define ACCORDION_DEVICE_CUH

#include "accordion_kernels.h"

#ifndef __CUDACC__
#include "emulator.h"
#endif

namespace accordion {

constexpr uint32_t WARP = 32;
constexpr uint32_t ALL_LANES = 0xffffffffu;

__host__ __device__ __forceinline__ int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

__device__ __forceinline__ int64_t clamp(int64_t value, int64_t low, int64_t high) {
  return value < low ? low : value > high ? high : value;
}

#ifdef __CUDACC__
// What is read once and written once should not displace what is read again: __ldcs and __stcs, for each width of a vector.
template <class V>
__device__ __forceinline__ V load_once(const V *from) {
  return __ldcs(from);
}

template <class V>
__device__ __forceinline__ void store_once(V *to, V value) {
  __stcs(to, value);
}

// What is read again soon.
template <class V>
__device__ __forceinline__ void store_kept(V *to, V value) {
  *to = value;
}

// What stays as it is while the kernel runs, and is read by many threads.
template <class V>
__device__ __forceinline__ V load_shared(const V *from) {
  return __ldg(from);
}
#else
template <class V>
V load_once(const V *from) {
  return emulator::checked(from, sizeof(V)), *from;
}

template <class V>
void store_once(V *to, V value) {
  emulator::checked(to, sizeof(V)), *to = value;
}

template <class V>
void store_kept(V *to, V value) {
  store_once(to, value);
}

template <class V>
V load_shared(const V *from) {
  return load_once(from);
}
#endif

// Half precision without the toolkit's headers.
#ifdef __CUDACC__
__device__ __forceinline__ float half_to_float(uint16_t bits) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
}

__device__ __forceinline__ uint16_t float_to_half(float value) {
  uint16_t bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}

__device__ __forceinline__ uint16_t float_to_bfloat(float value) {
  uint16_t bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}
#else
using emulator::float_to_bfloat;
using emulator::float_to_half;
using emulator::half_to_float;
#endif

// The element types: how they lie in memory, and what they are as numbers.
struct F32 {
  typedef uint32_t Bits;
  static __device__ __forceinline__ float decode(Bits bits) { return __uint_as_float(bits); }
  static __device__ __forceinline__ Bits encode(float value) { return __float_as_uint(value); }
};

struct F16 {
  typedef uint16_t Bits;
  static __device__ __forceinline__ float decode(Bits bits) { return half_to_float(bits); }
  static __device__ __forceinline__ Bits encode(float value) { return float_to_half(value); }
};

struct BF16 {
  typedef uint16_t Bits;
  static __device__ __forceinline__ float decode(Bits bits) { return __uint_as_float(uint32_t(bits) << 16); }
  static __device__ __forceinline__ Bits encode(float value) { return float_to_bfloat(value); }
};

// The elements of a vector V of E, each in its place.
template <class E, class V>
union Elements {
  static constexpr int COUNT = sizeof(V) / sizeof(typename E::Bits);
  V vector;
  typename E::Bits bits[COUNT];
};

__host__ __device__ __forceinline__ int64_t element_bytes(int32_t type) { return type == ACCORDION_F32 ? 4 : 2; }

// The widest vector that every row of `row_bytes` can be cut into, wherever it starts.
__device__ __forceinline__ uint32_t vector_bytes(const void *a, const void *b, int64_t row_bytes) {
  const uint64_t bits = uint64_t(a) | uint64_t(b) | uint64_t(row_bytes);
  return bits % 16 == 0 ? 16 : bits % 8 == 0 ? 8 : bits % 4 == 0 ? 4 : 2;
}

}  // namespace accordion
#endif
