// One way to launch a kernel, on a device or in the emulator.
#ifndef ACCORDION_LAUNCH_H
#define ACCORDION_LAUNCH_H

#include "device.cuh"
#include "lengths.h"

namespace accordion {

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
