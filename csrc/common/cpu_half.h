// Half-precision numbers as floats.
// Part of the translation unit of one instruction set, like vec.h.
#pragma once

#include <cstdint>
#include <cstring>

namespace otface {
namespace {

inline float half_to_float(uint16_t h) {
  // The exponent is rebased by an exact multiplication, which also makes subnormal halves normal floats.
  uint32_t bits = static_cast<uint32_t>(h & 0x7fff) << 13;
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  x *= 0x1p112f;
  std::memcpy(&bits, &x, sizeof(x));
  if ((h & 0x7c00) == 0x7c00) bits |= 0x7f800000u;  // infinity and NaN
  bits |= static_cast<uint32_t>(h & 0x8000) << 16;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}

inline float bfloat_to_float(uint16_t h) {
  const uint32_t bits = static_cast<uint32_t>(h) << 16;
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}

}  // namespace
}  // namespace otface
