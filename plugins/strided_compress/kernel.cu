// The rows that ai.accordion::StridedCompress and StridedCompressMean keep, on CUDA devices. See contract.md.

#include "rows.cuh"

namespace accordion {

// Rows of y; row k is row `ratio` k + `offset` of x, or of the mean of x and x2.
__host__ __device__ __forceinline__ int64_t kept_rows(const AccordionStridedRows &call) {
  return call.segments * (call.window / call.ratio);
}

template <class E, class V>
__device__ __forceinline__ void mean_tile_in(const AccordionStridedRows &call, int64_t row_bytes, int64_t tile) {
  typedef Elements<E, V> Vector;
  const int64_t first = tile * tile_rows(row_bytes), rows = kept_rows(call);
  const int64_t vectors = row_bytes / int64_t(sizeof(V)), ratio = call.ratio, offset = call.offset;
  const V *a = (const V *)call.x, *b = (const V *)call.x2;
  const uint32_t height = uint32_t(smaller(tile_rows(row_bytes), rows - first));
  write_tile(
      (V *)call.y + first * vectors, height, uint32_t(vectors),
      [=](uint32_t row, uint32_t column) { return ((first + row) * ratio + offset) * vectors + column; },
      [=](int64_t place) {
        Vector one, other;
        one.vector = load_once(a + place);
        other.vector = load_once(b + place);
#pragma unroll
        for (int e = 0; e < Vector::COUNT; e++) {
          // Rounded between the two, as two operators would.
          one.bits[e] = E::encode(__fmul_rn(0.5f, E::decode(one.bits[e]) + E::decode(other.bits[e])));
        }
        return one.vector;
      });
}

template <class E>
__device__ __forceinline__ void mean(const AccordionStridedRows &call) {
  const int64_t row_bytes = call.width * int64_t(sizeof(typename E::Bits));
  const bool wide = vector_bytes(call.x, call.y, row_bytes) == 16 && vector_bytes(call.x2, call.y, row_bytes) == 16;
  if (wide) {
    mean_tile_in<E, uint4>(call, row_bytes, blockIdx.x);
  } else {
    mean_tile_in<E, typename E::Bits>(call, row_bytes, blockIdx.x);
  }
}

}  // namespace accordion

extern "C" {

// A block for each tile; of any type.
__global__ void __launch_bounds__(accordion::ROW_THREADS, accordion::ROW_BLOCKS)
    accordion_strided_select(const AccordionStridedRows call) {
  using namespace accordion;
  const int64_t row_bytes = call.width * element_bytes(call.type), ratio = call.ratio, offset = call.offset;
  copy_tile((const char *)call.x, (char *)call.y, row_bytes, blockIdx.x, kept_rows(call),
            [=](int64_t k) { return k * ratio + offset; });
}

__global__ void __launch_bounds__(accordion::ROW_THREADS, accordion::ROW_BLOCKS)
    accordion_strided_mean_f32(const AccordionStridedRows call) {
  accordion::mean<accordion::F32>(call);
}

__global__ void __launch_bounds__(accordion::ROW_THREADS, accordion::ROW_BLOCKS)
    accordion_strided_mean_f16(const AccordionStridedRows call) {
  accordion::mean<accordion::F16>(call);
}

__global__ void __launch_bounds__(accordion::ROW_THREADS, accordion::ROW_BLOCKS)
    accordion_strided_mean_bf16(const AccordionStridedRows call) {
  accordion::mean<accordion::BF16>(call);
}

}  // extern "C"

#ifndef __CUDACC_RTC__
#include "launch.h"
#include "shapes.h"

extern "C" const char *accordion_strided_rows(const AccordionStridedRows *given, void *stream) {
  using namespace accordion;
  const AccordionStridedRows &call = *given;
  if (const char *refused = shape_refusal(call)) return refused;
  const int64_t tiles = tile_count(kept_rows(call), call.width * element_bytes(call.type));
  if (tiles == 0) return nullptr;
  if (!call.x || !call.y) return "StridedCompress: x or y is null";
  if (tiles > MOST_BLOCKS) return "StridedCompress: more than 2^31 - 1 tiles to copy";
  auto *kernel = !call.x2                       ? accordion_strided_select
                 : call.type == ACCORDION_F32   ? accordion_strided_mean_f32
                 : call.type == ACCORDION_F16   ? accordion_strided_mean_f16
                                                : accordion_strided_mean_bf16;
  return launch(kernel, dim3(uint32_t(tiles)), ROW_THREADS, stream, call);
}
#endif
