// Writing rows of a matrix, tile by tile, in vectors. What a vector is made of is the caller's.
#ifndef ACCORDION_ROWS_CUH
#define ACCORDION_ROWS_CUH

#include "device.cuh"

namespace accordion {

// A block that moves rows: its threads, and how many such blocks a multiprocessor should have room for. Each thread has BATCH
// vectors under way at once, 64 KiB in a multiprocessor, which is what hides the memory's latency.
constexpr uint32_t ROW_THREADS = 256, ROW_BLOCKS = 4;
constexpr int BATCH = 4;

// Bytes of a tile: two batches of vectors of 16 bytes for every thread.
constexpr int64_t TILE_BYTES = 2 * BATCH * 16 * ROW_THREADS;

// Whole rows that make up a tile; a row longer than a tile is a tile.
__host__ __device__ __forceinline__ int64_t tile_rows(int64_t row_bytes) {
  return row_bytes <= 0 || row_bytes >= TILE_BYTES ? 1 : TILE_BYTES / row_bytes;
}

// Tiles of a matrix.
__host__ __device__ __forceinline__ int64_t tile_count(int64_t rows, int64_t row_bytes) {
  const int64_t height = tile_rows(row_bytes);
  return row_bytes == 0 ? 0 : (rows + height - 1) / height;
}

// Writes `rows` rows of `row_vectors` vectors, one after the other. `locate(row, column)` says where what belongs there is, and
// `load` what it is: apart, so that what the places depend on is not waited for once for every vector. All threads of the block come
// here together, or none.
template <class V, class Locate, class Load>
__device__ __forceinline__ void write_tile(V *to, uint32_t rows, uint32_t row_vectors, Locate locate, Load load) {
  const uint32_t total = rows * row_vectors;
  // A thread's place moves on by a constant number of rows and columns: no division for each vector.
  const uint32_t row_step = ROW_THREADS / row_vectors, column_step = ROW_THREADS % row_vectors;
  uint32_t row = threadIdx.x / row_vectors, column = threadIdx.x % row_vectors;
#pragma unroll 1
  for (uint32_t first = threadIdx.x; first < total; first += BATCH * ROW_THREADS) {
    int64_t places[BATCH];
    V batch[BATCH];
#pragma unroll
    for (int i = 0; i < BATCH; i++) {
      // Past the end, the last row once more, which is not written.
      places[i] = locate(row < rows ? row : rows - 1, column);
      row += row_step;
      column += column_step;
      if (column >= row_vectors) {
        column -= row_vectors;
        row++;
      }
    }
#pragma unroll
    for (int i = 0; i < BATCH; i++) batch[i] = load(places[i]);
#pragma unroll
    for (int i = 0; i < BATCH; i++) {
      if (first + i * ROW_THREADS < total) store_once(to + first + i * ROW_THREADS, batch[i]);
    }
  }
}

// One tile of a matrix whose row k is row `source_row(k)` of `from`.
template <class V, class SourceRow>
__device__ __forceinline__ void copy_tile_in(const char *from, char *to, int64_t row_bytes, int64_t tile, int64_t rows,
                                             SourceRow source_row) {
  const int64_t first = tile * tile_rows(row_bytes);
  const uint32_t height = uint32_t(smaller(tile_rows(row_bytes), rows - first)), row_vectors = uint32_t(row_bytes / sizeof(V));
  write_tile(
      (V *)(to + first * row_bytes), height, row_vectors,
      [=](uint32_t row, uint32_t column) { return source_row(first + row) * row_vectors + column; },
      [=](int64_t place) { return load_once((const V *)from + place); });
}

// The same with the widest vectors that fit.
template <class SourceRow>
__device__ __forceinline__ void copy_tile(const char *from, char *to, int64_t row_bytes, int64_t tile, int64_t rows,
                                          SourceRow source_row) {
  switch (vector_bytes(from, to, row_bytes)) {
    case 16: return copy_tile_in<uint4>(from, to, row_bytes, tile, rows, source_row);
    case 8: return copy_tile_in<uint2>(from, to, row_bytes, tile, rows, source_row);
    case 4: return copy_tile_in<uint32_t>(from, to, row_bytes, tile, rows, source_row);
    default: return copy_tile_in<uint16_t>(from, to, row_bytes, tile, rows, source_row);
  }
}

}  // namespace accordion
#endif
