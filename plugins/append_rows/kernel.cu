// Appends a row to every cache of a decoder, on CUDA devices. Where it goes is read from the device's memory, so that the launch is the
// same for every token and can be repeated from a CUDA graph.

#include "rows.cuh"

namespace accordion {

// Vectors of one new row; all threads of `gridDim.y` blocks share them.
template <class V>
__device__ __forceinline__ void append_in(const AccordionAppendedRow &pair, const AccordionAppendRows &call, int64_t row_bytes,
                                          int64_t at) {
  const int64_t row_vectors = row_bytes / int64_t(sizeof(V)), total = call.rows * row_vectors;
  const V *row = (const V *)pair.row;
  V *cache = (V *)pair.cache;
  for (int64_t i = int64_t(blockIdx.y) * ROW_THREADS + threadIdx.x; i < total; i += int64_t(gridDim.y) * ROW_THREADS) {
    const int64_t group = i / row_vectors, column = i % row_vectors;
    store_kept(cache + (group * call.capacity + at) * row_vectors + column, load_once(row + i));
  }
}

}  // namespace accordion

extern "C" {

// A column of blocks for each cache; of any type.
__global__ void __launch_bounds__(accordion::ROW_THREADS, accordion::ROW_BLOCKS)
    accordion_append_each(const AccordionAppendRows call) {
  using namespace accordion;
  const int64_t row_bytes = call.width * element_bytes(call.type), at = *call.length_at;
  if (at < 0 || at >= call.capacity) return;
  const AccordionAppendedRow pair = call.pairs[blockIdx.x];
  switch (vector_bytes(pair.row, pair.cache, row_bytes)) {
    case 16: return append_in<uint4>(pair, call, row_bytes, at);
    case 8: return append_in<uint2>(pair, call, row_bytes, at);
    case 4: return append_in<uint32_t>(pair, call, row_bytes, at);
    default: return append_in<uint16_t>(pair, call, row_bytes, at);
  }
}

}  // extern "C"

#ifndef __CUDACC_RTC__
#include "launch.h"

namespace accordion {

inline const char *append_refusal(const AccordionAppendRows &call) {
  if (!is_length(call.caches) || !is_length(call.rows) || !is_length(call.capacity) || !is_length(call.width))
    return "AppendRows: a length is negative or at least 2^31";
  if (!known_type(call.type)) return "AppendRows: unknown element type";
  if (!(Product(call.rows) * call.capacity * call.width * 4).fits || !(Product(call.rows) * call.width * 4).fits)
    return "AppendRows: a cache has more bytes than 63 bits can count";
  return nullptr;
}

}  // namespace accordion

extern "C" const char *accordion_append_rows(const AccordionAppendRows *given, void *stream) {
  using namespace accordion;
  const AccordionAppendRows &call = *given;
  if (const char *refused = append_refusal(call)) return refused;
  const int64_t bytes = call.rows * call.width * element_bytes(call.type), block_bytes = ROW_THREADS * 16;
  if (call.caches == 0 || call.capacity == 0 || bytes == 0) return nullptr;
  if (!call.pairs || !call.length_at) return "AppendRows: pairs or length_at is null";
  const int64_t blocks = smaller((bytes + block_bytes - 1) / block_bytes, 65535);
  return launch(accordion_append_each, dim3(uint32_t(call.caches), uint32_t(blocks)), ROW_THREADS, stream, call);
}
#endif
