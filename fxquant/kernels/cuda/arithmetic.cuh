// The arithmetic of fxquant.numerics for one element: what every kernel in this folder computes with.
//
// The same text is compiled for devices by NVRTC or nvcc, and for the host by a C++ compiler, where tests hold it equal
// to fxquant.numerics bit for bit. So it includes nothing, and every operation that rounds is written as a call: on a
// device that is an intrinsic which no flag can contract or approximate; on the host it is the plain operator, compiled
// with -ffp-contract=off.
#pragma once

#if defined(__CUDACC__) || defined(__CUDACC_RTC__)
#define FXQ_DEVICE 1
#define FXQ_HD __host__ __device__ __forceinline__
#else
#include <math.h>
#define FXQ_DEVICE 0
#define FXQ_HD inline
#endif

// Division and products as intrinsics exist in device code only; nvcc also compiles these functions for the host.
#if defined(__CUDA_ARCH__)
#define FXQ_ON_DEVICE 1
#else
#define FXQ_ON_DEVICE 0
#endif

namespace fxq {

typedef long long int64;
typedef int int32;
typedef unsigned int uint32;
typedef unsigned short uint16;
typedef unsigned char uint8;
static_assert(sizeof(int64) == 8 && sizeof(int32) == 4 && sizeof(uint16) == 2 && sizeof(uint8) == 1, "integer widths");

// ---- operations of one rounding ----

#if FXQ_ON_DEVICE
FXQ_HD float mul(float a, float b) { return __fmul_rn(a, b); }
FXQ_HD float add(float a, float b) { return __fadd_rn(a, b); }
FXQ_HD float sub(float a, float b) { return __fsub_rn(a, b); }
FXQ_HD float divide(float a, float b) { return __fdiv_rn(a, b); }
FXQ_HD float fused(float a, float b, float c) { return __fmaf_rn(a, b, c); }
FXQ_HD double mul(double a, double b) { return __dmul_rn(a, b); }
FXQ_HD double sub(double a, double b) { return __dsub_rn(a, b); }
FXQ_HD uint32 bits_of(float x) { return __float_as_uint(x); }
FXQ_HD float from_bits(uint32 bits) { return __uint_as_float(bits); }
#else
FXQ_HD float mul(float a, float b) { return a * b; }
FXQ_HD float add(float a, float b) { return a + b; }
FXQ_HD float sub(float a, float b) { return a - b; }
FXQ_HD float divide(float a, float b) { return a / b; }
FXQ_HD float fused(float a, float b, float c) { return fmaf(a, b, c); }
FXQ_HD double mul(double a, double b) { return a * b; }
FXQ_HD double sub(double a, double b) { return a - b; }
union FloatBits {
  float value;
  uint32 bits;
};
FXQ_HD uint32 bits_of(float x) {
  FloatBits both;
  both.value = x;
  return both.bits;
}
FXQ_HD float from_bits(uint32 bits) {
  FloatBits both;
  both.bits = bits;
  return both.value;
}
#endif

FXQ_HD float infinity() { return from_bits(0x7F800000u); }
FXQ_HD float nan_value() { return from_bits(0x7FC00000u); }
FXQ_HD bool is_nan(float x) { return x != x; }

// min and max that keep NaN, as torch's do; the hardware's drop it.
FXQ_HD float lesser(float a, float b) { return is_nan(a) || a < b ? a : b; }
FXQ_HD float greater(float a, float b) { return is_nan(a) || a > b ? a : b; }

// ---- storage: half and bfloat16 as their bits ----

struct Half {
  uint16 bits;
};
struct Bfloat {
  uint16 bits;
};

FXQ_HD float widen(float x) { return x; }
FXQ_HD float widen(Bfloat x) { return from_bits((uint32)x.bits << 16); }
FXQ_HD float widen(Half x) {
#if FXQ_ON_DEVICE
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(x.bits));
  return wide;
#else
  uint32 sign = (uint32)(x.bits & 0x8000u) << 16, rest = x.bits & 0x7FFFu;
  if (rest >= 0x7C00u) return from_bits(sign | 0x7F800000u | ((rest & 0x3FFu) << 13));
  if (rest >= 0x400u) return from_bits(sign | ((rest << 13) + (112u << 23)));
  float tiny = mul((float)rest, from_bits(103u << 23));  // a subnormal counts steps of 2^-24
  return from_bits(sign | bits_of(tiny));
#endif
}

FXQ_HD void narrow(float x, float& out) { out = x; }
FXQ_HD void narrow(float x, Bfloat& out) {
  uint32 bits = bits_of(x);
  out.bits = is_nan(x) ? (uint16)0x7FC0u : (uint16)((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
}
FXQ_HD void narrow(float x, Half& out) {
#if FXQ_ON_DEVICE
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out.bits) : "f"(x));
#else
  uint32 bits = bits_of(x), sign = (bits >> 16) & 0x8000u, rest = bits & 0x7FFFFFFFu;
  uint32 found;
  if (rest > 0x7F800000u) {
    found = 0x7E00u;
  } else if (rest >= 0x477FF000u) {  // 65520, half a step above the largest
    found = 0x7C00u;
  } else if (rest < 0x38800000u) {  // below the smallest normal, 2^-14: the sum's last bit is worth 2^-24
    found = bits_of(add(from_bits(rest), 0.5f)) - bits_of(0.5f);
  } else {
    found = (rest + 0xFFFu + ((rest >> 13) & 1u) - (112u << 23)) >> 13;
  }
  out.bits = (uint16)(sign | found);
#endif
}

// ---- affine: fxquant.numerics.affine ----

enum Rounding { RECIPROCAL = 0, DIVIDE = 1 };
// Of zero points, as their tensors hold them. Only per channel do floating ones keep their fraction.
enum PointKind { POINT_INTEGER = 0, POINT_FLOAT = 1, POINT_HALF = 2 };

struct Affine {
  float scale;
  float inverse;       // 1 / scale
  float point;         // the zero point in float32
  double wide_point;   // and in double
  float quant_min;
  float quant_max;
  int32 point_kind;
  bool wide;           // the product of dequantize is taken in double
};

FXQ_HD float round_even(float x) { return rintf(x); }

template <Rounding R>
FXQ_HD float code_before_clamp(float x, const Affine& by) {
  if (R == DIVIDE) return add(round_even(divide(x, by.scale)), by.point);
  if (by.point_kind == POINT_FLOAT) return add(round_even(fused(x, by.inverse, by.point)), 0.0f);
  if (by.point_kind == POINT_HALF) return add(round_even(add(mul(x, by.inverse), by.point)), 0.0f);
  // Adding a zero point of 0 turns -0 into +0.
  return add(round_even(mul(x, by.inverse)), by.point);
}

FXQ_HD bool inside(float code, const Affine& by) { return code >= by.quant_min && code <= by.quant_max; }

// NaN becomes quant_min. `wrap`: so does what int64 cannot hold, as torch's per-channel kernels have it.
FXQ_HD float clamp_code(float code, const Affine& by, bool wrap) {
  if (wrap && code >= 9223372036854775808.0f) return by.quant_min;
  float low = code >= by.quant_min ? code : by.quant_min;
  return low > by.quant_max ? by.quant_max : low;
}

FXQ_HD float dequantize(float code, const Affine& by) {
  if (by.wide) return (float)mul(sub((double)code, by.wide_point), (double)by.scale);
  return mul(sub(code, by.point), by.scale);
}

// grad · mask, a product: inf · 0 is NaN, as in torch.
FXQ_HD float masked(float grad, bool mask) { return mul(grad, mask ? 1.0f : 0.0f); }

// ---- small floats: fxquant.numerics.floating ----

enum Overflow { SATURATE = 0, TO_INFINITY = 1, TO_NAN = 2 };

// Numbers that follow from a format: see fxquant.kernels.floating.
struct FloatGrid {
  float max;          // the largest finite value
  float limit;        // magnitudes are cut here: max, or one binade above where overflow is to be seen
  float lift;         // 2^(23 - mantissa bits)
  float lowest;       // 2^(23 - mantissa bits + emin)
  int32 overflow;
  int32 mantissa_bits;
  int32 emin;         // exponent of the smallest normal value
};

FXQ_HD float round_to_float(float x, const FloatGrid& grid) {
  float magnitude = fabsf(x);
  magnitude = magnitude > grid.limit ? grid.limit : magnitude;  // NaN stays
  // Veltkamp's splitting: about the upper half of the bits.
  float upper = mul(magnitude, 4097.0f);
  float head = sub(upper, sub(upper, magnitude));
  float carrier = mul(head, grid.lift);
  carrier = carrier < grid.lowest ? grid.lowest : carrier;
  float y = copysignf(sub(add(magnitude, carrier), carrier), x);
  if (grid.overflow == SATURATE || !(fabsf(y) > grid.max)) return y;
  return grid.overflow == TO_NAN ? nan_value() : copysignf(infinity(), y);
}

// A value of the grid as the byte of float8_e4m3fn or float8_e5m2, whose exponents start at emin.
FXQ_HD uint8 float8_bits(float y, const FloatGrid& grid) {
  uint32 bits = bits_of(y), sign = (bits >> 24) & 0x80u, rest = bits & 0x7FFFFFFFu;
  if (rest > 0x7F800000u) return (uint8)(sign | 0x7Fu);
  if (rest == 0x7F800000u) return (uint8)(sign | 0x7Cu);
  uint32 lowest = (uint32)(grid.emin + 127) << 23;
  uint32 shift = 23u - (uint32)grid.mantissa_bits;
  if (rest >= lowest) return (uint8)(sign | ((rest - lowest + (1u << 23)) >> shift));
  float steps = mul(from_bits(rest), from_bits((uint32)(127 - grid.emin + grid.mantissa_bits) << 23));
  return (uint8)(sign | (uint32)steps);
}

// ---- elements of a block, and its scale: fxquant.numerics.blocks ----

// Floats of a grid; or, where `integer`, multiples of `step` from `low` to `high` steps.
struct Element {
  FloatGrid grid;
  float low;
  float high;
  float step;
  float max;
  int32 integer;
};

FXQ_HD float round_to_element(float x, const Element& to) {
  if (!to.integer) return round_to_float(x, to.grid);
  float code = round_even(mul(x, divide(1.0f, to.step)));
  code = code < to.low ? to.low : code;  // NaN stays
  code = code > to.high ? to.high : code;
  return mul(code, to.step);
}

FXQ_HD float power_of_two_below(float x) { return from_bits(bits_of(x) & 0x7F800000u); }

// A power of two for a largest magnitude; `unit` is 2^-emax of the element.
FXQ_HD float mx_scale(float amax, const Element& to, float unit, bool ceil) {
  const float least = from_bits(0x00400000u), most = from_bits(0x7F000000u);  // 2^-127 (subnormal), 2^127
  float below = power_of_two_below(amax);
  float scale = below < infinity() ? mul(below, unit) : 1.0f;
  scale = scale > least ? scale : least;
  if (ceil && amax > mul(scale, to.max) && below < infinity() && scale < most) scale = mul(scale, 2.0f);
  return scale;
}

FXQ_HD float mx_value(float x, float scale, const Element& to) {
  return mul(round_to_element(mul(x, divide(1.0f, scale)), to), scale);
}

FXQ_HD float finite_scale(float scale) { return scale < infinity() ? scale : 1.0f; }

// One factor for the tensor, which puts its largest scale at the largest of `scales`.
FXQ_HD float scale_unit(float tensor_amax, float reach) {
  float unit = divide(tensor_amax, reach);
  return unit > 0.0f && unit < infinity() ? unit : 1.0f;
}

FXQ_HD float quantized_scale(float amax, float unit, const Element& to, const FloatGrid& scales) {
  amax = amax < 0.0f ? 0.0f : amax;
  float ratio = divide(divide(amax, to.max), unit);
  ratio = ratio < scales.max ? ratio : scales.max;  // NaN too: it stays alone in its block
  return mul(round_to_float(ratio, scales), unit);
}

FXQ_HD float block_value(float x, float scale, const Element& to) {
  return mul(round_to_element(divide(x, scale > 0.0f ? scale : 1.0f), to), scale);
}

}  // namespace fxq
