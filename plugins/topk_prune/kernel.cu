// ai.accordion::TopKPrune on CUDA devices: scores, selection, gathering, one launch each. See contract.md.

#include "rows.cuh"

namespace accordion {

constexpr uint32_t SCORE_THREADS = 128;
constexpr uint32_t SELECT_THREADS = 1024;
constexpr uint32_t SELECT_WARPS = SELECT_THREADS / WARP;
constexpr uint32_t DIGITS = 256;

// Query heads that share a key in registers.
constexpr int HEADS_AT_ONCE = 4;

__device__ __forceinline__ int64_t affix_length(const int64_t *at, int64_t value, int64_t length) {
  return clamp(at ? *at : value, 0, length);
}

// bias[position_last - position_j]; NaN where there is no such entry.
__device__ __forceinline__ float expected_score(const AccordionTopKPrune &call, const int64_t *positions, int64_t j) {
  const int64_t last = positions[call.length - 1], position = positions[j];
  // Without sign, so that no two positions overflow.
  const uint64_t distance = uint64_t(last) - uint64_t(position);
  const bool known = position <= last && distance < uint64_t(call.bias_length);
  return known ? call.bias[distance] : __uint_as_float(0x7fffffffu);
}

// A warp takes as many rows as fit side by side, each the lanes that its vectors need.
template <class E, class V>
__device__ __forceinline__ void score(const AccordionTopKPrune &call) {
  typedef Elements<E, V> Vector;
  const int64_t vectors = call.head_dim / Vector::COUNT;
  uint32_t lanes = 1;
  while (lanes < vectors && lanes < WARP) lanes *= 2;
  const uint32_t lane = threadIdx.x % lanes;
  const int64_t rows = SCORE_THREADS / lanes, length = call.length, group = call.heads / call.kv_heads;
  const int64_t prefix = affix_length(call.prefix_length_at, call.prefix_length, length);
  const int64_t suffix = affix_length(call.suffix_length_at, call.suffix_length, length);

  for (int64_t b = blockIdx.y; b < call.batch; b += gridDim.y) {
    for (int64_t first = blockIdx.x * rows; first < length; first += gridDim.x * rows) {
      const int64_t j = first + threadIdx.x / lanes;
      // Lanes past the end compute the last row again: all of a warp takes part in the sums.
      const bool writes = j < length && lane == 0;
      const int64_t row = smaller(j, length - 1);
      float best = __uint_as_float(0xff800000u);
      for (int64_t g = 0; g < call.kv_heads; g++) {
        const V *key = (const V *)call.key + ((b * call.kv_heads + g) * length + row) * vectors;
        for (int64_t in_group = 0; in_group < group; in_group += HEADS_AT_ONCE) {
          const int64_t head = b * call.heads + g * group + in_group;
          const V *query = (const V *)call.query_last + head * vectors;
          float sums[HEADS_AT_ONCE] = {};
          for (int64_t c = lane; c < vectors; c += lanes) {
            Vector k, q;
            k.vector = load_shared(key + c);
#pragma unroll
            for (int i = 0; i < HEADS_AT_ONCE; i++) {
              if (in_group + i < group) {
                q.vector = load_shared(query + i * vectors + c);
#pragma unroll
                for (int e = 0; e < Vector::COUNT; e++) sums[i] += E::decode(q.bits[e]) * E::decode(k.bits[e]);
              }
            }
          }
#pragma unroll
          for (int i = 0; i < HEADS_AT_ONCE; i++) {
            if (in_group + i < group) {
              for (uint32_t other = lanes / 2; other > 0; other /= 2) sums[i] += __shfl_xor_sync(ALL_LANES, sums[i], other);
              // Rounded by itself: contracted with the subtraction below it would be another number.
              const float logit = __fmul_rn(sums[i], call.scale);
              if (call.metric && writes) call.metric[(head + i) * length + j] = logit;
              // Written so that NaN wins: a broken logit must not hide behind the other heads.
              if (logit > best || logit != logit) best = logit;
            }
          }
        }
      }
      if (writes) {
        const bool affix = j < prefix || j >= length - suffix;
        const float infinity = __uint_as_float(0x7f800000u);
        call.scores[b * length + j] = affix ? infinity : best - expected_score(call, call.position_ids + b * length, j);
      }
    }
  }
}

template <class E>
__device__ __forceinline__ void score_in(const AccordionTopKPrune &call) {
  const int64_t row_bytes = call.head_dim * int64_t(sizeof(typename E::Bits));
  if (vector_bytes(call.query_last, call.key, row_bytes) == 16) {
    score<E, uint4>(call);
  } else {
    score<E, typename E::Bits>(call);
  }
}

// An integer that is larger for a larger score: both zeros are one, NaN is below everything.
__device__ __forceinline__ uint32_t rank(float score) {
  if (score != score) return 0;
  const uint32_t bits = __float_as_uint(score + 0.0f);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

// The rank of the worst survivor, and how many of that rank survive.
struct Threshold {
  uint32_t rank, survivors;
};

// Finds the rank of the `keep`-th largest score, digit by digit from the highest. One block; 1 <= keep <= length.
__device__ __forceinline__ Threshold radix_select(const float *scores, uint32_t length, uint32_t keep) {
  __shared__ uint32_t bins[DIGITS];
  __shared__ Threshold found;
  Threshold threshold = {0, keep};
  for (uint32_t shift = WARP; shift > 0;) {
    // Of the ranks that begin like the threshold as far as it is known.
    const uint32_t known = shift < WARP ? ~0u << shift : 0;
    shift -= 8;
    for (uint32_t digit = threadIdx.x; digit < DIGITS; digit += SELECT_THREADS) bins[digit] = 0;
    __syncthreads();
#pragma unroll 4
    for (uint32_t j = threadIdx.x; j < length; j += SELECT_THREADS) {
      const uint32_t r = rank(scores[j]);
      if ((r & known) == threshold.rank) atomicAdd(&bins[r >> shift & (DIGITS - 1)], 1u);
    }
    __syncthreads();
    if (threadIdx.x < WARP) {
      // Each lane takes eight digits, the first lane the largest.
      constexpr uint32_t SHARE = DIGITS / WARP;
      const uint32_t top = DIGITS - 1 - threadIdx.x * SHARE;
      uint32_t sum = 0;
      for (uint32_t i = 0; i < SHARE; i++) sum += bins[top - i];
      uint32_t upto = sum;
      for (uint32_t distance = 1; distance < WARP; distance *= 2) {
        const uint32_t before = __shfl_up_sync(ALL_LANES, upto, distance);
        if (threadIdx.x >= distance) upto += before;
      }
      uint32_t above = upto - sum;
      if (above < threshold.survivors && threshold.survivors <= upto) {
        uint32_t digit = top;
        while (above + bins[digit] < threshold.survivors) above += bins[digit--];
        found.rank = threshold.rank | digit << shift;
        found.survivors = threshold.survivors - above;
      }
    }
    __syncthreads();
    threshold = found;
  }
  return threshold;
}

// Writes the survivors of one sequence and their positions, in their order. Each warp has a share of consecutive tokens; what the
// warps before it keep, it counts first.
__device__ __forceinline__ void compact(const float *scores, uint32_t length, Threshold threshold, const int64_t *positions,
                                        int64_t *keep_idx, int64_t *kept_positions) {
  __shared__ uint32_t larger[SELECT_WARPS], equal[SELECT_WARPS];
  const uint32_t warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, before = (1u << lane) - 1;
  const uint32_t share = (length + SELECT_THREADS - 1) / SELECT_THREADS * WARP;
  const uint64_t begin = uint64_t(warp) * share, end = begin + share < length ? begin + share : length;

  uint32_t counts[2] = {};
  for (uint64_t first = begin; first < end; first += WARP) {
    const uint64_t j = first + lane;
    const uint32_t r = j < end ? rank(scores[j]) : 0;
    counts[0] += __popc(__ballot_sync(ALL_LANES, j < end && r > threshold.rank));
    counts[1] += __popc(__ballot_sync(ALL_LANES, j < end && r == threshold.rank));
  }
  if (lane == 0) {
    larger[warp] = counts[0];
    equal[warp] = counts[1];
  }
  __syncthreads();

  uint32_t larger_before = lane < warp ? larger[lane] : 0, equal_before = lane < warp ? equal[lane] : 0;
  for (uint32_t other = WARP / 2; other > 0; other /= 2) {
    larger_before += __shfl_xor_sync(ALL_LANES, larger_before, other);
    equal_before += __shfl_xor_sync(ALL_LANES, equal_before, other);
  }
  uint32_t kept = larger_before + (equal_before < threshold.survivors ? equal_before : threshold.survivors);
  for (uint64_t first = begin; first < end; first += WARP) {
    const uint64_t j = first + lane;
    const uint32_t r = j < end ? rank(scores[j]) : 0;
    const uint32_t ties = __ballot_sync(ALL_LANES, j < end && r == threshold.rank);
    // Of equal scores the lower index stays.
    const bool tie_stays = r == threshold.rank && equal_before + __popc(ties & before) < threshold.survivors;
    const bool stays = j < end && (r > threshold.rank || tie_stays);
    const uint32_t staying = __ballot_sync(ALL_LANES, stays);
    if (stays) {
      const uint64_t at = kept + __popc(staying & before);
      keep_idx[at] = int64_t(j);
      kept_positions[at] = positions[j];
    }
    kept += __popc(staying);
    equal_before += __popc(ties);
  }
}

// The planes of the cache, of one sequence.
__host__ __device__ __forceinline__ int64_t planes(const AccordionTopKPrune &call) { return call.layers * 2 * call.kv_heads; }

__host__ __device__ __forceinline__ int64_t kv_row_bytes(const AccordionTopKPrune &call) {
  return call.head_dim * element_bytes(call.type);
}

__host__ __device__ __forceinline__ int64_t hidden_row_bytes(const AccordionTopKPrune &call) {
  return call.hidden_size * element_bytes(call.hidden_type);
}

}  // namespace accordion

extern "C" {

__global__ void __launch_bounds__(accordion::SCORE_THREADS)
    accordion_topk_prune_score_f32(const AccordionTopKPrune call) {
  accordion::score_in<accordion::F32>(call);
}

__global__ void __launch_bounds__(accordion::SCORE_THREADS)
    accordion_topk_prune_score_f16(const AccordionTopKPrune call) {
  accordion::score_in<accordion::F16>(call);
}

__global__ void __launch_bounds__(accordion::SCORE_THREADS)
    accordion_topk_prune_score_bf16(const AccordionTopKPrune call) {
  accordion::score_in<accordion::BF16>(call);
}

// A block for each sequence.
__global__ void __launch_bounds__(accordion::SELECT_THREADS, 1)
    accordion_topk_prune_select(const AccordionTopKPrune call) {
  using namespace accordion;
  for (int64_t b = blockIdx.x; b < call.batch; b += gridDim.x) {
    const float *scores = call.scores + b * call.length;
    const Threshold threshold = radix_select(scores, uint32_t(call.length), uint32_t(call.keep));
    compact(scores, uint32_t(call.length), threshold, call.position_ids + b * call.length, call.keep_idx + b * call.keep,
            call.kept_position_ids + b * call.keep);
    // The next sequence uses the same shared memory.
    __syncthreads();
  }
}

// A block for each tile: those of the cache, then those of the hidden states.
__global__ void __launch_bounds__(accordion::ROW_THREADS, accordion::ROW_BLOCKS)
    accordion_topk_prune_gather(const AccordionTopKPrune call) {
  using namespace accordion;
  const int64_t kv_bytes = kv_row_bytes(call), hidden_bytes = hidden_row_bytes(call);
  const int64_t kv_tiles = tile_count(call.keep, kv_bytes), hidden_tiles = tile_count(call.keep, hidden_bytes);
  const int64_t all_kv = call.batch * planes(call) * kv_tiles;
  const bool is_kv = blockIdx.x < all_kv;
  const int64_t tiles = is_kv ? kv_tiles : hidden_tiles, row_bytes = is_kv ? kv_bytes : hidden_bytes;
  const int64_t index = is_kv ? blockIdx.x : blockIdx.x - all_kv, plane = index / tiles;
  const int64_t *keep_idx = call.keep_idx + (is_kv ? plane / planes(call) : plane) * call.keep;
  const char *from = (const char *)(is_kv ? call.kv : call.hidden) + plane * call.length * row_bytes;
  char *to = (char *)(is_kv ? call.kept_kv : call.kept_hidden) + plane * call.keep * row_bytes;
  copy_tile(from, to, row_bytes, index % tiles, call.keep, [=](int64_t k) { return load_shared(keep_idx + k); });
}

}  // extern "C"

#ifndef __CUDACC_RTC__
#include "launch.h"

namespace accordion {

// Blocks that gather.
static int64_t gather_tiles(const AccordionTopKPrune &call) {
  return call.batch * (planes(call) * tile_count(call.keep, kv_row_bytes(call)) + tile_count(call.keep, hidden_row_bytes(call)));
}

static const char *refusal(const AccordionTopKPrune &c) {
  if (!is_length(c.batch) || !is_length(c.heads) || !is_length(c.kv_heads) || !is_length(c.head_dim) ||
      !is_length(c.length) || !is_length(c.hidden_size) || !is_length(c.layers) || !is_length(c.keep) || !is_length(c.bias_length))
    return "TopKPrune: a length is negative or at least 2^31";
  if (c.heads == 0 || c.kv_heads == 0 || c.head_dim == 0 || c.heads % c.kv_heads != 0)
    return "TopKPrune: heads must be a positive multiple of kv_heads, and head_dim positive";
  if (!known_type(c.type) || !known_type(c.hidden_type)) return "TopKPrune: unknown element type";
  if (c.keep > c.length) return "TopKPrune: keep is larger than length";
  if ((!c.prefix_length_at && !is_length(c.prefix_length)) || (!c.suffix_length_at && !is_length(c.suffix_length)))
    return "TopKPrune: prefix_length or suffix_length is negative or at least 2^31";
  const int64_t affixes = (c.prefix_length_at ? 0 : c.prefix_length) + (c.suffix_length_at ? 0 : c.suffix_length);
  if (affixes > c.keep) return "TopKPrune: keep is smaller than prefix_length + suffix_length";

  const Product kv = Product(c.batch) * c.layers * 2 * c.kv_heads * c.head_dim, hidden = Product(c.batch) * c.hidden_size;
  const Product key = Product(c.batch) * c.kv_heads * c.head_dim * c.length, metric = Product(c.batch) * c.heads * c.length;
  if (!(kv * c.length * 4).fits || !(hidden * c.length * 4).fits || !(key * 4).fits || !(metric * 4).fits)
    return "TopKPrune: a tensor has more bytes than 63 bits can count";
  if (gather_tiles(c) > MOST_BLOCKS) return "TopKPrune: more than 2^31 - 1 tiles to gather";
  const bool tokens = c.batch > 0 && c.length > 0, survivors = c.batch > 0 && c.keep > 0;
  if (tokens && (!c.query_last || !c.key || !c.position_ids || !c.scores || (c.bias_length > 0 && !c.bias)))
    return "TopKPrune: a tensor that the scores need is null";
  if (survivors && (!c.keep_idx || !c.kept_position_ids)) return "TopKPrune: keep_idx or kept_position_ids is null";
  if (survivors && c.hidden_size > 0 && (!c.hidden || !c.kept_hidden)) return "TopKPrune: hidden or kept_hidden is null";
  if (survivors && c.layers > 0 && (!c.kv || !c.kept_kv)) return "TopKPrune: kv or kept_kv is null";
  return nullptr;
}

}  // namespace accordion

extern "C" const char *accordion_topk_prune(const AccordionTopKPrune *given, void *stream) {
  using namespace accordion;
  const AccordionTopKPrune &call = *given;
  if (const char *refused = refusal(call)) return refused;
  if (call.batch == 0 || call.length == 0) return nullptr;

  // Blocks take the next rows until none is left: this is a number for speed alone.
  const int64_t rows = 16;
  const dim3 score_grid(uint32_t((call.length + rows - 1) / rows), uint32_t(smaller(call.batch, 65535)));
  auto *score = call.type == ACCORDION_F32   ? accordion_topk_prune_score_f32
                : call.type == ACCORDION_F16 ? accordion_topk_prune_score_f16
                                             : accordion_topk_prune_score_bf16;
  if (const char *failed = launch(score, score_grid, SCORE_THREADS, stream, call)) return failed;
  if (call.keep == 0) return nullptr;
  if (const char *failed = launch(accordion_topk_prune_select, dim3(uint32_t(call.batch)), SELECT_THREADS, stream, call))
    return failed;
  const int64_t tiles = gather_tiles(call);
  if (tiles == 0) return nullptr;
  return launch(accordion_topk_prune_gather, dim3(uint32_t(tiles)), ROW_THREADS, stream, call);
}
#endif
