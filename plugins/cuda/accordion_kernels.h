/* C interface of the CUDA kernels, for every host that runs them: contracts in ../topk_prune and ../strided_compress; AppendRows is
 * no operator, and all there is to say about it stands here.
 *
 * The same functions exist twice, from the same sources: compiled by nvcc they launch kernels, and pointers are device
 * pointers; compiled by a C++ compiler alone (see emulator.h) they run the kernels' code on the CPU before they return, pointers
 * are host pointers and the stream is ignored.
 *
 * Nothing here allocates, waits for the device, or keeps a pointer: launches go to `stream` in order and can be captured in a CUDA
 * graph. Tensors are dense and row-major. A pointer may be null if its tensor has no elements.
 *
 * Every function returns null, or a message that lives as long as the library: then nothing was launched, unless the message is
 * the driver's own. What the host can see is refused that way. What only the device can see never leads out of bounds; each
 * structure says what it leads to instead. */
#ifndef ACCORDION_KERNELS_H
#define ACCORDION_KERNELS_H

#ifdef __CUDACC_RTC__
typedef long long int64_t;
typedef int int32_t;
typedef unsigned int uint32_t;
typedef unsigned short uint16_t;
typedef unsigned long long uint64_t;
typedef unsigned long size_t;
#else
#include <stddef.h>
#include <stdint.h>
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* Element types of tensors whose type is not fixed. */
enum { ACCORDION_F32 = 0, ACCORDION_F16 = 1, ACCORDION_BF16 = 2 };

/* One call of TopKPrune. B sequences, H query heads, G key heads, d elements per head, L tokens of which K stay, D elements
 * per hidden state, n layers.
 *
 * Refused by the host: lengths that are negative or at least 2^31, H no positive multiple of G, keep above length, keep below
 * prefix_length + suffix_length where both are given by value, a required pointer that is null, an unknown type.
 *
 * On the device: affix lengths read from pointers are clamped to 0..L, and if they do not fit in `keep` together, the first K
 * rows of the affixes stay; a token whose distance to the last one has no entry in `bias` scores NaN, which ranks below
 * everything, unless it is an affix. */
typedef struct AccordionTopKPrune {
  const void *query_last;           /* type [B, H, d] */
  const void *key;                  /* type [B, G, L, d] */
  const float *bias;                /* [bias_length] */
  const int64_t *position_ids;      /* [B, L] */
  const void *hidden;               /* hidden_type [B, L, D] */
  const void *kv;                   /* type [B, n, 2, G, L, d] */
  const int64_t *prefix_length_at;  /* one element on the device, or null: prefix_length below holds */
  const int64_t *suffix_length_at;  /* one element on the device, or null: suffix_length below holds */
  int64_t *keep_idx;                /* [B, K] */
  void *kept_hidden;                /* hidden_type [B, K, D] */
  int64_t *kept_position_ids;       /* [B, K] */
  void *kept_kv;                    /* type [B, n, 2, G, K, d] */
  float *scores;                    /* [B, L] */
  float *metric;                    /* [B, H, L], or null if not wanted */
  int64_t batch, heads, kv_heads, head_dim, length, hidden_size, layers, keep, prefix_length, suffix_length, bias_length;
  float scale;
  int32_t type, hidden_type;
} AccordionTopKPrune;

/* The rows that StridedCompress keeps: y[s W / ratio + j] = x[s, ratio j + offset], or the mean of x and x2 there, computed in
 * float32. S segments of W rows of He elements.
 *
 * Refused: lengths that are negative or at least 2^31, a ratio that is not positive or does not divide the window, an offset
 * outside 0..ratio, a required pointer that is null, an unknown type. */
typedef struct AccordionStridedRows {
  const void *x;  /* [S, W, He] */
  const void *x2; /* [S, W, He], or null for selection alone */
  void *y;        /* [S W / ratio, He] */
  int64_t segments, window, width, ratio, offset;
  int32_t type;
} AccordionStridedRows;

/* StridedCompress and, with x2, StridedCompressMean. The product is cuBLASLt's and reads the rows where they are: they lie at a
 * constant distance, ratio * He. Only the mean is written before it is multiplied, into the workspace. Products of float32 use
 * float32, not TF32; the others accumulate in float32. Refused: as for AccordionStridedRows. */
typedef struct AccordionStridedCompress {
  AccordionStridedRows rows; /* y: here [S W / ratio, H] */
  const void *weight;        /* [H, He] */
  int64_t out_width;         /* H */
  void *workspace;           /* aligned to 256 bytes */
  size_t workspace_bytes;    /* at least what accordion_strided_compress_workspace says */
} AccordionStridedCompress;

/* A new row and the cache that it is appended to. */
typedef struct AccordionAppendedRow {
  const void *row; /* type [R, d] */
  void *cache;     /* type [R, capacity, d] */
} AccordionAppendedRow;

/* What a decoder does with its caches after every token: cache[r, *length_at] = row[r], for each of `caches` pairs. R counts the heads
 * of all sequences, d the elements per head.
 *
 * Refused: lengths that are negative or at least 2^31, a required pointer that is null, an unknown type.
 *
 * On the device: nothing is appended where *length_at is not in 0..capacity. */
typedef struct AccordionAppendRows {
  const AccordionAppendedRow *pairs; /* [caches], on the device */
  const int64_t *length_at;          /* one element on the device */
  int64_t caches, rows, capacity, width;
  int32_t type;
} AccordionAppendRows;

#ifndef __CUDACC_RTC__
/* One launch; needs no workspace. */
const char *accordion_append_rows(const AccordionAppendRows *call, void *stream);

/* Three launches whatever the number of layers; needs no workspace. */
const char *accordion_topk_prune(const AccordionTopKPrune *call, void *stream);

/* One launch; needs no workspace. */
const char *accordion_strided_rows(const AccordionStridedRows *call, void *stream);

/* Bytes that a call needs; pointers in `call` need not be set, but x2 must be null or not. A call that would be refused needs
 * none. */
size_t accordion_strided_compress_workspace(const AccordionStridedCompress *call);

/* cuBLASLt, loaded at run time. One per thread that uses it at a time. */
typedef struct AccordionCublasLt AccordionCublasLt;

/* Loads `library`, or if that is null the first of libcublasLt.so.13, .12 and libcublasLt.so that the linker finds. */
const char *accordion_cublaslt_open(const char *library, AccordionCublasLt **cublaslt);
void accordion_cublaslt_close(AccordionCublasLt *cublaslt);

const char *accordion_strided_compress(AccordionCublasLt *cublaslt, const AccordionStridedCompress *call, void *stream);
#endif

#ifdef __cplusplus
}
#endif
#endif
