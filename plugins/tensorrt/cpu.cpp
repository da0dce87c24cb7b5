// The kernels' interface in plain C++, for a plugin library that is built without nvcc: pointers are host pointers, and a stream is
// ignored. It exists to test plugins where there is no GPU, and is written to be read beside the contracts, not to be fast.

#include "../cuda/accordion_kernels.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <vector>

// A product needs no library here; the handle is only there to be opened and closed.
struct AccordionCublasLt {};

namespace {

constexpr float NOT_A_NUMBER = std::numeric_limits<float>::quiet_NaN();

float from_half(uint16_t bits) {
    int const exponent = bits >> 10 & 31;
    int const fraction = bits & 1023;
    float magnitude = 0.0F;
    if (exponent == 31) {
        magnitude = fraction == 0 ? std::numeric_limits<float>::infinity() : NOT_A_NUMBER;
    } else if (exponent == 0) {
        magnitude = std::ldexp(static_cast<float>(fraction), -24);
    } else {
        magnitude = std::ldexp(static_cast<float>(1024 + fraction), exponent - 25);
    }
    return (bits & 0x8000) != 0 ? -magnitude : magnitude;
}

// The nearest of the numbers with `bits` fraction bits and exponents from `smallest` on; ties go to the even one.
float rounded(float value, int bits, int smallest) {
    int exponent = 0;
    std::frexp(value, &exponent);
    int const unit = std::max(exponent - 1, smallest) - bits;
    return std::ldexp(std::nearbyint(std::ldexp(value, -unit)), unit);
}

uint16_t to_half(float value) {
    uint16_t const sign = std::signbit(value) ? 0x8000 : 0;
    if (std::isnan(value)) {
        return 0x7e00;
    }
    float const magnitude = std::isinf(value) ? std::abs(value) : rounded(std::abs(value), 10, -14);
    if (magnitude >= 65536.0F) {
        return sign | 0x7c00;
    }
    if (magnitude < 0x1p-14F) {
        return sign | static_cast<uint16_t>(std::ldexp(magnitude, 24));
    }
    int exponent = 0;
    float const fraction = std::frexp(magnitude, &exponent);
    return sign | static_cast<uint16_t>((exponent + 14) << 10 | (static_cast<int>(std::ldexp(fraction, 11)) & 1023));
}

float from_bits(uint32_t bits) {
    float value = 0.0F;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

uint16_t to_bfloat(float value) {
    if (std::isnan(value)) {
        return 0x7fc0;
    }
    uint32_t bits = 0;
    std::memcpy(&bits, &value, sizeof bits);
    return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

size_t size_of(int32_t type) { return type == ACCORDION_F32 ? 4 : 2; }

float load(void const* data, int64_t at, int32_t type) {
    switch (type) {
    case ACCORDION_F32: return static_cast<float const*>(data)[at];
    case ACCORDION_F16: return from_half(static_cast<uint16_t const*>(data)[at]);
    default: return from_bits(static_cast<uint32_t>(static_cast<uint16_t const*>(data)[at]) << 16);
    }
}

void store(void* data, int64_t at, int32_t type, float value) {
    switch (type) {
    case ACCORDION_F32: static_cast<float*>(data)[at] = value; break;
    case ACCORDION_F16: static_cast<uint16_t*>(data)[at] = to_half(value); break;
    default: static_cast<uint16_t*>(data)[at] = to_bfloat(value);
    }
}

bool known(int32_t type) { return type == ACCORDION_F32 || type == ACCORDION_F16 || type == ACCORDION_BF16; }

// Rows `index` of a matrix [.., width] of `bytes` per element.
void gather(void const* from, void* to, std::vector<int64_t> const& index, int64_t width, size_t bytes) {
    size_t const row = static_cast<size_t>(width) * bytes;
    for (size_t k = 0; k < index.size(); ++k) {
        std::memcpy(static_cast<char*>(to) + k * row, static_cast<char const*>(from) + index[k] * row, row);
    }
}

// The scores of sequence `b`; its logits too, if they are wanted.
void score(AccordionTopKPrune const& c, int64_t b, int64_t prefix, int64_t suffix) {
    int64_t const* const positions = c.position_ids + b * c.length;
    for (int64_t j = 0; j < c.length; ++j) {
        float best = -std::numeric_limits<float>::infinity();
        for (int64_t h = 0; h < c.heads; ++h) {
            int64_t const group = h / (c.heads / c.kv_heads);
            int64_t const query = (b * c.heads + h) * c.head_dim;
            int64_t const key = ((b * c.kv_heads + group) * c.length + j) * c.head_dim;
            float sum = 0.0F;
            for (int64_t i = 0; i < c.head_dim; ++i) {
                sum += load(c.query_last, query + i, c.type) * load(c.key, key + i, c.type);
            }
            float const logit = sum * c.scale;
            if (c.metric != nullptr) {
                c.metric[(b * c.heads + h) * c.length + j] = logit;
            }
            best = std::isnan(logit) || std::isnan(best) ? NOT_A_NUMBER : std::max(best, logit);
        }
        bool const affix = j < prefix || j >= c.length - suffix;
        int64_t const distance = positions[c.length - 1] - positions[j];
        float const expected = distance >= 0 && distance < c.bias_length ? c.bias[distance] : NOT_A_NUMBER;
        c.scores[b * c.length + j] = affix ? std::numeric_limits<float>::infinity() : best - expected;
    }
}

} // namespace

char const* accordion_topk_prune(AccordionTopKPrune const* given, void*) {
    AccordionTopKPrune const& c = *given;
    if (c.batch < 0 || c.length < 0 || c.hidden_size < 0 || c.layers < 0 || c.head_dim < 1 || c.kv_heads < 1
        || c.heads < 1 || c.heads % c.kv_heads != 0 || !known(c.type) || !known(c.hidden_type)) {
        return "TopKPrune: lengths or types are out of range";
    }
    int64_t const prefix = c.prefix_length_at != nullptr ? *c.prefix_length_at : c.prefix_length;
    int64_t const suffix = c.suffix_length_at != nullptr ? *c.suffix_length_at : c.suffix_length;
    if (c.keep < 0 || c.keep > c.length || prefix < 0 || suffix < 0 || prefix > c.keep || suffix > c.keep - prefix) {
        return "TopKPrune: keep is larger than length, or smaller than prefix_length + suffix_length";
    }
    for (int64_t b = 0; b < c.batch; ++b) {
        score(c, b, prefix, suffix);
        float const* const scores = c.scores + b * c.length;
        std::vector<int64_t> rows(c.length);
        std::iota(rows.begin(), rows.end(), 0);
        // Stable, so that the lower of equal ones comes first; what is not a number comes last.
        std::stable_sort(rows.begin(), rows.end(), [&](int64_t i, int64_t j) {
            return std::isnan(scores[j]) ? !std::isnan(scores[i]) : scores[i] > scores[j];
        });
        rows.resize(c.keep);
        std::sort(rows.begin(), rows.end());
        std::copy(rows.begin(), rows.end(), c.keep_idx + b * c.keep);
        gather(c.position_ids + b * c.length, c.kept_position_ids + b * c.keep, rows, 1, sizeof(int64_t));
        auto const plane = [&](void const* from, void* to, int64_t number, int64_t width, int32_t type) {
            size_t const bytes = size_of(type);
            gather(static_cast<char const*>(from) + number * c.length * width * bytes,
                static_cast<char*>(to) + number * c.keep * width * bytes, rows, width, bytes);
        };
        plane(c.hidden, c.kept_hidden, b, c.hidden_size, c.hidden_type);
        int64_t const planes = c.layers * 2 * c.kv_heads;
        for (int64_t p = 0; p < planes; ++p) {
            plane(c.kv, c.kept_kv, b * planes + p, c.head_dim, c.type);
        }
    }
    return nullptr;
}

char const* accordion_strided_rows(AccordionStridedRows const* given, void*) {
    AccordionStridedRows const& c = *given;
    if (c.segments < 0 || c.window < 0 || c.width < 0 || c.ratio < 1 || c.window % c.ratio != 0 || c.offset < 0
        || c.offset >= c.ratio || !known(c.type)) {
        return "StridedCompress: the ratio does not divide the window, or a length is out of range";
    }
    int64_t const rows = c.segments * (c.window / c.ratio);
    for (int64_t r = 0; r < rows; ++r) {
        for (int64_t i = 0; i < c.width; ++i) {
            int64_t const at = (r * c.ratio + c.offset) * c.width + i;
            float const x = load(c.x, at, c.type);
            store(c.y, r * c.width + i, c.type, c.x2 == nullptr ? x : 0.5F * (x + load(c.x2, at, c.type)));
        }
    }
    return nullptr;
}

size_t accordion_strided_compress_workspace(AccordionStridedCompress const* call) {
    AccordionStridedRows const& c = call->rows;
    if (c.ratio < 1 || c.window < 0 || c.segments < 0 || c.width < 0) {
        return 0;
    }
    return static_cast<size_t>(c.segments * (c.window / c.ratio) * c.width) * size_of(c.type);
}

char const* accordion_cublaslt_open(char const*, AccordionCublasLt** cublaslt) {
    *cublaslt = new AccordionCublasLt;
    return nullptr;
}

void accordion_cublaslt_close(AccordionCublasLt* cublaslt) { delete cublaslt; }

char const* accordion_strided_compress(AccordionCublasLt*, AccordionStridedCompress const* call, void* stream) {
    AccordionStridedRows selected = call->rows;
    selected.y = call->workspace;
    if (call->workspace_bytes < accordion_strided_compress_workspace(call)) {
        return "StridedCompress: the workspace is too small";
    }
    if (char const* const refusal = accordion_strided_rows(&selected, stream)) {
        return refusal;
    }
    int64_t const rows = selected.segments * (selected.window / selected.ratio);
    for (int64_t r = 0; r < rows; ++r) {
        for (int64_t o = 0; o < call->out_width; ++o) {
            float sum = 0.0F;
            for (int64_t i = 0; i < selected.width; ++i) {
                sum += load(selected.y, r * selected.width + i, selected.type)
                    * load(call->weight, o * selected.width + i, selected.type);
            }
            store(call->rows.y, r * call->out_width + o, selected.type, sum);
        }
    }
    return nullptr;
}
