// CUDA_MEMCPY2D of the driver's interface, as far as a copy on the device needs it: for drivers without one.
#pragma once

#include <stddef.h>
#include <stdint.h>

struct Side {
  size_t x, y;
  int memory;  // 2: a device's
  const void *host;
  uint64_t device;
  void *array;
  size_t pitch;
};

struct Memcpy2D {
  Side from, to;
  size_t width, height;

  // Puts its rows on the stream by `copy(to, from, bytes, stream)`, if it is one that a driver takes; else returns an error.
  template <class Copy>
  int rows(Copy copy, void *stream) const {
    const auto valid = [&](const Side &side) {
      return side.memory == 2 && !side.x && !side.y && side.device && side.pitch >= width && side.pitch <= 0x7fffffff;
    };
    if (!valid(from) || !valid(to)) return 1;
    for (size_t row = 0; row < height; ++row)
      if (const int status = copy(to.device + row * to.pitch, from.device + row * from.pitch, width, stream)) return status;
    return 0;
  }
};
