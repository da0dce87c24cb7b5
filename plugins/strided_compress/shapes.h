// Which shapes StridedCompress refuses, whoever computes it.
#ifndef ACCORDION_STRIDED_SHAPES_H
#define ACCORDION_STRIDED_SHAPES_H

#include "lengths.h"

namespace accordion {

inline const char *shape_refusal(const AccordionStridedRows &c) {
  if (!is_length(c.segments) || !is_length(c.window) || !is_length(c.width))
    return "StridedCompress: a length is negative or at least 2^31";
  if (!known_type(c.type)) return "StridedCompress: unknown element type";
  if (!is_length(c.ratio) || c.ratio == 0 || c.window % c.ratio != 0)
    return "StridedCompress: ratio does not divide the window";
  if (c.offset < 0 || c.offset >= c.ratio) return "StridedCompress: offset must be at least 0 and below ratio";
  if (!(Product(c.segments) * c.window * c.width * 4).fits)
    return "StridedCompress: a tensor has more bytes than 63 bits can count";
  return nullptr;
}

}  // namespace accordion
#endif
