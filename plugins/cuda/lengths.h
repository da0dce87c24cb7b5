// What the host checks before it launches: lengths, their products, element types.
#ifndef ACCORDION_LENGTHS_H
#define ACCORDION_LENGTHS_H

#include "accordion_kernels.h"

namespace accordion {

// Blocks of a grid.
constexpr int64_t MOST_BLOCKS = 0x7fffffff;

// Whether a length can be one: 0 to 2^31 - 1.
inline bool is_length(int64_t length) { return length >= 0 && length <= 0x7fffffff; }

// A product of lengths, and whether 63 bits hold it.
struct Product {
  int64_t value;
  bool fits = true;

  explicit Product(int64_t length) : value(length) {}

  Product operator*(int64_t factor) const {
    Product product = *this;
    product.fits = fits && !__builtin_mul_overflow(value, factor, &product.value);
    return product;
  }
};

inline bool known_type(int32_t type) { return type == ACCORDION_F32 || type == ACCORDION_F16 || type == ACCORDION_BF16; }

}  // namespace accordion
#endif
