// What the launching functions share: checked lengths, and one way to launch on a device or in the emulator.
#ifndef ACCORDION_LAUNCH_H
#define ACCORDION_LAUNCH_H

#include "device.cuh"

namespace accordion {

// Whether a length can be one: 0 to 2^31 - 1.
struct Lengths {
  bool operator()(int64_t length) const { return length >= 0 && length <= 0x7fffffff; }
};

// A product of lengths, and whether 63 bits hold it.
struct Product {
  int64_t value;
  bool fits = true;

  explicit Product(int64_t length) : value(length) {}

  Product operator*(int64_t factor) const {
    Product product = *this;
    product.fits = fits && !__builtin_mul_overflow(value, factor, &product.value);
    return product;
  }
};

inline bool known_type(int32_t type) { return type == ACCORDION_F32 || type == ACCORDION_F16 || type == ACCORDION_BF16; }

template <class Call>
const char *launch(void (*kernel)(Call), dim3 grid, uint32_t threads, void *stream, const Call &call) {
#ifdef __CUDACC__
  kernel<<<grid, threads, 0, cudaStream_t(stream)>>>(call);
  const cudaError_t status = cudaPeekAtLastError();
  return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
#else
  (void)stream;
  emulator::run(grid, threads, [&] { kernel(call); });
  return nullptr;
#endif
}

}  // namespace accordion
#endif
