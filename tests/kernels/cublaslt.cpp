// The part of cuBLASLt's interface that StridedCompress uses, computed on the CPU from its own description: column-major matrices
// with a leading dimension, the first one transposed if the description says so.

#include <dlfcn.h>
#include <stddef.h>
#include <stdint.h>

#include <functional>

#include "emulator.h"

namespace {

constexpr int F32 = 0, F16 = 2, BF16 = 14, COMPUTE_32F = 68, NOT_SUPPORTED = 15;

struct Desc {
  int32_t transpose_a = 0;
};

struct Layout {
  int type;
  uint64_t rows, columns;
  int64_t leading_dimension;
};

struct Heuristic {
  uint64_t algorithm[8];
  size_t workspace_bytes;
  int state;
  float waves;
  int reserved[4];
};

float read(const Layout &layout, const void *at, uint64_t row, uint64_t column) {
  const uint64_t index = column * uint64_t(layout.leading_dimension) + row;
  if (row >= layout.rows || column >= layout.columns) emulator::fail("an element outside of its matrix");
  if (layout.type == F32) return static_cast<const float *>(at)[index];
  const uint16_t bits = static_cast<const uint16_t *>(at)[index];
  return layout.type == F16 ? emulator::half_to_float(bits) : emulator::unpack<float>(uint64_t(bits) << 16);
}

void write(const Layout &layout, void *at, uint64_t row, uint64_t column, float value) {
  const uint64_t index = column * uint64_t(layout.leading_dimension) + row;
  if (layout.type == F32) {
    static_cast<float *>(at)[index] = value;
  } else {
    static_cast<uint16_t *>(at)[index] = layout.type == F16 ? emulator::float_to_half(value) : emulator::float_to_bfloat(value);
  }
}

// Whether the emulated driver is recording, and takes the work to do it later, as a stream does.
bool record(const std::function<void()> &work) {
  void *driver = dlopen("libcuda.so", RTLD_NOW | RTLD_NOLOAD);
  if (!driver) return false;
  const auto take = reinterpret_cast<bool (*)(const std::function<void()> *)>(dlsym(driver, "emulated_driver_record"));
  return take && take(&work);
}

}  // namespace

extern "C" {

int cublasLtCreate(void **handle) {
  *handle = new int(0);
  return 0;
}

int cublasLtDestroy(void *handle) {
  delete static_cast<int *>(handle);
  return 0;
}

int cublasLtMatmulDescCreate(void **desc, int compute_type, int scale_type) {
  if (compute_type != COMPUTE_32F || scale_type != F32) return NOT_SUPPORTED;
  *desc = new Desc;
  return 0;
}

int cublasLtMatmulDescSetAttribute(void *desc, int attribute, const void *value, size_t size) {
  if (attribute != 3 || size != 4) return NOT_SUPPORTED;
  static_cast<Desc *>(desc)->transpose_a = *static_cast<const int32_t *>(value);
  return 0;
}

int cublasLtMatmulDescDestroy(void *desc) {
  delete static_cast<Desc *>(desc);
  return 0;
}

int cublasLtMatrixLayoutCreate(void **layout, int type, uint64_t rows, uint64_t columns, int64_t leading_dimension) {
  if ((type != F32 && type != F16 && type != BF16) || leading_dimension < int64_t(rows)) return NOT_SUPPORTED;
  *layout = new Layout{type, rows, columns, leading_dimension};
  return 0;
}

int cublasLtMatrixLayoutDestroy(void *layout) {
  delete static_cast<Layout *>(layout);
  return 0;
}

int cublasLtMatmulPreferenceCreate(void **preference) {
  *preference = new int(0);
  return 0;
}

int cublasLtMatmulPreferenceSetAttribute(void *, int attribute, const void *, size_t size) {
  const bool workspace = attribute == 1 && size == 8, mask = attribute == 3 && size == 4;
  const bool alignment = attribute >= 5 && attribute <= 8 && size == 4;
  return workspace || mask || alignment ? 0 : NOT_SUPPORTED;
}

int cublasLtMatmulPreferenceDestroy(void *preference) {
  delete static_cast<int *>(preference);
  return 0;
}

int cublasLtMatmulAlgoGetHeuristic(void *, void *, void *, void *, void *, void *, void *, int wanted, Heuristic *best,
                                   int *found) {
  if (wanted < 1) return NOT_SUPPORTED;
  *best = Heuristic();
  *found = 1;
  return 0;
}

int cublasLtMatmul(void *, void *desc, const float *alpha, const void *a, void *a_layout, const void *b, void *b_layout,
                   const float *beta, const void *, void *, void *d, void *d_layout, const void *, void *, size_t, void *) {
  // Copies: descriptions may go before work that is recorded is done.
  const Layout la = *static_cast<Layout *>(a_layout), lb = *static_cast<Layout *>(b_layout), ld = *static_cast<Layout *>(d_layout);
  const bool transpose = static_cast<Desc *>(desc)->transpose_a;
  const uint64_t m = transpose ? la.columns : la.rows, k = transpose ? la.rows : la.columns;
  const float factor = *alpha;
  if (*beta != 0 || lb.rows != k || ld.rows != m || ld.columns != lb.columns || la.type != lb.type || la.type != ld.type)
    return NOT_SUPPORTED;
  const auto multiply = [=] {
    for (uint64_t j = 0; j < ld.columns; j++) {
      for (uint64_t i = 0; i < m; i++) {
        float sum = 0;
        for (uint64_t c = 0; c < k; c++) sum += (transpose ? read(la, a, c, i) : read(la, a, i, c)) * read(lb, b, c, j);
        write(ld, d, i, j, factor * sum);
      }
    }
  };
  if (!record(multiply)) multiply();
  return 0;
}

}  // extern "C"
