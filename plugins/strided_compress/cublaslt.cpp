// The product of ai.accordion::StridedCompress by cuBLASLt. Plain C++: the library is loaded at run time, and what is needed of its
// interface, which is stable, is declared here.

#include <dlfcn.h>

#include <memory>
#include <new>

#include "accordion_kernels.h"
#include "shapes.h"

namespace {

// As in cublasLt.h and library_types.h.
constexpr int CUBLAS_COMPUTE_32F = 68, CUBLAS_OP_T = 1;
constexpr int CUDA_R_32F = 0, CUDA_R_16F = 2, CUDA_R_16BF = 14;
constexpr int MATMUL_DESC_TRANSA = 3;
constexpr int MATMUL_PREF_MAX_WORKSPACE_BYTES = 1, MATMUL_PREF_REDUCTION_SCHEME_MASK = 3;
constexpr int MATMUL_PREF_MIN_ALIGNMENT_BYTES[4] = {5, 6, 7, 8};  // of A, B, C, D

// Sums that are split must not be rounded to half precision before they are added.
constexpr uint32_t REDUCTION_IN_COMPUTE_TYPE = 2;

struct Algorithm {
  uint64_t data[8];
};

struct Heuristic {
  Algorithm algorithm;
  size_t workspace_bytes;
  int state;
  float waves;
  int reserved[4];
};

// What the product may use besides its operands.
constexpr size_t WORKSPACE_BYTES = 32 << 20;

typedef void *Handle;

struct Library {
  void *loaded = nullptr;
  int (*create)(Handle *) = nullptr;
  int (*destroy)(Handle) = nullptr;
  int (*desc_create)(Handle *, int compute_type, int scale_type) = nullptr;
  int (*desc_set)(Handle, int attribute, const void *value, size_t bytes) = nullptr;
  int (*desc_destroy)(Handle) = nullptr;
  int (*layout_create)(Handle *, int type, uint64_t rows, uint64_t columns, int64_t leading_dimension) = nullptr;
  int (*layout_destroy)(Handle) = nullptr;
  int (*preference_create)(Handle *) = nullptr;
  int (*preference_set)(Handle, int attribute, const void *value, size_t bytes) = nullptr;
  int (*preference_destroy)(Handle) = nullptr;
  int (*heuristic)(Handle, Handle desc, Handle a, Handle b, Handle c, Handle d, Handle preference, int wanted, Heuristic *,
                   int *found) = nullptr;
  int (*matmul)(Handle, Handle desc, const void *alpha, const void *a, Handle a_layout, const void *b, Handle b_layout,
                const void *beta, const void *c, Handle c_layout, void *d, Handle d_layout, const Algorithm *, void *workspace,
                size_t workspace_bytes, void *stream) = nullptr;

  template <class F>
  bool find(F &function, const char *name) {
    function = reinterpret_cast<F>(dlsym(loaded, name));
    return function != nullptr;
  }

  const char *open(const char *name) {
    const char *const names[] = {"libcublasLt.so.13", "libcublasLt.so.12", "libcublasLt.so"};
    if (name) {
      loaded = dlopen(name, RTLD_NOW | RTLD_LOCAL);
    } else {
      for (const char *candidate : names)
        if ((loaded = dlopen(candidate, RTLD_NOW | RTLD_LOCAL))) break;
    }
    if (!loaded) return "StridedCompress: there is no cuBLASLt (libcublasLt.so.13 or .12)";
    const bool complete =
        find(create, "cublasLtCreate") && find(destroy, "cublasLtDestroy") && find(desc_create, "cublasLtMatmulDescCreate") &&
        find(desc_set, "cublasLtMatmulDescSetAttribute") && find(desc_destroy, "cublasLtMatmulDescDestroy") &&
        find(layout_create, "cublasLtMatrixLayoutCreate") && find(layout_destroy, "cublasLtMatrixLayoutDestroy") &&
        find(preference_create, "cublasLtMatmulPreferenceCreate") &&
        find(preference_set, "cublasLtMatmulPreferenceSetAttribute") &&
        find(preference_destroy, "cublasLtMatmulPreferenceDestroy") && find(heuristic, "cublasLtMatmulAlgoGetHeuristic") &&
        find(matmul, "cublasLtMatmul");
    return complete ? nullptr : "StridedCompress: the cuBLASLt library lacks a function of its interface";
  }

  ~Library() {
    if (loaded) dlclose(loaded);
  }
};

// A description that is destroyed with its scope.
struct Description {
  int (*destroy)(Handle);
  Handle handle = nullptr;

  explicit Description(int (*destroy)(Handle)) : destroy(destroy) {}
  Description(const Description &) = delete;
  ~Description() {
    if (handle) destroy(handle);
  }
};

int data_type(int32_t type) { return type == ACCORDION_F32 ? CUDA_R_32F : type == ACCORDION_F16 ? CUDA_R_16F : CUDA_R_16BF; }

size_t element_bytes(int32_t type) { return type == ACCORDION_F32 ? 4 : 2; }

// The largest power of two, at most 256, that divides the address and the distance of rows.
uint32_t alignment(const void *address, int64_t row_bytes) {
  const uint64_t bits = uint64_t(address) | uint64_t(row_bytes) | 256;
  return uint32_t(bits & -bits);
}

int64_t kept_rows(const AccordionStridedRows &rows) { return rows.segments * (rows.window / rows.ratio); }

// Bytes of the mean, up to where the product's own workspace begins.
size_t mean_bytes(const AccordionStridedRows &rows) {
  if (!rows.x2) return 0;
  const size_t bytes = size_t(kept_rows(rows)) * size_t(rows.width) * element_bytes(rows.type);
  return (bytes + 255) / 256 * 256;
}

}  // namespace

struct AccordionCublasLt {
  Library library;
  Handle handle = nullptr;

  ~AccordionCublasLt() {
    if (handle) library.destroy(handle);
  }

  // d [n, m] = a [n, k] w^T, where w is [m, k], all row-major and the rows of `a` `a_stride` elements apart. cuBLAS is column-major:
  // what it sees is d^T = w a^T.
  const char *product(int32_t type, int64_t n, int64_t m, int64_t k, const void *w, const void *a, int64_t a_stride, void *d,
                      void *workspace, size_t workspace_bytes, void *stream) {
    const int data = data_type(type), transpose = CUBLAS_OP_T;
    const int64_t size = int64_t(element_bytes(type));
    Description desc(library.desc_destroy), w_layout(library.layout_destroy), a_layout(library.layout_destroy),
        d_layout(library.layout_destroy), preference(library.preference_destroy);
    const uint32_t alignments[4] = {alignment(w, k * size), alignment(a, a_stride * size), alignment(d, m * size),
                                    alignment(d, m * size)};
    bool made = library.desc_create(&desc.handle, CUBLAS_COMPUTE_32F, CUDA_R_32F) == 0 &&
                library.desc_set(desc.handle, MATMUL_DESC_TRANSA, &transpose, sizeof(transpose)) == 0 &&
                library.layout_create(&w_layout.handle, data, uint64_t(k), uint64_t(m), k) == 0 &&
                library.layout_create(&a_layout.handle, data, uint64_t(k), uint64_t(n), a_stride) == 0 &&
                library.layout_create(&d_layout.handle, data, uint64_t(m), uint64_t(n), m) == 0 &&
                library.preference_create(&preference.handle) == 0 &&
                library.preference_set(preference.handle, MATMUL_PREF_MAX_WORKSPACE_BYTES, &workspace_bytes,
                                       sizeof(workspace_bytes)) == 0 &&
                library.preference_set(preference.handle, MATMUL_PREF_REDUCTION_SCHEME_MASK, &REDUCTION_IN_COMPUTE_TYPE,
                                       sizeof(uint32_t)) == 0;
    for (int i = 0; made && i < 4; i++)
      made = library.preference_set(preference.handle, MATMUL_PREF_MIN_ALIGNMENT_BYTES[i], &alignments[i], sizeof(uint32_t)) == 0;
    if (!made) return "StridedCompress: cuBLASLt refuses the description of the product";

    Heuristic best;
    int found = 0;
    if (library.heuristic(handle, desc.handle, w_layout.handle, a_layout.handle, d_layout.handle, d_layout.handle,
                          preference.handle, 1, &best, &found) != 0 ||
        found == 0)
      return "StridedCompress: cuBLASLt has no algorithm for the product";
    const float one = 1.0f, zero = 0.0f;
    const int status =
        library.matmul(handle, desc.handle, &one, w, w_layout.handle, a, a_layout.handle, &zero, d, d_layout.handle, d,
                       d_layout.handle, &best.algorithm, workspace, workspace_bytes, stream);
    return status == 0 ? nullptr : "StridedCompress: cuBLASLt failed to launch the product";
  }
};

extern "C" const char *accordion_cublaslt_open(const char *library, AccordionCublasLt **cublaslt) {
  *cublaslt = nullptr;
  std::unique_ptr<AccordionCublasLt> opened(new (std::nothrow) AccordionCublasLt);
  if (!opened) return "StridedCompress: out of memory";
  if (const char *failed = opened->library.open(library)) return failed;
  if (opened->library.create(&opened->handle) != 0) return "StridedCompress: cuBLASLt does not start";
  *cublaslt = opened.release();
  return nullptr;
}

extern "C" void accordion_cublaslt_close(AccordionCublasLt *cublaslt) { delete cublaslt; }

extern "C" size_t accordion_strided_compress_workspace(const AccordionStridedCompress *call) {
  if (accordion::shape_refusal(call->rows)) return 0;
  return mean_bytes(call->rows) + WORKSPACE_BYTES;
}

extern "C" const char *accordion_strided_compress(AccordionCublasLt *cublaslt, const AccordionStridedCompress *call,
                                                  void *stream) {
  if (!cublaslt) return "StridedCompress: cuBLASLt is not open";
  AccordionStridedRows rows = call->rows;
  if (const char *refused = accordion::shape_refusal(rows)) return refused;
  if (!accordion::is_length(call->out_width)) return "StridedCompress: a length is negative or at least 2^31";
  const int64_t n = kept_rows(rows), k = rows.width, size = int64_t(element_bytes(rows.type));
  if (n == 0 || call->out_width == 0) return nullptr;
  if (k == 0) return "StridedCompress: a row of x has no elements";
  if (!accordion::is_length(n)) return "StridedCompress: at least 2^31 rows";
  if (!rows.x || !rows.y || !call->weight) return "StridedCompress: x, y or weight is null";
  const size_t reserved = mean_bytes(rows);
  if (call->workspace_bytes < reserved || (call->workspace_bytes > 0 && !call->workspace))
    return "StridedCompress: the workspace is smaller than accordion_strided_compress_workspace says";

  const void *a = static_cast<const char *>(rows.x) + rows.offset * k * size;
  int64_t a_stride = rows.ratio * k;
  if (rows.x2) {
    rows.y = call->workspace;
    if (const char *failed = accordion_strided_rows(&rows, stream)) return failed;
    a = call->workspace;
    a_stride = k;
  }
  return cublaslt->product(rows.type, n, call->out_width, k, call->weight, a, a_stride, call->rows.y,
                           static_cast<char *>(call->workspace) + reserved, call->workspace_bytes - reserved, stream);
}
