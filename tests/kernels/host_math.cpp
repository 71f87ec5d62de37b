// Functions of arithmetic.cuh and memory.cuh over arrays, for tests.
#include "memory.cuh"

using namespace fxq;

extern "C" {

int64 size_of_grid() { return sizeof(FloatGrid); }
int64 size_of_element() { return sizeof(Element); }

void affine(const float* x, int64 n, float scale, double point, int32 kind, float low, float high, int32 rounding,
            int32 wrap, int32 wide, float* code, float* y, uint8* mask) {
  Affine by{scale, divide(1.0f, scale), (float)point, point, low, high, kind, wide != 0};
  for (int64 i = 0; i < n; ++i) {
    float before = rounding == DIVIDE ? code_before_clamp<DIVIDE>(x[i], by) : code_before_clamp<RECIPROCAL>(x[i], by);
    code[i] = clamp_code(before, by, wrap);
    y[i] = dequantize(code[i], by);
    mask[i] = inside(before, by);
  }
}

void rounded(const float* x, int64 n, const FloatGrid* grid, float* y, uint8* bits) {
  for (int64 i = 0; i < n; ++i) {
    y[i] = round_to_float(x[i], *grid);
    bits[i] = float8_bits(y[i], *grid);
  }
}

void elements(const float* x, int64 n, const Element* to, float* y) {
  for (int64 i = 0; i < n; ++i) y[i] = round_to_element(x[i], *to);
}

void mx_scales(const float* amax, int64 n, const Element* to, float unit, int32 ceil, float* y) {
  for (int64 i = 0; i < n; ++i) y[i] = mx_scale(amax[i], *to, unit, ceil);
}

void quantized_scales(const float* amax, int64 n, float tensor_amax, float reach, const Element* to,
                      const FloatGrid* scales, float* y) {
  float unit = scale_unit(tensor_amax, reach);
  for (int64 i = 0; i < n; ++i) y[i] = quantized_scale(amax[i], unit, *to, *scales);
}

void widen_half(const Half* x, int64 n, float* y) {
  for (int64 i = 0; i < n; ++i) y[i] = widen(x[i]);
}
void widen_bfloat(const Bfloat* x, int64 n, float* y) {
  for (int64 i = 0; i < n; ++i) y[i] = widen(x[i]);
}
void narrow_half(const float* x, int64 n, Half* y) {
  for (int64 i = 0; i < n; ++i) narrow(x[i], y[i]);
}
void narrow_bfloat(const float* x, int64 n, Bfloat* y) {
  for (int64 i = 0; i < n; ++i) narrow(x[i], y[i]);
}

void extremes(const float* a, const float* b, int64 n, float* least, float* largest) {
  for (int64 i = 0; i < n; ++i) {
    least[i] = lesser(a[i], b[i]);
    largest[i] = greater(a[i], b[i]);
  }
}

void places(const int64* index, int64 n, int64 channels, int64 inner, int64* channel, int64* left) {
  for (int64 i = 0; i < n; ++i) {
    Place found = place_of(index[i], channels, inner);
    channel[i] = found.channel;
    left[i] = found.left;
  }
}
}
